"""Questions with checkable answers: read, asked after each epoch and by `apt eval`, and what they do not touch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fixture_types import RunApt

from apt.core.errors import AptWarning, ConfigError, DataError, UsageError
from apt.core.runs import RunFolder
from apt.evaluation.answers import Question, read_questions
from apt.evaluation.evaluate import evaluate_run
from apt.training.metrics import read_metrics
from apt.training.trainer import Trainer

Config = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run that learns what every line ends with, and is asked about it."""
    lines = "".join(f"{letter}:yes\n" for letter in "abcdefgh") * 40
    (tmp_path / "text.txt").write_text(lines)
    asked = [{"prompt": f"{letter}:", "answer": "yes"} for letter in "abcdefgh"]
    asked += [{"prompt": "a:", "answer": "no"}, {"prompt": "ab:", "answer": " yes "}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(question) + "\n\n" for question in asked))
    return {
        "name": "letters", "output_dir": str(tmp_path / "runs"),
        "model": {
            "d_model": 32, "num_heads": 2, "num_layers": 1, "max_seq_len": 24, "voter_name": "entropy",
            "voting": {"threshold": 0.2, "k": 2, "rollout": 2},
        },
        "data": {
            "train_path": str(tmp_path / "text.txt"), "cache_dir": str(tmp_path / "cache"), "tokenizer": "char",
            "answers_path": str(tmp_path / "q.jsonl"), "answers_max_tokens": 8,
        },
        "training": {"max_epochs": 2, "batch_size": 4, "learning_rate": 0.02, "eval_every": 8, "eval_batches": 9},
        "schedules": {"vote_threshold": {"start": 2.0, "end": 1.0}},
        "hardware": {"device": "cpu"},
    }  # fmt: skip


def trained(config: Config) -> RunFolder:
    return RunFolder(Trainer(config, quiet=True).train())


def weights(run: RunFolder) -> bytes:
    return next(sorted(run.checkpoints.iterdir())[-1].glob("model*.safetensors")).read_bytes()


def evaluations(run: RunFolder) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run.metrics) if record["event"] == "eval"]


def test_a_run_is_asked_after_each_epoch_and_eval_says_the_same(config: Config, run_apt: RunApt) -> None:
    run = trained(config)
    records = evaluations(run)
    asked = [record for record in records if "accuracy" in record]
    assert len(asked) == 2 < len(records), "after each epoch, and not in the middle of one"
    assert [record["vote_threshold"] for record in asked] == [2.0, 1.5]
    assert asked[-1]["answers"] == 10 and asked[-1]["accuracy"] == 0.9, "one answer is not what the text says"
    again = evaluate_run(run, batches=9)
    for name in ("val_loss", "answers", "accuracy", "voted_accuracy", "vote_threshold"):
        assert again[name] == pytest.approx(asked[-1][name], rel=1e-6), name
    told = json.loads(run_apt("eval", str(run.path), "--json", "--voter", "self_consistency").out)
    assert told["accuracy"] == again["accuracy"] and "vote_threshold" not in told
    told = json.loads(run_apt("eval", str(run.path), "--json", "--model.voting.k=1").out)
    assert 0.1 < told["voted_accuracy"] <= 0.9


def test_being_asked_changes_nothing_in_the_run(config: Config) -> None:
    config["training"]["max_steps"] = 12
    asked = trained(config)
    del config["data"]["answers_path"], config["schedules"]
    plain = trained(config)
    assert weights(asked) == weights(plain)
    assert [r["val_loss"] for r in evaluations(asked)] == [r["val_loss"] for r in evaluations(plain)]
    assert not any("accuracy" in record for record in evaluations(plain))


def test_without_a_voter_the_likeliest_tokens_answer_alone(config: Config) -> None:
    del config["model"]["voter_name"]
    config["training"]["max_steps"] = 2
    with pytest.warns(AptWarning, match="nothing in a whole epoch has asked for vote_threshold"):
        run = trained(config)
    (record,) = (record for record in evaluations(run) if "accuracy" in record)
    assert "voted_accuracy" not in record and "vote_threshold" not in record


def test_a_voter_that_is_absent_is_said_and_a_slip_is_refused(config: Config) -> None:
    config["training"]["max_steps"] = 1
    config["schedules"] = {}
    config["model"]["voter_name"] = "committee"
    with pytest.warns(AptWarning, match="voter:committee is not installed.*using no voter instead"):
        assert "voted_accuracy" not in evaluations(trained(config))[-1]
    config["model"]["voter_name"] = "entropi"
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        trained(config)


def test_the_summary_of_an_epoch_says_it(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    config["training"]["max_steps"] = 1
    Trainer(config).train()
    assert "accuracy=0.0% voted_accuracy=0.0%" in capsys.readouterr().out


def test_what_is_no_file_of_questions_is_refused_before_anything_is_written(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for content, wrong in (
        ('{"prompt": "a", "answer": 3}\n', r"q\.jsonl:1: no object with the strings"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n', r"q\.jsonl:2: no object"),
        ("\n[]\n", r"q\.jsonl:2: no object"),
        ("{", r"q\.jsonl:1: no object"),
        ("[" * 100_000, r"q\.jsonl:1: no object"),
        ("\n", "holds no question"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=wrong):
            trained(config)
    path.write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot be read"):
        trained(config)
    path.unlink()
    with pytest.raises(DataError, match=r"q\.jsonl cannot be read: No such file"):
        trained(config)
    assert not (tmp_path / "runs").exists()


def test_questions_in_order(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "2+3=", "answer": "5", "more": 1}\r\n\n{"answer": "", "prompt": "x"}')
    assert read_questions(tmp_path / "q.jsonl") == [Question("2+3=", "5"), Question("x", "")]


def test_a_byte_order_mark_is_no_part_of_the_questions(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "2+3=", "answer": "5"}\n', encoding="utf-8-sig")
    assert read_questions(tmp_path / "q.jsonl") == [Question("2+3=", "5")]


def test_eval_needs_questions_for_a_voter_and_a_section_that_fits(config: Config, tmp_path: Path) -> None:
    config["training"]["max_steps"] = 1
    config["schedules"] = {}
    path = config["data"].pop("answers_path")
    del config["model"]["voter_name"]
    run = trained(config)
    with pytest.raises(UsageError, match="this run has none"):
        evaluate_run(run, voter="entropy")
    assert evaluate_run(run, overrides={"data.answers_path": path})["answers"] == 10
    with pytest.raises(ConfigError, match=r"--model\.voting\.pattern: no regular expression"):
        evaluate_run(run, overrides={"data.answers_path": path, "model.voting.pattern": "("})
