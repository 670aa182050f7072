"""The model of 1.x: its calls, on the kernel's encoder-decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apt.core.errors import ConfigError, DataError
from apt.inference.sampling import Draws, Sampling, sample, seed_of_row
from apt.inference.target_batch import TargetBatch
from apt.modeling.backbones.backbone import Backbone, ModelOutput
from apt.modeling.backbones.encdec import EncoderDecoder, Memory
from apt.modeling.compose import ModelBuilder
from apt.modeling.layers.mode import evaluation_mode
from apt_model.config._options import APTConfig, say_once


class APTModel(nn.Module):
    """An encoder-decoder: B sources of S tokens, their targets of T tokens, V tokens in the vocabulary.

    Masks are those of `nn.Transformer`: True, or in a float mask anything but 0, is blocked.

    Args:
        config: sizes and attention.
        built: a backbone that there is already, and what built it.

    Attributes:
        backbone: the kernel's model.
        builder: what built it; `apt.api.save_model` asks for it.

    Raises:
        ConfigError: the sizes do not fit each other.
    """

    def __init__(self, config: APTConfig, *, built: tuple[ModelBuilder, Backbone] | None = None) -> None:
        super().__init__()
        self.config = config
        if built is None:
            builder = ModelBuilder(config.to_profile())
            built = builder, builder.build_model()
        self.builder, backbone = built
        assert isinstance(backbone, EncoderDecoder)
        self.backbone = backbone

    def forward(
        self,
        src_tokens: Tensor,
        tgt_tokens: Tensor | None = None,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        return_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The logits [B, T, V] of the token behind each of the target.

        Args:
            src_tokens: int64 [B, S].
            tgt_tokens: int64 [B, T]; the source if left out.
            src_key_padding_mask: [B, S]; `memory_key_padding_mask` is the same unless it is given.
            src_mask, tgt_mask, memory_mask, tgt_key_padding_mask: as for `encode` and `decode`.
            return_dict: return {"logits", "encoder_output" [B, S, D], "decoder_output" [B, T, D]}.

        Raises:
            ConfigError: a mask that the model cannot follow.
        """
        states_BSD = self.encode(src_tokens, src_mask, src_key_padding_mask)
        seen = src_key_padding_mask if memory_key_padding_mask is None else memory_key_padding_mask
        target = src_tokens if tgt_tokens is None else tgt_tokens
        output = self._decode(target, states_BSD, tgt_mask, memory_mask, tgt_key_padding_mask, seen)
        if return_dict:
            return {"logits": output.logits, "encoder_output": states_BSD, "decoder_output": output.hidden}
        return output.logits

    def encode(
        self, src_tokens: Tensor, src_mask: Tensor | None = None, src_key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """The source as it was read, [B, S, D].

        Args:
            src_mask: may block nothing: each token sees the whole source.

        Raises:
            ConfigError: it does.
        """
        _refuse_any("src_mask", src_mask)
        return self.backbone.encode(src_tokens, _blocked(src_key_padding_mask)).states_BSD

    def decode(
        self,
        tgt_tokens: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The target's hidden states [B, T, D], of which `output_projection` makes logits.

        Args:
            memory: from `encode`.
            tgt_mask: may be the causal one, which holds in any case.
            memory_mask: may block nothing.
            tgt_key_padding_mask: may block the end of each row, which nothing before it sees in any case.

        Raises:
            ConfigError: a mask is another one.
        """
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        return self._decode(tgt_tokens, memory, *masks, last_only=True).hidden

    def output_projection(self, hidden_BTD: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        head = self.backbone.token_embedding if self.backbone.head is None else self.backbone.head
        return F.linear(hidden_BTD, head.weight)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        max_length: int = 50,
        temperature: float = 1.0,
        top_p: float = 0.9,
        top_k: int | None = None,
        repetition_penalty: float = 1.0,
        do_sample: bool = True,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        *,
        src_tokens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Write a target for each source, with a cache and without dropout.

        `torch.manual_seed` makes it repeatable.

        Args:
            input_ids: int64 [B, S]; tokens `pad_token_id` are no part of a source, wherever they stand. 1.0 called them
                `src_tokens`.
            max_length: tokens to write, at most `config.max_seq_len`.
            temperature, top_p, top_k, repetition_penalty: see `apt.inference.sampling.Sampling`.
            do_sample: if not, the likeliest tokens are taken.
            eos_token_id, pad_token_id: those of the config if left out.
            **options: others are passed over with an AptWarning.

        Returns:
            int64 [B, T]: `config.bos_token_id`, then what was written; behind the token that ends a row, padding.

        Raises:
            ConfigError: a setting is out of range.
            DataError: a source is empty, or longer than the model reads.
        """
        if options:
            say_once(f"generate: {', '.join(options)} not used: nothing reads it any more")
        source_BS = src_tokens if input_ids is None else input_ids
        if source_BS is None:
            raise TypeError("generate needs input_ids")
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        eos = self.config.eos_token_id if eos_token_id is None else eos_token_id
        sampling = Sampling(temperature if do_sample else 0.0, top_k, top_p, repetition_penalty=repetition_penalty)
        sources = [[token for token in row if token != pad] for row in source_BS.tolist()]
        if [] in sources:
            raise DataError(f"row {sources.index([])} of input_ids is all padding", hint="give it a token")
        draws = [Draws(seed_of_row(int(torch.randint(2**62, ())), 0)) for _ in sources]
        room = min(max_length, self.backbone.max_seq_len)
        with evaluation_mode(self.backbone):
            batch = TargetBatch(
                self.backbone,
                sources,
                copies=1,
                room=room,
                start_id=self.config.bos_token_id,
                device=self.backbone.token_embedding.weight.device,
            )
            ended_B = torch.zeros_like(batch.padding_B, dtype=torch.bool)
            for place in range(room):
                logits_BV, _ = batch.forward()
                tokens_B = sample(logits_BV, sampling, [draw.at(place) for draw in draws], batch.tokens_BT)
                tokens_B = tokens_B.masked_fill(ended_B, pad)
                batch.append(tokens_B)
                ended_B |= tokens_B == eos
                if bool(ended_B.all()):
                    break
        return batch.tokens_BT

    def _decode(
        self,
        tokens_BT: Tensor,
        states_BSD: Tensor,
        tgt_mask: Tensor | None,
        memory_mask: Tensor | None,
        tgt_key_padding_mask: Tensor | None,
        memory_key_padding_mask: Tensor | None,
        *,
        last_only: bool = False,
    ) -> ModelOutput:
        _refuse_any("memory_mask", memory_mask)
        _check_target_masks(_blocked(tgt_mask), _blocked(tgt_key_padding_mask))
        memory = Memory(states_BSD, _blocked(memory_key_padding_mask))
        output: ModelOutput = self.backbone(tokens_BT, memory=memory, last_only=last_only)
        return output


class APTLargeModel(APTModel):
    """The same model under the name that 1.x trained it by."""

    def update_dynamic_taylor_parameters(self, learning_rate: float) -> None:
        """Called after each step by training loops of 1.x; there are no such parameters to update."""


def _blocked(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.bool()


def _refuse_any(name: str, mask: Tensor | None) -> None:
    if mask is not None and bool(mask.any()):
        raise ConfigError(f"{name} blocks something, which the model cannot follow", hint="leave it out, or pad")


def _check_target_masks(mask_TT: Tensor | None, padding_BT: Tensor | None) -> None:
    if mask_TT is not None and not torch.equal(mask_TT, torch.ones_like(mask_TT).triu(1)):
        raise ConfigError("tgt_mask is not the causal mask, which is the one that holds", hint="leave it out")
    if padding_BT is not None and bool((padding_BT[:, :-1] & ~padding_BT[:, 1:]).any()):
        raise ConfigError("tgt_key_padding_mask blocks tokens before others", hint="pad targets on the right")
