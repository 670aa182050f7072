"""What the tests of this package share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import made_distribution
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
    """Install made-up distributions in a folder that is on this process's path for the length of the test:

        make_distribution("apt-toy", plugins={"toy": "toy_plugin"}, modules={"toy_plugin": "API_VERSION = (1, 0)"})

    The arguments are those of `made_distribution`. It returns the folder; put it on PYTHONPATH for a child process.
    """
    site = tmp_path / "site-packages"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    yield partial(made_distribution.make_distribution, site)
    for module_name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(site)):
            del sys.modules[module_name]
