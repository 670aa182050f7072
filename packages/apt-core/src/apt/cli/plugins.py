"""What plugins add to the command line: commands of their own, and options on the commands of core."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apt.cli.overview import COMMANDS
from apt.cli.system_apt import WORDS
from apt.core.discovery import Plugin, Plugins, choose, discover
from apt.core.errors import AptError, AptWarning, PluginError, in_a_line
from apt.core.hooks import Hooks

if TYPE_CHECKING:
    import argparse

Configure = Callable[["argparse.ArgumentParser"], object]
Run = Callable[["argparse.Namespace"], int | None]


@dataclass(frozen=True, slots=True)
class PluginCommand:
    """A command that a plugin adds."""

    name: str
    help: str
    plugin: Plugin
    _configure: Configure
    _run: Run

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Let the plugin add its arguments to `parser`. Raises PluginError where it fails."""
        with self._blamed():
            self._configure(parser)

    def run(self, args: argparse.Namespace) -> int:
        """Run it; returns the exit code. Raises PluginError where it fails."""
        with self._blamed():
            return self._run(args) or 0

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except (AptError, BrokenPipeError):
            raise
        except Exception as error:
            failure = PluginError(
                f"{self.plugin.label}: its command {self.name!r} failed: {in_a_line(error)}",
                hint="run it again with --debug, and report what it shows to the authors of the plugin",
            )
            failure.exit_code = 1  # nothing that the user has done wrong
            raise failure from error


class Commands:
    """Takes the commands of one plugin: the argument of `apt_register_commands`.

    Args:
        plugin: whose commands they are.
        taken: {name: owner} of the commands that are there already.
    """

    def __init__(self, plugin: Plugin, taken: dict[str, str]) -> None:
        self._plugin = plugin
        self._taken = taken
        self.added: dict[str, PluginCommand] = {}

    def add(self, name: str, help: str, configure: Configure, run: Run) -> None:
        """Add the command `apt NAME`; one whose name cannot be used is passed over with a warning.

        Args:
            name: lower-case words joined by hyphens.
            help: one line for `apt --help`.
            configure: adds arguments to the command's `argparse.ArgumentParser`.
            run: is given the parsed arguments, and returns the exit code; None counts as 0.
        """
        owner = self._taken.get(name) or ("this plugin itself" if name in self.added else None)
        if name in WORDS:
            problem = "is a word of the system's own apt"
        elif owner:
            problem = f"is taken by {owner}"
        elif not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
            problem = "is not of lower-case words joined by hyphens"
        else:
            self.added[name] = PluginCommand(name, help, self._plugin, configure, run)
            return
        warnings.warn(
            f"{self._plugin.label}: its command {name!r} is left out: the name {problem}", AptWarning, stacklevel=2
        )


def find_commands() -> dict[str, PluginCommand]:
    """The commands of the installed plugins, by name. A plugin that raises is passed over with a warning.

    Raises:
        PluginError: the environment selects a plugin that does not exist.
    """
    taken = dict.fromkeys(COMMANDS, "apt-core")
    found: dict[str, PluginCommand] = {}
    for plugin, call in _implementations(discover(choose()), "apt_register_commands"):
        commands = Commands(plugin, taken)
        try:
            call(commands=commands)
        except (Exception, SystemExit) as error:
            _warn(plugin, "its commands are left out", error)
            continue
        found |= commands.added
        taken |= dict.fromkeys(commands.added, plugin.label)
    return found


def add_options(command: str, parser: argparse.ArgumentParser, plugins: Plugins) -> None:
    """Let the loaded plugins add options to a command of core. A plugin that raises is passed over with a warning."""
    for plugin, call in _implementations(plugins, "apt_register_options"):
        group = parser.add_argument_group(f"options of {plugin.label}")
        try:
            call(command=command, options=group)
        except (Exception, SystemExit) as error:
            _warn(plugin, f"its options for {command!r} are left out", error)


def _implementations(plugins: Plugins, hook: str) -> Iterator[tuple[Plugin, Callable[..., None]]]:
    """Each plugin that implements `hook`, and a function that calls that plugin alone."""
    hooks = Hooks()
    by_name = {hooks.add(plugin.module, plugin.name): plugin for plugin in plugins.listeners({hook})}
    for impl in getattr(hooks.manager.hook, hook).get_hookimpls():

        def call(impl: Any = impl, **arguments: Any) -> None:
            impl.function(*[arguments[name] for name in impl.argnames])

        yield by_name[impl.plugin_name], call


def _warn(plugin: Plugin, consequence: str, error: BaseException) -> None:
    warnings.warn(f"{plugin.label}: {consequence}: {in_a_line(error)}", AptWarning, stacklevel=3)
