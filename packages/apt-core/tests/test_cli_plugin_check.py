"""`apt plugin-check` and what `apt plugin-info` says of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fixture_types import MakeDistribution, RunApt

HEAD = "from apt.hookspecs import hookimpl\nAPI_VERSION = (1, 0)\n"

REGISTERS = """
@hookimpl
def apt_register_providers(registry):
    registry.register("dataset", "rhymes", "toy_data:Rhymes", version="{version}")
    registry.register("dataset", "wrong", "toy_data:Wrong", version="0.1")
    registry.register("dataset", "picky", "toy_data:Picky", version="0.1")
    registry.register("ffn", "elsewhere", "toy_data:Elsewhere", version="0.1")
    registry.register("dataset", "broken", "toy_data:Broken", version="0.1")
"""

PROVIDERS = """
import itertools
from pydantic import BaseModel, ConfigDict
from apt.core.errors import ProviderError
from apt.core.providers.dataset import DatasetProvider, Piece
from apt.core.providers.ffn import FFNProvider


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    verses: int = 2


class Rhymes(DatasetProvider):
    Config = Settings

    def get_name(self): return "rhymes"
    def get_version(self): return "0.1"
    def pieces(self): return (Piece("a verse\\n" * (n + 1)) for n in range(self.config.verses))
    def fingerprint(self): return str(self.config.verses)


class Wrong(Rhymes):
    expected_failures = {"the_size_is_near": "it says one byte"}
    count = itertools.count()

    def get_name(self): return "wrong"
    def fingerprint(self): return str(next(self.count))
    def size_hint(self): return 1


class Broken(Rhymes):
    def get_name(self): return "broken"
    def pieces(self): raise ZeroDivisionError("in the provider")


class Path(BaseModel):
    path: str


class Picky(Rhymes):
    Config = Path


class Elsewhere(FFNProvider):
    def get_name(self): return "elsewhere"
    def get_version(self): return "0.1"
    def create_layer(self, d_model, d_ff, **config):
        raise ProviderError("it needs a GPU", hint="buy one")
"""

FUSSY = """
from apt.core.errors import ConfigError
from apt.core.providers.attention import AttentionProvider


class Fussy(AttentionProvider):
    def get_name(self): return "fussy"
    def get_version(self): return "1"
    def create_layer(self, d_model, num_heads, **options):
        raise ConfigError(f"d_model {d_model} is too small")
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def toy(make_distribution: MakeDistribution) -> None:
    modules = {"toy_plugin": HEAD + REGISTERS.format(version="0.1"), "toy_data": PROVIDERS}
    make_distribution("apt-toy", "0.9", plugins={"toy": "toy_plugin"}, modules=modules)


def test_one_line_for_each_check_and_a_total(run_apt: RunApt, toy: None) -> None:
    result = run_apt("plugin-check", "dataset:rhymes")
    assert (result.code, result.err) == (0, "")
    first, *lines, total = result.out.splitlines()
    assert first == "dataset:rhymes 0.1 (apt-toy 0.9)"
    assert lines[0].split() == ["ok", "names_itself"]
    assert len(lines) >= 9
    assert re.fullmatch(rf"{len(lines)} of {len(lines)} checks passed in \d+ s", total)


def test_a_failure_says_what_is_wrong_and_ends_in_1(run_apt: RunApt, toy: None) -> None:
    result = run_apt("plugin-check", "dataset:wrong")
    assert result.code == 1
    assert "  FAILED    the_fingerprint_is_fixed: after a pass fingerprint gives another string" in result.out
    assert "  expected  the_size_is_near: it says one byte" in result.out
    assert "1 expected to fail" in result.out.splitlines()[-1]


def test_what_cannot_be_built_here_is_said_once(run_apt: RunApt, toy: None) -> None:
    result = run_apt("plugin-check", "ffn:elsewhere")
    assert (result.code, result.out, result.err) == (2, "", "error: it needs a GPU\n  fix: buy one\n")
    result = run_apt("plugin-check", "dataset:broken")
    assert result.code == 1
    assert "FAILED    pieces_are_text: it raises ZeroDivisionError: in the provider (" in result.out


def test_settings_are_given_by_key(run_apt: RunApt, toy: None) -> None:
    result = run_apt("plugin-check", "dataset:rhymes", "--set", "verses=5")
    assert (result.code, result.out.splitlines()[0]) == (0, "dataset:rhymes 0.1 (apt-toy 0.9) with verses=5")
    assert "with verses=5" in run_apt("plugin-info", "dataset", "rhymes").out
    result = run_apt("plugin-check", "dataset:rhymes", "--set", "verse=5")
    assert result.code == 2
    assert "its section does not fit: verse" in result.err


def test_settings_that_do_not_fit_leave_the_last_result_as_it_was(run_apt: RunApt) -> None:
    for setting in ("r=x", "rr=2", "r=7"):
        assert run_apt("plugin-check", "attention:tva_default", "--set", setting).code == 2
    assert "not checked yet" in run_apt("plugin-info", "attention", "tva_default").out


def test_a_provider_that_fits_no_size_by_itself_has_failed(
    run_apt: RunApt, make_distribution: MakeDistribution
) -> None:
    plugin = HEAD + (
        "@hookimpl\ndef apt_register_providers(registry):\n"
        "    registry.register('attention', 'fussy', 'fussy_attention:Fussy')\n"
    )
    make_distribution(
        "apt-fussy", "1", plugins={"fussy": "fussy_plugin"}, modules={"fussy_plugin": plugin, "fussy_attention": FUSSY}
    )
    result = run_apt("plugin-check", "attention:fussy")
    assert result.code == 1
    assert "FAILED    output_shape: none of the sizes" in result.out


def test_without_an_argument_every_plugins_providers_are_checked(
    run_apt: RunApt, toy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("APT_PLUGINS", "toy")
    result = run_apt("plugin-check")
    assert result.code == 1
    assert "dataset:picky is not checked: " in result.out
    assert "--set KEY=VALUE" in result.out
    assert "ffn:elsewhere is not checked: it needs a GPU (buy one)" in result.out
    last = "3 of 5 providers checked, some failed; not checked: dataset:picky, ffn:elsewhere"
    assert result.out.splitlines()[-1] == last
    assert run_apt("plugin-check", "--set", "verses=3").code == 2


def test_without_plugins_there_is_nothing_to_check(run_apt: RunApt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APT_PLUGINS", "builtin")
    result = run_apt("plugin-check")
    assert result.code == 0
    assert "apt plugin-check attention:tva_default" in result.out


def test_info_shows_the_last_result_and_of_which_version(
    run_apt: RunApt, make_distribution: MakeDistribution, toy: None
) -> None:
    def line() -> str:
        (found,) = [row for row in run_apt("plugin-info", "dataset", "rhymes").out.splitlines() if "conformance" in row]
        return found

    assert "not checked yet: apt plugin-check dataset:rhymes" in line()
    run_apt("plugin-check", "dataset:rhymes")
    assert re.search(r"(\d+) of \1 checks passed, on \d{4}-\d\d-\d\d, version 0\.1$", line())
    # Of another length than the one before: Python takes one of the same second and length for compiled already.
    modules = {"toy_plugin": HEAD + REGISTERS.format(version="0.2.0")}
    make_distribution("apt-toy", "0.9", plugins={"toy": "toy_plugin"}, modules=modules)
    import sys

    sys.modules.pop("toy_plugin", None)
    assert line().endswith("version 0.1; this is 0.2.0: apt plugin-check dataset:rhymes")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["tva_default"], "did you mean attention:tva_default?"),
        (["attention:tva_defualt"], "did you mean 'tva_default'?"),
        (["atention:mha"], "did you mean attention?"),
        (["quite-else:mha"], "the kinds are attention"),
        (["zzz"], "such as attention:tva_default"),
        (["ffn:default", "--set", "bias"], "such as --set r=2"),
        (["ffn:default", "--device", "abacus"], "use auto, cpu"),
        (["router:topk_moe"], "apt-plugin-moe"),
        (["dataset:files"], "--set KEY=VALUE"),
        (["dataset:files", "--set", "train_path=nowhere.txt"], "nowhere.txt does not exist"),
        (["attention:mha", "--set", "windw=3"], "attention:mha: its section does not fit: windw: unknown key"),
        (["attention:tva_default", "--set", "r=x"], "r: expected a whole number greater than 0, got 'x'"),
        (["attention:tva_default", "--set", "r=7"], "fits it: model.tva.r: 7 does not fit d_model 128"),
        (["tracker:tensorboard", "--set", "foo=1"], "tracker:tensorboard: its section does not fit: foo: unknown key"),
        (["tokenizer:file", "--set", "path=nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_wrong_input_is_one_line_and_a_fix(run_apt: RunApt, arguments: list[str], error: str) -> None:
    result = run_apt("plugin-check", *arguments)
    if arguments == ["router:topk_moe"] and result.code == 0:
        pytest.skip("apt-plugin-moe is installed")
    assert (result.code, result.out) == (2, "")
    assert error in result.err
    assert len(result.err.splitlines()) == 2
