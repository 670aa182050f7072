"""What providers of every kind keep to."""

from __future__ import annotations

import copy
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from apt.core.catalogue import KINDS
from apt.core.errors import PluginError
from apt.core.hooks import Hooks, has_hooks
from apt.testing.check import check
from apt.testing.compare import require
from apt.testing.subjects import Subject, describe

INTERFACES = {
    "attention": ("create_layer",),
    "ffn": ("create_layer",),
    "router": ("wrap_ffn",),
    "align": ("compute_align_loss",),
    "retrieval": ("retrieve",),
    "voter": ("vote",),
    "quant": ("quantize",),
    "dataset": ("pieces", "fingerprint"),
    "tokenizer": ("build", "load"),
    "tracker": ("start", "log", "finish"),
}
"""Kind -> the methods without which a provider is none of that kind."""


@check(*KINDS)
def names_itself(subject: Subject) -> None:
    """`get_name` and `get_version` give the name it is registered under and a version, and the methods of its kind are
    there. A run records both and refuses to resume with another provider."""
    provider = subject.provider()
    name, version = provider.get_name(), provider.get_version()
    require(isinstance(name, str) and name, f"get_name returns {describe(name)}, not a name")
    require(isinstance(version, str) and version, f"get_version returns {describe(version)}, not a version")
    if subject.name is not None:
        require(
            name == subject.name, f"get_name returns {name!r}, and it is registered as {subject.name!r}: use one name"
        )
    missing = [method for method in INTERFACES[subject.kind] if not callable(getattr(provider, method, None))]
    require(not missing, f"it has no method {missing}: see apt.core.providers.{subject.kind}")


@check(*KINDS)
def dependencies_are_requirements(subject: Subject) -> None:
    """`get_dependencies` lists requirements as pip reads them: they are what a user is told to install."""
    found: Any = getattr(subject.provider(), "get_dependencies", list)()
    require(isinstance(found, list), f"get_dependencies returns {describe(found)}, not a list")
    for requirement in found:
        try:
            Requirement(requirement)
        except (InvalidRequirement, TypeError) as error:
            require(False, f"get_dependencies: {requirement!r} is no requirement that pip understands: {error}")


@check(*KINDS)
def hooks_fit(subject: Subject) -> None:
    """Every method that has the name of a hook takes that hook's arguments. A provider in use is called with them, and
    one that does not fit ends the run before it starts."""
    provider = subject.provider()
    if has_hooks(provider):
        try:
            Hooks().add(provider)
        except PluginError as error:
            require(False, f"{error.message}; the hooks and their arguments are in apt.hookspecs")


@check(*KINDS, needs="config")
def config_survives_the_lock(subject: Subject) -> None:
    """Its config, written as JSON and read again, is the same config. Runs keep it in that form, and are opened with
    what was kept."""
    provider = subject.provider()
    plain = provider.config.model_dump(mode="json")
    again = type(provider).validate_config(copy.deepcopy(plain))
    require(
        again == provider.config,
        f"the config {provider.config!r} comes back as {again!r}: give its fields types that pydantic writes as JSON",
    )


@check(*KINDS, needs="config")
def config_refuses_unknown_keys(subject: Subject) -> None:
    """A key that the section does not have is refused: one that is swallowed is a slip that nobody notices, and a run
    trained with another setting than its profile says."""
    provider = subject.provider()
    plain: dict[str, Any] = provider.config.model_dump(mode="json")
    try:
        type(provider).validate_config({**plain, "no_such_key": 1})
    except Exception:  # pydantic's, or whatever the provider's own model raises
        return
    require(False, 'the key "no_such_key" is accepted: set model_config = ConfigDict(extra="forbid") in its Config')
