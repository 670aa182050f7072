"""Names, shapes and orders of Llama's and Mixtral's tensors, against the definitions of both rotations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apt.modeling.layers.rope import RotaryEmbedding, rotate
from apt_plugin_quant.export.llama import Layout, from_llama, to_halves, to_llama, to_neighbours

LAYOUTS = [
    Layout(vocab_size=11, d_model=8, d_ff=6, num_layers=2, num_heads=4, num_kv_heads=2),
    Layout(vocab_size=11, d_model=8, d_ff=6, num_layers=1, num_heads=2, num_kv_heads=2, tied=True, ffn_bias=True),
    Layout(vocab_size=11, d_model=8, d_ff=6, num_layers=1, num_heads=2, num_kv_heads=1, attention_bias=True),
    Layout(vocab_size=11, d_model=8, d_ff=6, num_layers=2, num_heads=2, num_kv_heads=1, experts=3),
]


def half_rotation(x_THd: Tensor, theta: float) -> Tensor:
    """Llama's rotation from its definition: dimensions i and i + d / 2 are the complex number that turns."""
    d = x_THd.shape[-1]
    angles = torch.arange(len(x_THd))[:, None].double() * theta ** (-torch.arange(0, d, 2).double() / d)
    number = torch.complex(x_THd[..., : d // 2].double(), x_THd[..., d // 2 :].double())
    turned = number * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), -1).float()


@pytest.mark.parametrize("head_dim", [2, 4, 10])
def test_scores_are_the_same_under_both_rotations(head_dim: int) -> None:
    torch.manual_seed(0)
    w_q, w_k, x_TD = torch.randn(3 * head_dim, 8), torch.randn(3 * head_dim, 8), torch.randn(7, 8)
    turns = RotaryEmbedding(head_dim, 100.0).turns(None, 0, 7, x_TD)
    ours = [rotate((x_TD @ w.T).view(7, 3, head_dim), turns) for w in (w_q, w_k)]
    theirs = [half_rotation((x_TD @ to_halves(w, head_dim).T).view(7, 3, head_dim), 100.0) for w in (w_q, w_k)]
    scores = [torch.einsum("thd,shd->hts", q, k) for q, k in (ours, theirs)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-4)


def test_the_two_orders_are_inverse() -> None:
    rows = torch.arange(2 * 6 * 3.0).view(12, 3)
    assert to_halves(rows, 6)[:6, 0].tolist() == [rows[i, 0] for i in (0, 2, 4, 1, 3, 5)]
    assert torch.equal(to_neighbours(to_halves(rows, 6), 6), rows)
    assert torch.equal(to_halves(to_neighbours(rows[:, 0], 6), 6), rows[:, 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_changes_nothing_and_every_name_is_expected(layout: Layout) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs = {name: torch.randn(shape, generator=generator) for name, shape in layout.shapes().items()}
    ours = from_llama(theirs, layout)
    beside = {name: ours.pop(name) for name in list(ours) if "dense" in name or "bias" in name.split(".")[-1][-4:]}
    ours |= {name: tensor for name, tensor in beside.items() if "dense" not in name and "selection" not in name}
    back = to_llama(ours, layout)
    assert set(ours) <= {f"blocks.{i}.ffn.schedule" for i in range(2)}
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_the_dense_layer_beside_experts_is_their_mean() -> None:
    layout = LAYOUTS[-1]
    theirs = {name: torch.randn(shape) for name, shape in layout.shapes().items()}
    ours = from_llama(theirs, layout)
    experts = [theirs[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(3)]
    torch.testing.assert_close(ours["blocks.1.ffn.dense.w_down.weight"], sum(experts) / 3)
