"""The format `hf`: a folder that `transformers.AutoModelForCausalLM` loads as a Llama or Mixtral model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from apt.api import AptWarning, ConfigError, LoadedRun
from apt.modeling.layers.norm import EPS
from apt_plugin_quant.export.llama import Layout, to_llama
from apt_plugin_quant.export.tokenizer import TOKENIZER
from apt_plugin_quant.export.tracing import decoder_only
from apt_plugin_quant.export.weights_export import save_weights

FILE = "model.safetensors"
KNOWN_OF_MHA = ("num_kv_heads", "qk_norm", "bias")
TORCH_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def write(loaded: LoadedRun, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write `config.json`, `model.safetensors` and `tokenizer_config.json`.

    Raises:
        ConfigError: a part of the model has no counterpart; the message names all of them.
    """
    decoder_only(loaded, "hf")
    experts = _experts_that_compute(loaded)
    if obstacles := find_obstacles(loaded, experts):
        raise ConfigError(
            f"this model is neither a Llama nor a Mixtral: {'; '.join(obstacles)}",
            hint="train with the parts that are named, or export as safetensors or onnx",
        )
    layout = _layout(loaded, experts)
    weights = {name: tensor.detach() for name, tensor in loaded.model.state_dict().items()}
    dense = "ffn"
    if experts is not None:
        _fold_temperature(weights, layout)
    elif "router" in _slots(loaded):
        dense = "ffn.dense"
        warnings.warn(
            f"at step {loaded.step} the experts are not switched on yet: what computes, the dense layers, is exported "
            "as a Llama",
            AptWarning,
            stacklevel=2,
        )
    theirs = to_llama(weights, layout, dense)
    beside = (".ffn.dense.", ".ffn.selection_bias", ".ffn.schedule", ".ffn.experts.", ".ffn.router.")
    if left := [name for name in weights if not ("router" in _slots(loaded) and any(part in name for part in beside))]:
        raise ConfigError(
            f"the model holds what neither a Llama nor a Mixtral has: {', '.join(left[:3])}"
            + (f" and {len(left) - 3} more" if len(left) > 3 else ""),
            hint="leave out the plugin that adds it (--no-plugin in training), or export as safetensors",
        )
    save_weights(theirs, folder / FILE, dtype)
    _write_json(folder / "config.json", _config(loaded, layout, experts, dtype))
    if (folder / TOKENIZER).is_file():
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(loaded, folder / TOKENIZER))
    return {}


def find_obstacles(loaded: LoadedRun, experts: dict[str, Any] | None) -> list[str]:
    """What stands in the way, one clause each.

    Args:
        experts: the router's config, if experts compute.
    """
    model, slots = loaded.config.model, _slots(loaded)
    target = "Llama" if experts is None else "Mixtral"
    found: list[str] = []

    def no(setting: str, value: object, instead: str) -> None:
        found.append(f"{setting}: {value} has no counterpart in {target}; use {instead}")

    attention, ffn, router = slots["attention"], slots["ffn"], slots.get("router")
    if getattr(attention.provider, "weights_layout", None) != "mha":
        no("model.attention_name", attention.name, "mha")
    else:
        section = f"model.{attention.registration.section}"
        usual = type(attention.provider)({}).config.model_dump(mode="json")
        if attention.config.get("qk_norm"):
            no(f"{section}.qk_norm", "true", "false")
        if attention.config.get("bias") and experts is not None:
            no(f"{section}.bias", "true", "false")
        for key, value in attention.config.items():
            if key not in KNOWN_OF_MHA and value != usual.get(key):
                no(f"{section}.{key}", value, str(usual.get(key)))
    if ffn.name != "swiglu":
        no("model.ffn_name", ffn.name, "swiglu")
    elif ffn.config.get("bias") and experts is not None:
        no("model.swiglu.bias", "true", "false")
    if model.norm != "rmsnorm":
        no("model.norm", model.norm, "rmsnorm")
    if model.positions != "rope":
        no("model.positions", model.positions, "rope")
    if router is not None and router.name != "topk_moe":
        no("model.router_name", router.name, "topk_moe")
    elif experts is not None:
        if not experts["normalize"]:
            no("model.moe.normalize", "false", "true")
        if experts["shared_experts"]:
            no("model.moe.shared_experts", experts["shared_experts"], "0")
        if _biased(loaded):
            no("model.moe.bias_rate", experts["bias_rate"], "0, with a balance_loss")
    return found


def _slots(loaded: LoadedRun) -> dict[str, Any]:
    """{kind: slot} of the model's parts; a slot that stayed empty is left out."""
    return {slot.kind: slot for slot in loaded.in_use.slots.values() if slot.name is not None}


def _experts_that_compute(loaded: LoadedRun) -> dict[str, Any] | None:
    """The config of `topk_moe`, if its experts are switched on in this checkpoint."""
    router = _slots(loaded).get("router")
    if router is None or router.name != "topk_moe":
        return None
    active = bool(loaded.model.state_dict()["blocks.0.ffn.schedule"][0])
    return dict(router.config) if active else None


def _biased(loaded: LoadedRun) -> bool:
    weights = loaded.model.state_dict()
    return any(bool(weights[name].any()) for name in weights if name.endswith(".ffn.selection_bias"))


def _layout(loaded: LoadedRun, experts: dict[str, Any] | None) -> Layout:
    model, slots = loaded.config.model, _slots(loaded)
    attention = slots["attention"].config
    return Layout(
        vocab_size=loaded.model.vocab_size,
        d_model=model.d_model,
        d_ff=model.hidden_size,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=attention.get("num_kv_heads") or model.num_heads,
        experts=experts["experts"] if experts is not None else None,
        attention_bias=bool(attention.get("bias")),
        ffn_bias=bool(slots["ffn"].config.get("bias")),
        tied=model.tie_embeddings,
    )


def _fold_temperature(weights: dict[str, Any], layout: Layout) -> None:
    """softmax(W x / t) is softmax((W / t) x): Mixtral's router has no temperature, its matrix takes it."""
    for layer in range(layout.num_layers):
        temperature = float(weights[f"blocks.{layer}.ffn.schedule"][1])
        name = f"blocks.{layer}.ffn.router.weight"
        weights[name] = weights[name] / temperature


def _config(loaded: LoadedRun, layout: Layout, experts: dict[str, Any] | None, dtype: torch.dtype) -> dict[str, Any]:
    model = loaded.config.model
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM" if experts is None else "MixtralForCausalLM"],
        "model_type": "llama" if experts is None else "mixtral",
        "dtype": TORCH_NAMES[dtype],
        "vocab_size": layout.vocab_size,
        "hidden_size": layout.d_model,
        "intermediate_size": layout.d_ff,
        "num_hidden_layers": layout.num_layers,
        "num_attention_heads": layout.num_heads,
        "num_key_value_heads": layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": EPS if model.norm_eps is None else model.norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": layout.tied,
        "attention_dropout": model.dropout,
        "bos_token_id": None,
        "eos_token_id": loaded.tokenizer.eos_id,
        "pad_token_id": None,
    }
    if experts is None:
        config |= {"attention_bias": layout.attention_bias, "mlp_bias": layout.ffn_bias}
    else:
        config |= {
            "num_local_experts": experts["experts"],
            "num_experts_per_tok": experts["top_k"],
            "sliding_window": None,
        }
    return config


def _tokenizer_config(loaded: LoadedRun, path: Path) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": loaded.config.model.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    # A token that is no special one, as byte 0 of `byte`, must not become one: a text may hold its letter.
    special = Tokenizer.from_file(str(path)).get_added_tokens_decoder()
    if loaded.tokenizer.eos_id in special:
        config["eos_token"] = special[loaded.tokenizer.eos_id].content
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
