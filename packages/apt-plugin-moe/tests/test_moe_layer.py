"""The layer against a plain reference, token by token; the switch from dense to experts; what it keeps and promises."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from apt.modeling.layers.config import FFNConfig
from apt.modeling.layers.ffn import FeedForward, GatedFeedForward
from apt_plugin_moe.config import MoEConfig
from apt_plugin_moe.layer import MoEFFN
from apt_plugin_moe.router import MoERouter
from apt_plugin_moe.upcycling import draw_experts, upcycle

D, B, T = 8, 3, 5

torch.set_num_threads(1)


def build(base: nn.Module | None = None, *, seed=0, skew=0.0, **options) -> MoEFFN:
    """A float64 layer whose experts all differ, with a router far from even; `skew` prefers the first experts."""
    torch.manual_seed(seed)
    config = MoEConfig(**{"experts": 4, **options})
    layer = MoEFFN(base or GatedFeedForward(D, 12, FFNConfig(bias=True)), config).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
        layer.selection_bias.copy_(torch.linspace(skew, 0, config.experts) + 0.02 * torch.randn(config.experts))
    return layer


def draw(*shape: int, seed=1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Plain:
    """The definition, a token at a time, with modules of its own that hold the layer's weights."""

    def __init__(self, layer: MoEFFN) -> None:
        self.config, self.temperature = layer.config, layer.temperature
        self.bias = layer.selection_bias.tolist()
        self.router = layer.router.weight.detach().clone().requires_grad_()
        self.experts = [self._expert(layer, layer.experts, e) for e in range(layer.config.experts)]
        self.shared = [self._expert(layer, layer.shared, e) for e in range(layer.config.shared_experts)]

    @staticmethod
    def _expert(layer, experts, number: int) -> nn.Module:
        expert = copy.deepcopy(layer.dense)
        with torch.no_grad():
            for name, parameter in expert.named_parameters():
                parameter.copy_(experts.copy_of(name, number))
        return expert

    def __call__(self, x_BTD: Tensor, limit: int | None) -> tuple[Tensor, Tensor]:
        config, experts = self.config, range(self.config.experts)
        batch, length, _ = x_BTD.shape
        room = [math.inf if limit is None else limit for _ in experts]
        demand = [0 for _ in experts]
        out = torch.zeros(x_BTD.shape, dtype=x_BTD.dtype).unbind(1)
        out = [list(row.unbind(0)) for row in out]
        mean_p, squares = 0, 0
        for t in range(length):
            for b in range(batch):
                x_D = x_BTD[b, t]
                logits = self.router @ x_D
                p = torch.exp(logits / self.temperature) / torch.exp(logits / self.temperature).sum()
                mean_p = mean_p + p / (batch * length)
                squares = squares + torch.log(torch.exp(logits).sum()) ** 2 / (batch * length)
                ranked = sorted(experts, key=lambda e: p[e].item() + self.bias[e], reverse=True)
                for e in ranked[: config.top_k]:
                    demand[e] += 1
                if config.overflow == "next":
                    visits = [e for e in ranked if room[e]][: config.top_k]
                    total = sum(p[e] for e in visits)
                else:
                    visits = [e for e in ranked[: config.top_k] if room[e]]
                    total = sum(p[e] for e in ranked[: config.top_k])
                y_D = torch.zeros_like(x_D)
                for e in visits:
                    room[e] -= 1
                    y_D = y_D + p[e] / (total if config.normalize else 1) * self.experts[e](x_D[None, None])[0, 0]
                for expert in self.shared:
                    y_D = y_D + expert(x_D[None, None])[0, 0]
                out[t][b] = y_D / (1 + len(self.shared))
        share = torch.tensor(demand, dtype=torch.float64) / (batch * length * config.top_k)
        aux = config.balance_loss * config.experts * (share * mean_p).sum() + config.z_loss * squares
        return torch.stack([torch.stack(row) for row in out], dim=1), aux


CASES = [
    {"top_k": 1, "capacity": 1.0},
    {"top_k": 2, "capacity": 1.25, "z_loss": 0.1},
    {"top_k": 2, "capacity": 1.0, "shared_experts": 2},
    {"top_k": 2, "capacity": 1.0, "normalize": False},
    {"top_k": 4, "capacity": 1.0},
    {"top_k": 2, "capacity": None, "balance_loss": 1.0},
    {"top_k": 1, "capacity": None, "normalize": False},
    {"top_k": 1, "capacity": 1.0, "overflow": "drop", "normalize": False},
    {"top_k": 2, "capacity": 1.25, "overflow": "drop", "z_loss": 0.1},
    {"top_k": 2, "capacity": 0.5, "overflow": "drop", "shared_experts": 1},
    {"top_k": 3, "experts": 5, "capacity": 1.0, "temperature": 0.6},
    {"top_k": 2, "experts": 16, "capacity": 1.25, "temperature": 1.5},
]


@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize("options", CASES, ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()))
def test_forward_and_every_gradient_are_those_of_the_definition(options, skew: float) -> None:
    options = dict(options)
    temperature = options.pop("temperature", 1.0)
    base = FeedForward(D, 10, FFNConfig()) if options["top_k"] == 1 else None
    layer = build(base, skew=skew, **options)
    layer.set_schedule(active=True, temperature=temperature, capacity=options["capacity"])
    plain = Plain(layer)
    x_BTD, other_BTD = draw(B, T, D).requires_grad_(), draw(B, T, D).requires_grad_()
    limit = None
    if options["capacity"] is not None:
        limit = math.ceil(options["capacity"] * B * T * options["top_k"] / layer.config.experts)

    out_BTD, aux_loss = layer(x_BTD)
    expected_BTD, expected_aux = plain(other_BTD, limit)
    assert aux_loss.shape == ()
    torch.testing.assert_close(out_BTD, expected_BTD)
    torch.testing.assert_close(aux_loss, expected_aux)
    if skew and options["capacity"] is not None and options["top_k"] < layer.config.experts:
        assert float(layer.load.overflow) > 0, "the case is meant to overflow"

    g_BTD = draw(B, T, D, seed=2)
    ((out_BTD * g_BTD).sum() + aux_loss).backward()
    ((expected_BTD * g_BTD).sum() + expected_aux).backward()
    torch.testing.assert_close(x_BTD.grad, other_BTD.grad)
    torch.testing.assert_close(layer.router.weight.grad, plain.router.grad)
    for mine, theirs in ((layer.experts, plain.experts), (layer.shared, plain.shared)):
        for name in dict(layer.dense.named_parameters()):
            for number, expert in enumerate(theirs):
                stacked = next(mine.copies_of(name)).grad
                got = stacked[number] if mine is layer.experts else mine.copy_of(name, number).grad
                wanted = expert.get_parameter(name).grad
                torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted)
    assert all(parameter.grad is None for parameter in layer.dense.parameters())


def test_until_it_is_active_it_is_the_dense_layer() -> None:
    layer = build(shared_experts=1, jitter=0.1, bias_rate=0.1)
    layer.set_schedule(active=False, temperature=1.0, capacity=1.0)
    x_BTD, bias = draw(B, T, D), layer.selection_bias.clone()
    out_BTD, aux_loss = layer(x_BTD)
    assert torch.equal(out_BTD, layer.dense(x_BTD))
    assert aux_loss.shape == () and aux_loss.item() == 0.0
    (out_BTD.sum() + aux_loss).backward()
    for name, parameter in layer.named_parameters():
        assert (parameter.grad is not None) == name.startswith("dense."), name
    layer.balance()
    assert torch.equal(layer.selection_bias, bias) and not layer.load


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("capacity", [1.0, 1.25, None])
@pytest.mark.parametrize("kind", [FeedForward, GatedFeedForward])
def test_switching_on_leaves_the_function_unchanged(kind, capacity: float | None, shared: int) -> None:
    torch.manual_seed(0)
    base = kind(32, 64, FFNConfig(bias=True))
    layer = MoEFFN(base, MoEConfig(experts=8, top_k=2, capacity=capacity, shared_experts=shared)).train()
    layer.set_schedule(active=False, temperature=1.0, capacity=capacity)
    with torch.no_grad():
        for parameter in base.parameters():  # training goes on
            parameter.normal_(std=0.3)
        layer.router.weight[0] += 1.0
        x_BTD = torch.randn(4, 16, 32) + 1.0
        before_BTD, _ = layer(x_BTD)
        upcycle(layer)
        layer.set_schedule(active=True, temperature=1.0, capacity=capacity)
        after_BTD, _ = layer(x_BTD)
    assert layer.load.demand_E.max() == 64, "every token wants expert 0"
    assert (float(layer.load.overflow) > 0) == (capacity is not None)
    assert (after_BTD - before_BTD).abs().max() <= 1e-5


# Copies


def with_state(layer: MoEFFN, without: str) -> torch.optim.Optimizer:
    """AdamW after two steps of the dense layer, with an entry of another optimizer's; `without` had no gradient."""
    layer.set_schedule(active=False, temperature=1.0, capacity=None)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for seed in range(2):
        optimizer.zero_grad()
        layer(draw(B, T, D, seed=seed))[0].square().sum().backward()
        layer.dense.get_parameter(without).grad = None
        optimizer.step()
    for state in optimizer.state.values():
        state["stable"] = torch.tensor([3, 4])
        state["name"] = "mine"
    return optimizer


@pytest.mark.parametrize("kind", ["stacked", "separate"])
def test_copies_of_weights_and_of_what_the_optimizer_knows(kind: str) -> None:
    base = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)) if kind == "separate" else None
    if base is not None:
        base.d_model = D
    layer = build(base, shared_experts=1)
    without = "1.bias" if kind == "separate" else "w_up.bias"
    optimizer = with_state(layer, without)
    upcycle(layer, optimizer)
    for name, dense in layer.dense.named_parameters():
        for experts in (layer.experts, layer.shared):
            copies = list(experts.copies_of(name))
            assert len(copies) == (1 if kind == "stacked" and experts is layer.experts else experts.num_experts)
            for number in range(experts.num_experts):
                assert torch.equal(experts.copy_of(name, number), dense)
            for copied in copies:
                assert (copied in optimizer.state) == (name != without)
                if name == without:
                    continue
                state, own = optimizer.state[copied], optimizer.state[dense]
                assert set(state) == set(own) == {"exp_avg", "exp_avg_sq", "step", "stable", "name"}
                for key in ("exp_avg", "exp_avg_sq"):
                    assert own[key].any() and state[key].shape == copied.shape
                    assert all(torch.equal(part, own[key]) for part in state[key].view(-1, *dense.shape))
                for key in ("step", "stable"):
                    assert torch.equal(state[key], own[key])
                assert state["name"] == "mine"
    # No memory is shared: the next steps of one leave the others as they are.
    tensors = [*layer.parameters()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.is_contiguous() for tensor in tensors)
    layer.set_schedule(active=True, temperature=1.0, capacity=None)
    dense = [parameter.clone() for parameter in layer.dense.parameters()]
    optimizer.zero_grad()
    layer(draw(B, T, D))[0].sum().backward()
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(dense, layer.dense.parameters(), strict=True))


def test_experts_that_start_on_their_own_differ_and_are_drawn_as_the_dense_layer_is() -> None:
    torch.manual_seed(0)
    base = GatedFeedForward(64, 128, FFNConfig(bias=True), num_layers=8)
    before = copy.deepcopy(base.state_dict())
    layer = MoEFFN(base, MoEConfig(experts=4, shared_experts=2))
    draw_experts(layer)
    for experts in (layer.experts, layer.shared):
        for name, std in (("w_gate.weight", 0.02), ("w_up.weight", 0.02), ("w_down.weight", 0.02 / 4)):
            drawn = [experts.copy_of(name, number) for number in range(experts.num_experts)]
            for number, weight in enumerate(drawn):
                assert weight.std().item() == pytest.approx(std, rel=0.05)
                assert abs(weight.mean().item()) < std / 20
                assert all(not torch.equal(weight, other) for other in drawn[:number])
        assert not experts.copy_of("w_gate.bias", 1).any()
    assert all(torch.equal(value, before[name]) for name, value in layer.dense.state_dict().items())


def test_a_layer_that_cannot_be_drawn_again_stays_a_copy() -> None:
    base = nn.Sequential(nn.Linear(D, D), nn.GELU())
    base.d_model = D
    layer = MoEFFN(base, MoEConfig(experts=4))
    draw_experts(layer)
    assert all(torch.equal(layer.experts.copy_of("0.weight", e), base[0].weight) for e in range(4))


# What it keeps


def test_the_schedule_is_part_of_the_state_dict() -> None:
    one, two = nn.ModuleList([build(seed=0)]), nn.ModuleList([build(seed=1)])
    for active in (False, True):
        one[0].set_schedule(active=active, temperature=1.7, capacity=2.0)
        result = two.load_state_dict(one.state_dict(), strict=True)
        assert not result.missing_keys and not result.unexpected_keys
        assert two[0].active is active
        assert two[0].temperature == pytest.approx(1.7)
        one.eval(), two.eval()
        x_BTD = draw(B, T, D)
        assert torch.equal(one[0](x_BTD)[0], two[0](x_BTD)[0])


def test_set_schedule_takes_effect() -> None:
    layer = build()
    x_BTD = draw(B, T, D)
    layer.set_schedule(active=True, temperature=1.0, capacity=None)
    warm_BTD, _ = layer(x_BTD)
    layer.set_schedule(active=True, temperature=0.1, capacity=None)
    cold_BTD, _ = layer(x_BTD)
    assert layer.temperature == pytest.approx(0.1)
    assert not torch.allclose(warm_BTD, cold_BTD)
    layer.set_schedule(active=False, temperature=0.1, capacity=None)
    assert torch.equal(layer(x_BTD)[0], layer.dense(x_BTD))
    assert layer.schedule.tolist() == pytest.approx([0.0, 0.1])


def test_a_deep_copy_is_a_layer_of_its_own() -> None:
    layer = build()
    other = copy.deepcopy(layer)
    x_BTD = draw(B, T, D)
    assert torch.equal(layer(x_BTD)[0], other(x_BTD)[0])
    before_BTD = layer(x_BTD)[0]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(layer(x_BTD)[0], before_BTD)


# What it promises


@pytest.mark.parametrize("overflow", ["next", "drop"])
def test_in_evaluation_a_token_depends_on_itself_alone(overflow: str) -> None:
    layer = build(skew=3.0, overflow=overflow, capacity=1.0, jitter=0.2, bias_rate=0.1, z_loss=0.1).eval()
    x_BTD = draw(B, T, D)
    out_BTD, aux_loss = layer(x_BTD)
    assert aux_loss.shape == () and aux_loss.item() == 0.0
    assert not layer.load, "what evaluation asks for is not training's load"
    for b in range(B):
        torch.testing.assert_close(layer(x_BTD[b : b + 1])[0], out_BTD[b : b + 1])
    for t in range(1, T):
        torch.testing.assert_close(layer(x_BTD[:, :t])[0], out_BTD[:, :t])
    torch.testing.assert_close(out_BTD, Plain(layer)(x_BTD, None)[0])


def test_jitter_is_for_training_alone() -> None:
    layer = build(jitter=0.3, capacity=None)
    still = copy.deepcopy(layer)
    still.config = layer.config.model_copy(update={"jitter": 0.0})
    x_BTD = draw(B, T, D)
    assert not torch.allclose(layer(x_BTD)[0], layer(x_BTD)[0])
    assert torch.equal(still(x_BTD)[0], still(x_BTD)[0])
    assert torch.equal(layer.eval()(x_BTD)[0], still.eval()(x_BTD)[0])


def test_a_bias_rises_where_the_load_is_low() -> None:
    layer = build(bias_rate=0.25, top_k=1, capacity=None)
    with torch.no_grad():
        layer.selection_bias.zero_()
        layer.router.weight.zero_()
        layer.router.weight[:, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    x_BTD = torch.zeros(1, 8, D, dtype=torch.float64)
    x_BTD[..., 0] = torch.tensor([1.0] * 6 + [-1.0] * 2)
    layer(x_BTD)
    assert layer.step_load.demand_E.tolist() == [6, 0, 0, 2]
    layer.balance()
    assert layer.selection_bias.tolist() == [-0.25, 0.25, 0.25, 0.0]
    layer.balance()
    assert layer.selection_bias.tolist() == [-0.25, 0.25, 0.25, 0.0], "nothing was asked for since"


def test_balancing_evens_the_load() -> None:
    torch.manual_seed(0)
    layer = MoEFFN(FeedForward(D, 8, FFNConfig()), MoEConfig(experts=8, top_k=2, balance_loss=0, bias_rate=0.002))
    with torch.no_grad():
        layer.router.weight.normal_(std=0.3)
        layer.router.weight[:2] += 0.3
    x_BTD = torch.randn(4, 64, D) + 0.5

    def busiest() -> float:
        layer.load.clear()
        with torch.no_grad():
            layer(x_BTD)
        return (layer.load.demand_E * (8 / layer.load.choices)).max().item()

    before = busiest()
    for _ in range(300):
        busiest()
        layer.balance()
    assert before > 2
    assert busiest() < 1.25


def test_flops_count_the_experts_a_token_visits() -> None:
    layer = build(top_k=2, shared_experts=1, experts=4)
    dense = 2 * 3 * D * 12
    assert layer.flops_per_token(7) == 3 * dense + 2 * 4 * D
    layer.set_schedule(active=False, temperature=1.0, capacity=None)
    assert layer.flops_per_token(7) == dense
    base = nn.Sequential(nn.Linear(D, 3 * D), nn.Linear(3 * D, D))
    base.d_model = D
    assert MoEFFN(base, MoEConfig(experts=2, top_k=1)).flops_per_token(7) == 12 * D * D + 4 * D


# The provider


class SomeDummyFFN(nn.Module):
    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.up, self.down = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def test_provider() -> None:
    options = {"experts": 8, "top_k": 2, "capacity": 1.5, "enabled": True}
    moe = MoERouter(options)
    assert (moe.get_name(), moe.get_version()) == ("topk_moe", "1.0.0")
    assert (moe.experts, moe.top_k, moe.capacity, moe.balance_loss_weight) == (8, 2, 1.5, 0.01)
    layer = moe.wrap_ffn(SomeDummyFFN(d_model=64, d_ff=256), options)
    x_BTD = torch.randn(2, 10, 64)
    output, aux_loss = layer(x_BTD)
    assert output.shape == x_BTD.shape
    assert aux_loss.item() >= 0
    assert layer.config.experts == 8 and layer.capacity == 1.5


def test_options_given_with_the_layer_come_first() -> None:
    moe = MoERouter({"experts": 8, "capacity": 2.0})
    layer = moe.wrap_ffn(SomeDummyFFN(8, 16), {"experts": 4})
    assert (layer.config.experts, layer.config.capacity) == (4, 2.0)
    assert moe.wrap_ffn(SomeDummyFFN(8, 16)).config == moe.config
    with pytest.raises(ValidationError, match="top_k 9 is more than the 8 experts"):
        moe.wrap_ffn(SomeDummyFFN(8, 16), {"top_k": 9})


@pytest.mark.parametrize("kind", ["stacked", "separate"])
def test_wrapping_draws_nothing_from_the_run(kind: str) -> None:
    base = SomeDummyFFN(8, 16) if kind == "stacked" else nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout())
    base.d_model = 8
    base[2].eval() if kind == "separate" else base.up.eval()
    weights = copy.deepcopy(base.state_dict())
    modes = [module.training for module in base.modules()]
    state = torch.get_rng_state()
    layer = MoERouter().wrap_ffn(base, {"shared_experts": 1})
    assert torch.equal(torch.get_rng_state(), state)
    assert layer.dense is base
    assert [module.training for module in base.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in base.state_dict().items())
    assert layer.router.weight.std().item() == pytest.approx(0.02, rel=0.2)
