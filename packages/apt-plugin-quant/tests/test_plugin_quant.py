"""The plugin as core finds it: by its entry point, and without the cost of importing torch."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from apt.hookspecs import API_VERSION

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_entry_point_leads_to_a_light_module_of_this_contract() -> None:
    module = PROJECT["entry-points"]["apt.providers"]["quant"]
    script = f"import sys, {module} as plugin; assert 'torch' not in sys.modules; print(*plugin.API_VERSION)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    major, minor = map(int, result.stdout.split())
    assert major == API_VERSION[0]
    assert minor <= API_VERSION[1]
