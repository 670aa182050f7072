"""The command line of 1.x, translated: what is run is the new command, and what is shown is how to write it."""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from apt.cli.main import main as apt
from apt.cli.main import report, warnings_in_one_line
from apt.cli.parser import Parser
from apt.cli.run_commands import SHORT
from apt.core.errors import AptWarning, UsageError
from apt_model._moved import REMOVED_IN
from apt_model.config._options import say_once
from apt_model.training._folder import refuse_weights_of_old

GONE = {
    "test": "apt generate RUN --prompt TEXT",
    "compare": "apt eval RUN, for each of them",
    "train-custom": "python -m apt_model train --data-path FILE",
    "train-hf": "apt train -p PROFILE --data.train_path FILE",
    "visualize": "apt inspect RUN, or a tracker such as tensorboard",
    "estimate": "apt doctor",
}
"""What is not translated -> what to use; for anything else there is the help of `apt`."""

UNREAD_OPTIONS = (
    "--language", "--language-file", "--checkpoint-freq", "--model-language", "--vocab-size",
    "--num-eval-samples", "--output-dir", "--log-interval", "--plot-format", "--dataset-size",
)  # fmt: skip
UNREAD_FLAGS = (
    "--visualize-attention", "--enable-image", "--enable-audio", "--monitor-resources", "--create-plots", "--verbose",
)  # fmt: skip
"""Taken, and passed over aloud; flags have no value."""


class OldCommandLineWarning(AptWarning, DeprecationWarning):
    """What `python -m apt_model` was asked for has a new command line, which the message gives.

    Python hides a plain DeprecationWarning that no line of the user's own code caused; as one of ours it is shown.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line of 1.x; returns the exit code, as `apt` does.

    Args:
        argv: the arguments; those of the process if None.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments

    def command() -> int:
        with warnings_in_one_line():
            translated = translate([argument for argument in arguments if argument != "--debug"])
            for new in translated:
                warnings.warn(
                    f"python -m apt_model will be removed in APT {REMOVED_IN}: use {shlex.join(['apt', *new])}",
                    OldCommandLineWarning,
                    stacklevel=2,
                )
        return max([apt([*new, "--debug"] if debug else new) for new in translated])

    return report(command, debug=debug)


def translate(arguments: Sequence[str]) -> list[list[str]]:
    """The arguments of `apt` for those of 1.x; of several commands, if several models are to be measured.

    For `train` the folder of the run is made, with the profile that the new command names.

    Raises:
        UsageError: there is no such command or option.
        AptError: the texts cannot be read, or a model is one of 1.x.
    """
    parser = _parser()
    options = parser.parse_all(arguments)
    action = {"eval": "evaluate"}.get(options.action, options.action)
    if action not in _TRANSLATIONS:
        raise UsageError(
            f"python -m apt_model: {action or 'no command'} is not translated",
            hint=f"use {GONE[action]}" if action in GONE else f"{', '.join(_TRANSLATIONS)} are; see apt --help",
        )
    translation, read = _TRANSLATIONS[action]
    given = [name for name, value in vars(options).items() if value != parser.get_default(name)]
    if unread := ["--" + name.replace("_", "-") for name in given if name not in ("action", *read)]:
        say_once(f"python -m apt_model {action}: {', '.join(unread)} not used: nothing reads it any more")
    return translation(options)


def _train(options: argparse.Namespace) -> list[list[str]]:
    from apt_model.training._run import default_config, prepare

    folder = Path(options.save_path)
    profile, asked = prepare(
        folder,
        None if options.data_path is None else Path(options.data_path),
        default_config(),
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        tokenizer_type=options.tokenizer_type,
        limit=options.max_samples,
        seed=options.seed,
    )
    short = {key: name.replace("_", "-") for name, key in SHORT.items()}
    asked |= {"hardware.device": "cpu"} if options.force_cpu else {}
    asked |= {"data.cache_dir": options.cache_dir} if options.cache_dir else {}
    keys = [part for key, value in asked.items() for part in (f"--{short.get(key, key)}", str(value))]
    return [["train", "-p", str(profile), "--run-dir", str(folder), *keys]]


def _chat(options: argparse.Namespace) -> list[list[str]]:
    if len(options.model_path) > 1:
        say_once(f"python -m apt_model chat: one model talks, {options.model_path[0]}")
    refuse_weights_of_old(Path(options.model_path[0]))
    sampling = {"temperature": options.temperature, "top-p": options.top_p, "max-tokens": options.max_length}
    settings = [part for name, value in sampling.items() for part in (f"--{name}", str(value))]
    return [["chat", options.model_path[0], *settings, *_device(options)]]


def _evaluate(options: argparse.Namespace) -> list[list[str]]:
    for path in options.model_path:
        refuse_weights_of_old(Path(path))
    return [["eval", path, *_device(options)] for path in options.model_path]


def _clean_cache(options: argparse.Namespace) -> list[list[str]]:
    return [["cache", "--clean", "--older-than", str(options.clean_days)]]


def _device(options: argparse.Namespace) -> list[str]:
    return ["--device", "cpu"] if options.force_cpu else []


_TRANSLATIONS: dict[str, tuple[Callable[[argparse.Namespace], list[list[str]]], tuple[str, ...]]] = {
    "train": (
        _train,
        ("epochs", "batch_size", "learning_rate", "save_path", "data_path", "max_samples", "tokenizer_type",
         "cache_dir", "seed", "force_cpu"),
    ),
    "chat": (_chat, ("model_path", "temperature", "top_p", "max_length", "force_cpu")),
    "evaluate": (_evaluate, ("model_path", "force_cpu")),
    "clean-cache": (_clean_cache, ("clean_days",)),
}  # fmt: skip
"""{command: (what translates it, the options that it reads)}."""


def _parser() -> Parser:
    """The options of 1.x; one parser had those of every command."""
    parser = Parser(prog="python -m apt_model", description="The command line of APT 1.x.")
    parser.add_argument("action", nargs="?", metavar="train|chat|evaluate|clean-cache")
    add = parser.add_argument
    train = "train: %(default)s if left out"
    add("--epochs", type=int, default=20, metavar="N", help=train)
    add("--batch-size", type=int, default=8, metavar="N", help=train)
    add("--learning-rate", type=float, default=3e-5, metavar="X", help=train)
    add("--save-path", default="apt_model", metavar="DIR", help=f"folder of the run, {train}")
    add("--data-path", metavar="FILE", help="train: texts, train.txt if left out")
    add("--max-samples", type=int, metavar="N", help="train: how many texts to take")
    add("--tokenizer-type", metavar="T", help="train: gpt2, chinese-char or chinese-word, or one of apt's")
    add("--cache-dir", metavar="DIR", help="train: where tokens are kept")
    add("--seed", type=int, default=42, metavar="N", help=train)
    add("--model-path", nargs="+", default=["apt_model"], metavar="DIR", help="chat, evaluate: folders of runs")
    add("--temperature", type=float, default=0.7, metavar="T", help="chat")
    add("--top-p", type=float, default=0.9, metavar="P", help="chat")
    add("--max-length", type=int, default=50, metavar="N", help="chat: tokens of a reply")
    add("--clean-days", type=int, default=30, metavar="N", help="clean-cache: what was not used for so long")
    add("--force-cpu", action="store_true", help="use no GPU")
    add("--eval-sets", nargs="+", help=argparse.SUPPRESS)
    for name in UNREAD_OPTIONS:
        add(name, help=argparse.SUPPRESS)
    for name in UNREAD_FLAGS:
        add(name, action="store_true", help=argparse.SUPPRESS)
    return parser
