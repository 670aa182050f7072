"""What layers keep to where they are built, saved, copied and loaded, and what of the world they leave alone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from apt.testing.check import check
from apt.testing.compare import require, require_equal
from apt.testing.subjects import LayerSubject

LAYERS = ("attention", "ffn", "router")


@check(*LAYERS)
def says_its_width(subject: LayerSubject) -> None:
    """The layer has `d_model`, by which the block around it builds its norms, and what it says of its FLOPs is a number
    of FLOPs: throughput figures come from it."""
    layer = subject.layer()
    found = getattr(layer, "d_model", None)
    require(found == subject.d_model, f"layer.d_model is {found!r}, and it was built for {subject.d_model}")
    flops_per_token = getattr(layer, "flops_per_token", None)
    if flops_per_token is not None:
        flops = flops_per_token(64)
        require(isinstance(flops, int) and flops > 0, f"flops_per_token(64) is {flops!r}: return a positive int")


@check(*LAYERS)
def state_dict_round_trip(subject: LayerSubject) -> None:
    """The state dict, through safetensors and loaded strictly into another layer, makes that one the same: what a
    checkpoint does not hold is lost at the first resume."""
    saved, other = subject.layer(seed=0), subject.layer(seed=1)
    state = saved.state_dict()
    strays = [name for name, value in state.items() if not isinstance(value, Tensor)]
    require(not strays, f"the state dict holds what is no tensor: {strays}; checkpoints hold tensors alone")
    places: dict[int, str] = {}
    for name, tensor in state.items():
        if tensor.numel():
            twin = places.setdefault(tensor.untyped_storage().data_ptr(), name)
            require(twin == name, f"{name} and {twin} share memory: a state dict holds each tensor once")
    other.load_state_dict(load_safetensors(save_safetensors({k: v.contiguous() for k, v in state.items()})))
    x_BTD = subject.x()
    require_equal(
        subject.forward(other, x_BTD),
        subject.forward(saved, x_BTD),
        "the output of a layer that has loaded the state dict, beside that of the layer that saved it",
        "something it computes with is not in the state dict: use nn.Parameter or a persistent buffer",
    )


@check(*LAYERS)
def deepcopy_is_independent(subject: LayerSubject) -> None:
    """A deep copy computes the same and lives on its own: averages of the weights and experts are made so."""
    layer, x_BTD = subject.layer(), subject.x()
    before = subject.forward(layer, x_BTD)
    twin = copy.deepcopy(layer)
    require_equal(subject.forward(twin, x_BTD), before, "the output of a deep copy", "look at __deepcopy__")
    advice = "the two share tensors: look for closures, class attributes and __deepcopy__"
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2).add_(1)
    require_equal(subject.forward(twin, x_BTD), before, "the output of a deep copy after the original changed", advice)


@check(*LAYERS)
def layers_share_nothing(subject: LayerSubject) -> None:
    """Two layers of one provider share no tensor and no module: a model builds each of its blocks with the same
    provider."""
    provider_subject = type(subject)(subject.kind, _same(subject.provider()), device=str(subject.device))
    one, two = provider_subject.layer(seed=0), provider_subject.layer(seed=1)
    shared = {id(module) for module in one.modules()} & {id(module) for module in two.modules()}
    require(not shared, f"two layers share {len(shared)} modules: build new ones in each call")
    memory = {t.untyped_storage().data_ptr() for t in _tensors(one) if t.numel()}
    twice = [name for name, t in two.state_dict().items() if t.numel() and t.untyped_storage().data_ptr() in memory]
    require(not twice, f"two layers share the memory of {twice}: make new tensors in each call")


@check(*LAYERS)
def meta_device(subject: LayerSubject) -> None:
    """It can be built on the meta device, without memory, and is complete once memory is given and a state dict loaded:
    models larger than a machine's memory are built so."""
    real, x_BTD = subject.layer(), subject.x()
    with torch.device("meta"):
        layer = subject.build()
    solid = [name for name, tensor in layer.state_dict().items() if not tensor.is_meta]
    require(not solid, f"on the meta device {solid} take memory all the same: name no device where they are made")
    # Their types as in the layer that computes: what is loaded is copied into them.
    layer.to(subject.dtype).to_empty(device=subject.device)
    layer.load_state_dict(real.state_dict())
    require_equal(
        subject.forward(layer.eval(), x_BTD),
        subject.forward(real, x_BTD),
        "the output of a layer built on the meta device, after to_empty and load_state_dict",
        "something it computes with is neither a parameter nor a persistent buffer, and got no content",
    )


@check(*LAYERS)
def initial_weights_follow_the_seed(subject: LayerSubject) -> None:
    """The same seed gives the same initial weights and another one others, and building leaves torch's generator where
    other layers draw on: a layer that seeds it makes all layers alike, and a run no longer the one its seed says."""

    def built(seed: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        layer = subject.build()
        return layer, torch.rand(4)

    (one, after_one), (again, after_again), (other, after_other) = built(3), built(3), built(4)
    for name, tensor in one.state_dict().items():
        require(torch.equal(tensor, again.state_dict()[name]), f"the same seed gives another {name}: draw with torch")
    require(torch.equal(after_one, after_again), "what is drawn after building differs under one seed")
    require(
        not torch.equal(after_one, after_other),
        "after building, torch's generator is in the same state whatever the seed was: take torch.manual_seed out",
    )
    if subject.kind != "router" and any(t.numel() > 1 and t.std() > 0 for t in one.parameters() if t.dim() > 1):
        same = all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
        require(not same, "another seed gives the same initial weights: draw them from torch's global generator")


@check(*LAYERS)
def global_state_is_left_alone(subject: LayerSubject) -> None:
    """Building, forward and backward change no global setting, and evaluation draws no random number: what one plugin
    sets holds for all others, and for resuming bit for bit."""
    settings = _settings()
    layer, x_BTD = subject.layer(), subject.x(grad=True)
    subject.loss(layer, x_BTD).backward()
    for (what, before), (_, after) in zip(settings, _settings(), strict=True):
        require(before == after, f"{what} was {before} and is {after} after building, forward and backward")
    before_torch, before_python = torch.get_rng_state(), random.getstate()
    before_numpy = _numpy_state()
    subject.forward(layer, x_BTD)
    for what, same in (
        ("torch's", torch.equal(torch.get_rng_state(), before_torch)),
        ("Python's", random.getstate() == before_python),
        ("NumPy's", _numpy_state() == before_numpy),
    ):
        require(same, f"forward in evaluation draws from {what} random generator: it may in training alone")


@check(*LAYERS)
def evaluation_changes_nothing(subject: LayerSubject) -> None:
    """Evaluation leaves parameters and buffers as they are: statistics that move there make a run's result depend on
    how often it was measured."""
    layer = subject.layer()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for seed in range(3):
        subject.forward(layer, subject.x(seed=seed))
    for name, tensor in layer.state_dict().items():
        require(
            torch.equal(tensor, before[name]),
            f"{name} changes in evaluation: update statistics only where self.training is true",
        )


def _same(provider: Any) -> Callable[[], Any]:
    return lambda: provider


def _tensors(layer: nn.Module) -> list[Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _numpy_state() -> tuple[int, list[int]]:
    state: dict[str, Any] = numpy.random.get_state(legacy=False)["state"]
    return state["pos"], state["key"].tolist()


def _settings() -> list[tuple[str, object]]:
    return [
        ("torch's default dtype", torch.get_default_dtype()),
        ("torch's default device", torch.get_default_device()),
        ("the number of threads", torch.get_num_threads()),
        ("whether gradients are computed", torch.is_grad_enabled()),
        ("torch.use_deterministic_algorithms", torch.are_deterministic_algorithms_enabled()),
        ("anomaly detection", torch.is_anomaly_enabled()),
        ("the precision of matrix products", torch.get_float32_matmul_precision()),
    ]
