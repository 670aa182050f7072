"""The registry: claims, instances, fallbacks, conflicts."""

from __future__ import annotations

from typing import Any

import pytest
from fixture_types import MakeDistribution
from pydantic import BaseModel, ConfigDict, Field

from apt.core.errors import ConfigError, ConflictError, FallbackWarning, ProviderError, ProviderNotFoundError
from apt.core.in_use import ProvidersInUse
from apt.core.registry import Provider, Registry


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")
    r: int = Field(4, ge=1)


class Plain(Provider):
    """A provider for tests.

    With a second paragraph.
    """

    Config = Settings

    def get_name(self) -> str:
        return "plain"

    def get_version(self) -> str:
        return "1.0"

    def get_dependencies(self) -> list[str]:
        return ["flash-attn>=2.5"]


class Other(Plain): ...


class Unbuildable(Plain):
    def __init__(self, config: Any = None) -> None:
        raise ProviderError("needs a GPU", hint="buy one")


class Buggy(Plain):
    def __init__(self, config: Any = None) -> None:
        raise ZeroDivisionError("oops")


@pytest.fixture
def registry() -> Registry:
    made = Registry()
    made.register("attention", "tva_default", Plain, default=True, section="tva")
    made.register("attention", "other", Other)
    made.register("attention", "unbuildable", Unbuildable)
    made.register("attention", "buggy", Buggy)
    made.register("attention", "lazy", f"{__name__}:Plain", version="3.1")
    made.register("attention", "stale", "no_such_module:Thing")
    made.register("router", "only", Other)
    return made


def test_an_instance_is_kept_per_kind_name_and_config(registry: Registry) -> None:
    first = registry.get("attention", "other", {"r": 2})
    assert registry.get("attention", "other", {"r": 2}) is first
    assert registry.get("attention", "other", Settings(r=2)) is first
    assert registry.get("attention", "other", {"r": 8}) is not first
    assert registry.get("attention", "tva_default", {"r": 2}) is not first
    assert first.config == Settings(r=2)
    assert registry.get("attention", "other").config == Settings()


def test_views_share_registrations_and_nothing_else(registry: Registry) -> None:
    one, two = registry.view(), registry.view()
    assert one.get("attention", "other") is not two.get("attention", "other")
    one.register("ffn", "new", Plain)
    assert "ffn" not in two.list_providers()
    assert "ffn" not in registry.list_providers()


def test_an_import_string_is_imported_when_it_is_built(registry: Registry) -> None:
    assert registry.get("attention", "lazy").get_name() == "plain"
    assert registry.get_info("attention", "lazy")["version"] == "3.1"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("absent_thing", "not installed"),
        ("unbuildable", "needs a GPU"),
        ("buggy", "ZeroDivisionError"),
        ("stale", "no_such_module"),
    ],
)
def test_what_cannot_be_had_falls_back_loudly_or_raises(registry: Registry, name: str, why: str) -> None:
    with pytest.warns(FallbackWarning, match=rf"{why}.*using attention:tva_default instead"):
        assert type(registry.get("attention", name)) is Plain
    with pytest.raises(ProviderError, match=why):
        registry.get("attention", name, fallback=False)


def test_a_first_party_provider_that_is_absent_names_its_package(registry: Registry) -> None:
    with pytest.warns(
        FallbackWarning, match=r"pip install \"apt-plugin-flash\[cuda\]\"|apt-plugin-flash \S+ is installed"
    ):
        registry.get("attention", "flash_v2")


def test_what_is_installed_and_left_out_is_not_said_to_be_absent(
    registry: Registry, make_distribution: MakeDistribution
) -> None:
    make_distribution("apt-plugin-moe", "7.8", plugins={"moe": "moe_plugin"})
    make_distribution("apt-own", "3.1", plugins={"own": "own_plugin"})
    registry.recorded = {("ffn", "own"): "apt-own==3.1", ("ffn", "older"): "apt-own==3.0"}
    for kind, name, package in (("router", "topk_moe", "apt-plugin-moe 7.8"), ("ffn", "own", "apt-own 3.1")):
        with pytest.raises(ProviderNotFoundError) as caught:
            registry.get(kind, name)
        said = f"{kind}:{name} cannot be used: {package} is installed and its plugin not in use"
        assert (caught.value.message, caught.value.hint) == (said, "leave --no-plugin out, or see apt plugin-list")
    with pytest.raises(ProviderNotFoundError, match=r'older is not installed; pip install "apt-own==3\.0"'):
        registry.get("ffn", "older")
    with registry.owned_by("moe", "apt-plugin-moe", "7.8"):
        registry.register("router", "another", Other)
    with pytest.raises(ProviderNotFoundError, match=r"topk_moe is not installed; .* 7\.8 does not bring it"):
        registry.get("router", "topk_moe")


def test_a_near_miss_is_a_slip_and_never_falls_back(registry: Registry) -> None:
    with pytest.raises(ProviderNotFoundError, match="did you mean 'tva_default'"):
        registry.get("attention", "tva_defalt")


def test_a_kind_without_a_default_raises_a_value_error(registry: Registry) -> None:
    with pytest.raises(ValueError, match=r"topk_moe (is not installed|cannot be used: apt-plugin-moe)"):
        registry.get("router", "topk_moe")


def test_a_config_that_does_not_fit_is_no_reason_to_fall_back(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="rr"):
        registry.get("attention", "other", {"rr": 2})


def test_a_config_that_does_not_fit_is_told_in_the_words_of_profiles(registry: Registry) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.get("attention", "other", {"rr": 2, "r": 0})
    said = "r: expected a whole number at least 1, got 0; rr: unknown key"
    assert caught.value.message == f"attention:other: its section does not fit: {said}"
    assert caught.value.hint == "its keys are r"


class ErrorOfAnother(Exception):
    def errors(self) -> list[dict[str, Any]]:
        return [{"loc": ("r", 0), "msg": "too odd"}]


ErrorOfAnother.__name__ = "ValidationError"


class OfAnotherLibrary(Plain):
    def __init__(self, config: Any = None) -> None:
        raise ErrorOfAnother


def test_another_librarys_words_are_kept(registry: Registry) -> None:
    registry.register("ffn", "foreign", OfAnotherLibrary)
    with pytest.raises(ConfigError, match=r"ffn:foreign: its section does not fit: r\.0: too odd"):
        registry.get("ffn", "foreign")


def test_bad_registrations_are_refused(registry: Registry) -> None:
    with pytest.raises(ConfigError, match="did you mean 'attention'"):
        registry.register("atention", "x", Plain)
    with pytest.raises(ConfigError, match="neither a class nor an import string"):
        registry.register("attention", "x", "no_colon")
    with pytest.raises(ConfigError, match="x: 'no_colon' is neither a class nor an import string"):
        registry.register("attention", "x", Plain, config="no_colon")


def test_a_config_of_its_own_is_had_without_the_class(registry: Registry) -> None:
    registry.register("ffn", "light", "no_such_module:Thing", config=f"{__name__}:Settings")
    assert registry.find("ffn", "light").load_config() is Settings
    assert registry.find("attention", "other").load_config() is Settings
    with pytest.raises(ProviderError, match="no_such_module"):
        registry.find("attention", "stale").load_config()
    with pytest.raises(ProviderError, match=r"ffn:light .*'no_such_module:Thing': ModuleNotFoundError"):
        registry.get("ffn", "light")


def test_a_config_that_is_not_that_of_the_class_is_refused(registry: Registry) -> None:
    class Looser(Settings):
        s: int = 0

    registry.register("ffn", "plain", f"{__name__}:Plain", config=Settings)
    assert registry.get("ffn", "plain", {"r": 1}).config == Settings(r=1)
    registry.register("ffn", "plain", f"{__name__}:Plain", config=Looser)
    with pytest.raises(ProviderError, match="the config registered for it is not the Config of its class"):
        registry.get("ffn", "plain", {"r": 1})


def test_two_plugins_that_claim_one_name_are_both_shown_and_neither_wins(registry: Registry) -> None:
    for plugin, cls in (("a", Plain), ("b", Other)):
        with registry.owned_by(plugin, f"dist-{plugin}", "1.0"):
            registry.register("ffn", "contested", cls)
    assert [claim.plugin for claim in registry.claims() if claim.name == "contested"] == ["a", "b"]
    with pytest.raises(ConflictError, match=r"dist-a.*dist-b"):
        registry.get("ffn", "contested")


def test_registering_again_replaces_what_the_same_owner_registered(registry: Registry) -> None:
    before = registry.get("attention", "other")
    registry.register("attention", "other", Plain)
    assert type(registry.get("attention", "other")) is Plain
    assert registry.get("attention", "other") is not before


def test_listing_and_info(registry: Registry) -> None:
    assert registry.list_providers("router") == {"router": ["only"]}
    assert registry.list_providers("quant") == {"quant": []}
    assert set(registry.list_providers()) == {"attention", "router"}
    info = registry.get_info("attention", "tva_default")
    assert info["is_default"] is True
    assert info["summary"] == "A provider for tests."
    assert info["dependencies"] == ["flash-attn>=2.5"]
    assert info["section"] == "tva"
    assert registry.get_info("router", "only")["is_default"] is False


def test_excludes_and_requires(registry: Registry) -> None:
    registry.register("ffn", "picky", Plain, excludes=["attention:other"], requires=["router:only"])
    assert registry.check_conflicts([("ffn", "picky"), ("router", "only")]) == []
    problems = registry.check_conflicts([("ffn", "picky"), ("attention", "other")])
    assert problems == [
        "ffn:picky cannot be used together with attention:other",
        "ffn:picky needs router:only, which is not in use",
    ]


def test_a_registry_is_filled_at_its_first_use() -> None:
    filled = []

    def fill(registry: Registry) -> None:
        filled.append(registry)
        registry.register("ffn", "late", Plain)

    registry = Registry(load=fill)
    assert not filled
    assert registry.list_providers() == {"ffn": ["late"]}
    assert len(filled) == 1


# The providers in use


def test_a_slot_remembers_what_was_asked_for_and_what_it_got(registry: Registry) -> None:
    in_use = ProvidersInUse(registry, {"model": {"tva": {"r": 2}, "unbuildable": {"r": 8}}})
    with pytest.warns(FallbackWarning, match="needs a GPU"):
        provider = in_use.use("attention", "unbuildable", lambda p: p)
    assert type(provider) is Plain
    assert provider.config == Settings(r=2), "the default is built from its own section"
    slot = in_use.slots["attention", "unbuildable"]
    assert (slot.name, slot.is_fallback, slot.config) == ("tva_default", True, {"r": 2})
    assert in_use.use("attention", "unbuildable", lambda p: p) is provider, "and is said once"
    assert list(in_use.providers) == [("attention", "tva_default")]


def test_what_fails_while_the_part_is_made_falls_back_too(registry: Registry) -> None:
    def make(provider: Provider) -> Provider:
        if isinstance(provider, Other):
            raise RuntimeError("no CUDA")
        return provider

    in_use = ProvidersInUse(registry)
    with pytest.warns(FallbackWarning, match="no CUDA"):
        assert type(in_use.use("attention", "other", make)) is Plain


def test_a_misfit_of_the_users_does_not_fall_back(registry: Registry) -> None:
    def make(provider: Provider) -> Provider:
        raise ConfigError("r does not fit")

    with pytest.raises(ConfigError, match="r does not fit"):
        ProvidersInUse(registry).use("attention", "other", make)


def test_what_fails_at_a_later_layer_is_an_error_that_says_whose(registry: Registry) -> None:
    in_use = ProvidersInUse(registry)
    in_use.use("attention", "other", lambda p: p)
    with pytest.raises(ProviderError, match="attention:other cannot be built: ZeroDivisionError"):
        in_use.use("attention", "other", lambda p: 1 // 0)


def test_a_provider_that_ends_the_process_or_lacks_a_config_or_version(registry: Registry) -> None:
    class Ends(Plain):
        def __init__(self, config: Any = None) -> None:
            raise SystemExit(3)

    class Bare(Plain):
        def __init__(self, config: Any) -> None: ...

    class Versionless(Plain):
        def get_version(self) -> str:
            raise OSError("no metadata")

    for name, cls in {"ends": Ends, "bare": Bare, "versionless": Versionless}.items():
        registry.register("attention", name, cls)
    in_use = ProvidersInUse(registry, {"model": {"bare": {"r": 3}}})
    assert type(in_use.use("attention", "bare", lambda p: p)) is Bare
    assert in_use.slots["attention", "bare"].config == {"r": 3}
    for name, why in (("ends", "SystemExit: 3"), ("versionless", "no metadata")):
        with pytest.warns(FallbackWarning, match=why):
            in_use.use("attention", name, lambda p: p)


def test_a_provider_cannot_change_the_profile_it_is_given(registry: Registry) -> None:
    class Greedy(Plain):
        Config = None

        def __init__(self, config: Any = None) -> None:
            super().__init__(config)
            self.config["list"].clear()

    registry.register("attention", "greedy", Greedy)
    section = {"list": [1, 2]}
    ProvidersInUse(registry, {"model": {"greedy": section}}).use("attention", "greedy", lambda p: p)
    assert section == {"list": [1, 2]}


def test_a_config_that_is_no_plain_data_is_built_anew_each_time(registry: Registry) -> None:
    registry.register("attention", "free", type("Free", (Plain,), {"Config": None}))
    assert registry.get("attention", "free", {"f": print}) is not registry.get("attention", "free", {"f": print})


def test_an_optional_slot_stays_empty_and_strict_refuses(registry: Registry) -> None:
    in_use = ProvidersInUse(registry)
    with pytest.warns(FallbackWarning, match="using no router instead"):
        assert in_use.use("router", "topk_moe", lambda p: p, optional=True) is None
    assert in_use.use("router", "topk_moe", lambda p: p, optional=True) is None
    assert in_use.providers == {}
    for kind, name in (("router", "topk_moe"), ("attention", "absent_thing")):
        with pytest.raises(ProviderError):
            ProvidersInUse(registry, strict=True).use(kind, name, lambda p: p, optional=True)


def test_conflicts_between_providers_in_use_are_refused(registry: Registry) -> None:
    registry.register("ffn", "picky", Plain, excludes=["attention:other"])
    in_use = ProvidersInUse(registry)
    in_use.use("ffn", "picky", lambda p: p)
    in_use.check_conflicts()
    in_use.use("attention", "other", lambda p: p)
    with pytest.raises(ConflictError, match="cannot be used together"):
        in_use.check_conflicts()
