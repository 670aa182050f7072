"""What the tests of this package share."""

from __future__ import annotations

import base64
import hashlib
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from fixture_types import MakeDistribution, Result, RunApt


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this process's own, so that tests neither see nor leave anything in the user's; and time for plugins
    that import torch, however busy the machine is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("APT_IMPORT_SECONDS", "120")
        yield


@pytest.fixture
def run_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunApt:
    """Call the command line in this process, in an empty folder, with no plugins chosen by the environment:
    `run_apt("plugin-list", "--json")` gives exit code, standard output and standard error."""
    from apt.cli.main import main

    monkeypatch.chdir(tmp_path)
    for variable in ("APT_PLUGINS", "APT_DISABLE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        return Result(main(arguments), *capsys.readouterr())

    return run


@pytest.fixture
def make_distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeDistribution]:
    """Install made-up distributions, as pip would leave them: modules beside a `.dist-info` with METADATA,
    entry_points.txt and RECORD, in a folder that is on this process's path for the length of the test.

        make_distribution("apt-toy", plugins={"toy": "toy_plugin"}, modules={"toy_plugin": "API_VERSION = (1, 0)"})

    Args of the function it gives:
        name, version: of the distribution.
        plugins: {name: module} of its entry points in the group `apt.providers`.
        modules: {dotted module name: source}.
        requires: its requirements.
        direct_url: the content of direct_url.json, which tells an editable install.

    Returns the folder; put it on PYTHONPATH for a child process.
    """
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def make(
        name: str,
        version: str = "1.0",
        *,
        plugins: Mapping[str, str] | None = None,
        modules: Mapping[str, str] | None = None,
        requires: Sequence[str] = (),
        direct_url: str | None = None,
    ) -> Path:
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}\nVersion: of the text\n"
        files = {
            **{f"{module.replace('.', '/')}.py": source for module, source in (modules or {}).items()},
            f"{info}/METADATA": metadata,
        }
        if plugins:
            points = "".join(f"{plugin} = {module}\n" for plugin, module in plugins.items())
            files[f"{info}/entry_points.txt"] = f"[apt.providers]\n{points}"
        if direct_url is not None:
            files[f"{info}/direct_url.json"] = direct_url
        record = ""
        for path, content in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={digest},{len(content.encode())}\n"
        (site / info / "RECORD").write_text(f"{record}{info}/RECORD,,\n")
        importlib.invalidate_caches()
        return site

    yield make
    for module_name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(site)):
            del sys.modules[module_name]
