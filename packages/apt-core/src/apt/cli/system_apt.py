"""The system's own apt: which calls are meant for it, and where it lies.

Debian and its kin have an `apt` too, and an environment's `bin` comes first on the path. A call whose first word is a
command of that tool is passed on to it, unchanged.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

# fmt: off
WORDS = frozenset({
    "list", "search", "show", "info",
    "install", "reinstall", "remove", "purge", "autoremove", "auto-remove", "autopurge",
    "update", "upgrade", "full-upgrade", "dist-upgrade",
    "history-list", "history-info", "history-undo", "history-redo", "history-rollback",
    "edit-sources", "modernize-sources", "moo", "satisfy", "build-dep", "source", "showsrc",
    "depends", "rdepends", "policy", "why", "why-not",
    "download", "changelog", "clean", "autoclean", "auto-clean", "distclean", "dist-clean",
})
"""The commands of apt 2.6 (Debian 12) to 3.1, their undocumented spellings included."""

TAKE_A_VALUE = frozenset({
    "-o", "--option", "-c", "--config-file", "-t", "--target-release", "--default-release", "-a", "--host-architecture",
})
# fmt: on
"""Options of the system's apt whose value may be the next word."""

USUAL_PLACE = "/usr/bin/apt"

MARK = "_APT_PASSED_ON"
"""Set to our process id when we pass a call on. `exec` keeps the id: whoever finds their own there was called by one of
us, through a second environment or a launcher on the path, and goes to the usual place instead of round in circles."""


def is_meant_for_it(arguments: Sequence[str]) -> bool:
    """Whether the first word, options before it left aside, is a command of the system's apt."""
    rest = iter(arguments)
    for argument in rest:
        if argument in TAKE_A_VALUE:
            next(rest, None)
        elif not argument.startswith("-"):
            return argument in WORDS
    return False


def find_system_apt() -> str | None:
    """The first `apt` on the path that is not ours, else the one in the usual place; None where there is none."""
    if os.environ.get(MARK) != str(os.getpid()):
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
            path = os.path.join(folder, "apt")
            if os.path.isabs(path) and _is_program(path) and not _is_in_our_environment(path):
                return path
    return USUAL_PLACE if _is_program(USUAL_PLACE) else None


def pass_on(arguments: Sequence[str]) -> NoReturn:
    """Become the system's apt, called with these arguments.

    Raises:
        AptError: there is none, or it cannot be run.
    """
    path = find_system_apt()
    if path is None:
        from apt.core.errors import AptError

        called = " ".join(["apt", *arguments])
        raise AptError(
            f"'{called}' is a call of the system's apt, and this machine has none",
            hint="use this system's own package manager; the commands of APT are shown by: apt --help",
        )
    os.environ[MARK] = str(os.getpid())
    try:
        os.execv(path, [path, *arguments])
    except OSError as error:
        from apt.core.errors import AptError

        raise AptError(f"the system's apt, {path}, cannot be run: {error.strerror}") from error


def _is_program(path: str) -> bool:
    """Whether it is an executable file, and not the script that is running."""
    if not (os.path.isfile(path) and os.access(path, os.X_OK)):
        return False
    try:
        return not os.path.samefile(path, sys.argv[0])
    except OSError:  # run by `python -c`, or the script is gone
        return True


def _is_in_our_environment(path: str) -> bool:
    environment = os.path.join(os.path.realpath(sys.prefix), "")
    return os.path.realpath(path).startswith(environment)
