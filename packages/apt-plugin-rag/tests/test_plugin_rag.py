"""The plugin as core finds it: by its entry point, and without the cost of what it stands for."""

import argparse
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from apt.core.catalogue import PROVIDERS
from apt.core.registry import Registry
from apt.hookspecs import API_VERSION
from apt_plugin_rag import plugin

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_entry_point_leads_to_a_light_module_of_this_contract() -> None:
    module = PROJECT["entry-points"]["apt.providers"]["rag"]
    script = (
        f"import sys, {module} as plugin; from apt.core.registry import Registry; r = Registry();"
        "plugin.apt_register_providers(r); r.list_providers();"
        "heavy = {'torch', 'sklearn', 'bm25s', 'numpy', 'rich', 'psycopg'} & set(sys.modules); assert not heavy, heavy;"
        "print(*plugin.API_VERSION)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    major, minor = map(int, result.stdout.split())
    assert major == API_VERSION[0]
    assert minor <= API_VERSION[1]


def test_the_catalogue_names_every_retriever() -> None:
    registry = Registry()
    plugin.apt_register_providers(registry)
    known = sorted(name for (kind, name), package in PROVIDERS.items() if package == "apt-plugin-rag")
    assert registry.list_providers("retrieval")["retrieval"] == known
    for name in known:
        provider = registry.get("retrieval", name)
        assert (provider.get_name(), provider.get_version()) == (name, "1.0.0")


def test_options_are_added_where_text_is_generated_alone() -> None:
    for command, wanted in {"generate": True, "chat": True, "train": False, "eval": False}.items():
        parser = argparse.ArgumentParser()
        plugin.apt_register_options(command, parser)
        assert ("--retrieve" in parser.format_help()) is wanted
