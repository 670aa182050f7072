"""The sections of a profile that belong to providers, and the JSON Schema with them in it."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
from fixture_types import MakeDistribution
from pydantic import field_validator

from apt.core.catalogue import SECTIONS
from apt.core.config import RunConfig, Section
from apt.core.errors import AptWarning, ConfigError
from apt.core.profiles import check_sections, list_profiles, resolve, schema
from apt.core.registry import Provider, Registry


class Expert(Section):
    """One expert."""

    width: int = 4
    kind: Literal["dense", "sparse"] = "dense"


class MoEConfig(Section):
    """A mixture of experts."""

    experts: int = 8
    balance_loss: float = 0.01
    layout: tuple[Expert, ...] = ()

    @field_validator("experts")
    @classmethod
    def _even(cls, value: int) -> int:
        if value == 13:
            raise ConfigError("13 experts cannot be had", hint="take 14")
        if value == 99:
            raise RuntimeError("a fault of the plugin")
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value


class PathConfig(Section):
    """Something that the section around may say."""

    train_path: str
    port: int


class OtherConfig(Section):
    """The same section, read in another way."""

    index: int = 0


class Odd(Section):
    """A model without a JSON Schema."""

    model_config: ClassVar[Any] = {"arbitrary_types_allowed": True}
    size: int = 0
    what: SimpleNamespace | None = None


def provider(config: type[Any] | None) -> type[Provider]:
    class Made(Provider):
        Config = config

        def get_name(self) -> str:
            return "made"

        def get_version(self) -> str:
            return "1"

    return Made


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.register("router", "topk_moe", provider(MoEConfig), section="moe")
    made.register("dataset", "files", provider(PathConfig))
    made.register("retrieval", "bm25", provider(MoEConfig), section="rag")
    made.register("retrieval", "dense", provider(OtherConfig), section="rag")
    made.register("attention", "free", provider(None))
    made.register("ffn", "odd", provider(Odd))
    made.register("align", "broken", "no_such_module:Thing", section="broken")
    return made


def check(text: str, registry: Registry, folder: Path) -> list[str]:
    """What is said of the sections: errors, or warnings."""
    (folder / "tiny.yaml").write_text(text)
    profile = resolve("tiny.yaml")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            check_sections(profile.config, registry, profile.origins)
        except ConfigError as error:
            return str(error).splitlines()
    assert all(issubclass(warning.category, AptWarning) for warning in said)
    return [f"warning: {warning.message}" for warning in said]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("model:\n  moe: {enabled: true, experts: 4}\n", []),
        ("model:\n  moe:\n    exprets: 4\n", ["tiny.yaml:3: model.moe.exprets: unknown key; did you mean 'experts'?"]),
        ("model:\n  moe: {experts: x}\n", ["tiny.yaml:2: model.moe.experts: expected a whole number, got 'x'"]),
        ("model:\n  moe: {experts: false}\n", ["tiny.yaml:2: model.moe.experts: expected a whole number, got false"]),
        ("model:\n  moe: {experts: 3}\n", ["tiny.yaml:2: model.moe.experts: 3 is odd"]),
        ("model:\n  moe: {experts: 13}\n", ["tiny.yaml:2: model.moe: 13 experts cannot be had; take 14"]),
        ("model:\n  moe: {experts: 99}\n", []),
        (
            "model:\n  moe:\n    layout:\n      - {width: 3}\n      - {widht: 3,\n         kind: spars}\n",
            [
                "tiny.yaml:5: model.moe.layout[1].widht: unknown key; did you mean 'width'?",
                "tiny.yaml:6: model.moe.layout[1].kind: expected one of 'dense', 'sparse', got 'spars'; "
                "did you mean 'sparse'?",
            ],
        ),
        ("data:\n  train_path: x\n  files: {port: 3}\n", []),
        ("data:\n  files: {port: 3}\n", ["tiny.yaml:2: data.files.train_path: is missing; add it"]),
        ("data:\n  files: {train_path: x}\n", ["tiny.yaml:2: data.files.port: is missing; add it"]),
        ("model:\n  rag: {index: 3}\n", []),
        ("model:\n  rag: {experts: 2}\n", []),
        (
            "model:\n  rag: {indxe: 2}\n",
            ["tiny.yaml:2: model.rag.indxe: unknown key; 'apt profile schema' lists the keys"],
        ),
        ("model:\n  free: {anything: [1]}\n", []),
        ("model:\n  broken: {anything: 1}\n", []),
        (
            "model:\n  odd: {size: x}\n",
            ["tiny.yaml:2: model.odd.size: input should be a valid integer, unable to parse string as an integer"],
        ),
        ("model:\n  odd: {size: true}\n", ["tiny.yaml:2: model.odd.size: expected a number, got true"]),
        ("model:\n  mooe: {}\n", ["tiny.yaml:2: model.mooe: unknown section; did you mean 'moe'?"]),
        ("model:\n  d_modle: {}\n", ["tiny.yaml:2: model.d_modle: unknown section; did you mean 'd_model'?"]),
        ("model:\n  votign: {}\n", ["tiny.yaml:2: model.votign: unknown section; did you mean 'voting'?"]),
        ("data:\n  flies: {}\n", ["tiny.yaml:2: data.flies: unknown section; did you mean 'files'?"]),
        (
            "model:\n  schedules: {}\n",
            ["tiny.yaml:2: model.schedules: unknown section; did you mean 'schedules' at the top level?"],
        ),
        (
            "model:\n  bistate: {alpha: 1}\n",
            [
                "warning: tiny.yaml:2: model.bistate: kept, but no plugin in use reads it; "
                'pip install "apt-plugin-align"'
            ],
        ),
        (
            "training:\n  wandb: {}\n",
            [
                "warning: tiny.yaml:2: training.wandb: kept, but no plugin in use reads it; "
                "install the plugin that does, or take it out"
            ],
        ),
    ],
)
def test_sections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Registry, text: str, lines: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # Whether the package is installed here must not decide what is expected.
    monkeypatch.setattr("apt.core.sections.how_to_install", lambda package, in_use: f'pip install "{package}"')
    assert check(text, registry, tmp_path) == lines


def test_a_plugin_that_is_left_out_is_not_to_be_installed_again(
    registry: Registry, make_distribution: MakeDistribution
) -> None:
    make_distribution("apt-plugin-align", "7.8", plugins={"align": "align_plugin"})
    profile = resolve({"model": {"bistate": {"alpha": 1}}})
    fix = (
        r"apt-plugin-align 7\.8 is installed and its plugin not in use: leave --no-plugin out, or see apt plugin-list$"
    )
    with pytest.warns(AptWarning, match=rf"model\.bistate: kept, but no plugin in use reads it; {fix}"):
        check_sections(profile.config, registry, profile.origins)
    with registry.owned_by("align", "apt-plugin-align", "7.8"):
        registry.register("align", "another", "no_such_module:Thing")
    with pytest.warns(AptWarning, match=r"for the installed 7\.8 does not bring it$"):
        check_sections(profile.config, registry, profile.origins)


def test_a_section_belongs_where_its_kind_does(registry: Registry) -> None:
    profile = resolve({"data": {"moe": {"experts": 3}}})
    with pytest.warns(AptWarning, match=r"^config: data\.moe: kept, but no plugin in use reads it"):
        check_sections(profile.config, registry, profile.origins)


def test_shipped_profiles_pass_with_what_comes_with_core() -> None:
    from apt.builtin.plugin import apt_register_providers

    builtin = Registry()
    apt_register_providers(builtin)
    for name, _ in list_profiles():
        profile = resolve(name)
        wanted = {SECTIONS[section] for section in profile.config.model.sections} - {"apt-core"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            check_sections(profile.config, builtin, profile.origins, absent=wanted)
        for package in wanted:
            with pytest.warns(AptWarning, match=f"no plugin in use reads it; .*{package}"):
                check_sections(profile.config, builtin, profile.origins, absent=wanted - {package})


# The JSON Schema


def resolved(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = whole["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part
    return found


def test_schema(registry: Registry) -> None:
    whole = schema(registry)
    assert whole["additionalProperties"] is False
    assert {"extends", "name", *RunConfig.model_fields} == set(whole["properties"])
    model = resolved(whole, whole["properties"]["model"])
    assert model["additionalProperties"] == {"type": "object"}
    assert model["properties"]["d_model"]["description"] == "Width of the residual stream."
    moe = resolved(whole, model["properties"]["moe"]["anyOf"][0])
    assert {"experts", "layout", "enabled"} <= set(moe["properties"])
    assert len(model["properties"]["rag"]["anyOf"]) == 2
    for name in ("free", "odd", "broken"):
        assert model["properties"][name] == {"type": "object"}
    data = resolved(whole, whole["properties"]["data"])
    assert "files" in data["properties"] and "moe" not in data["properties"]
    references = _references(whole)
    assert references and all(reference.removeprefix("#/$defs/") in whole["$defs"] for reference in references)


def test_schemas_of_one_name_stay_apart() -> None:
    other = type("Expert", (Section,), {"__annotations__": {"deep": int}, "deep": 1})
    made = Registry()
    made.register("router", "a", provider(Expert))
    made.register("router", "b", provider(other))
    whole = schema(made)
    properties = resolved(whole, whole["properties"]["model"])["properties"]
    found = [set(resolved(whole, properties[name]["anyOf"][0])["properties"]) for name in ("a", "b")]
    assert found == [{"width", "kind", "enabled"}, {"deep", "enabled"}]


def _references(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [found for inner in value.values() for found in _references(inner)]
    return [found for inner in value for found in _references(inner)] if isinstance(value, list) else []
