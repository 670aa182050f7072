"""The providers in effect: what a run asked for, what it got, and why the two differ where they do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from apt.core.catalogue import KINDS
from apt.core.errors import ConfigError, ConflictError, FallbackWarning, ProviderError, in_a_line
from apt.core.registry import Provider, Registration, Registry, fallback_message

T = TypeVar("T")


@dataclass(slots=True)
class Slot:
    """One place in a run that a provider fills."""

    kind: str
    requested: str
    name: str | None
    """The provider in effect; None where the slot stays empty."""
    provider: Provider | None
    registration: Registration | None
    config: dict[str, Any] = field(default_factory=dict)
    """The provider's section, defaults filled in."""
    reason: str | None = None
    """Why `name` is not `requested`; None where it is."""
    version: str | None = None
    """What the provider says of itself."""

    @property
    def is_fallback(self) -> bool:
        return self.reason is not None


class ProvidersInUse:
    """Builds the providers that a profile names, falls back where that is allowed, and remembers all of it.

    Args:
        registry: the run's view of the registry.
        sections: {"model": {...}, "data": {...}, "training": {...}}: the providers' sections of the profile.
        strict: raise instead of falling back.
        layouts: {kind: the layout of weights that there are already}: a provider that reads them stands in rather than
            the kind's default.
    """

    def __init__(
        self,
        registry: Registry,
        sections: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        strict: bool = False,
        layouts: Mapping[str, str] | None = None,
    ) -> None:
        self.registry = registry
        self.sections = sections or {}
        self.strict = strict
        self.layouts = layouts or {}
        self.slots: dict[tuple[str, str], Slot] = {}

    @property
    def providers(self) -> dict[tuple[str, str], Provider]:
        """{(kind, name): instance} of the providers in effect."""
        return {(s.kind, s.name): s.provider for s in self.slots.values() if s.name and s.provider}

    @property
    def incomplete(self) -> bool:
        """Whether something that is installed could not be built, and another one stands in for it."""
        installed = {(claim.kind, claim.name) for claim in self.registry.claims()}
        return any(slot.is_fallback and (slot.kind, slot.requested) in installed for slot in self.slots.values())

    def use(self, kind: str, name: str, make: Callable[[Any], T], *, optional: bool = False) -> T | None:
        """Make a part with the provider `kind`:`name`, or with its kind's default if that one cannot be had.

        The first call for a slot decides which provider fills it; later calls use the same one.

        Args:
            kind: the provider's kind.
            name: the provider that the profile names.
            make: builds the part, given the provider. What it raises as `ConfigError` is the user's to mend and raised;
                any other error counts as a provider that cannot be built here.
            optional: leave the slot empty, loudly, if not even a default can be had, and return None.

        Raises:
            ProviderError: it cannot be had, and may not or cannot fall back.
            ConflictError: two plugins claim it.
            ConfigError: its section does not fit.
        """
        known = self.slots.get((kind, name))
        if known is not None:
            return None if known.provider is None else _made(f"{kind}:{known.name}", make, known.provider)
        try:
            slot, part = self._fill(kind, name, name, make)
        except ProviderError as error:
            stand_in = self._of_the_same_layout(kind, name) or self.registry.fallback_of(kind, name)
            optional = optional and (kind, name) not in self.registry.recorded
            if self.strict or (stand_in is None and not optional) or self.registry.near_miss(kind, name):
                raise
            label = f"{kind}:{stand_in}" if stand_in else f"no {kind}"
            warnings.warn(fallback_message(error, label), FallbackWarning, stacklevel=3)
            if stand_in is None:
                slot, part = Slot(kind, name, None, None, None), None
            else:
                slot, part = self._fill(kind, name, stand_in, make)
            slot.reason = error.message
        self.slots[kind, name] = slot
        return part

    def check_conflicts(self) -> None:
        """Raise ConflictError if providers in use exclude or lack each other."""
        problems = self.registry.check_conflicts(self.providers)
        if problems:
            raise ConflictError("; ".join(problems), hint="choose other providers in the profile")

    def _of_the_same_layout(self, kind: str, name: str) -> str | None:
        """A provider that reads the weights that there are already, other than `name`; None if there is none."""
        layout = self.layouts.get(kind)
        if layout is None:
            return None
        for other in self.registry.list_providers(kind)[kind]:
            # One that cannot be imported, or that two plugins claim, is no reason not to look at the others.
            with suppress(ProviderError, ConflictError):
                if other != name and self.registry.get_info(kind, other)["weights_layout"] == layout:
                    return other
        return None

    def _fill(self, kind: str, requested: str, name: str, make: Callable[[Any], T]) -> tuple[Slot, T]:
        claim = self.registry.find(kind, name)
        section = self.sections.get(KINDS[kind], {}).get(claim.section, {})
        # `enabled` is read by core, and a provider need not know it. What the others hold is the provider's own.
        section = {key: copy.deepcopy(value) for key, value in section.items() if key != "enabled"}
        provider = self.registry.get(kind, name, section, fallback=False)
        config = getattr(provider, "config", None)  # one that is written without regard to the base class has none
        dump = getattr(config, "model_dump", None)
        plain = dump(mode="json") if dump is not None else dict(config or section)
        version = _made(claim.slot, lambda made: str(made.get_version()), provider)
        slot = Slot(kind, requested, name, provider, claim, plain, version=version)
        return slot, _made(claim.slot, make, provider)


def _made(slot: str, make: Callable[[Any], T], provider: Any) -> T:
    """What `make` makes of a provider; whatever else goes wrong is a ProviderError that says whose."""
    try:
        return make(provider)
    except (ProviderError, ConfigError):
        raise
    except (Exception, SystemExit) as error:
        raise ProviderError(f"{slot} cannot be built: {in_a_line(error)}") from error
