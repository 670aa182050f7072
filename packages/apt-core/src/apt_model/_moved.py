"""What old names lead to: each is looked up when it is first used, and says once where it is now."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from apt.core.errors import PluginError

REMOVED_IN = "4.0"
"""Two major versions after the one that replaced them."""

Place = str | tuple[str, str]
"""The new place, "module:attribute"; with a second such place where the new thing does not serve old code as it is: the
first is named, the second given."""


class NotInstalledError(PluginError, ImportError):
    """An old import path leads to a package that is not installed."""


def moved(
    module: str, places: Mapping[str, Place], *, package: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a module of old names:

        __getattr__, __dir__ = moved(
            __name__, {"Old": "apt.api:New", "older": ("apt.api:newer", "apt_model._own:older")}
        )

    Nothing is imported before a name is used. Its first use in a process warns with DeprecationWarning, on the line
    that uses it: `from old import Old`, or `old.Old`.

    Args:
        package: the distribution that the module has become. Such a module was imported for what that did, too, so it
            is the import that warns, once for all of its names.

    Raises:
        NotInstalledError: `package` is not installed. It is an ImportError.
    """
    if package is not None:
        new = [_new(place) for place in places.values()]
        if importlib.util.find_spec(new[0].partition(".")[0]) is None:
            raise NotInstalledError(f"{module} is a package of its own now: {package}", hint=f"pip install {package}")
        _warn(module, ", ".join(new), _importer(sys._getframe(1)))

    def look_up(name: str) -> Any:
        if name == "__all__":
            return list(places)
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = _given(places[name])
        if package is None:
            _warn(f"{module}.{name}", _new(places[name]), sys._getframe(1))
        # From now on it is found without us, and so said once. Not before: where the warning is an error, it stays one.
        setattr(sys.modules[module], name, value)
        return value

    return look_up, lambda: sorted({*vars(sys.modules[module]), *places})


def _given(place: Place) -> Any:
    where, _, attribute = (place if isinstance(place, str) else place[1]).partition(":")
    return getattr(importlib.import_module(where), attribute)


def _new(place: Place) -> str:
    return (place if isinstance(place, str) else place[0]).replace(":", ".")


def _importer(module: FrameType) -> FrameType:
    """The frame that runs a module. Before it stands whatever loads the module: pytest, for one, has its own loader."""
    frame: FrameType | None = module
    while frame is not None and frame.f_code.co_name != "_find_and_load":
        frame = frame.f_back
    return frame or module


def _warn(old: str, new: str, user: FrameType) -> None:
    """Warn on the line that `user` is at, or whoever imports where that is Python itself."""
    while user.f_back is not None and str(user.f_globals.get("__name__")).startswith("importlib"):
        user = user.f_back
    warnings.warn_explicit(
        f"{old} will be removed in APT {REMOVED_IN}: use {new} (docs/migration.md)",
        DeprecationWarning,
        user.f_code.co_filename,
        user.f_lineno,
        module=user.f_globals.get("__name__", "<string>"),
        registry=user.f_globals.setdefault("__warningregistry__", {}),
    )
