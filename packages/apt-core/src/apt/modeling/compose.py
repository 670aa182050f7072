"""The model of a profile, put together from the parts that its providers build."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from apt.core.config import RunConfig
from apt.core.errors import ConfigError, ProviderError
from apt.core.in_use import ProvidersInUse
from apt.core.profiles import resolve
from apt.core.providers.attention import supports
from apt.core.registry import Registry
from apt.core.registry import registry as installed
from apt.modeling.backbones.backbone import Backbone
from apt.modeling.backbones.encdec import DecoderBlock, EncoderDecoder
from apt.modeling.backbones.gpt import GPT, TransformerBlock

PLACES = {"attention": ("attention", "cross_attention"), "ffn": ("ffn",), "router": ("ffn",)}
"""Kind of provider -> where in a block its modules are."""


class ModelBuilder:
    """Builds a model, or parts of one, with the providers that a profile names.

    Args:
        config: a resolved profile, a plain dict of the same shape, or a profile's name or path.
        in_use: the run's providers; a script needs none.
        registry: where the providers are found if `in_use` is left out; a view of the installed ones by default.
        device: where the model will run, if that is known: some kernels exist on some devices alone.
        trains: whether the model will be trained, and not only used.

    Raises:
        ConfigError: the config is no valid profile.
    """

    def __init__(
        self,
        config: RunConfig | Mapping[str, Any] | str | os.PathLike[str],
        in_use: ProvidersInUse | None = None,
        registry: Registry | None = None,
        *,
        device: torch.device | None = None,
        trains: bool = False,
    ) -> None:
        self.config = config if isinstance(config, RunConfig) else resolve(config).config
        self.in_use = in_use or ProvidersInUse(registry or installed.view(), self.config.sections)
        self.device = device
        self.trains = trains

    def build_attention(self, d_model: int, num_heads: int, *, causal: bool = True, crosses: bool = False) -> nn.Module:
        """An attention layer of `model.attention_name`, or of the default where that cannot be had.

        Args:
            causal: whether a position sees only itself and what came before it.
            crosses: whether its keys and values come from another sequence.

        Raises:
            ConfigError, ProviderError, ConflictError: as `ProvidersInUse.use`; ConfigError too for one that is there
                and cannot be what it has to be.
        """
        model = self.config.model
        known = {
            "causal": causal,
            "dropout": model.dropout,
            "num_layers": model.num_layers,
            "rope_theta": model.rope_theta if model.positions == "rope" else None,
            "device": self.device,
            "trains": self.trains,
        }

        def make(provider: Any) -> nn.Module:
            options = accepted(provider.create_layer, known)
            if not causal and "causal" not in options:
                raise unfit(provider, "is always causal, and an encoder is not")
            layer = checked(provider.create_layer(d_model, num_heads, **options), d_model)
            if crosses and not supports(layer, "cross_attention"):
                raise unfit(provider, "cannot look at another sequence than its own, as a decoder does")
            return layer

        return cast(nn.Module, self.in_use.use("attention", model.attention_name, make))

    def build_ffn(self, d_model: int, d_ff: int) -> nn.Module:
        """A feed-forward layer of `model.ffn_name`, or of the default where that cannot be had. Raises likewise."""
        model = self.config.model
        known = {"dropout": model.dropout, "num_layers": model.num_layers}

        def make(provider: Any) -> nn.Module:
            return checked(provider.create_layer(d_model, d_ff, **accepted(provider.create_layer, known)), d_model)

        return cast(nn.Module, self.in_use.use("ffn", model.ffn_name, make))

    def build_block(self, d_model: int, num_heads: int, d_ff: int, *, causal: bool = True) -> TransformerBlock:
        """A pre-norm block. Where `model.moe.enabled` is true a router wraps its FFN, which else stays dense."""
        attention = self.build_attention(d_model, num_heads, causal=causal)
        return TransformerBlock(attention, self._build_wrapped_ffn(d_model, d_ff), **self._block_options())

    def build_decoder_block(self, d_model: int, num_heads: int, d_ff: int) -> DecoderBlock:
        """Likewise, for the decoder of an encoder-decoder."""
        attention = self.build_attention(d_model, num_heads)
        cross_attention = self.build_attention(d_model, num_heads, causal=False, crosses=True)
        ffn = self._build_wrapped_ffn(d_model, d_ff)
        return DecoderBlock(attention, cross_attention, ffn, **self._block_options())

    def _build_wrapped_ffn(self, d_model: int, d_ff: int) -> nn.Module:
        model = self.config.model
        ffn = self.build_ffn(d_model, d_ff)
        section = model.sections.get("moe", {})
        if section.get("enabled", False):

            def wrap(provider: Any) -> nn.Module:
                return checked(provider.wrap_ffn(ffn, copy.deepcopy(section)), None)

            wrapped = self.in_use.use("router", model.router_name, wrap, optional=True)
            ffn = ffn if wrapped is None else wrapped
        return ffn

    def _block_options(self) -> dict[str, Any]:
        model = self.config.model
        return {"norm": model.norm, "dropout": model.dropout, "norm_eps": model.norm_eps}

    def build_model(self, vocab_size: int | None = None) -> Backbone:
        """The whole model, its weights drawn from torch's global generator.

        Args:
            vocab_size: rows of the embedding; the profile's `model.vocab_size` if left out.

        Raises:
            ConfigError: neither says how large the vocabulary is.
        """
        model = self.config.model
        rows = vocab_size or model.vocab_size
        if rows is None:
            raise ConfigError(
                "model.vocab_size: the size of the vocabulary is not known",
                hint="set it in the profile, or pass that of the tokenizer: build_model(vocab_size=...)",
            )
        sizes = (model.d_model, model.num_heads, model.hidden_size)
        if model.backbone == "gpt":
            return GPT(model, [self.build_block(*sizes) for _ in range(model.num_layers)], rows)
        encoder_layers = model.num_encoder_layers or model.num_layers
        encoder = [self.build_block(*sizes, causal=False) for _ in range(encoder_layers)]
        decoder = [self.build_decoder_block(*sizes) for _ in range(model.num_layers)]
        return EncoderDecoder(model, encoder, decoder, rows)

    def modules_by_slot(self, model: nn.Module) -> dict[tuple[str, str], list[str]]:
        """{(kind, name): qualified names of the modules of `model` that this provider built}."""
        blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, TransformerBlock)]

        def built(kind: str) -> list[str]:
            return [f"{path}.{place}" for path, block in blocks for place in PLACES[kind] if hasattr(block, place)]

        return {(kind, name): built(kind) for kind, name in self.in_use.providers if kind in PLACES}


def checked(layer: Any, d_model: int | None) -> nn.Module:
    """`layer`, if it is a module that says it has this width (None: any). Raises ProviderError if not."""
    if not isinstance(layer, nn.Module):
        raise ProviderError(f"the provider built {type(layer).__name__}, which is no torch.nn.Module")
    if d_model is not None and getattr(layer, "d_model", None) != d_model:
        raise ProviderError(f"{type(layer).__name__} was built for d_model {d_model} and has no such attribute")
    return layer


def unfit(provider: Any, reason: str) -> ConfigError:
    """The error for an attention that an encoder-decoder cannot be built with."""
    return ConfigError(
        f"model.attention_name: {provider.get_name()} {reason}",
        hint="model.backbone encdec needs one that can, such as tva_default or mha",
    )


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `function` takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(options)
    return {name: value for name, value in options.items() if name in parameters}


__all__ = ["ModelBuilder"]
