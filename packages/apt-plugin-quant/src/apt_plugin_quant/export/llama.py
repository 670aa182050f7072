"""Llama and Mixtral beside ours: the names and shapes of their tensors, and how one becomes the other.

What differs is the order of rows and how tensors are split. A rotation turns pairs of dimensions: ours are neighbours,
2i and 2i + 1 of a head, theirs are i and i + d / 2; so the rows of each head's queries and keys change places. Queries,
keys and values are one matrix here and three there; the experts of a layer are one tensor [E, ...] here and E there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EXPERT = {"w_gate": "w1", "w_down": "w2", "w_up": "w3"}
"""Our name of an expert's matrix -> Mixtral's."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The sizes that the names and shapes follow from."""

    vocab_size: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    experts: int | None = None
    """None for Llama."""
    attention_bias: bool = False
    ffn_bias: bool = False
    tied: bool = False
    """Whether the output projection is the embedding, and no tensor of its own."""

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """The rows of queries, keys and values in our one matrix."""
        return self.d_model, self.num_kv_heads * self.head_dim, self.num_kv_heads * self.head_dim

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{their name: shape} of every tensor."""
        D, F, E = self.d_model, self.d_ff, self.experts
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, D),
            "model.norm.weight": (D,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, D)
        for layer in range(self.num_layers):
            here = f"model.layers.{layer}"
            shapes |= {f"{here}.input_layernorm.weight": (D,), f"{here}.post_attention_layernorm.weight": (D,)}
            linears = {f"self_attn.{x}_proj": (rows, D) for x, rows in zip("qkv", self.qkv_rows, strict=True)}
            linears["self_attn.o_proj"] = (D, D)
            if E is None:
                linears |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
            else:
                linears["block_sparse_moe.gate"] = (E, D)
                for e in range(E):
                    linears |= {f"block_sparse_moe.experts.{e}.{w}": (F, D) for w in ("w1", "w3")}
                    linears[f"block_sparse_moe.experts.{e}.w2"] = (D, F)
            for name, shape in linears.items():
                shapes[f"{here}.{name}.weight"] = shape
                if self.attention_bias if name.startswith("self_attn") else self.ffn_bias:
                    shapes[f"{here}.{name}.bias"] = shape[:1]
        return shapes

    def same(self, ffn: str = "ffn") -> Iterator[tuple[str, str]]:
        """(our name, their name) of the tensors that are the same here and there; `ffn` is where a block's dense
        layer is."""
        yield "token_embedding.weight", "model.embed_tokens.weight"
        yield "norm.weight", "model.norm.weight"
        if not self.tied:
            yield "head.weight", "lm_head.weight"
        for layer in range(self.num_layers):
            ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
            yield f"{ours}.norm1.weight", f"{theirs}.input_layernorm.weight"
            yield f"{ours}.norm2.weight", f"{theirs}.post_attention_layernorm.weight"
            pairs = [(f"{ours}.attention.w_o", f"{theirs}.self_attn.o_proj", self.attention_bias)]
            if self.experts is None:
                pairs += [
                    (f"{ours}.{ffn}.w_{x}", f"{theirs}.mlp.{x}_proj", self.ffn_bias) for x in ("gate", "up", "down")
                ]
            for our, their, bias in pairs:
                yield f"{our}.weight", f"{their}.weight"
                if bias:
                    yield f"{our}.bias", f"{their}.bias"


def to_llama(weights: dict[str, Tensor], layout: Layout, ffn: str = "ffn") -> dict[str, Tensor]:
    """Their tensors of our weights, which are taken out of `weights`: what is left there has no counterpart."""
    theirs = {their: weights.pop(our) for our, their in layout.same(ffn)}
    for layer in range(layout.num_layers):
        our, their = f"blocks.{layer}", f"model.layers.{layer}"
        for kind in ("weight", "bias") if layout.attention_bias else ("weight",):
            q, k, v = weights.pop(f"{our}.attention.w_qkv.{kind}").split(layout.qkv_rows)
            theirs[f"{their}.self_attn.q_proj.{kind}"] = to_halves(q, layout.head_dim)
            theirs[f"{their}.self_attn.k_proj.{kind}"] = to_halves(k, layout.head_dim)
            theirs[f"{their}.self_attn.v_proj.{kind}"] = v
        if layout.experts is not None:
            theirs[f"{their}.block_sparse_moe.gate.weight"] = weights.pop(f"{our}.ffn.router.weight")
            for our_name, their_name in EXPERT.items():
                stack_E = weights.pop(f"{our}.ffn.experts.stack.{our_name}.weight")
                for e, expert in enumerate(stack_E.unbind()):
                    theirs[f"{their}.block_sparse_moe.experts.{e}.{their_name}.weight"] = expert
    return theirs


def from_llama(theirs: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our weights of their tensors, whose names and shapes are those of `layout`.

    A layer of experts keeps a dense layer beside them, which computes only before they are switched on. Here they are
    on from the start, and it holds the experts' mean.
    """
    weights = {our: theirs[their] for our, their in layout.same()}
    for layer in range(layout.num_layers):
        our, their = f"blocks.{layer}", f"model.layers.{layer}"
        for kind in ("weight", "bias") if layout.attention_bias else ("weight",):
            q, k, v = (theirs[f"{their}.self_attn.{x}_proj.{kind}"] for x in "qkv")
            rows = (to_neighbours(q, layout.head_dim), to_neighbours(k, layout.head_dim), v)
            weights[f"{our}.attention.w_qkv.{kind}"] = torch.cat(rows)
        if layout.experts is not None:
            weights[f"{our}.ffn.router.weight"] = theirs[f"{their}.block_sparse_moe.gate.weight"]
            for our_name, their_name in EXPERT.items():
                stack_E = torch.stack(
                    [theirs[f"{their}.block_sparse_moe.experts.{e}.{their_name}.weight"] for e in range(layout.experts)]
                )
                weights[f"{our}.ffn.experts.stack.{our_name}.weight"] = stack_E
                weights[f"{our}.ffn.dense.{our_name}.weight"] = stack_E.mean(0)
            weights[f"{our}.ffn.selection_bias"] = torch.zeros(layout.experts)
            weights[f"{our}.ffn.schedule"] = torch.ones(2)  # on, at temperature 1
    return weights


def to_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of queries or keys, [H d, ...], whose pairs are neighbours, in the order in which pairs are d / 2 apart."""
    moved: Tensor = rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
    return moved


def to_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `to_halves`."""
    moved: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return moved
