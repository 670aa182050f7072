"""The plugin that docs/plugins.md shows, put together from its snippets as they stand there, works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from checkout import ROOT, Apt


def test_the_plugin_of_the_guide_installs_and_trains(apt: Apt, small: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs/plugins.md").read_text()
    (pyproject,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    module, provider, hook = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    source = tmp_path / "toy/src/apt_toy"
    source.mkdir(parents=True)
    (tmp_path / "toy/pyproject.toml").write_text(pyproject)
    (source / "__init__.py").write_text("")
    (source / "plugin.py").write_text(f"{module}\n\n{hook}")
    (source / "ffn.py").write_text(provider)
    site = tmp_path / "site"
    install = ["install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", *install, str(tmp_path / "toy")], check=True)

    apt("train", "-p", str(small), "--model.ffn_name", "toy_relu2", "--model.toy_relu2.power", "3", path=[site])
    run = small.parent / "runs/small-1"
    lock = {slot["kind"]: slot for slot in json.loads((run / "plugins.lock.json").read_text())["slots"]}
    assert lock["ffn"]["config"] == {"power": 3.0}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["weights_norm"] > 0
