"""`apt generate` and `apt chat`: what goes in, what comes out where, and what is said of wrong input."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_types import RunApt

from apt.builtin.voter import EntropyVoter, SelfConsistencyVoter
from apt.cli import text_commands
from apt.cli.text_commands import tell
from apt.core.runs import RunFolder
from apt.inference.chat import Chat
from apt.inference.generator import Generator
from apt.inference.rows import Vote
from apt.training.trainer import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A small run, whose text is chats."""
    folder = tmp_path_factory.mktemp("run")
    turns = "".join(f"User: how many are {n}?\nAssistant: they are {n}.\n" for n in range(60))
    (folder / "text.txt").write_text(turns + "+=/x\\-12 ; \t")
    trainer = Trainer(
        {
            "name": "small", "output_dir": str(folder / "runs"),
            "model": {"d_model": 32, "num_heads": 2, "num_layers": 1, "max_seq_len": 64},
            "data": {"train_path": str(folder / "text.txt"), "cache_dir": str(folder / "cache"), "tokenizer": "char"},
            "training": {"max_epochs": 1, "max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "eval_batches": 1},
            "hardware": {"device": "cpu"},
        },
        quiet=True,
    )  # fmt: skip
    return RunFolder(trainer.train())


@pytest.fixture
def run(trained: RunFolder, run_apt: RunApt) -> str:
    return str(trained.path)


def alone(run: str, prompt: str, seed: int, **settings: Any) -> str:
    return "".join(Generator.from_run(RunFolder(Path(run)), device="cpu").stream(prompt, seed=seed, **settings))


# generate


def test_a_prompt_and_its_continuation(run_apt: RunApt, run: str) -> None:
    call = "--max-tokens 9 --temperature 0.5 --top-k 30 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.1 --seed 7"
    result = run_apt("generate", run, "--prompt", "how ", *call.split(), "--device", "cpu")
    expected = alone(
        run, "how ", 7, max_new_tokens=9, temperature=0.5, top_k=30, top_p=0.9, min_p=0.01, repetition_penalty=1.1
    )
    assert result == (0, f"how {expected}\n", "")


def test_several_prompts_and_samples(run_apt: RunApt, run: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("User: \n\nthey\n")
    call = ["--prompt", "how ", "--prompts", "prompts.txt", "--samples", "2", "--max-tokens", "5", "--seed", "3"]
    prompts = ["how ", "how ", "User: ", "User: ", "they", "they"]
    texts = [alone(run, prompt, 3 + i, max_new_tokens=5) for i, prompt in enumerate(prompts)]
    result = run_apt("generate", run, *call)
    assert result == (0, "---\n".join(f"{p}{t}\n" for p, t in zip(prompts, texts, strict=True)), "")
    result = run_apt("generate", run, *call, "--json", "--batch-size", "2")
    assert [json.loads(line) for line in result.out.split("\n")[:-1]] == [
        {"prompt": p, "text": t, "ended": "length"} for p, t in zip(prompts, texts, strict=True)
    ]


def test_stop_strings_are_not_shown(run_apt: RunApt, run: str) -> None:
    text = alone(run, "how ", 1, max_new_tokens=60)
    result = run_apt("generate", run, "--prompt", "how ", "--max-tokens", "60", "--seed", "1", "--stop", "\\n")
    assert result.out == "how " + text.partition("\n")[0] + "\n"


def test_votes_are_told_on_standard_error(run_apt: RunApt, run: str) -> None:
    call = ["generate", run, "--prompt", "how ", "--max-tokens", "12", "--seed", "1", "--voter"]
    result = run_apt(*call, "entropy", "--model.voting.threshold", "0.1", "--model.voting.rollout", "3")
    assert result.code == 0 and result.out.startswith("how ")
    assert result.err == "entropy: 4 votes, 0 of them with a majority\n"
    result = run_apt(*call, "self_consistency", "--model.voting.k=2", "--samples", "2")
    assert [line[:30] for line in result.err.splitlines()] == [
        "1: self_consistency: of 2 text", "2: self_consistency: of 2 text"
    ]  # fmt: skip
    assert result.out.count("---\n") == 1


def test_what_votes_came_to_in_words() -> None:
    whole, tokens = SelfConsistencyVoter({"pattern": "x"}), EntropyVoter()
    for voter, votes, words in (
        (whole, [("5", "5", None)], "self_consistency: of 3 texts, '5' x 2, 1 without an answer"),
        (
            whole,
            [("5", "6")],
            "self_consistency: of 2 texts, '5' x 1, '6' x 1; no two agree, the likeliest is kept",
        ),
        (whole, [(None, None)], "self_consistency: none of 2 texts holds an answer; the likeliest is kept"),
        (tokens, [], "entropy: no vote was needed"),
        (tokens, [("a", "b", "a")], "entropy: 1 vote, 1 of them with a majority"),
        (tokens, [("a", "b", "a"), ("a", "b", "c")], "entropy: 2 votes, 1 of them with a majority"),
    ):
        assert tell(voter, [Vote(0, answers, 0) for answers in votes]) == words  # type: ignore[arg-type]
    assert "'yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy...' x 2" in tell(whole, [Vote(0, ("y" * 50,) * 2, 0)])


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (["--temperature=-1"], "error: temperature is -1.0\n  fix: use 0 or more\n"),
        (["--min-p", "2"], "error: min_p is 2.0\n  fix: use 0 to 1\n"),
        (["--voter", "entropy", "--temperature", "0"], "error: the voter entropy has nothing to choose from"),
        (["--voter", "entropi"], "error: voter:entropi is not installed\n  fix: did you mean 'entropy'?\n"),
        (["--voter", "entropy", "--model.voting.k", "0"],
         "error: command line: --model.voting.k: expected a whole number greater than 0, got 0\n"),
        (["--model.tva.tua", "3"], "error: command line: --model.tva.tua: unknown key\n  fix: did you mean 'tau'?\n"),
        (["--prompts", "none.txt"], "error: none.txt cannot be read: No such file"),
        (["--prompts", "empty.txt"], "error: empty.txt holds no prompt\n"),
        (["--prompts", "bytes.txt"], "error: bytes.txt: not UTF-8 at byte 2\n"),
        (["--prompt", "a€"], "error: the character '€' (U+20AC, character 1 of the text) is not among"),
        (["--prompt", "a\udcff"], "error: --prompt: not UTF-8\n"),
        ([], "error: there is nothing to continue"),
        (["--training.seed", "8"], "error: apt generate: --training.seed is no key of the model\n"),
        (["--chat.user", "x"], "error: apt generate: --chat.user is no key of the model\n"),
        (["--model.voting.k"], "error: --model.voting.k needs a value\n"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_clear_line_and_nothing_is_written(
    run_apt: RunApt, run: str, tmp_path: Path, call: list[str], error: str
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    prompt = [] if not call or call[0].startswith("--prompt") else ["--prompt", "how "]
    result = run_apt("generate", run, *prompt, *call)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(error), result.err
    assert len(result.err.splitlines()) <= 2


def test_standard_input_may_hold_prompts(run_apt: RunApt, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("how \nmany\n"))
    out = run_apt("generate", run, "--prompt", "-", "--max-tokens", "3", "--seed", "0").out
    assert out.startswith("how \nmany") and len(out) == len("how \nmany") + 4
    monkeypatch.setattr(sys, "stdin", io.StringIO("how \nmany\n"))
    assert run_apt("generate", run, "--prompts", "-", "--max-tokens", "3").out.count("---\n") == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff"), encoding="utf-8"))
    result = run_apt("generate", run, "--prompt", "-")
    assert result == (2, "", "error: standard input: not utf-8 at byte 2\n  fix: give UTF-8 text\n")


def test_a_byte_order_mark_is_no_part_of_a_prompt(
    run_apt: RunApt, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("how \nmany\n", encoding="utf-8-sig")
    marked = run_apt("generate", run, "--prompts", "prompts.txt", "--max-tokens", "3", "--seed", "0")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffhow \nmany\n"))
    assert run_apt("generate", run, "--prompts", "-", "--max-tokens", "3", "--seed", "0") == marked
    assert (marked.code, marked.err) == (0, "") and marked.out.startswith("how ")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffhow "))
    result = run_apt("generate", run, "--prompt", "-", "--max-tokens", "3")
    assert (result.code, result.err) == (0, "") and result.out.startswith("how ")


def in_the_c_locale(typed: bytes) -> io.TextIOWrapper:
    """Standard input where Python hands on as surrogates what is not UTF-8."""
    return io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8", errors="surrogateescape")


@pytest.mark.parametrize("option", ["--prompt", "--prompts"])
def test_standard_input_that_is_not_utf_8_in_the_c_locale(
    run_apt: RunApt, run: str, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(sys, "stdin", in_the_c_locale(b"hi\xe9\n"))
    result = run_apt("generate", run, option, "-")
    assert result == (2, "", "error: standard input: not UTF-8\n  fix: give UTF-8 text\n")


def test_prompts_without_end(run_apt: RunApt, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apt.cli.text_commands.LARGEST", 8)
    (tmp_path / "long.txt").write_text("1234567é" * 2)
    assert run_apt("generate", run, "--prompts", "long.txt").err.startswith("error: long.txt is larger than")
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 20))
    assert run_apt("generate", run, "--prompts", "-").err.startswith("error: standard input is larger than")
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 20))
    assert run_apt("generate", run, "--prompt", "-").err.startswith("error: standard input is larger than")


# chat


def chat(run_apt: RunApt, run: str, monkeypatch: pytest.MonkeyPatch, typed: str, *call: str) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    return run_apt("chat", run, "--max-tokens", "20", "--seed", "5", *call)


def test_a_chat_on_a_pipe(run_apt: RunApt, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Chat(Generator.from_run(RunFolder(Path(run)), device="cpu"), max_new_tokens=20, seed=5)
    replies = ["".join(expected.reply(message)) for message in ("how", "many")]
    result = chat(run_apt, run, monkeypatch, "how\n\n  many  \n")
    assert result[:2] == (0, f"{replies[0]}\n{replies[1]}\n")
    result = chat(run_apt, run, monkeypatch, "how\n/exit\nmany\n")
    assert result == (0, f"{replies[0]}\n", "")
    result = chat(run_apt, run, monkeypatch, "\ufeffhow\n")
    assert result == (0, f"{replies[0]}\n", ""), "a byte order mark is no part of a message"


def test_commands_of_a_chat_and_messages_that_cannot_be_said(
    run_apt: RunApt, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "how\n/reset\n/help\n/foo bar\nhéllo\n"
    result = chat(run_apt, run, monkeypatch, lines, "--chat.end=\\n", "--voter", "entropy")
    assert result.code == 0 and len(result.out.splitlines()) >= 1
    told = result.err.splitlines()
    assert told[0].startswith("entropy: ")
    assert told[1:5] == text_commands.CHAT_HELP.splitlines()
    assert told[5] == "there is no /foo; see /help"
    assert told[6].startswith("error: the character 'é'") and told[7].startswith("  fix: ")


def test_a_chat_ends_with_its_input_even_if_there_is_none(
    run_apt: RunApt, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chat(run_apt, run, monkeypatch, "") == (0, "", "")
    assert chat(run_apt, run, monkeypatch, "/exit") == (0, "", "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"how\nab\xff\n"), encoding="utf-8"))
    result = run_apt("chat", run, "--max-tokens", "3")
    assert result.code == 2 and result.err.startswith("error: standard input: not utf-8 at byte")
    monkeypatch.setattr(sys, "stdin", in_the_c_locale(b"how\nhi\xe9\n"))
    result = run_apt("chat", run, "--max-tokens", "3")
    assert result.code == 2 and result.out, "the message before it was answered"
    assert result.err == "error: standard input: not UTF-8\n  fix: give UTF-8 text\n"
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it after <&-
    assert run_apt("chat", run) == (0, "", "")
    result = chat(run_apt, run, monkeypatch, "how\n", "--chat.user", "€: ")
    assert result.code == 2 and "the run's way to write a chat does not fit its tokenizer" in result.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_ctrl_c_ends_a_reply_and_not_the_chat(run_apt: RunApt, run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    lines = iter([KeyboardInterrupt, "how", "many", EOFError])

    def typed(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, str):
            return line
        if line is KeyboardInterrupt:
            os.kill(os.getpid(), signal.SIGINT)
        raise line()

    def reply(self: Chat, message: str) -> Iterator[str]:
        said.append(message)
        yield "first"
        if message == "how":
            os.kill(os.getpid(), signal.SIGINT)
        yield "\x1b[2J second"

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(sys, "stdin", Terminal())
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(Chat, "reply", reply)
    assert run_apt("chat", run).code == 0
    shown = screen.getvalue()
    assert shown.startswith(f"Chat with {run}\nWrite a message")
    assert "(leave with /exit or Ctrl-D)\nfirst ...\nfirst\\x1b[2J second\n" in shown
    assert said == ["how", "many"]
    assert torch.is_grad_enabled()
