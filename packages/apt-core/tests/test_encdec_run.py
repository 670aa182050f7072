"""An encoder-decoder as a run: trained on pairs, resumed, evaluated, asked, and used from the command line."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_run import StopAt, train
from torch import Tensor

from apt.cli.main import main
from apt.core.errors import ConfigError, DataError
from apt.core.hooks import Hooks
from apt.core.runs import RunFolder
from apt.evaluation.evaluate import evaluate_run
from apt.inference.chat import Chat
from apt.inference.generator import Generator
from apt.inference.sampling import Sampling
from apt.modeling.compose import ModelBuilder
from apt.training.signals import Interrupted
from apt.training.trainer import Trainer

torch.set_num_threads(1)
Config = dict[str, Any]


def words(count: int, longest: int, letters: str, seed: int) -> list[str]:
    choose = random.Random(seed)
    return ["".join(choose.choices(letters, k=choose.randint(1, longest))) for _ in range(count)]


def write_pairs(path: Path, sources: list[str], *, reverse: bool = False) -> str:
    path.write_text("".join(f"{source}\t{source[::-1] if reverse else source}\n" for source in sources))
    return str(path)


def config_of(tmp_path: Path, path: str, **training: Any) -> Config:
    return {
        "name": "small",
        "output_dir": str(tmp_path / "runs"),
        "model": {"backbone": "encdec", "d_model": 16, "num_heads": 2, "num_layers": 1, "max_seq_len": 8},
        "data": {"train_path": path, "tokenizer": "char", "cache_dir": str(tmp_path / "cache")},
        "training": {"max_epochs": 2, "batch_size": 8, "log_every": 2, "learning_rate": 0.01, **training},
        "hardware": {"device": "cpu"},
    }


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run of 2 epochs of 5 steps, with dropout, so that the random state matters."""
    config = config_of(tmp_path, write_pairs(tmp_path / "pairs.txt", words(45, 6, "abc", 0), reverse=True))
    config["model"]["dropout"] = 0.1
    return config


class Gradients:
    """Keeps the gradients of every step."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.found += [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("attention", ["tva_default", "mha"])
def test_a_run_goes_on_bit_for_bit(config: Config, attention: str) -> None:
    config["model"]["attention_name"] = attention
    whole = train(config)
    for steps in (3, 5, 7):
        first = Trainer(config, quiet=True)
        first.register_hook(StopAt(steps))
        with pytest.raises(Interrupted):
            first.train()
        assert first.step == steps
        again = train(config, resume=RunFolder(first.run_dir))
        assert equal(weights_of(again), weights_of(whole))
        assert again.metrics == whole.metrics


def test_accumulated_gradients_weigh_each_token_alike(config: Config) -> None:
    """Micro-batches of targets of other lengths add up to the step that one batch of all of them takes."""
    config["model"]["dropout"] = 0.0
    found = []
    for accumulation in (1, 2, 4):
        config["training"] |= {"batch_size": 8 // accumulation, "gradient_accumulation": accumulation, "max_steps": 3}
        gradients = Gradients()
        train(config, gradients)
        found.append(gradients.found)
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_hooks_see_sources_and_the_tokens_that_were_written(config: Config) -> None:
    seen: list[Any] = []

    class Watch:
        def extra_losses(self, batch: Any, model_state: dict[str, Any]) -> dict[str, Tensor]:
            seen.append((batch.source.shape, model_state["tokens"].shape, model_state["hidden"].shape))
            return {"small": model_state["hidden"].square().mean() * 0}

        def on_next_token(self, logits: Tensor, generator: Any) -> None:
            seen.append(generator.tokens.tolist())

    trainer = train(config, Watch())
    assert all(len(source) == 2 and tokens == hidden[:2] for source, tokens, hidden in seen)
    seen.clear()
    generator = trainer._generator()
    text = generator.complete(["ab"], max_new_tokens=4, temperature=0)[0]
    assert seen[0] == [[generator.tokenizer.eos_id]] and seen[-1][0][1:] == list(text.tokens[: len(seen) - 1])


class Letters:
    """A tokenizer of twenty letters; the first ends a text."""

    vocab_size, eos_id = 20, 0

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids: Any) -> str:
        return "".join(chr(ord("a") + i) for i in ids)


def make_generator(**model: Any) -> Generator:
    torch.manual_seed(0)
    shape = {"backbone": "encdec", "d_model": 32, "num_heads": 4, "num_layers": 2, "max_seq_len": 12, **model}
    built = ModelBuilder({"model": shape}).build_model(vocab_size=20).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return Generator(SimpleNamespace(
        model=built, tokenizer=Letters(), device=torch.device("cpu"), hooks=Hooks(), config=None, in_use=None,
    ))  # type: ignore[arg-type]  # fmt: skip


PROMPTS = ["b", "bcdefghijklm", "srq", "kkkkk", "cb", "onm"]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("model", [{}, {"attention_name": "mha"}, {"positions": "learned"}], ids=str)
def test_prompts_side_by_side_give_what_each_gives_alone(model: Config, temperature: float) -> None:
    generator = make_generator(**model)
    settings: Any = {"max_new_tokens": 12, "seed": 3, "temperature": temperature}
    together = generator.complete(PROMPTS, samples=2, batch_size=8, **settings)
    alone = [
        generator.complete([prompt], **(settings | {"seed": 3 + 2 * i + j}))[0]
        for i, prompt in enumerate(PROMPTS)
        for j in range(2)
    ]
    assert [made.tokens for made in together] == [made.tokens for made in alone]
    assert len({made.tokens for made in together}) > (4 if temperature else 1)
    streamed = "".join(generator.stream(PROMPTS[2], **(settings | {"seed": 7})))
    assert streamed == together[4].text
    ids = list(generator.generate_ids(Letters().encode("b"), 12, Sampling(temperature=temperature), seed=3))
    assert tuple(ids) == together[0].tokens


@pytest.mark.parametrize("name", ["tva_default", "mha"])
def test_the_cache_changes_nothing_that_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = make_generator(attention_name=name)
    cached = generator.complete(PROMPTS, max_new_tokens=12, temperature=0)
    monkeypatch.setattr(generator.model, "supports", lambda capability: False)
    assert [made.tokens for made in generator.complete(PROMPTS, max_new_tokens=12, temperature=0)] == [
        made.tokens for made in cached
    ]


def test_a_target_is_no_longer_than_the_model_has_learned() -> None:
    generator = make_generator(positions="learned")
    made = generator.complete(["srq"], max_new_tokens=500, temperature=2.0, seed=1)[0]
    assert len(made.tokens) <= 12
    with pytest.raises(DataError, match="a prompt has 13 tokens, and this model reads 12 at most"):
        generator.complete(["b" * 13])
    with pytest.raises(ConfigError, match="an encoder-decoder answers a text; give a --prompt"):
        generator.complete([""])


def test_a_chat_answers_each_message_by_itself() -> None:
    generator = make_generator()
    alone = generator.complete(["srq"], temperature=0)[0].text
    chat = Chat(generator, template=object(), temperature=0)  # type: ignore[arg-type]  # no template is looked at
    assert ["".join(chat.reply(message)) for message in ("b", "srq")][1] == alone


def test_the_commands(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "small.yaml"
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "ab", "answer": "ba"}\n')
    config["data"]["train_path"] = None
    profile.write_text(json.dumps(config))
    run = str(tmp_path / "run")
    pairs = str(tmp_path / "pairs.txt")
    assert main(["train", "-p", str(profile), "--data.train_path", pairs, "--run-dir", run]) == 0
    out = capsys.readouterr().out
    assert "dataset    pairs" in out and "40 pairs to train on, 5 pairs held out" in out and "model      encdec" in out
    assert f"Next: apt chat {run}" in out
    assert main(["train", "--resume", run, "--epochs", "3"]) == 0
    assert main(["eval", run, "--data.answers_path", str(answers)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["generate", run, "--prompt", "ab", "--temperature", "0"]) == 0
    text = capsys.readouterr().out
    assert not text.startswith("ab") or len(text) < 4, "the target alone is written"
    assert main(["generate", run, "--prompt", "ab", "--prompt", "ca", "--json"]) == 0
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == ["ab", "ca"]
    weights = load_file(next(Path(run, "checkpoints").glob("*/model.safetensors")))
    assert {name.split(".")[0] for name in weights} >= {"encoder", "decoder", "token_embedding"}
    assert evaluate_run(RunFolder(Path(run)))["val_tokens"] > 0


@pytest.mark.parametrize("reverse", [False, True], ids=["copy", "reverse"])
def test_it_learns_to_copy_and_to_reverse(tmp_path: Path, reverse: bool) -> None:
    """Words of four letters that it has never seen; examples/pairs.py does it with words of up to ten."""
    different = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=4)]
    random.Random(0).shuffle(different)
    path, asked = write_pairs(tmp_path / "pairs.txt", different[200:], reverse=reverse), different[:200]
    config = config_of(tmp_path, path, max_epochs=6, batch_size=64, learning_rate=5e-3, log_every=50)
    config["model"] |= {"d_model": 32, "num_heads": 2, "positions": "learned"}
    trainer = train(config)
    given = trainer._generator().complete(asked, temperature=0, batch_size=200)
    right = sum(made.text == (word[::-1] if reverse else word) for made, word in zip(given, asked, strict=True))
    assert right >= 198, f"{right} of 200"
