"""What `apt` says without a command: its help and its version. Written by hand: argparse costs more than all of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model as a profile says, or go on with a run",
    "generate": "continue a prompt with a trained model",
    "chat": "talk with a trained model",
    "eval": "measure a trained model on its held-out text",
    "profile": "list the profiles that ship, show one in full, print the JSON Schema",
    "plugin-list": "list the plugins and providers that are installed",
    "plugin-info": "show what is known of one provider",
    "plugin-lock": "write down the plugins that a profile uses, for apt train --frozen",
    "inspect": "show what a run is made of and what it has saved, without its plugins",
    "consolidate": "turn a run's checkpoints in shards into those of a single process",
    "plugin-check": "check that a provider keeps the contract of its kind",
    "plugin-new": "write a plugin of your own, to start from",
    "cache": "show how large the caches are, or clean them",
    "doctor": "show hardware and versions, and what would fall back and why",
}
"""Core's own commands, and a line about each."""

OPTIONS = {
    "-h, --help": "show this; after a command, that command's own help",
    "--version": "show the version",
    "--debug": "show the traceback of an error; before or after the command",
}


def answer(arguments: Sequence[str]) -> str | None:
    """What to print for a call that names no command; None if it names one."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return overview()
    if arguments[0] == "--version":
        from apt import __version__

        return f"apt-core {__version__}"
    return None


def overview() -> str:
    """The help of `apt` itself, plugins' commands included."""
    from apt import __version__
    from apt.cli.screen import columns, heading

    theirs = _plugin_commands()
    width = max(map(len, [*COMMANDS, *OPTIONS, *theirs]))

    def block(title: str, rows: dict[str, str]) -> list[str]:
        return ["", heading(title), *columns([(name.ljust(width), text) for name, text in rows.items()])]

    lines = [f"APT {__version__} trains transformer language models whose parts are plugins.", ""]
    lines += ["usage: apt COMMAND [options]"]
    lines += block("Commands", COMMANDS)
    lines += block("Commands of plugins", theirs) if theirs else []
    lines += block("Options", OPTIONS)
    lines += ["", "The system's own apt is still here: its commands (install, update, ...) are passed on to it."]
    lines += ["Start with: apt train --profile tiny_debug"]
    return "\n".join(lines)


def _plugin_commands() -> dict[str, str]:
    from apt.cli.plugins import find_commands
    from apt.core.errors import AptError, AptWarning

    try:
        commands = find_commands()
    except AptError as error:  # a wrong APT_PLUGINS must not take the help away
        warnings.warn(str(error), AptWarning, stacklevel=2)
        return {}
    owners = {name: command.plugin.distribution or command.plugin.name for name, command in commands.items()}
    return {name: f"{command.help} ({owners[name]})" for name, command in sorted(commands.items())}
