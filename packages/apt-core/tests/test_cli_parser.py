"""The arguments of the commands, and what is said where they do not fit."""

from __future__ import annotations

import pytest
from fixture_types import RunApt
from hypothesis import given
from hypothesis import strategies as st

from apt.cli import parser as parser_module
from apt.cli.overrides import TOP_LEVEL, parse_overrides, split_overrides
from apt.cli.overview import COMMANDS
from apt.cli.parser import parse_arguments
from apt.core.config import RunConfig
from apt.core.errors import ConfigError, UsageError


def test_every_command_has_a_line_and_arguments() -> None:
    assert list(COMMANDS) == list(parser_module._CONFIGURE)


def test_keys_outside_the_sections_are_those_of_the_profile() -> None:
    plain = {
        name for name, field in RunConfig.model_fields.items() if field.annotation is str or name == "on_plugin_error"
    }
    assert plain == set(TOP_LEVEL)


def test_train_takes_a_profile_and_any_key_of_it() -> None:
    call = (
        "train -p tiny --plugins voter builtin --model.attention_name mha --training.learning_rate=3e-4 --epochs 5 "
        "--batch-size 2 --no-plugin moe --no-plugin rag --output_dir o --strict"
    )
    args = parse_arguments(call.split())
    assert (args.command, args.profile) == ("train", "tiny")
    assert (args.plugins, args.no_plugin) == (["voter", "builtin"], ["moe", "rag"])
    assert (args.epochs, args.batch_size, args.strict, args.resume, args.quiet) == (5, 2, True, None, False)
    assert args.overrides == {"model.attention_name": "mha", "training.learning_rate": "3e-4", "output_dir": "o"}


def test_resume_may_name_a_run_or_not() -> None:
    assert parse_arguments(["train", "--resume"]).resume == ""
    assert parse_arguments(["train", "--resume", "--training.max_epochs", "3"]).resume == ""
    assert parse_arguments(["train", "--resume", "runs/a-1", "--quiet"]).resume == "runs/a-1"


def test_generate_and_eval_take_a_run_and_a_checkpoint() -> None:
    args = parse_arguments(
        ["generate", "runs/a-1", "--checkpoint", "300", "--prompt=-x", "--top-p", "0.9", "--seed", "0"]
    )
    assert (args.run_name, args.checkpoint, args.prompt, args.top_p, args.seed) == ("runs/a-1", 300, ["-x"], 0.9, 0)
    args = parse_arguments(["eval", "--checkpoint", "best"])
    assert (args.run_name, args.checkpoint, args.json, args.batches) == (None, "best", False, None)


KEYS = st.from_regex(r"[a-z_]{1,8}(\.[a-z_0-9]{1,8}){1,3}", fullmatch=True)
VALUES = st.text().filter(lambda text: not text.startswith("-")) | st.floats(allow_nan=False, allow_infinity=False).map(
    str
)
OTHERS = st.sampled_from(["-p", "tiny", "--epochs", "5", "--strict", "--run-dir=a.b/c", "x.y", "-", "--prompt=--a.b"])


@given(st.lists(st.one_of(OTHERS, st.tuples(KEYS, VALUES, st.booleans()))))
def test_overrides_are_parted_from_the_rest(pieces: list[str | tuple[str, str, bool]]) -> None:
    arguments: list[str] = []
    expected: dict[str, str] = {}
    for piece in pieces:
        if isinstance(piece, str):
            arguments.append(piece)
        else:
            key, value, joined = piece
            expected[key] = value
            arguments += [f"--{key}={value}"] if joined else [f"--{key}", value]
    others = [piece for piece in pieces if isinstance(piece, str)]
    assert split_overrides(arguments) == (others, expected)


@pytest.mark.parametrize("rest", [[], ["--strict"], ["-p", "tiny"], ["--training.seed", "1"]])
def test_an_override_needs_a_value(rest: list[str]) -> None:
    with pytest.raises(UsageError, match=r"--model\.d_model needs a value") as caught:
        split_overrides(["--model.d_model", *rest])
    assert caught.value.hint == "write --model.d_model VALUE, or --model.d_model=VALUE"


def test_values_are_yaml() -> None:
    texts = {"a.b": "3e-4", "a.c": "[x, y]", "a.d": "off", "a.e": "null", "a.f": "-.5"}
    assert parse_overrides(texts) == {"a.b": 3e-4, "a.c": ["x", "y"], "a.d": "off", "a.e": None, "a.f": -0.5}
    with pytest.raises(ConfigError, match=r"command line: --a\.b"):
        parse_overrides({"a.b": "[x"})


@pytest.mark.parametrize(
    ("call", "message", "near"),
    [
        ("train --epoch 3", "there is no option --epoch", "--epochs"),
        ("eval --epochs=3", "there is no option --epochs", None),
        ("train --learning-rate 1", "there is no option --learning-rate", "--training.learning_rate"),
        ("train --attention mha", "there is no option --attention", "--model.attention_name"),
        ("train --moe true", "there is no option --moe", "--model.moe.KEY"),
        ("train --training 1", "there is no option --training", "--training.KEY"),
        ("train --lr 1", "there is no option --lr", "--training.learning_rate"),
        ("train --output-dir x", "there is no option --output-dir", "--output_dir"),
        ("train --zzz 1", "there is no option --zzz", None),
        ("profile list --model.d_model 8", "there is no option --model.d_model", None),
        ("train --epochs", "--epochs: expected one argument", None),
        ("train --epochs 0", "--epochs: expected a whole number, at least 1, got '0'", None),
        ("train --epochs 1.5", "--epochs: expected a whole number, at least 1, got '1.5'", None),
        ("train --no-plugins --plugins moe", "--plugins: not allowed with argument --no-plugins", None),
        ("train x", "one argument too many: 'x'", None),
        ("generate --top-p x", "--top-p: expected a number, got 'x'", None),
        ("eval --checkpoint -1", "--checkpoint: expected best, last or a step, got '-1'", None),
        ("plugin-info attention", "needs NAME", None),
        ("profile", "needs list|show|schema", None),
        ("profile shw x", "'shw' is none of list, show, schema", "show"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line_with_its_fix(
    run_apt: RunApt, call: str, message: str, near: str | None
) -> None:
    command = call.split()[0]
    fix = f"did you mean {near}? " if near else ""
    result = run_apt(*call.split())
    assert result == (2, "", f"error: apt {command}: {message}\n  fix: {fix}see apt {command} --help\n")


@pytest.mark.parametrize(
    ("call", "message", "near"),
    [
        ("trian", "there is no command 'trian'", "train"),
        ("plugins", "there is no command 'plugins'", "plugin-list"),
        ("instal x", "there is no command 'instal'", "install"),
        ("zzz", "there is no command 'zzz'", None),
        ("-p tiny train", "there is no option -p before the command", None),
    ],
)
def test_a_command_that_does_not_exist_is_told_with_the_nearest(
    run_apt: RunApt, call: str, message: str, near: str | None
) -> None:
    fix = f"did you mean {near}? " if near else ""
    result = run_apt(*call.split())
    assert result == (2, "", f"error: {message}\n  fix: {fix}see the commands with: apt --help\n")


@pytest.mark.parametrize("command", [*COMMANDS, "profile list", "profile show", "profile schema"])
def test_every_command_shows_its_help(run_apt: RunApt, command: str) -> None:
    result = run_apt(*command.split(), "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"usage: apt {command} ")
    assert max(map(len, result.out.splitlines())) <= 120


def test_help_and_version_end_a_script_as_argparse_does(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], [], ["--version"], ["train", "-h"]):
        with pytest.raises(SystemExit) as ended:
            parse_arguments(arguments)
        assert ended.value.code == 0
        assert capsys.readouterr().out
