"""The registry: which provider answers to which kind and name, and one instance of it per configuration.

A provider is registered as a class, or as an import string ("package.module:Class") that is imported when it is first
built: so what is installed can be listed without importing any of it.
"""

from __future__ import annotations

import copy
import importlib
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from apt.core.catalogue import (
    DEFAULTS,
    HOW_TO_USE,
    KINDS,
    how_to_install,
    how_to_restore,
    left_out,
    package_of_provider,
)
from apt.core.errors import (
    ConfigError,
    ConflictError,
    FallbackWarning,
    ProviderError,
    ProviderNotFoundError,
    did_you_mean,
    in_a_line,
)


class Provider(ABC):
    """A factory for one kind of part.

    Args:
        config: this provider's section of the profile, or None for the defaults.

    A subclass may name a pydantic model as `Config`: `self.config` is then an instance of it, else a plain dict.
    """

    Config: ClassVar[type[Any] | None] = None

    def __init__(self, config: Any = None) -> None:
        self.config: Any = self.validate_config({} if config is None else config)

    @abstractmethod
    def get_name(self) -> str:
        """The name it is registered under."""

    @abstractmethod
    def get_version(self) -> str:
        """Its version; a change in what it computes changes it."""

    @classmethod
    def validate_config(cls, config: Any) -> Any:
        """`config` as an instance of `Config`, defaults filled in; pydantic's ValidationError if it does not fit."""
        return cls.Config.model_validate(config) if cls.Config is not None else config

    def get_dependencies(self) -> list[str]:
        """The requirements beyond its distribution's own that building it needs, such as "flash-attn>=2.5"."""
        return []


@dataclass(frozen=True, slots=True)
class Registration:
    """One claim on a (kind, name)."""

    kind: str
    name: str
    target: type[Any] | str
    default: bool = False
    excludes: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    version: str | None = None
    section: str = ""
    config: type[Any] | str | None = None
    plugin: str = "script"
    distribution: str | None = None
    distribution_version: str | None = None

    @property
    def slot(self) -> str:
        """ "kind:name", as `excludes` and `requires` spell it."""
        return f"{self.kind}:{self.name}"

    @property
    def path(self) -> str:
        """The class as an import string."""
        if isinstance(self.target, str):
            return self.target
        return f"{self.target.__module__}:{self.target.__qualname__}"

    def arguments(self) -> dict[str, Any]:
        """What `Registry.register` was called with."""
        named = ("kind", "name", "target", "default", "excludes", "requires", "version", "section", "config")
        return {name: getattr(self, name) for name in named}

    def load(self) -> type[Any]:
        """The class, imported if need be.

        Raises:
            ProviderError: the import fails or leads to something that is no class, or to one whose `Config` is not what
                was registered as such.
        """
        cls = self._class(self.target)
        if self.config is not None and getattr(cls, "Config", None) is not self._class(self.config):
            raise ProviderError(
                f"{self.slot} of plugin {self.plugin!r}: the config registered for it is not the Config of its class",
                hint=f"mend or upgrade {self.distribution or 'its package'}",
            )
        return cls

    def load_config(self) -> type[Any] | None:
        """What checks its section, a pydantic model; None if it has none. The class is imported only where no `config`
        was registered.

        Raises:
            ProviderError: as `load`.
        """
        return getattr(self.load(), "Config", None) if self.config is None else self._class(self.config)

    def _class(self, target: type[Any] | str) -> type[Any]:
        if not isinstance(target, str):
            return target
        module_name, _, attribute = target.partition(":")
        try:
            found = operator.attrgetter(attribute)(importlib.import_module(module_name))
        except (Exception, SystemExit) as error:
            raise ProviderError(
                f"{self.slot} of plugin {self.plugin!r} cannot be imported from {target!r}: {in_a_line(error)}",
                hint=f"mend or reinstall {self.distribution or 'its package'}",
            ) from error
        if not isinstance(found, type):
            raise ProviderError(f"{self.slot} of plugin {self.plugin!r}: {target!r} is not a class")
        return found


class Registry:
    """Providers by kind and name.

    Args:
        load: called with the registry at its first use, to fill it; None for an empty registry.
    """

    def __init__(self, load: Callable[[Registry], None] | None = None) -> None:
        self._load = load
        self._claims: dict[tuple[str, str], list[Registration]] = {}
        self._instances: dict[tuple[str, str, str], Any] = {}
        self._owner: dict[str, Any] = {}
        self.recorded: Mapping[tuple[str, str], str | None] = {}
        """(kind, name) of the providers that an earlier run was built with, and the requirement that brings each, such
        as "apt-plugin-moe==2.0.0". Nothing stands in for one of these: its weights are there already."""

    def register(
        self,
        kind: str,
        name: str,
        target: type[Any] | str,
        default: bool = False,
        excludes: Iterable[str] = (),
        requires: Iterable[str] = (),
        version: str | None = None,
        *,
        section: str | None = None,
        config: type[Any] | str | None = None,
    ) -> None:
        """Claim `kind`:`name` for a provider.

        Args:
            kind: one of `apt.core.catalogue.KINDS`.
            target: a class, or "package.module:Class", imported when it is first built.
            default: whether it is what its kind falls back to.
            excludes: "kind:name" of providers that cannot be in use together with this one.
            requires: "kind:name" of providers that must be in use together with it.
            version: shown when listing; without it the distribution's version is.
            section: the name of its section in a profile; its own name if left out.
            config: the class's `Config`, as a class or an import string. Where that lies in a module that does not
                import torch, what is wrong with a section is said in a fraction of a second; without it the class is
                imported for that. Since API 1.1.

        Raises:
            ConfigError: an unknown kind, or a target or config that is neither a class nor an import string.
        """
        self._ensure_loaded()
        if kind not in KINDS:
            near = did_you_mean(kind, KINDS)
            raise ConfigError(
                f"there is no provider kind {kind!r}",
                hint=f"did you mean {near!r}?" if near else f"the kinds are {', '.join(KINDS)}",
            )
        for given in (target, config):
            importable = isinstance(given, str) and given.count(":") == 1
            if not (importable or isinstance(given, type) or (given is None and given is config)):
                raise ConfigError(
                    f"{kind}:{name}: {given!r} is neither a class nor an import string 'package.module:Class'"
                )
        claim = Registration(
            kind, name, target, default, tuple(excludes), tuple(requires), version, section or name, config,
            **self._owner,
        )  # fmt: skip
        self._claim(claim)
        for key in [key for key in self._instances if key[:2] == (kind, name)]:
            del self._instances[key]

    def get(self, kind: str, name: str, config: Any = None, fallback: bool = True) -> Any:
        """The provider, built once per kind, name and config.

        With `fallback`, a provider that is not registered or cannot be built gives way to its kind's default, with a
        `FallbackWarning` that says why and what to install.

        Raises:
            ProviderNotFoundError: it is not registered and may not or cannot fall back; also for a near miss of a
                registered name, which is a slip and not an absent package.
            ProviderError: it cannot be built and may not or cannot fall back.
            ConfigError: its config does not fit.
        """
        self._ensure_loaded()
        try:
            return self._build(self.find(kind, name), config)
        except ProviderError as error:
            default = self.fallback_of(kind, name) if fallback else None
            if default is None:
                raise
            warnings.warn(fallback_message(error, f"{kind}:{default}"), FallbackWarning, stacklevel=2)
            return self._build(self.find(kind, default), None)

    def find(self, kind: str, name: str) -> Registration:
        """The one claim on (kind, name).

        Raises:
            ProviderNotFoundError: nobody claims it.
            ConflictError: several plugins do.
        """
        self._ensure_loaded()
        claims = self._claims.get((kind, name), [])
        if len(claims) > 1:
            owners = " and ".join(f"plugin {c.plugin!r} ({c.distribution or 'no distribution'})" for c in claims)
            last = claims[-1].plugin
            fix = "register it under another name" if last == "script" else f"leave one of them out: --no-plugin {last}"
            raise ConflictError(f"{kind}:{name} is claimed by {owners}", hint=fix)
        if not claims:
            requirement = self.recorded.get((kind, name)) or package_of_provider(kind, name)
            if requirement and (said := left_out(requirement, {claim.distribution for claim in self.claims()})):
                raise ProviderNotFoundError(f"{kind}:{name} cannot be used: {said}", hint=HOW_TO_USE)
            raise ProviderNotFoundError(f"{kind}:{name} is not installed", hint=self._how_to_get(kind, name))
        return claims[0]

    def default_of(self, kind: str) -> str | None:
        """The name that `kind` falls back to, or None."""
        self._ensure_loaded()
        preferred = DEFAULTS.get(kind)
        if preferred and (kind, preferred) in self._claims:
            return preferred
        return next(
            (n for (k, n), claims in self._claims.items() if k == kind and any(c.default for c in claims)), None
        )

    def fallback_of(self, kind: str, name: str) -> str | None:
        """What may stand in for (kind, name): the kind's default; None where there is none, where `name` is the default
        itself or one of `recorded`, and where `name` is a near miss of a registered one, which is a slip and not an
        absent package."""
        default = self.default_of(kind)
        unique = default == name or (kind, name) in self.recorded or self.near_miss(kind, name)
        return None if unique else default

    def near_miss(self, kind: str, name: str) -> str | None:
        """The registered name that `name` is a slip of, or None; a name that is known elsewhere is no slip."""
        if (kind, name) in self._claims or (kind, name) in self.recorded or package_of_provider(kind, name):
            return None
        return did_you_mean(name, [n for k, n in self._claims if k == kind])

    def list_providers(self, kind: str | None = None) -> dict[str, list[str]]:
        """{kind: [names]} of what is registered; with `kind`, of that kind alone."""
        self._ensure_loaded()
        listing: dict[str, list[str]] = {kind: []} if kind else {}
        for claimed_kind, name in sorted(self._claims):
            if kind in (None, claimed_kind):
                listing.setdefault(claimed_kind, []).append(name)
        return listing

    def claims(self) -> Iterator[Registration]:
        """Every registration, contested ones included, by kind and name."""
        self._ensure_loaded()
        for key in sorted(self._claims):
            yield from self._claims[key]

    def get_info(self, kind: str, name: str) -> dict[str, Any]:
        """What is known of a provider; imports its class, but builds nothing.

        Raises:
            ProviderNotFoundError, ConflictError: as `find`.
            ProviderError: its class cannot be imported.
        """
        claim = self.find(kind, name)
        cls = claim.load()
        return {
            "name": name,
            "kind": kind,
            "version": claim.version or claim.distribution_version or "unknown",
            "is_default": self.default_of(kind) == name,
            "class": claim.path,
            "summary": (cls.__doc__ or "").strip().partition("\n")[0],
            "plugin": claim.plugin,
            "distribution": claim.distribution,
            "dependencies": _dependencies(cls),
            "excludes": list(claim.excludes),
            "requires": list(claim.requires),
            "section": claim.section,
            "weights_layout": getattr(cls, "weights_layout", None),
        }

    def check_conflicts(self, in_use: Iterable[tuple[str, str]]) -> list[str]:
        """What forbids these (kind, name) pairs to be in use together, one sentence each; empty if nothing does."""
        self._ensure_loaded()
        slots = {f"{kind}:{name}" for kind, name in in_use}
        problems = []
        for kind, name in sorted(tuple(slot.split(":", 1)) for slot in slots):
            for claim in self._claims.get((kind, name), []):
                problems += [
                    f"{claim.slot} cannot be used together with {other}" for other in claim.excludes if other in slots
                ]
                problems += [
                    f"{claim.slot} needs {other}, which is not in use" for other in claim.requires if other not in slots
                ]
        return problems

    @contextmanager
    def owned_by(self, plugin: str, distribution: str | None, version: str | None) -> Iterator[None]:
        """What is registered inside this block belongs to that plugin."""
        before, self._owner = self._owner, {
            "plugin": plugin, "distribution": distribution, "distribution_version": version,
        }  # fmt: skip
        try:
            yield
        finally:
            self._owner = before

    def view(self) -> Registry:
        """A registry of its own with the same registrations and no instances, so that two users share nothing."""
        self._ensure_loaded()
        view = Registry()
        view.recorded = self.recorded
        view.merge(self)
        return view

    def merge(self, other: Registry, plugin: str | None = None) -> None:
        """Take over what `other` holds; with `plugin`, only what that plugin (or "script") registered there."""
        for claims in other._claims.values():
            for claim in claims:
                if plugin in (None, claim.plugin):
                    self._claim(claim)

    def _claim(self, claim: Registration) -> None:
        """Record a claim. A plugin's later claim replaces its own earlier one; the same class is no second claim."""
        key = (claim.kind, claim.name)
        others = [c for c in self._claims.get(key, []) if c.plugin != claim.plugin and c.path != claim.path]
        self._claims[key] = [*others, claim]

    def _build(self, claim: Registration, config: Any) -> Any:
        fingerprint = _fingerprint(config)
        key = (claim.kind, claim.name, fingerprint or "")
        if fingerprint is not None and key in self._instances:
            return self._instances[key]
        cls = claim.load()
        try:
            instance = cls(copy.deepcopy(config) if config is not None else {})
        except (ProviderError, ConfigError):
            raise
        except (Exception, SystemExit) as error:
            # A config that does not fit is the user's slip, in whichever library's words it is told.
            if type(error).__name__ == "ValidationError":
                known = ", ".join(getattr(cls.Config, "model_fields", ()))
                raise ConfigError(
                    f"{claim.slot}: its section does not fit: {_faults(error, cls.Config, config)}",
                    hint=f"its keys are {known}" if known else None,
                ) from error
            raise ProviderError(f"{claim.slot} cannot be built: {in_a_line(error)}") from error
        if fingerprint is not None:
            self._instances[key] = instance
        return instance

    def _ensure_loaded(self) -> None:
        if self._load is not None:
            load, self._load = self._load, None
            load(self)

    def _how_to_get(self, kind: str, name: str) -> str:
        if requirement := self.recorded.get((kind, name)):
            return how_to_restore(requirement)
        package = package_of_provider(kind, name)
        if package:
            return how_to_install(package)
        near = self.near_miss(kind, name)
        if near:
            return f"did you mean {near!r}?"
        known = ", ".join(n for k, n in sorted(self._claims) if k == kind) or "none"
        return f"install the package that brings it, or use one of: {known}"


def fallback_message(error: ProviderError, stand_in: str) -> str:
    """What a `FallbackWarning` says: what is wrong, what is used instead, how to get what was asked for."""
    return f"{error.message}; using {stand_in} instead" + (f" (to get it: {error.hint})" if error.hint else "")


def _faults(error: Any, model: Any, config: Any) -> str:
    """What a ValidationError found: of pydantic in the words of a profile's faults, of others in their own."""
    from pydantic import BaseModel, ValidationError

    from apt.core.problems import dotted, validation_problems

    if isinstance(error, ValidationError) and isinstance(model, type) and issubclass(model, BaseModel):
        problems = validation_problems(error, model, {} if config is None else config)
        return "; ".join(f"{dotted(p.path)}: {p.message}".removeprefix(": ") for p in problems)
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


def _fingerprint(config: Any) -> str | None:
    """A key that is equal for equal configs; None for one that holds more than plain data, which is never kept."""
    if hasattr(config, "model_dump"):
        config = config.model_dump(mode="json")
    if isinstance(config, Mapping):
        config = dict(config)
    import json

    try:
        return json.dumps(config or {}, sort_keys=True)
    except (TypeError, ValueError):
        return None


def _dependencies(cls: type[Any]) -> list[str]:
    """A provider's dependencies; the method may be written without regard to `self`, or need an instance."""
    try:
        return list(cls.get_dependencies(cls))
    except Exception:
        try:
            return list(cls({}).get_dependencies())
        except Exception:
            return []


def _load_installed(registry: Registry) -> None:
    from apt.core.discovery import load_installed

    load_installed(registry)


registry = Registry(load=_load_installed)
"""For scripts: knows the installed plugins at first use. A run takes a view of its own."""
