"""The stable state: its average against one computed by hand, where it lies, and the pass through it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apt_plugin_align.stable import STABLE, decay_at, stable_output, update


class Model(nn.Module):
    """Dropout, a tracked module mode, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, tokens: Tensor, *, positions: Any = None, document_ids: Any = None) -> Tensor:
        x: Tensor = self.frozen(self.dropout(self.embedding(tokens))) * self.gain
        return x if positions is None else x + positions[..., None]


@pytest.mark.parametrize("lag", [0.5, 0.1, 0.01])
def test_the_average_lags_by_its_share_of_the_steps(lag: float) -> None:
    """The mean age of what is averaged, worked out from the decays, is `lag` of the steps done."""
    steps = 4000
    age = 0.0
    for step in range(1, steps + 1):
        age = decay_at(step, lag) * (age + 1)
    assert age / steps == pytest.approx(lag, rel=0.02)


def test_the_first_step_is_the_whole_average() -> None:
    assert decay_at(1, 0.025) == 0


def test_the_average_equals_one_computed_by_hand() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    expected: dict[str, Tensor] = {}
    for step in range(1, 9):
        layer(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        update(optimizer, step, 0.2)
        keep = (1 - 1 / step) ** 4
        for name, p in layer.named_parameters():
            expected[name] = keep * expected.get(name, torch.zeros(())) + (1 - keep) * p.detach()
            torch.testing.assert_close(optimizer.state[p][STABLE], expected[name])
            assert not optimizer.state[p][STABLE].requires_grad


def test_what_was_never_trained_gets_no_state_and_what_joins_later_starts_as_it_is() -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    update(optimizer, 1, 0.1)
    assert not optimizer.state, "AdamW takes an empty state as its sign to begin"
    model.embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    update(optimizer, 2, 0.1)
    assert model.gain not in optimizer.state
    assert torch.equal(optimizer.state[model.embedding.weight][STABLE], model.embedding.weight)
    model(torch.tensor([[1]])).sum().backward()
    optimizer.step()
    update(optimizer, 3, 0.1)
    assert torch.equal(optimizer.state[model.gain][STABLE], model.gain)


def test_the_stable_pass_uses_the_averages_without_graph_dropout_or_trace() -> None:
    torch.manual_seed(0)
    model = Model().train()
    model.frozen.eval()
    optimizer = torch.optim.AdamW([("embedding.weight", model.embedding.weight), ("gain", model.gain)])
    model.embedding(torch.tensor([1])).sum().backward()
    optimizer.step()
    average = torch.randn(11, 6)
    optimizer.state[model.embedding.weight][STABLE] = average
    tokens = torch.randint(0, 11, (2, 5))
    positions = torch.arange(5).repeat(2, 1)
    state = torch.get_rng_state()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = stable_output(model, optimizer, SimpleNamespace(tokens=tokens, context={"positions": positions}))
    assert torch.equal(out, average[tokens] * model.gain + positions[..., None])
    assert not out.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.dropout.training, model.frozen.training) == (True, True, False)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
