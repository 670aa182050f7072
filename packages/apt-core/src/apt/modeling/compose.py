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
from apt.core.registry import Registry
from apt.core.registry import registry as installed
from apt.modeling.backbones.gpt import GPT, TransformerBlock


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

    def build_attention(self, d_model: int, num_heads: int) -> nn.Module:
        """A causal attention layer of `model.attention_name`, or of the default where that cannot be had.

        Raises:
            ConfigError, ProviderError, ConflictError: as `ProvidersInUse.use`.
        """
        model = self.config.model
        known = {
            "causal": True,
            "dropout": model.dropout,
            "num_layers": model.num_layers,
            "rope_theta": model.rope_theta if model.positions == "rope" else None,
            "device": self.device,
            "trains": self.trains,
        }

        def make(provider: Any) -> nn.Module:
            return checked(provider.create_layer(d_model, num_heads, **accepted(provider.create_layer, known)), d_model)

        return cast(nn.Module, self.in_use.use("attention", model.attention_name, make))

    def build_ffn(self, d_model: int, d_ff: int) -> nn.Module:
        """A feed-forward layer of `model.ffn_name`, or of the default where that cannot be had. Raises likewise."""
        model = self.config.model
        known = {"dropout": model.dropout, "num_layers": model.num_layers}

        def make(provider: Any) -> nn.Module:
            return checked(provider.create_layer(d_model, d_ff, **accepted(provider.create_layer, known)), d_model)

        return cast(nn.Module, self.in_use.use("ffn", model.ffn_name, make))

    def build_block(self, d_model: int, num_heads: int, d_ff: int) -> TransformerBlock:
        """A pre-norm block. Where `model.moe.enabled` is true a router wraps its FFN, which else stays dense."""
        model = self.config.model
        attention = self.build_attention(d_model, num_heads)
        ffn = self.build_ffn(d_model, d_ff)
        section = model.sections.get("moe", {})
        if section.get("enabled", False):

            def wrap(provider: Any) -> nn.Module:
                return checked(provider.wrap_ffn(ffn, copy.deepcopy(section)), None)

            wrapped = self.in_use.use("router", model.router_name, wrap, optional=True)
            ffn = ffn if wrapped is None else wrapped
        return TransformerBlock(attention, ffn, norm=model.norm, dropout=model.dropout, norm_eps=model.norm_eps)

    def build_model(self, vocab_size: int | None = None) -> GPT:
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
        blocks = [self.build_block(model.d_model, model.num_heads, model.hidden_size) for _ in range(model.num_layers)]
        return GPT(model, blocks, rows)

    def modules_by_slot(self, model: GPT) -> dict[tuple[str, str], list[str]]:
        """{(kind, name): qualified names of the modules of `model` that this provider built}."""
        places = {"attention": "attention", "ffn": "ffn", "router": "ffn"}
        return {
            (kind, name): [f"blocks.{index}.{places[kind]}" for index in range(len(model.blocks))]
            for kind, name in self.in_use.providers
            if kind in places
        }


def checked(layer: Any, d_model: int | None) -> nn.Module:
    """`layer`, if it is a module that says it has this width (None: any). Raises ProviderError if not."""
    if not isinstance(layer, nn.Module):
        raise ProviderError(f"the provider built {type(layer).__name__}, which is no torch.nn.Module")
    if d_model is not None and getattr(layer, "d_model", None) != d_model:
        raise ProviderError(f"{type(layer).__name__} was built for d_model {d_model} and has no such attribute")
    return layer


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that `function` takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(options)
    return {name: value for name, value in options.items() if name in parameters}


__all__ = ["ModelBuilder"]
