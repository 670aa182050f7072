"""A model in shards, of which this process holds the only one: what is gathered when, and what goes in and out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import small_config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from apt.api import ModelBuilder
from apt.checkpoint.rng import rng_state
from apt.checkpoint.sharded import ShardedStore
from apt.checkpoint.store import Checkpoint, CheckpointStore
from apt.core.config import TrainingConfig
from apt.core.world import World, own_part
from apt.data.loader import Batch
from apt.modeling.layers.stand_in import call_with
from apt.training.distributed import reduced
from apt.training.finite import all_finite
from apt.training.optim import build_optimizer
from apt.training.sharding import ShardedLoss, is_sharded, shard, whole
from apt.training.step import BatchLoss, accumulate_gradients, clip_gradients, update


class Alone(World):
    """A world of one process that goes the way of several."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: dict[str, Any] = {}

    def tell(self, what: str, message: Any) -> None:
        self.notes[what] = message


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(tmp_path: Path, *, sharded: bool, bf16: bool = False) -> Any:
    torch.manual_seed(0)
    model = ModelBuilder(small_config(tmp_path, model={"dropout": 0.0})).build_model(vocab_size=11)
    if sharded:
        shard(model, Alone(), torch.device("cpu"), bf16=bf16)
    return model


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Any]:
    """The same model in shards and plain."""
    return build(tmp_path, sharded=True), build(tmp_path, sharded=False)


def batch() -> Batch:
    tokens = torch.randint(0, 11, (4, 9), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def loss_of(model: Any) -> nn.Module:
    return BatchLoss(model, torch.autocast("cpu", enabled=False))


def in_shards(model: nn.Module) -> set[bool]:
    return {isinstance(parameter, DTensor) for parameter in model.parameters()}


def test_steps_are_those_of_the_plain_model(pair: tuple[Any, Any]) -> None:
    sharded, plain = pair
    assert is_sharded(sharded) and not is_sharded(plain)
    assert in_shards(sharded) == {True}
    losses = []
    for model in pair:
        loss = ShardedLoss(loss_of(model), model) if model is sharded else loss_of(model)
        optimizer = build_optimizer(model, TrainingConfig())
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        told = []
        for _ in range(3):
            told += [accumulate_gradients(loss, [batch(), batch()]).total, clip_gradients(parameters, 1.0)]
            update(optimizer, 0.01)
        losses.append(torch.stack([own_part(number) for number in told]))  # type: ignore[arg-type]
        assert len(optimizer.param_groups[1]["params"]) == len(
            [p for n, p in model.named_parameters() if p.ndim < 2 or n.endswith("attention.w")]
        ), "what must not decay says so of its shards too"
    torch.testing.assert_close(losses[0], losses[1])
    assert all_finite(sharded.parameters())


def test_only_a_model_in_shards_is_wrapped_for_them(pair: tuple[Any, Any]) -> None:
    plain = loss_of(pair[1])
    assert reduced(plain, pair[1], World()) is plain
    assert isinstance(reduced(loss_of(pair[0]), pair[0], World(0, 2)), ShardedLoss)


def test_without_a_backward_to_come_nothing_stays_gathered(pair: tuple[Any, Any]) -> None:
    """The root's weights would be those of before the next update."""
    sharded, _ = pair
    sharded(batch().tokens)
    assert in_shards(sharded) == {True, False}, "the root keeps its weights for the backward pass"
    with torch.no_grad():
        sharded(batch().tokens)
    assert in_shards(sharded) == {True}


def test_whole_is_whole_for_as_long_as_it_is_asked_for(pair: tuple[Any, Any]) -> None:
    sharded, plain = pair
    with torch.no_grad():
        with whole(plain):
            wanted = plain(batch().tokens).logits
        with whole(sharded):
            for _ in range(2):
                assert torch.equal(sharded(batch().tokens).logits, wanted)
                assert in_shards(sharded) == {False}
        assert in_shards(sharded) == {True}
        assert torch.equal(sharded(batch().tokens).logits, wanted)
        assert in_shards(sharded) == {True}


def test_it_is_computed_with_other_weights_and_keeps_its_own(pair: tuple[Any, Any]) -> None:
    """In the midst of a step, too: the gradient that follows is that of its own weights."""
    gradients = []
    for model in pair:
        other = {name: torch.full_like(p.detach(), 0.1) for name, p in model.named_parameters() if "ffn" in name}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = model(batch().tokens).logits.square().mean()
        stood_in = call_with(model, other, (batch().tokens,), {}).logits
        assert not stood_in.requires_grad
        loss.backward()
        for name, parameter in model.named_parameters():
            assert torch.equal(own_part(parameter), own_part(before[name]))
        assert all((own_part(weight) == 0.1).all() for weight in other.values())
        gradients.append([stood_in, *(own_part(p.grad) for p in model.parameters())])
        call_with(model, other, (batch().tokens,), {})
        assert in_shards(model) == {model is pair[0]}
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_bf16_it_computes_in_bf16_and_keeps_fp32(tmp_path: Path) -> None:
    model = build(tmp_path, sharded=True, bf16=True)
    logits = model(batch().tokens).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert {tensor.dtype for p in model.parameters() for tensor in (p, p.grad)} == {torch.float32}


def test_what_is_saved_is_read_into_shards_and_as_a_whole(pair: tuple[Any, Any], tmp_path: Path) -> None:
    sharded, _ = pair
    optimizer = build_optimizer(sharded, TrainingConfig())
    sharded(batch().tokens).logits.square().mean().backward()
    optimizer.step()
    folder = tmp_path / "checkpoints"
    store = ShardedStore(folder, world=Alone(), parameters=dict(sharded.named_parameters()))
    checkpoint = Checkpoint(1, 0, 1, sharded.state_dict(), optimizer.state_dict(), rng_state())
    store.write(store.snapshot(checkpoint, copy=True))
    parts, full = store.load(), CheckpointStore(folder).load()
    for name, weight in checkpoint.model.items():
        assert isinstance(parts.model[name], DTensor) == isinstance(weight, DTensor)
        assert torch.equal(own_part(parts.model[name]), own_part(weight))
        assert type(full.model[name]) is Tensor and torch.equal(full.model[name], own_part(weight))
    for index, state in checkpoint.optimizer["state"].items():
        for name, value in state.items():
            read = parts.optimizer["state"][index][name]
            assert isinstance(read, DTensor) == (name != "step") and torch.equal(own_part(read), own_part(value))
    optimizer.load_state_dict(parts.optimizer)
    CheckpointStore(folder).save(full)
    again = store.load()
    assert all(torch.equal(own_part(again.model[name]), own_part(weight)) for name, weight in checkpoint.model.items())
