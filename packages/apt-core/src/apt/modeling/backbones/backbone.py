"""What every backbone has: an embedding of tokens and positions, a final norm, and a projection to the vocabulary."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt.core.config import ModelConfig
from apt.core.errors import ConfigError, ProviderError
from apt.modeling.layers.counting import Part
from apt.modeling.layers.norm import make_norm


class ModelOutput(NamedTuple):
    """What a model returns."""

    logits: Tensor
    """[B, T, V], or [B, 1, V] where only the last position was asked for."""
    hidden: Tensor
    """[B, T, D], after the final norm."""
    aux_loss: Tensor | None
    """0-d, the sum of the FFN layers' auxiliary losses; None if none has one."""


class Backbone(Part):
    """A model, but for the way from its first hidden states to its last.

    Args:
        config: sizes, norm, kind of positions, tying and dropout.
        vocab_size: rows V of the embedding.
        **stacks: {attribute: its blocks, first one first}.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, **stacks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.d_model = config.d_model
        self.max_seq_len = config.max_seq_len
        self.token_embedding = nn.Embedding(vocab_size, config.d_model)
        self.position_embedding = (
            nn.Embedding(config.max_seq_len, config.d_model) if config.positions == "learned" else None
        )
        self.dropout = nn.Dropout(config.dropout)
        for name, blocks in stacks.items():
            self.add_module(name, nn.ModuleList(blocks))
        self.norm = make_norm(config.norm, config.d_model, config.norm_eps)
        # A tied projection is the embedding itself and no second name for it: a state dict holds each tensor once.
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, vocab_size, bias=False)
        for module in (self.token_embedding, self.position_embedding, self.head):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)

    def embed(self, tokens_BT: Tensor, positions: Tensor | None = None, start: int = 0) -> Tensor:
        """The first hidden states, [B, T, D].

        Args:
            positions: int64 [T] or [B, T]; None: from `start` on.

        Raises:
            ConfigError: a learned position of `max_seq_len` or more.
        """
        x_BTD = self.token_embedding(tokens_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self._learned(self.position_embedding, tokens_BT.shape[1], positions, start)
        embedded: Tensor = self.dropout(x_BTD)
        return embedded

    def project(self, x_BTD: Tensor, aux_loss: Tensor | None, *, last_only: bool = False) -> ModelOutput:
        """What the model returns for its last hidden states; logits for the last position alone with `last_only`."""
        hidden_BTD = self.norm(x_BTD)
        seen = hidden_BTD[:, -1:] if last_only else hidden_BTD
        weight_VD = self.token_embedding.weight if self.head is None else self.head.weight
        return ModelOutput(F.linear(seen, weight_VD), hidden_BTD, aux_loss)

    def supports(self, capability: str) -> bool:
        """Whether every attention layer that generates can serve `capability` (see `AttentionProvider`)."""
        raise NotImplementedError

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs per token at a context of `length` tokens, attention scores and output projection included."""
        raise NotImplementedError

    def _learned(self, embedding: nn.Embedding, count: int, positions: Tensor | None, start: int) -> Tensor:
        last = start + count - 1
        if positions is not None and positions.is_cpu and not torch.compiler.is_compiling():
            last = int(positions.max())  # elsewhere it would wait for the device, and the embedding refuses by itself
        # Whoever exports the model says how long a text may be; to ask here would fix the length.
        if not torch.compiler.is_exporting() and last >= self.max_seq_len:
            raise ConfigError(
                f"position {last} lies beyond the {self.max_seq_len} that this model has learned",
                hint="shorten the text, or train with a larger model.max_seq_len or with model.positions: rope",
            )
        return embedding.weight[start : start + count] if positions is None else embedding(positions)


def lacking(layer: nn.Module, capability: str) -> ProviderError:
    """The error for a layer that cannot serve what it is asked for."""
    return ProviderError(
        f"{type(layer).__name__} does not support {capability!r}", hint="choose another model.attention_name"
    )


def sum_of(aux_loss: Tensor | None, another: Tensor | None) -> Tensor | None:
    """The sum of two auxiliary losses, either of which there may not be."""
    return another if aux_loss is None else aux_loss if another is None else aux_loss + another


def takes_context(layer: nn.Module) -> bool:
    """Whether an attention layer takes `context`."""
    parameters = inspect.signature(layer.forward).parameters
    return "context" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


__all__ = ["Backbone", "ModelOutput", "lacking", "sum_of", "takes_context"]
