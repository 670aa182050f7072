"""Runs: written again in fewer bits, opened, refused where they cannot be used; and trained for a scheme."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from small_run import register_for_one_test
from torch import Tensor

pytest.importorskip("torchao", reason="the schemes are torchao's")

from apt.cli.main import main
from apt.core.errors import AptWarning, ConfigError, FallbackWarning, ProviderError
from apt.core.providers.quant import QuantProvider
from apt.core.registry import registry
from apt.core.runs import RunFolder
from apt.evaluation.evaluate import evaluate, evaluate_run
from apt.inference.generator import Generator
from apt.training.metrics import read_metrics
from apt.training.signals import Interrupted
from apt.training.trainer import Trainer
from apt_plugin_quant import plugin
from apt_plugin_quant.linear import FakeQuantizedLinear

Config = dict[str, Any]
SWITCH, STEPS = 4, 12


class Result(NamedTuple):
    code: int
    out: str
    err: str


Apt = Callable[..., Result]


@pytest.fixture(autouse=True)
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin as pip leaves it, found by its entry point, and in the registry that scripts use, for one test."""
    info = tmp_path / "site" / "apt_plugin_quant-2.0.0a1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: apt-plugin-quant\nVersion: 2.0.0a1\n")
    (info / "entry_points.txt").write_text("[apt.providers]\nquant = apt_plugin_quant.plugin\n")
    monkeypatch.syspath_prepend(info.parent)
    for variable in ("APT_PLUGINS", "APT_DISABLE_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    register_for_one_test(monkeypatch)
    with registry.owned_by("quant", "apt-plugin-quant", "2.0.0a1"):
        plugin.apt_register_providers(registry)


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Apt:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        return Result(main([str(argument) for argument in arguments]), *capsys.readouterr())

    return run


def profile(folder: Path, **model: Any) -> Config:
    """2 epochs of 6 steps with dropout."""
    text = folder / "text.txt"
    text.write_text("".join(f"{n} green bottles hanging on the wall\n" for n in range(24)))
    return {
        "name": "small",
        "output_dir": str(folder / "runs"),
        "model": {"d_model": 16, "num_heads": 2, "num_layers": 2, "max_seq_len": 16, "dropout": 0.1, **model},
        "data": {"train_path": str(text), "cache_dir": str(folder / "cache")},
        "training": {"max_epochs": 2, "batch_size": 8, "log_every": 1, "learning_rate": 0.01},
        "hardware": {"device": "cpu"},
    }


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return profile(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned something; nobody writes into it."""
    folder = tmp_path_factory.mktemp("trained")
    config = profile(folder, d_model=32)
    config["training"] |= {"max_epochs": 12}
    config["plugins"] = []
    return Trainer(config, quiet=True).train()


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(next(run.glob("checkpoints/step-*/model.safetensors")))


# The command


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 1.005), ("int8_dynamic", 1.02), ("int4", 1.15)])
def test_a_run_is_written_again_and_opened_as_any_other(run: Path, apt: Apt, scheme: str, bound: float) -> None:
    said = apt("quantize", run, "--scheme", scheme)
    assert said.code == 0, said.err
    assert f"to {scheme}" in said.out
    assert "token_embedding.weight 8,192" in said.out
    out = run.with_name(f"run-{scheme}")
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoints", "plugins.lock.json", "profile.yaml", "tokenizer.json",
    ]  # fmt: skip
    slots = {slot["kind"]: slot for slot in json.loads((out / "plugins.lock.json").read_text())["slots"]}
    assert (slots["quant"]["name"], slots["quant"]["distribution"]) == (scheme, "apt-plugin-quant")
    kept = [tensor for tensor in weights_of(out).values() if tensor.dtype == torch.float32 and tensor.ndim > 1]
    assert sum(tensor.nbytes for tensor in weights_of(out).values()) < 0.55 * sum(
        tensor.nbytes for tensor in weights_of(run).values()
    )
    assert max(tensor.numel() for tensor in kept) == 8192, "nothing is left large but the embedding"
    before, after = (evaluate_run(RunFolder(path), device="cpu")["perplexity"] for path in (run, out))
    assert before < 60, "it has learned something"
    assert after < bound * before
    assert after != before
    generator = Generator.from_run(RunFolder(out), device="cpu")
    assert "".join(generator.stream("1 green", max_new_tokens=4, temperature=0)) == "".join(
        Generator.from_run(RunFolder(run), device="cpu").stream("1 green", max_new_tokens=4, temperature=0)
    )
    assert apt("eval", out, "--json").code == 0
    assert apt("generate", out, "--max-tokens", "2", "--prompt", "1").code == 0


def test_what_was_written_comes_back_bit_for_bit(run: Path, apt: Apt, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert apt("quantize", run, "--scheme", "int4", "--out", tmp_path / name, "--group-size", "8").code == 0
    a, b = weights_of(tmp_path / "a"), weights_of(tmp_path / "b")
    loaded = Generator.from_run(RunFolder(tmp_path / "a"), device="cpu").model.state_dict()
    assert a.keys() == b.keys() == loaded.keys()
    assert all(torch.equal(a[key], b[key]) and torch.equal(a[key], loaded[key]) for key in a)
    assert a["blocks.0.ffn.w_in.weight.scale"].shape == (128, 4)


def test_it_takes_the_checkpoint_that_is_named(config: Config, apt: Apt) -> None:
    run = Trainer(config, quiet=True).train()
    assert apt("quantize", run, "--scheme", "int8", "--checkpoint", "step-00000006").code == 0
    assert evaluate_run(RunFolder(run.with_name(f"{run.name}-int8")), device="cpu")["step"] == 6


def test_what_cannot_be_used_is_one_line_and_leaves_nothing(run: Path, apt: Apt, tmp_path: Path) -> None:
    assert apt("quantize", run, "--scheme", "int8").code == 0
    quantised = run.with_name("run-int8")
    before = sorted(tmp_path.iterdir())
    wrong: dict[tuple[Any, ...], str] = {
        (run, "--scheme", "int9"): "quant:int9 is not installed\n  fix: did you mean 'int8'?",
        (run,): "which scheme?\n  fix: give --scheme and one of: int4, int8, int8_dynamic",
        (tmp_path, "--scheme", "int8"): "is not the folder of a run",
        (quantised, "--scheme", "int4"): "is quantised already, as int8",
        (run, "--scheme", "int8"): "run-int8 exists already",
        (run, "--scheme", "int4", "--group-size", "5"): "model.int4.group_size: 5 does not divide the inputs of",
        (run, "--scheme", "int4", "--group-size", "many"): "--group-size 'many' is no whole number",
        (
            run,
            "--scheme",
            "int8",
            "--group-size",
            "8",
            "--out",
            "x",
        ): "its section does not fit: group_size",
        (run, "--scheme", "int4", "--checkpoint", "7"): "has no checkpoint of step 7",
        (run, "--scheme", "int4", "--state", "stable"): "holds no state 'stable'",
        (run, "--scheme", "int4", "--out", "/proc/nobody/x"): "cannot write",
    }
    for arguments, message in wrong.items():
        said = apt("quantize", *arguments)
        assert said.code == 2, said
        assert message in said.err
        assert said.err.startswith("error: ")
        assert "Traceback" not in said.err
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_checkpoint_is_named(run: Path, apt: Apt) -> None:
    assert apt("quantize", run, "--scheme", "int4").code == 0
    for path in (run, run.with_name("run-int4")):
        file = next(path.glob("checkpoints/step-*/model.safetensors"))
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)
        for old in path.glob("checkpoints/step-*"):
            if old != file.parent:
                shutil.rmtree(old)
    for command in (["quantize", run, "--scheme", "int8"], ["eval", run.with_name("run-int4")]):
        said = apt(*command)
        assert said.code == 2
        assert "is damaged: its SHA-256 is not the manifest's" in said.err


def test_without_the_plugin_it_names_the_package(run: Path, apt: Apt, monkeypatch: pytest.MonkeyPatch) -> None:
    assert apt("quantize", run, "--scheme", "int8").code == 0
    out = run.with_name("run-int8")
    assert "plugins: [quant]" in (out / "profile.yaml").read_text(), "the run asked for no plugins, and needs this one"
    text = (out / "profile.yaml").read_text()
    (out / "profile.yaml").write_text(text.replace("plugins: [quant]", "plugins: []"))
    said = apt("eval", out)
    assert said.code == 2
    assert re.search(
        r"quant:int8 cannot be used: apt-plugin-quant \S+ is installed and its plugin not in use", said.err
    )


def test_another_scheme_than_the_one_it_was_written_in_is_refused(run: Path, apt: Apt) -> None:
    assert apt("quantize", run, "--scheme", "int8").code == 0
    path = run.with_name("run-int8") / "profile.yaml"
    path.write_text(path.read_text().replace("quant_name: int8", "quant_name: int4"))
    said = apt("eval", path.parent)
    assert said.code == 2
    assert "this run was built with quant:int8" in said.err


def test_a_quantised_run_is_not_trained(run: Path, apt: Apt, config: Config) -> None:
    assert apt("quantize", run, "--scheme", "int8").code == 0
    said = apt("train", "--resume", run.with_name("run-int8"))
    assert said.code == 2
    assert "model.quant_name: int8: a quantised model cannot be trained" in said.err
    config["model"]["quant_name"] = "int8"
    with pytest.raises(ConfigError, match="cannot be trained"):
        Trainer(config)


def test_what_was_left_is_said_aloud_where_it_is_most(config: Config, apt: Apt, tmp_path: Path) -> None:
    config["model"] |= {"d_model": 8, "num_layers": 1}
    run = Trainer(config, quiet=True).train()
    said = apt("quantize", run, "--scheme", "int8")
    assert said.code == 0
    assert "warning: only" in said.err
    assert "token_embedding.weight 2,048" in said.err


# Training for a scheme


class Watch:
    """Keeps the weights after each step, and which of the steps were computed as if quantised."""

    def __init__(self, stop: int | None = None) -> None:
        self.after: list[dict[str, Tensor]] = []
        self.active: list[bool] = []
        self.stop = stop

    def on_step_end(self, step: int, trainer: Any) -> None:
        self.after.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        self.active += {m.active for m in trainer.model.modules() if isinstance(m, FakeQuantizedLinear)}
        if step + 1 == self.stop:
            signal.raise_signal(signal.SIGINT)


def train(config: Config, watch: Watch | None = None, **options: Any) -> Trainer:
    trainer = Trainer(config, quiet=True, **options)
    trainer.register_hook(watch or Watch())
    trainer.train()
    return trainer


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("scheme", ["int8", "int8_dynamic", "int4"])
def test_until_its_moment_the_run_is_the_run_without_it_bit_for_bit(config: Config, scheme: str) -> None:
    plain, watch = Watch(), Watch()
    first = train(config, plain)
    config["model"]["qat_name"] = scheme
    config["schedules"] = {"enable_qat_at_step": SWITCH}
    second = train(config, watch)
    assert watch.active == [False] * SWITCH + [True] * (STEPS - SWITCH)
    assert all(same(a, b) for a, b in zip(plain.after[:SWITCH], watch.after[:SWITCH], strict=True))
    assert not same(plain.after[SWITCH], watch.after[SWITCH])
    shapes = [{k: v.shape for k, v in weights_of(t.run_dir).items()} for t in (first, second)]
    assert shapes[0] == shapes[1], "its state dict is that of any run"


def test_it_begins_at_an_epoch_says_so_and_without_a_schedule_at_once(
    config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config["model"]["qat_name"] = "int4"
    config["schedules"] = {"enable_qat_at_epoch": 1}
    watch = Watch()
    trainer = Trainer(config)
    trainer.register_hook(watch)
    trainer.train()
    assert watch.active == [False] * 6 + [True] * 6
    said = capsys.readouterr().out
    assert said.count("QAT is on (epoch=1, step=6): 12 linear maps compute as if they were int4") == 1
    del config["schedules"]
    watch = Watch()
    train(config, watch)
    assert watch.active == [True] * STEPS


@pytest.mark.parametrize("schedule", [{"enable_qat_at_step": SWITCH}, {"enable_qat_at_epoch": 1}])
@pytest.mark.parametrize("stop", [SWITCH, 6, 7])
def test_stopped_and_resumed_it_equals_the_uninterrupted_run(
    config: Config, schedule: dict[str, int], stop: int
) -> None:
    config["model"]["qat_name"] = "int4"
    config["schedules"] = schedule
    whole = train(config)
    trainer = Trainer(config, quiet=True)
    trainer.register_hook(Watch(stop))
    with pytest.raises(Interrupted):
        trainer.train()
    resumed = train(config, resume=RunFolder(trainer.run_dir))
    assert same(dict(whole.model.named_parameters()), dict(resumed.model.named_parameters()))
    losses = [
        {r["step"]: r["val_loss"] for r in read_metrics(t.run_dir / "metrics.jsonl") if r["event"] == "eval"}
        for t in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_its_validation_loss_is_that_of_the_quantised_run(config: Config, apt: Apt) -> None:
    config["model"] |= {"qat_name": "int4", "attention_name": "mha", "int4": {"group_size": 8}}
    config["training"]["max_epochs"] = 4
    trainer = train(config)
    own = evaluate(trainer.model, trainer.data.val, 8, trainer.device)["val_loss"]
    assert own == pytest.approx(trainer.metrics["val_loss"])
    run = trainer.run_dir
    assert apt("quantize", run).code == 0, "the scheme is the one that it was trained for"
    after = evaluate_run(RunFolder(run.with_name(f"{run.name}-int4")), device="cpu")["val_loss"]
    assert after == pytest.approx(own, abs=1e-5)
    plain = evaluate_run(RunFolder(run), device="cpu")["val_loss"]
    assert plain != pytest.approx(own, abs=1e-6), "the run itself is opened with the weights as they are"


def test_a_scheme_that_is_not_here_is_passed_over_loudly(config: Config) -> None:
    config["model"]["qat_name"] = "int3_of_somebody"
    with pytest.warns(FallbackWarning, match="quant:int3_of_somebody is not installed; using no quant instead"):
        trainer = train(config)
    assert trainer.step == STEPS
    with pytest.raises(ProviderError, match="quant:int3_of_somebody is not installed"):
        Trainer(config, quiet=True, strict=True).train()


class Strangers(QuantProvider):
    """A scheme of another package, which only quantises."""

    def get_name(self) -> str:
        return "strangers"

    def get_version(self) -> str:
        return "1"

    def quantize(self, model: Any) -> Any:
        return torch.nn.Linear(1, 1)


def test_a_scheme_that_cannot_be_trained_for_says_so(config: Config) -> None:
    registry.register("quant", "strangers", Strangers)
    config["model"]["qat_name"] = "strangers"
    with pytest.warns(FallbackWarning, match="quant:strangers cannot be trained for; using no quant instead"):
        assert train(config).step == STEPS


def test_a_scheme_that_makes_no_model_is_blamed(run: Path) -> None:
    registry.register("quant", "strangers", Strangers)
    path = run / "profile.yaml"
    path.write_text(path.read_text().replace("quant_name: null", "quant_name: strangers"))
    with pytest.raises(ProviderError, match="quant:strangers made Linear of GPT"):
        evaluate_run(RunFolder(run), device="cpu")


def test_a_group_that_does_not_fit_stops_the_run_before_it_begins(config: Config) -> None:
    config["model"] |= {"qat_name": "int4", "int4": {"group_size": 3}}
    with pytest.raises(ConfigError, match=r"model\.int4\.group_size: 3 does not divide"):
        train(config)
    assert not Path(config["output_dir"]).exists()
    config["model"]["int4"] = {"group_sice": 3}
    with pytest.raises(ConfigError, match="did you mean 'group_size'"):
        Trainer(config)


def test_in_bf16_and_with_accumulation_it_trains(config: Config) -> None:
    config["model"]["qat_name"] = "int8_dynamic"
    config["training"] |= {"mixed_precision": "bf16", "batch_size": 4, "gradient_accumulation": 2, "max_epochs": 4}
    trainer = train(config)
    losses = [r["loss"] for r in read_metrics(trainer.run_dir / "metrics.jsonl") if r["event"] == "train"]
    assert losses[-1] < losses[0]


def test_what_is_kept_is_kept_in_training_too(config: Config, recwarn: pytest.WarningsRecorder) -> None:
    config["model"] |= {"qat_name": "int4", "int4": {"keep": ["*.ffn.*"]}}
    names = {n for n, m in train(config).model.named_modules() if isinstance(m, FakeQuantizedLinear)}
    assert names
    assert not any("ffn" in name for name in names)
    assert not [w for w in recwarn if issubclass(w.category, AptWarning)]
