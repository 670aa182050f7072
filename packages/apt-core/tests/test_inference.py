"""From a trained run to text and to its loss: sampling, generation with and without a cache, evaluation."""

from __future__ import annotations

import math
import os
import re
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from apt import hookspecs
from apt.core.errors import AptWarning, CheckpointError, ConfigError, DataError
from apt.core.runs import RunFolder, find_run, new_run
from apt.evaluation.evaluate import evaluate, evaluate_run
from apt.inference.generator import Generator
from apt.inference.sampling import Sampling
from apt.training.metrics import read_metrics
from apt.training.trainer import Trainer

# A run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A small trained run with its best and last checkpoints apart."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(40)))
    trainer = Trainer(
        {
            "name": "small",
            "output_dir": str(folder / "runs"),
            "model": {"d_model": 32, "num_heads": 2, "num_layers": 2, "max_seq_len": 24},
            "data": {"train_path": str(folder / "text.txt"), "cache_dir": str(folder / "cache"), "tokenizer": "char"},
            "training": {"max_epochs": 4, "batch_size": 8, "learning_rate": 0.01},
            "hardware": {"device": "cpu"},
        },
        quiet=True,
    )
    return RunFolder(trainer.train())


def test_a_seed_repeats_and_the_prompt_is_continued(run: RunFolder) -> None:
    generator = Generator.from_run(run)
    one, two = ("".join(generator.stream("1", max_new_tokens=40, seed=3)) for _ in range(2))
    assert one == two
    assert len(one) == 40
    assert one != "".join(generator.stream("1", max_new_tokens=40, seed=4))


def test_hooks_change_the_prompt_and_the_next_token(run: RunFolder) -> None:
    generator = Generator.from_run(run)
    letter = generator.tokenizer.encode("w")[0]

    class OnlyW:
        def on_generation_start(self, prompt: str) -> str:
            return prompt + "all"

        def on_next_token(self, logits: torch.Tensor) -> torch.Tensor:
            return F.one_hot(torch.tensor([letter]), logits.shape[-1]) * 1e9

    class Broken:
        def on_next_token(self) -> None:
            raise ValueError("no")

    generator.hooks.add(OnlyW())
    generator.hooks.add(Broken())
    with pytest.warns(AptWarning, match=r"Broken\.on_next_token failed"):
        assert "".join(generator.stream("w", max_new_tokens=5, seed=0)) == "wwwww"
    assert generator.tokenizer.decode(generator.tokens[0].tolist()) == "wallwwww", "what the last token followed"


def test_hooks_may_rely_on_what_the_table_of_the_contract_says(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    table = (hookspecs.__doc__ or "").partition("and `generator`")[2].partition("An average of the weights")[0]
    names = re.findall(r"^\| `(\w+)", table, re.MULTILINE)
    assert names == ["model", "tokenizer", "device", "options", "note", "tokens", "padding", "hidden"]
    options = Namespace(retrieve="store")
    seen: list[int] = []

    class Looks:
        def on_generation_start(self, prompt: str, generator: Generator) -> None:
            assert all(hasattr(generator, name) for name in names)
            assert generator.options is options
            generator.note("a source")

        def on_next_token(self, logits: torch.Tensor, generator: Generator) -> None:
            assert not generator.model.training
            assert generator.tokens.dtype == torch.int64
            expected = generator.model(generator.tokens[:, -24:])
            torch.testing.assert_close(generator.hidden, expected.hidden[:, -1])
            torch.testing.assert_close(logits, expected.logits[:, -1])
            seen.append(generator.tokens.shape[1])

    generator = Generator.from_run(run, options=options)
    generator.hooks.add(Looks())
    "".join(generator.stream("12", max_new_tokens=30, temperature=0))
    assert seen == list(range(2, 32))
    assert capsys.readouterr() == ("", "a source\n")
    assert Generator.from_run(run).options is None


def test_the_end_of_the_document_ends_the_text(run: RunFolder) -> None:
    generator = Generator.from_run(run)
    generator.tokenizer = SimpleNamespace(eos_id=2, vocab_size=generator.tokenizer.vocab_size)  # type: ignore[assignment]
    ids = list(generator.generate_ids([0], 500, Sampling(50.0), seed=0))
    assert len(ids) < 500
    assert 2 not in ids


def test_what_is_beyond_the_vocabulary_is_never_chosen(run: RunFolder) -> None:
    generator = Generator.from_run(run)
    generator.tokenizer = SimpleNamespace(eos_id=None, vocab_size=3)  # type: ignore[assignment]
    assert set(generator.generate_ids([0], 60, Sampling(50.0), seed=0)) == {0, 1, 2}
    with pytest.raises(ConfigError, match="the seed is"):
        next(generator.generate_ids([0], 1, Sampling(), seed=2**64))


def test_prompts_that_cannot_be_continued_are_refused(run: RunFolder) -> None:
    generator = Generator.from_run(run)
    with pytest.raises(ConfigError, match="nothing to continue"):
        next(generator.stream(""))
    with pytest.raises(DataError, match="U\\+20AC"):
        next(generator.stream("€"))


def test_evaluating_a_run_gives_the_loss_that_training_recorded(run: RunFolder) -> None:
    last = [record for record in read_metrics(run.metrics) if record["event"] == "eval"][-1]
    metrics = evaluate_run(run)
    assert metrics["val_loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(last["val_loss"]), rel=1e-6)


def test_evaluation_is_the_mean_over_every_token(run: RunFolder) -> None:
    from apt.inference.loading import load_run

    loaded = load_run(run)
    text = "12 green bottles hanging on the wall\n" * 3
    ids = loaded.tokenizer.encode(text)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, 24):  # the definition: blocks in order, each token predicted once
        block = torch.tensor(ids[start : start + 25])
        logits = loaded.model(block[None, :-1]).logits[0]
        total += F.cross_entropy(logits, block[1:], reduction="sum").item()
        count += len(block) - 1
    import numpy as np

    from apt.data.loader import TokenLoader
    from apt.data.token_store import Tokens

    loader = TokenLoader(Tokens(np.array(ids, np.uint16), np.array([0])), 24, 2)
    loaded.model.train()
    metrics = evaluate(loaded.model, loader, 2, loaded.device)
    assert loaded.model.training, "the mode is put back"
    assert metrics["val_tokens"] == count
    assert metrics["val_loss"] == pytest.approx(total / count, rel=1e-5)


def test_checkpoints_by_name_and_by_step(run: RunFolder) -> None:
    steps = [int(path.name.removeprefix("step-")) for path in run.checkpoints.iterdir()]
    for checkpoint in ("last", "best", str(max(steps)), min(steps)):
        assert evaluate_run(run, checkpoint=checkpoint, batches=1)["val_loss"] > 0
    assert evaluate_run(run)["step"] == max(steps)
    with pytest.raises(CheckpointError, match="use last, best or a step"):
        evaluate_run(run, checkpoint="newest")
    with pytest.raises(CheckpointError, match="no checkpoint of step 12345"):
        evaluate_run(run, checkpoint=12345)


# Run folders


def test_runs_are_numbered_and_found_again(tmp_path: Path, run: RunFolder) -> None:
    for _ in range(10):
        new_run(tmp_path, "a")
    for number in (2, 10):
        RunFolder(tmp_path / f"a-{number}").profile.write_text("name: a")
    (tmp_path / "b").mkdir()
    RunFolder(tmp_path / "b").profile.write_text("name: b")
    assert new_run(tmp_path, "a").path.name == "a-11"
    assert find_run(name="a", output_dir=tmp_path).path.name == "a-10"
    assert find_run("a-2", tmp_path).path == tmp_path / "a-2"
    assert find_run(run.path).path == run.path
    assert find_run(output_dir=tmp_path).holds_a_run()


def test_a_checkpoint_that_was_never_whole_is_none(tmp_path: Path) -> None:
    kept, newer = new_run(tmp_path, "a"), new_run(tmp_path, "a")
    for folder, name in [(kept, "step-00000003.old"), (newer, "step-00000006.tmp")]:
        folder.profile.write_text("name: a")
        assert not folder.has_checkpoints()
        (folder.checkpoints / name).mkdir(parents=True)
    assert kept.has_checkpoints(), "one that stepped aside is put back"
    assert not newer.has_checkpoints()
    with pytest.warns(AptWarning, match="a-2 has saved nothing; using"):
        assert find_run(name="a", output_dir=tmp_path) == kept


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    RunFolder(new_run(tmp_path, "small").path).profile.write_text("")
    kept = new_run(tmp_path, "kept")
    kept.profile.write_text("")
    (kept.checkpoints / "step-00000001").mkdir(parents=True)
    newer = new_run(tmp_path, "kept")
    newer.profile.write_text("")
    with pytest.warns(AptWarning, match="has saved nothing; using"):
        assert find_run(name="kept", output_dir=tmp_path) == kept
    with pytest.raises(ConfigError, match="did you mean 'small-1'"):
        find_run("smal-1", tmp_path)
    with pytest.raises(ConfigError, match="no run of profile 'other'"):
        find_run(name="other", output_dir=tmp_path)
    with pytest.raises(ConfigError, match="there is no run"):
        find_run(output_dir=tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make a run folder"):
        new_run(tmp_path / "file", "x")


def test_who_names_a_checkpoint_is_told_the_run(tmp_path: Path) -> None:
    run = new_run(tmp_path, "a")
    run.profile.write_text("name: a")
    (run.checkpoints / "step-00000040").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        find_run(run.checkpoints / "step-00000040", tmp_path)
    assert caught.value.hint == f"name the run that it lies in: {run.path}"


def test_an_empty_name_is_no_run_and_the_newest_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("profile.yaml").write_text("name: a")  # the current folder is a run, but was not asked for
    for number in range(1, 13):
        folder = new_run("runs", "a")
        folder.profile.write_text("name: a")
        os.utime(folder.profile, (number, number))
    with pytest.raises(ConfigError) as caught:
        find_run("")
    assert caught.value.message == "'' is not the folder of a run (it has no profile.yaml)"
    newest = ", ".join(f"a-{number}" for number in range(12, 2, -1))
    assert caught.value.hint == f"runs in runs: {newest} and 2 more"
