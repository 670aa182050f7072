"""What a config.json says of a Llama or Mixtral model, and what in it ours has not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError

from apt.api import ConfigError, DataError
from apt_plugin_quant.export.llama import Layout

Count = Annotated[int, Field(gt=0, lt=2**31)]
Layers = Annotated[int, Field(gt=0, le=10_000)]
Positive = Annotated[float, Field(gt=0)]

RESTORE = "restore it from the model's source"


class Rope(BaseModel):
    """The sections `rope_parameters` and, in older folders, `rope_scaling`."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rope_type: str = Field("default", validation_alias=AliasChoices("rope_type", "type"))
    rope_theta: Positive | None = None
    partial_rotary_factor: float = 1.0


class Llama(BaseModel):
    """What matters of a config.json, with the defaults of transformers. The sizes have none: another size is another
    model."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    model_type: str
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    hidden_act: str = "silu"
    max_position_embeddings: Count = 2048
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10_000.0
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    sliding_window: Count | None = None
    use_sliding_window: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    quantization_config: dict[str, Any] | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def theta(self) -> float:
        """The base of the angles, from wherever this version of transformers has written it."""
        return (self.rope_parameters and self.rope_parameters.rope_theta) or self.rope_theta

    def layout(self) -> Layout:
        """The sizes."""
        return Layout(
            vocab_size=self.vocab_size,
            d_model=self.hidden_size,
            d_ff=self.intermediate_size,
            num_layers=self.num_hidden_layers,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_key_value_heads or self.num_attention_heads,
            attention_bias=self.attention_bias,
            ffn_bias=self.mlp_bias,
            tied=self.tie_word_embeddings,
        )

    def profile(self) -> dict[str, Any]:
        """The section `model` of a profile."""
        return {
            "vocab_size": self.vocab_size,
            "max_seq_len": self.max_position_embeddings,
            "d_model": self.hidden_size,
            "num_heads": self.num_attention_heads,
            "num_layers": self.num_hidden_layers,
            "d_ff": self.intermediate_size,
            "attention_name": "mha",
            "ffn_name": "swiglu",
            "norm": "rmsnorm",
            "norm_eps": self.rms_norm_eps,
            "positions": "rope",
            "rope_theta": self.theta,
            "tie_embeddings": self.tie_word_embeddings,
            "mha": {"num_kv_heads": self.num_key_value_heads, "bias": self.attention_bias},
            "swiglu": {"bias": self.mlp_bias},
        }

    def obstacles(self) -> Iterator[str]:
        """What ours has not, one clause each."""
        width, heads, kv_heads = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if self.hidden_act != "silu":
            yield f"hidden_act is {self.hidden_act!r}, and swiglu has silu"
        if width % heads or (self.head_dim or width // heads) * heads != width:
            yield f"head_dim is {self.head_dim}, and ours is hidden_size / num_attention_heads"
        elif width // heads % 2:
            yield f"heads of size {width // heads} cannot be rotated in pairs"
        if kv_heads and heads % kv_heads:
            yield f"num_key_value_heads is {kv_heads}, no divisor of num_attention_heads {heads}"
        for name, rope in (("rope_scaling", self.rope_scaling), ("rope_parameters", self.rope_parameters)):
            if rope and rope.rope_type != "default":
                yield f"{name}: positions are scaled ({rope.rope_type}), and ours are not"
            if rope and rope.partial_rotary_factor != 1:
                yield f"{name}: partial_rotary_factor is {rope.partial_rotary_factor}, and ours turns whole heads"
        window = self.sliding_window if self.use_sliding_window else None
        if window is not None and window < self.max_position_embeddings:
            yield f"sliding_window is {window}, less than max_position_embeddings, and mha sees all"
        if self.quantization_config:
            yield "quantization_config: its weights are quantised"


class Mixtral(Llama):
    """The same with experts."""

    num_key_value_heads: Count | None = 8
    max_position_embeddings: Count = 131_072
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 1e6
    num_local_experts: Annotated[int, Field(gt=0, le=65_536)] = 8
    num_experts_per_tok: Count = 2

    def layout(self) -> Layout:
        return replace(super().layout(), experts=self.num_local_experts)

    def profile(self) -> dict[str, Any]:
        moe = {"enabled": True, "experts": self.num_local_experts, "top_k": self.num_experts_per_tok}
        return {**super().profile(), "router_name": "topk_moe", "moe": moe}

    def obstacles(self) -> Iterator[str]:
        yield from super().obstacles()
        if self.attention_bias or self.mlp_bias:
            yield "attention_bias or mlp_bias, which Mixtral has not"
        if self.num_local_experts < 2:
            yield "num_local_experts is 1, and a router of ours chooses among two at least"
        if self.num_experts_per_tok > self.num_local_experts:
            yield f"num_experts_per_tok is {self.num_experts_per_tok}, more than there are"


KINDS: dict[str, type[Llama]] = {"llama": Llama, "mixtral": Mixtral}


def read_config(path: Path, content: Mapping[str, Any]) -> Llama:
    """The config in `content`, which was read from `path`.

    Raises:
        DataError: it is damaged.
        ConfigError: the model has something that ours has not; the message names all of it.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(
            f"{path}: model_type is {kind!r}: only {' and '.join(KINDS)} can be imported", hint="choose another model"
        )
    try:
        config = KINDS[kind].model_validate(content)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg'].lower()}" for fault in error.errors()]
        raise DataError(f"{path}: {'; '.join(faults)}", hint=RESTORE) from error
    if found := list(config.obstacles()):
        raise ConfigError(f"{path}: {'; '.join(found)}", hint="choose another model")
    return config
