"""Targets in the making, side by side: what an encoder-decoder writes for the sources it has read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apt.core.errors import DataError
from apt.modeling.backbones.encdec import EncoderDecoder


class TargetBatch:
    """Rows of tokens that an encoder-decoder writes, one pass of its decoder for a token of every row; the sources are
    read once. It is used as `apt.inference.batch.Batch` is.

    Args:
        model: the model.
        prompts: the token ids of each source, none of them empty.
        copies: targets to make of each source, one after the other.
        room: tokens that there will be, at most `model.max_seq_len`.
        start_id: the token that starts a target.
        device: of the model.

    Attributes:
        tokens_BT: int64, the targets so far, the token that starts them included.
        padding_B: int64, zeros: targets grow together.

    Raises:
        DataError: a source is longer than the model reads.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        prompts: Sequence[Sequence[int]],
        *,
        copies: int,
        room: int,
        start_id: int,
        device: torch.device,
    ) -> None:
        longest = max(map(len, prompts))
        if longest > model.max_seq_len:
            raise DataError(
                f"a prompt has {longest} tokens, and this model reads {model.max_seq_len} at most",
                hint="shorten it, or train with a larger model.max_seq_len",
            )
        padded = [[*prompt, *[start_id] * (longest - len(prompt))] for prompt in prompts]
        lengths_B1 = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
        ended_BS = torch.arange(longest, device=device) >= lengths_B1
        source_BS = torch.tensor(padded, dtype=torch.int64, device=device)
        rows_B = torch.arange(len(prompts), device=device).repeat_interleave(copies)
        self.model = model
        self._memory = model.encode(source_BS, ended_BS if bool(ended_BS.any()) else None).select_rows(rows_B)
        self.tokens_BT = torch.full((len(rows_B), 1), start_id, dtype=torch.int64, device=device)
        self.padding_B = torch.zeros_like(rows_B)
        self._cache = model.make_cache(self._memory, room) if model.supports("cache") else None

    def forward(self) -> tuple[Tensor, Tensor]:
        """What follows the tokens there are: logits [B, V], and the hidden states [B, D] that they come from."""
        start = 0 if self._cache is None else self._cache.length
        output = self.model(self.tokens_BT[:, start:], memory=self._memory, cache=self._cache, last_only=True)
        return output.logits[:, -1], output.hidden[:, -1]

    def append(self, tokens_B: Tensor) -> None:
        """Add a token to each row."""
        self.tokens_BT = torch.cat([self.tokens_BT, tokens_B[:, None]], dim=1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in that order; a row may be repeated."""
        rows_B = torch.tensor(rows, dtype=torch.int64, device=self.tokens_BT.device)
        self.tokens_BT, self.padding_B = self.tokens_BT[rows_B], self.padding_B[rows_B]
        self._memory = self._memory.select_rows(rows_B)
        if self._cache is not None:
            self._cache.select_rows(rows_B)
