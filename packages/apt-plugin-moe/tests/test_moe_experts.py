"""E copies of a layer, stacked or separate, against a plain loop over modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt.modeling.layers.config import FFNConfig
from apt.modeling.layers.ffn import FeedForward, GatedFeedForward
from apt_plugin_moe.dispatch import Dispatch, sort_by_expert
from apt_plugin_moe.experts import SeparateExperts, StackedExperts, can_be_stacked, make_experts, split_output

E, D = 5, 16

torch.set_num_threads(1)


class Bottleneck(nn.Module):
    """A third party's layer: linear maps in a list and in a submodule, a residual, functions."""

    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.maps = nn.ModuleList([nn.Linear(D, 4, bias=False), nn.Linear(4, 32)])
        self.out = nn.Sequential(nn.GELU(), nn.Linear(32, D), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.maps
        return 0.5 * x + self.out(torch.tanh(second(F.relu(first(x)))))


class UsesItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.w = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.weight) + self.w(x)


class HasANorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.norm, self.w = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(self.norm(x))


class SharesAWeight(nn.Module):
    """One weight in two maps, and nothing else: a stack would give each map a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.one, self.two = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class SharesAMap(nn.Module):
    """One map under two names, and an output that starts at zero, so that no output shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.one = self.two = nn.Linear(D, D)
        self.out = nn.Linear(D, D)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(torch.tanh(self.one(x))))


class HasALoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.w = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.w(x)
        return out, out.square().mean()


class HasABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.w = nn.Linear(D, D)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.w(x)


class HasAHook(nn.Module):
    """A linear map whose output something else changes."""

    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.w = nn.Linear(D, D)
        self.w.register_forward_hook(_halve)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x)


def _halve(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    return out / 2


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1.0


class HasAnOwnLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d_model = D
        self.w, self.own = nn.Linear(D, D), OwnLinear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.w(x))


def bare_linear() -> nn.Module:
    linear = nn.Linear(D, D)
    linear.d_model = D
    return linear


def without_weights() -> nn.Module:
    module = nn.Sequential(nn.GELU())
    module.d_model = D
    return module


STACKABLE = {
    "ffn": lambda: FeedForward(D, 32, FFNConfig()),
    "ffn, bias": lambda: FeedForward(D, 32, FFNConfig(bias=True)),
    "gated": lambda: GatedFeedForward(D, 32, FFNConfig()),
    "gated, bias": lambda: GatedFeedForward(D, 32, FFNConfig(bias=True)),
    "odd widths": lambda: GatedFeedForward(7, 13, FFNConfig(bias=True)),
    "odd inside": lambda: FeedForward(D, 13, FFNConfig()),
    "third party": Bottleneck,
}
NOT_STACKABLE = {
    "weight used": UsesItsWeight,
    "norm": HasANorm,
    "shared weight": SharesAWeight,
    "shared map": SharesAMap,
    "loss": HasALoss,
    "buffer": HasABuffer,
    "hook": HasAHook,
    "own linear": HasAnOwnLinear,
    "bare linear": bare_linear,
    "no weights": without_weights,
}
SIZES = [(3, 1, 4, 2, 5), (0, 6, 0, 1, 0), (0, 0, 0, 0, 7)]


def rows_of(sizes: tuple[int, ...]) -> Dispatch:
    return sort_by_expert(torch.repeat_interleave(torch.arange(E), torch.tensor(sizes))[:, None], None, E)


def filled(experts: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The experts, each with weights of its own."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.4)
    return experts.to(dtype).eval()


def alone(base: nn.Module, experts: StackedExperts | SeparateExperts) -> list[nn.Module]:
    """The same experts as modules that know nothing of each other."""
    modules = []
    for number in range(E):
        module = copy.deepcopy(base).to(next(experts.parameters(), torch.empty(0)).dtype).eval()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(experts.copy_of(name, number))
        modules.append(module)
    return modules


def check(base: nn.Module, experts, sizes: tuple[int, ...], dtype: torch.dtype, **tolerance: float) -> None:
    """Output, auxiliary loss and every gradient are those of a loop over the experts."""
    modules = alone(base, experts)
    x_MD = torch.randn(sum(sizes), base.d_model, dtype=dtype, requires_grad=True)
    x2_MD = x_MD.detach().clone().requires_grad_()
    g_MD = torch.randn_like(x_MD)

    y_MD, aux_loss = experts(x_MD, rows_of(sizes))
    outs, expected_aux = [], None
    for module, rows in zip(modules, x2_MD.split(sizes), strict=True):
        if len(rows):
            out, aux = split_output(module(rows[None]))
            outs.append(out[0])
            if aux is not None:
                expected_aux = (0.0 if expected_aux is None else expected_aux) + aux * len(rows) / sum(sizes)
    expected_MD = torch.cat(outs)
    torch.testing.assert_close(y_MD, expected_MD, **tolerance)
    assert (aux_loss is None) == (expected_aux is None)
    if aux_loss is not None:
        torch.testing.assert_close(aux_loss, expected_aux)

    ((y_MD * g_MD).sum() + (0.0 if aux_loss is None else aux_loss)).backward()
    ((expected_MD * g_MD).sum() + (0.0 if expected_aux is None else expected_aux)).backward()
    torch.testing.assert_close(x_MD.grad, x2_MD.grad, **tolerance)
    for name, _ in base.named_parameters():
        grads = [copied.grad for copied in experts.copies_of(name)]
        for number, module in enumerate(modules):
            got = grads[0][number] if isinstance(experts, StackedExperts) else grads[number]
            wanted = module.get_parameter(name).grad
            if wanted is None:  # an expert that no row visited
                assert got is None or not got.any()
            else:
                torch.testing.assert_close(got, wanted, **tolerance)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", STACKABLE)
def test_a_stack_is_a_loop(kind: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    base = STACKABLE[kind]()
    experts = make_experts(base, E)
    assert isinstance(experts, StackedExperts)
    check(base, filled(experts, dtype), sizes, dtype)


@pytest.mark.parametrize("kind", ["gated, bias", "odd widths"])
def test_under_bf16_autocast(kind: str) -> None:
    base = STACKABLE[kind]()
    experts = filled(make_experts(base, E))
    with torch.autocast("cpu", torch.bfloat16):
        assert experts(torch.randn(7, base.d_model), rows_of(SIZES[1]))[0].dtype == torch.bfloat16
        check(base, experts, SIZES[1], torch.float32, rtol=0.05, atol=0.1)
    assert all(parameter.grad.dtype == torch.float32 for parameter in experts.parameters())


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", NOT_STACKABLE)
def test_what_a_stack_would_get_wrong_is_kept_apart(kind: str, sizes: tuple[int, ...]) -> None:
    base = NOT_STACKABLE[kind]()
    assert not can_be_stacked(base)
    experts = make_experts(base, E)
    assert isinstance(experts, SeparateExperts)
    check(base, filled(experts), sizes, torch.float32)


@pytest.mark.parametrize("kind", STACKABLE)
def test_apart_they_compute_what_a_stack_does(kind: str) -> None:
    base = STACKABLE[kind]()
    check(base, filled(SeparateExperts(base, E)), SIZES[0], torch.float32)


def test_apart_without_a_row() -> None:
    experts = SeparateExperts(HasANorm(), E)
    y_MD, aux_loss = experts(torch.empty(0, D), rows_of((0,) * E))
    assert y_MD.shape == (0, D) and aux_loss is None


@pytest.mark.parametrize("kind", ["gated, bias", "odd widths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_gradient_as_large_as_all_experts_for_each_of_them(kind: str, dtype: torch.dtype) -> None:
    base = STACKABLE[kind]()
    experts = filled(make_experts(base, E), dtype)
    x_MD = torch.randn(sum(SIZES[0]), base.d_model, dtype=dtype, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        experts(x_MD, rows_of(SIZES[0]))[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::cat" in names or "aten::_grouped_mm" in names
    assert not names & {"aten::select_backward", "SelectBackward0"}


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_a_gradient_may_lie_in_any_order(layout: str) -> None:
    experts = filled(make_experts(FeedForward(D, 32, FFNConfig()), E))
    x_MD = torch.randn(sum(SIZES[0]), D)
    g_MD = {
        "expanded": torch.ones(()).expand(len(x_MD), D),
        "transposed": torch.randn(D, len(x_MD)).t(),
        "strided": torch.randn(len(x_MD), 2 * D)[:, ::2],
    }[layout]
    grads = [
        torch.autograd.grad(experts(x_MD, rows_of(SIZES[0]))[0], list(experts.parameters()), gradient)
        for gradient in (g_MD, g_MD.clone(memory_format=torch.contiguous_format))
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_asking_changes_nothing() -> None:
    base = Bottleneck().train()
    base.out.eval()
    modes = [module.training for module in base.modules()]
    state, weights = torch.get_rng_state(), copy.deepcopy(base.state_dict())
    assert can_be_stacked(base)
    assert [module.training for module in base.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", STACKABLE)
def test_whether_it_can_be_stacked_is_no_matter_of_dtype(kind: str, dtype: torch.dtype) -> None:
    assert can_be_stacked(STACKABLE[kind]().to(dtype))


def test_without_memory_for_weights() -> None:
    with torch.device("meta"):
        experts = make_experts(GatedFeedForward(D, 32, FFNConfig()), E)
    assert isinstance(experts, StackedExperts)
    assert experts.copy_of("w_up.weight", 3).is_meta


def test_vectors_of_a_stack_do_not_decay_and_marks_are_kept() -> None:
    base = FeedForward(D, 32, FFNConfig(bias=True))
    base.w_out.weight.mark = "mine"
    stack = make_experts(base, E).stack
    assert stack.w_in.bias.shape == (E, 32) and stack.w_in.bias.no_weight_decay
    assert not hasattr(stack.w_in.weight, "no_weight_decay")
    assert stack.w_out.weight.mark == "mine"


def test_the_rows_of_a_call_that_fails_are_not_kept() -> None:
    experts = make_experts(FeedForward(D, 32, FFNConfig()), E)
    with pytest.raises(RuntimeError):
        experts(torch.randn(3, D + 1), rows_of(SIZES[0]))
    assert experts.rows.dispatch is None
