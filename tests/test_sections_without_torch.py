"""What is wrong with a provider's section is told before torch is imported: for every provider of the six packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from checkout import ROOT

ASK = """
import importlib, json, sys
from apt.core.registry import Registry

registry = Registry()
for name in sys.argv[1:]:
    importlib.import_module(name).apt_register_providers(registry)
rows = {}
for claim in registry.claims():
    model = claim.load_config()
    rows[claim.slot] = [model is not None, "torch" in sys.modules]
for claim in registry.claims():
    rows[claim.slot].append(getattr(claim.load(), "Config", None) is claim.load_config())
print(json.dumps(rows))
"""


def test_every_section_is_checked_without_torch() -> None:
    plugins = sorted(folder.name.replace("-", "_") for folder in (ROOT / "packages").glob("apt-plugin-*"))
    modules = ["apt.builtin.plugin", *(f"{name}.plugin" for name in plugins)]
    assert len(modules) == 6
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "packages").glob("*/src")))}
    done = subprocess.run(
        [sys.executable, "-c", ASK, *modules], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    rows = json.loads(done.stdout)
    assert len(rows) > 20
    assert not [slot for slot, (has_one, _, _) in rows.items() if not has_one], "a slip in its section is swallowed"
    assert not [slot for slot, (_, torch, _) in rows.items() if torch], "imports torch for its section"
    assert all(same for _, _, same in rows.values())
