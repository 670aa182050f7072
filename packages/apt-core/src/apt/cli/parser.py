"""The arguments of each command, and what is said where they do not fit: one line, and how to mend it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn
from warnings import catch_warnings, simplefilter

from apt.cli.overrides import parse_overrides, split_overrides
from apt.cli.overview import COMMANDS, answer
from apt.cli.values import checkpoint, number, whole_number
from apt.core.catalogue import KINDS, SECTIONS, how_to_have
from apt.core.errors import HINT, AptError, UsageError, did_you_mean

NEEDS_COMMAND = "see the commands with: apt --help"

TAKE_KEYS = ("apt train", "apt profile", "apt plugin-lock")
"""The commands that take keys of the profile as options."""

MODEL_KEYS = (
    "Keys of the run's model are options too: --model.attention_name mha opens it with another attention that reads "
    "the same weights."
)

TAKE_OPTIONS = ("train", "generate", "chat", "eval")
"""The commands that plugins may add options to."""


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UsageErrors in plain words."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        choice = re.fullmatch(r"argument (.+?): invalid choice: '?(.*?)'? \(choose from (.+)\)", message)
        if choice:
            known = choice[3].replace("'", "").split(", ")
            raise self.usage_error(
                f"{choice[2]!r} is none of {', '.join(known)}", did_you_mean(choice[2], known, cutoff=HINT)
            )
        missing = message.removeprefix("the following arguments are required: ")
        raise self.usage_error(f"needs {missing}" if missing != message else message.removeprefix("argument "))

    def usage_error(self, message: str, near: str | None = None) -> UsageError:
        """What to raise; `near` is what may have been meant."""
        hint = f"did you mean {near}? " if near else ""
        return UsageError(f"{self.prog}: {message}", hint=f"{hint}see {self.prog} --help")

    def parse_all(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse arguments of which none may be left over.

        Raises:
            UsageError: they do not fit.
        """
        namespace, left = self.parse_known_args(arguments)
        option = next((argument for argument in left if argument.startswith("-")), None)
        if option is not None:
            name = option.partition("=")[0]
            if (fix := how_to_have(name)) is not None:
                raise UsageError(f"{self.prog}: there is no option {name}", hint=fix)
            raise self.usage_error(f"there is no option {name}", self._what_is_near(name))
        if left:
            raise self.usage_error(f"one argument too many: {left[0]!r}")
        return namespace

    def _what_is_near(self, option: str) -> str | None:
        """What a word that is no option may be meant for: a key of the profile without its section, another option, or
        nearly such a key."""
        keys: dict[str, list[str]] = {}
        if self.prog in TAKE_KEYS:
            from apt.core.profiles import names_of_keys

            keys = names_of_keys()
        word = option.lstrip("-").replace("-", "_")
        near = None if word in keys else did_you_mean(option, self._option_string_actions, cutoff=HINT)
        if near or not keys:
            return near
        key = word if word in keys else did_you_mean(word, keys)
        sections = {name.rpartition(".")[0] for names in keys.values() for name in names}
        sections |= {f"model.{section}" for section in SECTIONS}
        found = keys[key] if key else ()
        return " or ".join(f"--{name}.KEY" if name in sections else f"--{name}" for name in found) or None


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace: `run_command` (what to call with it, or its import string) and the command's own
    arguments; a command of core has `command`, its name, and `overrides`, {dotted key: text} of the profile.

    Args:
        argv: the arguments, without the program's name; those of the process if None.

    Raises:
        UsageError: they do not fit.
        SystemExit: with code 0, after the help or the version was printed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if (text := answer(arguments)) is not None:
        print(text)
        raise SystemExit(0)
    command, *rest = arguments
    if command.startswith("-"):
        raise UsageError(f"there is no option {command} before the command", hint=NEEDS_COMMAND)
    if command not in COMMANDS:
        return _parse_plugin_command(command, rest)
    parser = Parser(prog=f"apt {command}", description=_sentence(COMMANDS[command]))
    overrides: dict[str, str] = {}
    if command in (*TAKE_OPTIONS, "plugin-lock") or (command == "profile" and rest[:1] == ["show"]):
        rest, overrides = split_overrides(rest)
    _CONFIGURE[command](parser)
    if command in TAKE_OPTIONS:
        _add_plugin_options(command, parser, rest, overrides)
    parser.set_defaults(command=command, overrides=overrides, arguments=arguments)
    return parser.parse_all(rest)


def _parse_plugin_command(command: str, rest: Sequence[str]) -> argparse.Namespace:
    from apt.cli.plugins import find_commands
    from apt.cli.system_apt import WORDS

    theirs = find_commands()
    if command not in theirs:
        near = did_you_mean(command, [*COMMANDS, *theirs, *sorted(WORDS)], cutoff=HINT)
        hint = f"did you mean {near}? " if near else ""
        raise UsageError(f"there is no command {command!r}", hint=how_to_have(command) or hint + NEEDS_COMMAND)
    parser = Parser(prog=f"apt {command}", description=theirs[command].help)
    theirs[command].configure(parser)
    namespace = parser.parse_all(rest)
    namespace.run_command = theirs[command].run
    return namespace


def _add_plugin_options(command: str, parser: Parser, rest: Sequence[str], overrides: dict[str, str]) -> None:
    """The options that plugins add to a command. Which plugins those are, other arguments and the profile say."""
    from apt.cli.plugins import add_options
    from apt.core.discovery import choose, discover

    first = Parser(prog=parser.prog, add_help=False)
    _CONFIGURE[command](first)
    chosen, left = first.parse_known_args(rest)
    selected = {"plugins": chosen.plugins, "no_plugin": chosen.no_plugin, "no_plugins": chosen.no_plugins}
    if left and command != "train":
        # What a plugin's option is given may look like the run, so the run is known once all options are.
        with catch_warnings():
            simplefilter("ignore")
            add_options(command, first, discover(choose(**selected)))
        chosen, _ = first.parse_known_args(rest)
    known = _known_plugins(command, chosen, overrides)
    add_options(command, parser, discover(choose(**selected, **known), strict=chosen.strict))


def _known_plugins(command: str, chosen: argparse.Namespace, overrides: dict[str, str]) -> dict[str, Any]:
    """The plugins that the profile names, of what is to be trained or of the run, and those that the run recorded: as
    arguments of `choose`."""
    from apt.checkpoint.lock import read_lock, recorded_plugins
    from apt.cli.run_commands import find_source
    from apt.core.profiles import find_profile, load_profile_data
    from apt.core.runs import find_run

    names: object = None
    recorded: dict[str, str] = {}
    with suppress(AptError):  # the command itself will say what is wrong with the profile or the run
        if command == "train":
            source, run = find_source(chosen.profile, chosen.resume, parse_overrides(overrides))
        else:
            run = find_run(chosen.run_name)
            source = run.profile
        names = load_profile_data(find_profile(source))[0].get("plugins")
        recorded = recorded_plugins(read_lock(run.lock)) if run else {}
    profile = [name for name in names if isinstance(name, str)] if isinstance(names, list) else None
    return {"profile": profile, "recorded": recorded}


# The commands


def _train(parser: Parser) -> None:
    parser.add_argument("-p", "--profile", metavar="P", help="a profile's path, or the name of one that ships")
    count = whole_number(1)
    parser.add_argument("--epochs", type=count, metavar="N", help="short for --training.max_epochs N")
    parser.add_argument("--batch-size", type=count, metavar="N", help="short for --training.batch_size N")
    parser.add_argument("--run-dir", metavar="DIR", help="the run's folder; a new one under output_dir if left out")
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help="go on with RUN, or with the newest run (of the profile P)"
    )
    parser.add_argument(
        "--frozen",
        nargs="?",
        const="",
        metavar="LOCK",
        help="refuse every plugin, version and file that LOCK does not hold; left out, it is the profile's own lock "
        "(apt plugin-lock), or that of the run that is resumed",
    )
    parser.add_argument(
        "--nproc", type=count, metavar="N", help="train in N processes of this machine, on a GPU each if it has as many"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    _add_selection(parser)
    parser.epilog = (
        "Any key of the profile is an option too: --training.learning_rate 3e-4, --model.attention_name=mha. "
        "Values are YAML; 'apt profile show P' prints a profile with all its keys."
    )
    parser.set_defaults(run_command="apt.cli.run_commands:run_train_command")


def _generate(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT",
        help="what to continue; - reads it from standard input; may be repeated",
    )  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help="prompts to continue, one a line; - reads standard input")
    parser.add_argument(
        "--samples", type=whole_number(1), default=1, metavar="N", help="continuations of each prompt (%(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=16, metavar="N", help="texts side by side (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one text a line")
    _add_sampling(parser)
    parser.epilog = MODEL_KEYS
    parser.set_defaults(run_command="apt.cli.text_commands:run_generate_command")


def _chat(parser: Parser) -> None:
    _add_run(parser)
    _add_sampling(parser)
    parser.epilog = (
        "Reads a message a line, on a terminal or from a pipe; /reset, /help and /exit are commands. How turns are "
        "written is in the section chat of the run's profile: --chat.user, --chat.assistant, --chat.end, --chat.system."
    )
    parser.set_defaults(run_command="apt.cli.text_commands:run_chat_command")


def _add_sampling(parser: Parser) -> None:
    parser.add_argument(
        "--max-tokens", type=whole_number(1), default=200, metavar="N", help="tokens to add (%(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=number,
        default=1.0,
        metavar="T",
        help="below 1 is tamer, above 1 wilder, 0 the likeliest (%(default)s)",
    )
    parser.add_argument("--top-k", type=whole_number(1), metavar="K", help="choose among the K likeliest tokens alone")
    parser.add_argument(
        "--top-p", type=number, metavar="P", help="choose among the likeliest tokens that make up P of 1"
    )
    parser.add_argument(
        "--min-p", type=number, metavar="P", help="choose among the tokens at least P times as likely as the likeliest"
    )
    parser.add_argument(
        "--repetition-penalty", type=number, default=1.0, metavar="R",
        help="above 1 makes tokens that are in the text less likely (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="end before this text, in which \\n is a line's end; may be repeated",
    )  # fmt: skip
    parser.add_argument("--seed", type=whole_number(0), metavar="N", help="makes the text repeatable")
    _add_voter(parser, "keep the best of several continuations: entropy or self_consistency; see --model.voting.k")
    _add_selection(parser)


def _add_voter(parser: Parser, what: str) -> None:
    parser.add_argument("--voter", metavar="V", help=what)


def _eval(parser: Parser) -> None:
    _add_run(parser)
    parser.add_argument(
        "--batches", type=whole_number(1), metavar="N", help="stop after N batches; all are measured if left out"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_voter(parser, "answer the questions of --data.answers_path by this voter too; the profile's if left out")
    _add_selection(parser)
    parser.epilog = MODEL_KEYS
    parser.set_defaults(run_command="apt.cli.run_commands:run_eval_command")


def _profile(parser: Parser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|show|schema", parser_class=Parser)
    what = "the profiles that ship"
    actions.add_parser("list", help=what, description=_sentence(what)).set_defaults(
        run_command="apt.cli.commands:run_profile_list_command"
    )
    what = "a profile in full, its defaults and what it extends filled in"
    show = actions.add_parser("show", help=what, description=_sentence(what))
    show.add_argument("profile", metavar="P", help="a profile's path, or the name of one that ships")
    show.epilog = "Keys may be changed as for apt train: --training.batch_size 8."
    show.set_defaults(run_command="apt.cli.commands:run_profile_show_command")
    what = "the JSON Schema of profiles, for editors; the sections of the installed plugins included"
    schema = actions.add_parser("schema", help=what, description=_sentence(what))
    schema.set_defaults(run_command="apt.cli.commands:run_profile_schema_command")


def _plugin_list(parser: Parser) -> None:
    parser.add_argument("--kind", metavar="K", help="the providers of this kind alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--refresh", action="store_true", help="look into every plugin again, whatever is remembered")
    parser.set_defaults(run_command="apt.cli.commands:run_plugin_list_command")


def _plugin_info(parser: Parser) -> None:
    parser.add_argument("kind", metavar="KIND", help="a provider's kind, such as attention")
    parser.add_argument("name", metavar="NAME", help="its name, such as tva_default")
    parser.set_defaults(run_command="apt.cli.commands:run_plugin_info_command")


def _plugin_lock(parser: Parser) -> None:
    parser.add_argument(
        "-p", "--profile", required=True, metavar="P", help="a profile's path, or the name of one that ships"
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where to write it; P.lock.json beside the profile, or here for one that ships, if left out",
    )
    _add_selection(parser)
    parser.epilog = "Keys of the profile may be changed as for apt train: --model.attention_name mha."
    parser.set_defaults(run_command="apt.cli.lock_commands:run_plugin_lock_command")


def _inspect(parser: Parser) -> None:
    parser.add_argument(
        "run_name", nargs="?", metavar="RUN", help="the run's folder, or its name in runs/; the newest if left out"
    )
    parser.add_argument(
        "--checkpoint", type=checkpoint, metavar="C", help="whose tensors to list: best, last, or the steps behind it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run_command="apt.cli.inspect:run_inspect_command")


def _consolidate(parser: Parser) -> None:
    parser.add_argument(
        "run_name", nargs="?", metavar="RUN", help="the run's folder, or its name in runs/; the newest if left out"
    )
    parser.set_defaults(run_command="apt.cli.consolidate:run_consolidate_command")


def _plugin_check(parser: Parser) -> None:
    parser.add_argument(
        "provider",
        nargs="?",
        metavar="KIND:NAME",
        help="such as attention:tva_default; those of every plugin if left out",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a key of its section; may be repeated"
    )
    parser.add_argument("--slow", action="store_true", help="run the slow checks too: torch.compile")
    parser.add_argument(
        "--device", default="cpu", metavar="D", help="where to run layers, cpu, cuda or mps (%(default)s)"
    )
    parser.set_defaults(run_command="apt.cli.plugin_check:run_plugin_check_command")


def _plugin_new(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help='what it is called, such as sliding-window; "apt-" goes before it')
    parser.add_argument("--kind", required=True, metavar="K", help=f"what it brings: {', '.join(KINDS)}")
    parser.add_argument("--dir", metavar="D", help="the folder to write (apt-NAME, in this one)")
    parser.set_defaults(run_command="apt.cli.scaffold:run_plugin_new_command")


def _cache(parser: Parser) -> None:
    parser.add_argument("--clean", action="store_true", help="remove what is cached; it can all be made again")
    parser.add_argument("--older-than", type=number, metavar="DAYS", help="what has not been used for so many, alone")
    parser.add_argument("--at-most", type=number, metavar="GB", help="what was used last stays, as much as fits")
    parser.set_defaults(run_command="apt.cli.cache:run_cache_command")


def _doctor(parser: Parser) -> None:
    parser.set_defaults(run_command="apt.cli.doctor:run_doctor_command")


_CONFIGURE: dict[str, Callable[[Parser], None]] = {
    "train": _train,
    "generate": _generate,
    "chat": _chat,
    "eval": _eval,
    "profile": _profile,
    "plugin-list": _plugin_list,
    "plugin-info": _plugin_info,
    "plugin-lock": _plugin_lock,
    "inspect": _inspect,
    "consolidate": _consolidate,
    "plugin-check": _plugin_check,
    "plugin-new": _plugin_new,
    "cache": _cache,
    "doctor": _doctor,
}


def _add_run(parser: Parser) -> None:
    parser.add_argument(
        "run_name", nargs="?", metavar="RUN", help="the run's folder, or its name in runs/; the newest if left out"
    )
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        metavar="C",
        help="best, last, or the steps behind it, as in step-00000300 (last)",
    )
    parser.add_argument(
        "--state", metavar="S", help="an average of the weights that the run keeps, such as stable (the weights)"
    )
    parser.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:1 or mps (%(default)s)")


def _add_selection(parser: Parser) -> None:
    group = parser.add_argument_group("plugins")
    names = group.add_mutually_exclusive_group()
    names.add_argument("--plugins", nargs="+", metavar="X", help="use these plugins alone, whatever the profile says")
    group.add_argument(
        "--no-plugin", action="append", default=[], metavar="X", help="leave this plugin out; may be repeated"
    )
    names.add_argument("--no-plugins", action="store_true", help="use none")
    group.add_argument(
        "--strict", action="store_true", help="make an error of everything that would fall back or be passed over"
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
