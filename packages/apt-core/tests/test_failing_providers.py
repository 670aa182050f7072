"""Every kind of provider that a run builds, failing when it is made, when it makes its part, or by making something
else; and parts that give NaN. The run goes on or ends as the kind allows, with one clear line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_types import MakeDistribution, RunApt
from safetensors.torch import load_file
from small_run import TEXT, small_config
from torch import Tensor, nn

from apt.checkpoint.store import CheckpointStore
from apt.core.errors import AptWarning, FallbackWarning, ProviderError, TrainingError
from apt.core.providers.align import AlignProvider
from apt.core.providers.dataset import DatasetProvider, Piece
from apt.core.providers.router import RouterProvider
from apt.core.providers.tracker import TrackerProvider
from apt.core.registry import registry
from apt.core.runs import RunFolder
from apt.data.tokenizers import ByteTokenizerProvider
from apt.modeling.layers.attention_tva import TVAAttention
from apt.modeling.layers.ffn import DefaultFFN
from apt.training.trainer import Trainer

Config = dict[str, Any]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Two epochs of two steps."""
    training = {"max_epochs": 2, "batch_size": 24, "log_every": 1}
    return small_config(tmp_path, model={"num_layers": 1}, training=training)


def last_weights(run: RunFolder) -> dict[str, Tensor]:
    return load_file(max(run.checkpoints.iterdir()) / "model.safetensors")


class Boom(RuntimeError):
    """What a provider raises here."""


class Router(RouterProvider):
    def get_name(self) -> str:
        return "broken"

    def get_version(self) -> str:
        return "1"

    def wrap_ffn(self, base_ffn: nn.Module, config: Mapping[str, Any]) -> nn.Module:
        return base_ffn


class Align(AlignProvider):
    get_name, get_version = Router.get_name, Router.get_version

    def compute_align_loss(self, logits: Tensor, targets: Tensor, model_state: Mapping[str, Any]) -> Tensor:
        return logits.new_zeros(())


class Tracker(TrackerProvider):
    get_name, get_version = Router.get_name, Router.get_version

    def start(self, run_dir: Path, config: Mapping[str, Any], step: int) -> None: ...

    def log(self, record: Mapping[str, Any]) -> None: ...


class Dataset(DatasetProvider):
    get_name, get_version = Router.get_name, Router.get_version

    def pieces(self) -> Iterator[Piece]:
        yield Piece(TEXT)

    def fingerprint(self) -> str:
        return "the bottles"


PARTS: dict[str, tuple[type, str, dict[str, Any]]] = {
    "attention": (TVAAttention, "create_layer", {"model.attention_name": "broken"}),
    "ffn": (DefaultFFN, "create_layer", {"model.ffn_name": "broken"}),
    "router": (Router, "wrap_ffn", {"model.router_name": "broken", "model.moe": {"enabled": True}}),
    "align": (Align, "compute_align_loss", {"model.align_name": "broken"}),
    "tracker": (Tracker, "start", {"training.trackers": ["broken"]}),
    "dataset": (Dataset, "pieces", {"data.dataset": "broken", "data.train_path": None}),
    "tokenizer": (ByteTokenizerProvider, "build", {"data.tokenizer": "broken"}),
}
"""Kind -> a provider that works, the method that makes its part, and what in a profile asks for it."""
STAND_INS = {
    "attention": "attention:tva_default", "ffn": "ffn:default", "router": "no router", "align": "no align",
    "tracker": "no tracker",
}  # fmt: skip
HEARD = {"align": "extra_losses", "tracker": "on_training_start"}
"""Kinds whose part is made while the run goes: through which hook."""


def register(kind: str, way: str) -> dict[str, Any]:
    """Register a provider that fails in this way; returns what asks for it."""
    base, method, overrides = PARTS[kind]

    def boom(self: object, *arguments: Any, **options: Any) -> Any:
        raise Boom("on purpose")

    def wrong(self: object, *arguments: Any, **options: Any) -> Any:
        return ["no such", "thing"]

    own = {"constructor": {"__init__": boom}, "version": {"get_version": boom}, "part": {method: boom}}
    section = "moe" if kind == "router" else None
    registry.register(kind, "broken", type("Broken", (base,), own.get(way, {method: wrong})), section=section)
    return overrides


def fails_late(kind: str, way: str) -> bool:
    return kind in HEARD and way in ("part", "wrong type")


WAYS = ("constructor", "version", "part", "wrong type")
CELLS = [(kind, way) for kind in PARTS for way in WAYS if (kind, way) != ("tracker", "wrong type")]
"""What a tracker returns is nobody's affair."""


@pytest.mark.parametrize(("kind", "way"), [cell for cell in CELLS if cell[0] in STAND_INS and not fails_late(*cell)])
def test_a_part_of_the_model_that_cannot_be_built_has_a_stand_in_or_is_left_out(
    config: Config, kind: str, way: str
) -> None:
    overrides = register(kind, way)
    trainer = Trainer(config, overrides=overrides, quiet=True)
    with pytest.warns(FallbackWarning) as warned:
        trainer.train()
    assert trainer.step == 4
    said = [str(warning.message) for warning in warned]
    assert len(said) == 1 and "\n" not in said[0]
    assert f"using {STAND_INS[kind]} instead" in said[0]
    if way != "wrong type":
        assert f"{kind}:broken cannot be built: Boom: on purpose" in said[0]
    slot = next(slot for slot in json.loads(RunFolder(trainer.run_dir).lock.read_text())["slots"] if slot["fallback"])
    assert (slot["kind"], slot["requested"]) == (kind, "broken")
    with pytest.raises(ProviderError):
        Trainer(config, overrides=overrides, quiet=True, strict=True).train()


@pytest.mark.parametrize(("kind", "way"), [cell for cell in CELLS if fails_late(*cell)])
def test_a_part_that_fails_while_the_run_goes_is_a_failed_effect(config: Config, kind: str, way: str) -> None:
    overrides, where = register(kind, way), f"{kind}.broken.{HEARD[kind]}"
    trainer = Trainer(config, overrides=overrides, quiet=True)
    with pytest.warns(AptWarning) as warned:
        trainer.train()
    assert trainer.step == 4
    assert [str(warning.message).startswith(f"{where} failed: ") for warning in warned] == [True]
    assert CheckpointStore(RunFolder(trainer.run_dir).checkpoints).load().dropped == [where]
    trainer = Trainer(config, overrides={**overrides, "on_plugin_error": "stop"}, quiet=True)
    with pytest.raises(TrainingError, match=rf"{where} failed: "):
        trainer.train()
    assert RunFolder(trainer.run_dir).has_checkpoints()


@pytest.mark.parametrize(("kind", "way"), [cell for cell in CELLS if cell[0] not in STAND_INS])
def test_nothing_stands_in_for_what_a_run_reads(config: Config, kind: str, way: str) -> None:
    overrides = register(kind, way)
    with pytest.raises(ProviderError, match=rf"^{kind}:broken ") as refused:
        Trainer(config, overrides=overrides, quiet=True).train()
    assert ("on purpose" in refused.value.message) == (way != "wrong type")
    assert not Path(config["output_dir"]).exists()


@pytest.mark.parametrize("method", ["encode", "save"])
def test_a_tokenizer_that_fails_at_its_work_is_named(config: Config, method: str) -> None:
    class Breaks(ByteTokenizerProvider):
        def build(self, pieces: Any) -> Any:
            tokenizer: Any = super().build(pieces)

            def boom(*_: Any) -> None:
                raise Boom("on purpose")

            setattr(tokenizer, method, boom)
            return tokenizer

    registry.register("tokenizer", "broken", Breaks)
    with pytest.raises(ProviderError, match="tokenizer:broken failed: Boom: on purpose"):
        Trainer(config, overrides={"data.tokenizer": "broken"}, quiet=True).train()


def test_an_attention_that_returns_no_weights_beside_its_output_is_not_taken_apart(config: Config) -> None:
    class Bare(TVAAttention):
        def create_layer(self, *arguments: Any, **options: Any) -> Any:
            layer = super().create_layer(*arguments, **options)
            layer.register_forward_hook(lambda module, inputs, output: output[0])
            return layer

    registry.register("attention", "broken", Bare)
    plain = last_weights(RunFolder(Trainer(config, quiet=True).train()))
    bare = last_weights(RunFolder(Trainer(config, overrides={"model.attention_name": "broken"}, quiet=True).train()))
    assert all(torch.equal(weight, plain[name]) for name, weight in bare.items())


# NaN

NAN_PLUGIN = """
import torch
from apt.hookspecs import hookimpl
from apt.core.providers.align import AlignProvider
from apt.core.providers.router import RouterProvider
from apt.modeling.layers.attention_tva import TVAAttention
from apt.modeling.layers.ffn import DefaultFFN

API_VERSION = (1, 0)
HOOK = False
seen = 0

def poison():
    "NaN from the third step in training on."
    global seen
    seen += 1
    return float("nan") if seen >= 3 else 0.0

@hookimpl
def apt_register_providers(registry):
    for kind, name in (("attention", "Attention"), ("ffn", "FFN"), ("router", "Router"), ("align", "Align")):
        registry.register(kind, "nan", f"nan_plugin:{name}", version="1")

@hookimpl
def extra_losses(logits):
    return {"mine": logits.new_tensor(poison())} if HOOK else None

class Attention(TVAAttention):
    def create_layer(self, *arguments, **options):
        layer = super().create_layer(*arguments, **options)
        layer.register_forward_hook(lambda m, i, out: (out[0] + poison(), out[1]) if m.training else out)
        return layer

class FFN(DefaultFFN):
    def create_layer(self, *arguments, **options):
        layer = super().create_layer(*arguments, **options)
        layer.register_forward_hook(lambda m, i, out: out + poison() if m.training else out)
        return layer

class Router(RouterProvider):
    def get_name(self):
        return "nan"
    def get_version(self):
        return "1"
    def wrap_ffn(self, base_ffn, config):
        base_ffn.register_forward_hook(
            lambda m, i, out: (out, out.new_tensor(poison() if m.training else 0.0))
        )
        return base_ffn

class Align(AlignProvider):
    get_name, get_version = Router.get_name, Router.get_version
    def compute_align_loss(self, logits, targets, model_state):
        return logits.new_tensor(poison())
"""

NAN_PARTS = {
    "attention": ("--model.attention_name", "nan"),
    "ffn": ("--model.ffn_name", "nan"),
    "router": ("--model.router_name", "nan", "--model.moe", "{enabled: true}"),
    "align": ("--model.align_name", "nan"),
    "hook": (),
}
BLAMED = {"router": ", by 'aux_loss' of the model", "align": ", by 'nan' of align.nan", "hook": ", by 'mine' of nan"}


@pytest.mark.parametrize("part", NAN_PARTS)
def test_a_part_that_gives_nan_stops_the_run_and_what_was_saved_is_kept(
    config: Config, part: str, make_distribution: MakeDistribution, run_apt: RunApt
) -> None:
    text = NAN_PLUGIN.replace("HOOK = False", "HOOK = True") if part == "hook" else NAN_PLUGIN
    make_distribution("apt-nan", plugins={"nan": "nan_plugin"}, modules={"nan_plugin": text})
    Path("small.yaml").write_text(json.dumps(config))
    result = run_apt("train", "-p", "small.yaml", "--quiet", *NAN_PARTS[part])
    assert result.code == 2
    error = result.err[result.err.index("error: ") :].splitlines()
    assert error[0] == f"error: not finite at step 3: the loss{BLAMED.get(part, '')}; the checkpoint of step 2 is kept"
    assert len(error) == 2 and error[1].startswith("  fix: ")
    run = RunFolder(Path(config["output_dir"]) / "small-1")
    assert CheckpointStore(run.checkpoints).steps() == [2]
    assert all(bool(weight.isfinite().all()) for weight in last_weights(run).values())
    assert run_apt("eval", str(run.path)).code == 0
