"""The program `apt`: hands a call to its command, and says in one line what went wrong."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from apt.cli import system_apt

INTERRUPTED = 130
BROKEN_PIPE = 141
"""What shells report for a program that SIGINT or SIGPIPE ended."""

SHOW_CURSOR = b"\x1b[?25h"

SECONDS_TO_SPEAK = 2.0
"""How long a process that leaves the word to the first one stays: a launcher ends them all as soon as one is gone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code: 0, 2 for what a user can mend, 1 for what only we can.

    Args:
        argv: the arguments, without the program's name; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        if system_apt.is_meant_for_it(arguments):
            # First of all, and with next to nothing imported.
            system_apt.pass_on(arguments)
        with _leaving_on_interrupt(), warnings_in_one_line():
            return _run([argument for argument in arguments if argument != "--debug"])

    return report(command, debug="--debug" in arguments)


def report(command: Callable[[], int], *, debug: bool = False) -> int:
    """Run what a command line asks for; returns its exit code, or what `main` returns where it fails.

    Args:
        debug: show the traceback of an error.
    """
    try:
        _open_missing_streams()
        code = command()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Exception as error:
        if debug:
            import traceback

            _say(traceback.format_exc().rstrip())
        return _tell(error)


def _open_missing_streams() -> None:
    """Put an empty stream in place of each standard one that the shell has closed (`>&-`): Python then has None, which
    nothing that reads or writes expects, and `print` would say on standard output what is meant for standard error."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115


@contextmanager
def _leaving_on_interrupt() -> Iterator[None]:
    """Inside this block Ctrl-C leaves at once. A KeyboardInterrupt in the middle of an import would be swallowed, or
    come out as something else; training, which has something to lose, catches the signal itself."""
    import signal
    import threading

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: object) -> None:
        if (cache := sys.modules.get("apt.core.cache")) is not None:
            cache.remove_unfinished()
        if _is_first():
            with suppress(OSError):
                # A bar of progress may have hidden the cursor.
                os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + b"\ninterrupted\n")
        os._exit(INTERRUPTED)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(arguments: list[str]) -> int:
    from apt.cli.overview import answer

    with suppress(AttributeError):  # a stand-in for standard output may lack it
        # A letter that the terminal's encoding lacks must not end a run.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    if (text := answer(arguments)) is not None:
        print(text)
        return 0
    from apt.cli.parser import parse_arguments

    try:
        args = parse_arguments(arguments)
        run = args.run_command
        if isinstance(run, str):
            run = _load(run)
        return int(run(args))
    except SystemExit as ended:  # the help of a command has been shown, or a plugin ended its own
        if isinstance(ended.code, str):
            _say(ended.code)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _load(path: str) -> Any:
    import importlib

    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Inside this block our warnings are shown, in one line each."""
    import warnings

    from apt.core.errors import AptWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always" if _is_first() else "ignore", AptWarning)
        warnings.showwarning = _one_line_each(warnings.showwarning)
        yield


def _one_line_each(elsewhere: Callable[..., None]) -> Callable[..., None]:
    """Shows our warnings in one line, each text once; hands those of others on to `elsewhere`."""
    from apt.core.errors import AptWarning

    shown: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if not issubclass(category, AptWarning):
            elsewhere(message, category, *place, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            _say(f"warning: {message}")

    return show


def _tell(error: Exception) -> int:
    """Say what went wrong and how to mend it; returns the exit code."""
    from apt.core.errors import AptError, DeviceError, in_a_line, is_out_of_memory

    if is_out_of_memory(error):
        error = DeviceError(in_a_line(error), hint="ask for less at once (a smaller batch), or for another device")
    if not _is_first():
        time.sleep(SECONDS_TO_SPEAK)
        return error.exit_code if isinstance(error, AptError) else 1
    if isinstance(error, AptError):
        ended_by_signal = error.exit_code > 128
        _say(f"{'' if ended_by_signal else 'error: '}{error.message}")
        if error.hint:
            _say(error.hint if ended_by_signal else f"  fix: {error.hint}")
        return error.exit_code
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        _say(f"error: {error.strerror}{where}")
        return 2
    _say(f"internal error: {in_a_line(error)}; run again with --debug and report what it shows")
    return 1


def _say(text: str) -> None:
    """To standard error, without what would steer the terminal: messages quote what files and their names hold. Where
    it is closed or full, what is said is lost, and nothing else."""
    from apt.cli.screen import CONTROLS

    with suppress(OSError, ValueError):
        print(text.translate(CONTROLS), file=sys.stderr)


def _is_first() -> bool:
    """Whether this process speaks: of those that train one run together, the first of each machine does."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _discard_output() -> None:
    """Nobody reads standard output any more: let what is left in its buffer go nowhere, instead of failing at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
