"""The options of 1.x, and the profile that they make."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from apt.core.cache import atomic_write
from apt.core.config import RunConfig
from apt.core.errors import AptWarning, ConfigError

FILE = "config.json"

UNREAD = (
    "epsilon", "alpha", "beta", "activation", "batch_first", "attention_dropout",
    "use_dbc_dac", "rank_ratio_proj", "rank_ratio_res", "dbc_threshold", "dbc_iterations",
)  # fmt: skip
"""What no part of a model has a use for any more."""


@dataclass(init=False)
class APTConfig:
    """The options of a model and its training, by their names in 1.x and in that order.

    Options that are not listed are kept too. Those that nothing reads any more are named in one AptWarning, once in a
    process, where they were given another value than their default.

    Raises:
        TypeError: an option is given twice, or more of them without a name than there are.
    """

    vocab_size: int = 50257
    d_model: int = 768
    d_ff: int = 2048
    num_heads: int = 12
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    dropout: float = 0.15
    """Everywhere, attention weights included."""
    max_seq_len: int = 512
    epsilon: float = 0.08
    alpha: float = 0.0008
    beta: float = 0.003
    base_lr: float = 4e-5
    pad_token_id: int = 0
    """Masked by `generate`."""
    bos_token_id: int = 1
    """Starts what `generate` returns."""
    eos_token_id: int = 2
    """Ends it."""
    activation: str = "gelu"
    use_autopoietic: bool = True
    """Whether the decoder's attention generates its vein: `tva.s` is 1, else 0."""
    sr_ratio: int = 6
    """The compression `tva.r`; one that does not fit becomes the nearest that does, with an AptWarning."""
    init_tau: float = 1.3
    """`tva.tau`."""
    batch_first: bool = True
    warmup_steps: int = 1500
    weight_decay: float = 0.015
    attention_dropout: float = 0.15
    layer_norm_eps: float = 1e-5
    gradient_clip: float = 0.8
    use_dbc_dac: bool = False
    rank_ratio_proj: float = 0.1
    rank_ratio_res: float = 0.05
    dbc_threshold: float = 1e-6
    dbc_iterations: int = 1
    tokenizer_type: str | None = None
    language: str | None = None

    def __init__(self, *options: Any, **named: Any) -> None:
        names = [field.name for field in fields(self)]
        given = dict(zip(names, options, strict=False))
        if len(options) > len(names) or given.keys() & named.keys():
            raise TypeError(f"APTConfig: an option is given twice, or more than {len(names)} without a name")
        given |= named
        for name, value in given.items():
            setattr(self, name, value)
        unread = [name for name, value in given.items() if _says_nothing(name, value, type(self))]
        if unread:
            say_once(f"APTConfig: {', '.join(unread)} kept, but nothing reads it any more; see docs/migration.md")

    def to_dict(self) -> dict[str, Any]:
        """Every option, those that are not listed included."""
        return {**asdict(self), **vars(self)}

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> APTConfig:
        """The options that `to_dict` wrote."""
        return cls(**config_dict)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `config.json` into a folder, which is made if it is not there.

        Raises:
            ConfigError: an option cannot be written as JSON, or the folder not be written to.
        """
        path = Path(save_directory) / FILE
        try:
            text = json.dumps(self.to_dict(), indent=2)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(text.encode())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path} cannot be written: {error}", hint="leave that option out") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}", hint="choose another folder") from None

    @classmethod
    def from_pretrained(cls, model_path: str | Path) -> APTConfig:
        """Read the `config.json` of a folder.

        Raises:
            ConfigError: there is none, or it holds no options.
        """
        path = Path(model_path) / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", hint="name the folder of a saved model") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{path} holds no options", hint="name the folder of a saved model")
        return cls.from_dict(content)

    @classmethod
    def from_profile(cls, config: RunConfig, **more: Any) -> APTConfig:
        """The options that a run's profile amounts to, and `more` of them.

        Raises:
            ConfigError: its model is no encoder-decoder, and so none of 1.x.
        """
        model, training = config.model, config.training
        if model.backbone != "encdec":
            raise ConfigError(
                f"model.backbone: {model.backbone} is no model of 1.x, which knows encoder-decoders alone",
                hint="open it with apt.api.load_run",
            )
        tva = model.sections.get("tva", {})
        options = {
            "d_model": model.d_model,
            "d_ff": model.hidden_size,
            "num_heads": model.num_heads,
            "num_encoder_layers": model.num_encoder_layers or model.num_layers,
            "num_decoder_layers": model.num_layers,
            "dropout": model.dropout,
            "max_seq_len": model.max_seq_len,
            "base_lr": training.learning_rate,
            "use_autopoietic": tva.get("s", 1.0) > 0,
            "sr_ratio": tva.get("r", 4),
            "init_tau": tva.get("tau", 0.18),
            "warmup_steps": training.warmup_steps,
            "weight_decay": training.weight_decay,
            "layer_norm_eps": model.norm_eps or cls.layer_norm_eps,
            "gradient_clip": training.gradient_clip,
        }
        return cls(**options | more)

    def to_profile(self) -> dict[str, Any]:
        """The sections `model` and `training` of a profile: what `apt.api.ModelBuilder` takes."""
        return {
            "model": {
                "backbone": "encdec",
                "vocab_size": self.vocab_size,
                "max_seq_len": self.max_seq_len,
                "d_model": self.d_model,
                "num_heads": self.num_heads,
                "num_layers": self.num_decoder_layers,
                "num_encoder_layers": self.num_encoder_layers,
                "d_ff": self.d_ff,
                "norm_eps": self.layer_norm_eps,
                "dropout": self.dropout,
                "tva": tva_section(self.d_model, self.num_heads, self.sr_ratio, self.init_tau, self.use_autopoietic),
            },
            "training": {
                "learning_rate": self.base_lr,
                "warmup_steps": self.warmup_steps,
                "weight_decay": self.weight_decay,
                "gradient_clip": self.gradient_clip,
            },
        }


@dataclass(init=False)
class APTModelConfiguration(APTConfig):
    """The same options with the defaults that they had under this name."""

    vocab_size: int = 30522
    d_ff: int = 3072
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    dropout: float = 0.1
    max_seq_len: int = 2048
    epsilon: float = 1e-6
    alpha: float = 0.1
    beta: float = 0.01
    base_lr: float = 3e-5
    bos_token_id: int = 101
    eos_token_id: int = 102
    sr_ratio: int = 4
    init_tau: float = 1.0
    use_dbc_dac: bool = True

    def __init__(self, vocab_size: int = 30522, d_model: int = 768, **named: Any) -> None:
        # The others stood in another order than those of APTConfig: a number must not become another option.
        super().__init__(vocab_size, d_model, **named)


def tva_section(d_model: int, heads: int, sr_ratio: int, init_tau: float, use_autopoietic: bool) -> dict[str, Any]:
    """The section `model.tva` that the options of an attention amount to."""
    from apt.modeling.layers.attention_tva import slice_width

    sized = all(isinstance(size, int) and size > 0 for size in (d_model, heads, sr_ratio)) and d_model % heads == 0
    fits = [r for r in range(1, d_model + 1) if slice_width(d_model, heads, r)] if sized else []
    # Where none fits, or a size is none, the kernel says what is wrong.
    r = min(fits, key=lambda ratio: abs(ratio - sr_ratio), default=sr_ratio)
    if r != sr_ratio:
        say_once(f"sr_ratio {sr_ratio} does not fit d_model {d_model} with {heads} heads: {r} is used, the nearest")
    return {"r": r, "s": 1.0 if use_autopoietic else 0.0, "tau": init_tau}


def _says_nothing(name: str, value: Any, kind: type[APTConfig]) -> bool:
    known = [field.name for field in fields(kind)]
    return name not in known or (name in UNREAD and value != getattr(kind, name))


@cache
def say_once(text: str) -> None:
    """Warn with AptWarning, once in a process for each text."""
    warnings.warn(text, AptWarning, stacklevel=3)
