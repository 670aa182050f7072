"""Texts in the making, side by side: their tokens, and the model's cache of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from apt.inference.target_batch import TargetBatch
from apt.modeling.backbones.backbone import Backbone
from apt.modeling.backbones.encdec import EncoderDecoder
from apt.modeling.backbones.gpt import GPT, ModelOutput
from apt.modeling.layers.kv_cache import ModelCache


class Batch:
    """Rows of tokens that a model continues, one forward pass for a token of every row.

    Shorter rows are padded on the left, where attention does not look and which no position counts; so each row gets
    the logits that it would get alone. Beyond the model's longest context only a row's newest tokens count: their
    positions move with every token, and no cache holds.

    Args:
        model: the model.
        prompts: the token ids of each row, none of them empty. Of one length, where the attention has no cache.
        copies: rows to make of each prompt, one after the other; the prompt itself is computed once.
        room: new tokens that there will be.
        device: of the model.

    Attributes:
        tokens_BT: int64.
        padding_B: int64, how many tokens at the left of each row are padding: copies of its first own token.
    """

    def __init__(
        self, model: GPT, prompts: Sequence[Sequence[int]], *, copies: int, room: int, device: torch.device
    ) -> None:
        longest = max(map(len, prompts))
        padded = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.model = model
        self.limit: int = model.max_seq_len
        self.tokens_BT = torch.tensor(padded, dtype=torch.int64, device=device)
        self.padding_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        self._is_padded = any(len(prompt) < longest for prompt in prompts)
        self._copies = copies
        self._room = min(longest + room, self.limit)
        self._cache = self._new_cache()

    def forward(self) -> tuple[Tensor, Tensor]:
        """What follows the tokens there are: logits [B, V], and the hidden states [B, D] that they come from."""
        excess = self.tokens_BT.shape[1] - self.limit
        if excess > 0 and self._is_padded and (unused := int(self.padding_B.min())):
            # The rows that were longer have ended: without what was padding for their sake there is room again.
            self.tokens_BT, self.padding_B = self.tokens_BT[:, unused:], self.padding_B - unused
            self._cache, excess = self._new_cache(), excess - unused
        if excess > 0:
            self._cache = None
        if self._cache is None:
            output = self._pass(self.tokens_BT[:, max(excess, 0) :], (self.padding_B - max(excess, 0)).clamp_min(0), 0)
        else:
            start = self._cache.length
            output = self._pass(self.tokens_BT[:, start:], self.padding_B, start)
        logits_BV, hidden_BD = output.logits[:, -1], output.hidden[:, -1]
        if self._copies > 1:
            copies, self._copies = self._copies, 1
            rows_B = torch.arange(len(logits_BV), device=logits_BV.device).repeat_interleave(copies)
            self._select(rows_B)
            logits_BV, hidden_BD = logits_BV[rows_B], hidden_BD[rows_B]
        return logits_BV, hidden_BD

    def append(self, tokens_B: Tensor) -> None:
        """Add a token to each row."""
        self.tokens_BT = torch.cat([self.tokens_BT, tokens_B[:, None]], dim=1)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in that order; a row may be repeated."""
        self._select(torch.tensor(rows, dtype=torch.int64, device=self.tokens_BT.device))

    def _select(self, rows_B: Tensor) -> None:
        self.tokens_BT, self.padding_B = self.tokens_BT[rows_B], self.padding_B[rows_B]
        if self._cache is not None:
            self._cache.select_rows(rows_B)

    def _pass(self, tokens_BT: Tensor, padding_B: Tensor, start: int) -> ModelOutput:
        """The output for `tokens_BT`, of which `start` before it are in the cache; padding counts from position 0."""
        if not self._is_padded:
            output: ModelOutput = self.model(tokens_BT, cache=self._cache, last_only=True)
            return output
        stop = start + tokens_BT.shape[1]
        places_S = torch.arange(stop, device=tokens_BT.device)
        positions_BT = (places_S[start:] - padding_B[:, None]).clamp_min(0)
        blocked_BS = places_S < padding_B[:, None]
        output = self.model(
            tokens_BT, positions=positions_BT, key_padding_mask=blocked_BS, cache=self._cache, last_only=True
        )
        return output

    def _new_cache(self) -> ModelCache | None:
        if not self.model.supports("cache") or self.tokens_BT.shape[1] > self.limit:
            return None
        return self.model.make_cache(len(self.tokens_BT), self._room)


def make_batch(
    model: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    copies: int,
    room: int,
    start_id: int | None,
    device: torch.device,
) -> Batch | TargetBatch:
    """What the model continues, or the targets that an encoder-decoder writes, which `start_id` starts. The arguments
    are those of both."""
    if isinstance(model, GPT):
        return Batch(model, prompts, copies=copies, room=room, device=device)
    assert isinstance(model, EncoderDecoder), type(model)
    assert start_id is not None, "the data of an encoder-decoder are refused where the tokenizer has no such token"
    room = min(room, model.max_seq_len)
    return TargetBatch(model, prompts, copies=copies, room=room, start_id=start_id, device=device)


def alike(model: Backbone, prompts: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """The indices of `prompts`, in groups that one `Batch` takes: at most `size`, near to each other in length; of one
    length where the model's attention has no cache, for it may not know of positions either."""
    groups: list[list[int]] = []
    pads = model.supports("cache") or isinstance(model, EncoderDecoder)
    for index in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        group = groups[-1] if groups else []
        fits = pads or len(prompts[group[0]] if group else ()) == len(prompts[index])
        if group and len(group) < size and fits:
            group.append(index)
        else:
            groups.append([index])
    return groups
