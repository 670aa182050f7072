"""What core knows by name without having it installed: the kinds, their defaults, and the first-party packages.

It serves one end: to name the package to install when something that exists is absent.
"""

from __future__ import annotations

from collections.abc import Container

KINDS: dict[str, str] = {
    "attention": "model",
    "ffn": "model",
    "router": "model",
    "align": "model",
    "retrieval": "model",
    "voter": "model",
    "quant": "model",
    "dataset": "data",
    "tokenizer": "data",
    "tracker": "training",
}
"""Kind -> the section of a profile in which its providers' own sections lie."""

DEFAULTS: dict[str, str] = {"attention": "tva_default", "ffn": "default"}
"""What a kind falls back to. Kinds without one (a router, an alignment) are simply left out of the model, loudly; those
that nothing can stand in for (a dataset, a tokenizer) are an error."""

PLUGINS: dict[str, str] = {
    "moe": "apt-plugin-moe",
    "routing": "apt-plugin-moe",
    "align": "apt-plugin-align",
    "flash": "apt-plugin-flash",
    "rag": "apt-plugin-rag",
    "quant": "apt-plugin-quant",
    "voter": "apt-core",
}
"""Plugin name -> the package that brings it. Two names may mean one package."""

ENTRY_POINTS: dict[str, str] = {"routing": "moe", "voter": "builtin"}
"""Plugin name -> the entry point it is part of, where that has another name."""

PROVIDERS: dict[tuple[str, str], str] = {
    ("router", "topk_moe"): "apt-plugin-moe",
    ("align", "bistate_default"): "apt-plugin-align",
    ("attention", "flash_v2"): "apt-plugin-flash[cuda]",
    ("attention", "flash_sdpa"): "apt-plugin-flash",
    ("attention", "flex"): "apt-plugin-flash",
    ("retrieval", "bm25"): "apt-plugin-rag",
    ("retrieval", "dense"): "apt-plugin-rag",
    ("retrieval", "hybrid"): "apt-plugin-rag",
    ("retrieval", "knn_lm"): "apt-plugin-rag",
    ("quant", "int8"): "apt-plugin-quant",
    ("quant", "int8_dynamic"): "apt-plugin-quant",
    ("quant", "int4"): "apt-plugin-quant",
}
"""(kind, name) -> the requirement that brings it."""

SECTIONS: dict[str, str] = {
    "tva": "apt-core",
    "mha": "apt-core",
    "moe": "apt-plugin-moe",
    "bistate": "apt-plugin-align",
    "voting": "apt-core",
    "int8": "apt-plugin-quant",
    "int8_dynamic": "apt-plugin-quant",
    "int4": "apt-plugin-quant",
}
"""Section of `model` -> the package whose provider reads it."""

ON_THE_COMMAND_LINE: dict[str, str] = {
    "rag": "apt-plugin-rag",
    "--retrieve": "apt-plugin-rag",
    "quantize": "apt-plugin-quant",
    "export": "apt-plugin-quant",
    "import": "apt-plugin-quant",
}
"""Command or option -> the package whose plugin adds it."""

WORDS_OF_OTHERS: dict[str, str] = {
    "n_embd": "model.d_model",
    "hidden_size": "model.d_model",
    "intermediate_size": "model.d_ff",
    "n_layer": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "n_head": "model.num_heads",
    "num_attention_heads": "model.num_heads",
    "block_size": "model.max_seq_len",
    "context_length": "model.max_seq_len",
    "max_position_embeddings": "model.max_seq_len",
    "tie_word_embeddings": "model.tie_embeddings",
    "lr": "training.learning_rate",
    "min_lr": "training.min_learning_rate",
    "lr_scheduler_type": "training.lr_schedule",
    "num_train_epochs": "training.max_epochs",
    "max_iters": "training.max_steps",
    "micro_batch_size": "training.batch_size",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "accumulate_grad_batches": "training.gradient_accumulation",
    "grad_clip": "training.gradient_clip",
    "max_grad_norm": "training.gradient_clip",
    "gradient_clip_val": "training.gradient_clip",
    "precision": "training.mixed_precision",
    "bf16": "training.mixed_precision",
    "torch_compile": "training.compile",
    "logging_steps": "training.log_every",
    "eval_steps": "training.eval_every",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep_last",
    "strategy": "hardware.parallel",
}
"""What HF Trainer, Lightning, litgpt and nanoGPT call a key of a profile -> our name of it, to say to those who come
from there."""


def package_of_provider(kind: str, name: str) -> str | None:
    """The requirement to install for a first-party provider, or None if core does not know it."""
    return PROVIDERS.get((kind, name))


def how_to_have(word: str) -> str | None:
    """What to do to have a command or an option of a first-party plugin that is not there; None if core does not know
    it."""
    from importlib_metadata import PackageNotFoundError, version

    requirement = ON_THE_COMMAND_LINE.get(word)
    if requirement is None:
        return None
    try:
        version(requirement)
    except PackageNotFoundError:
        return f'pip install "{requirement}"'
    return f"{requirement} brings it, and its plugin is left out, has failed or is too old: see apt plugin-list"


HOW_TO_USE = "leave --no-plugin out, or see apt plugin-list"
"""What to do to have a plugin in use that is `left_out`."""


def left_out(requirement: str, in_use: Container[str | None]) -> str | None:
    """Says that what `requirement` brings is installed and its plugin was left out, or failed; None where that is not
    so.

    Args:
        in_use: the distributions that registered something.
    """
    from importlib_metadata import PackageNotFoundError, distribution

    from apt.core.discovery import GROUP

    requirement, _, wanted = requirement.partition("==")
    name = requirement.partition("[")[0]
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    if name in in_use or wanted not in ("", found.version) or not found.entry_points.select(group=GROUP):
        return None
    return f"{name} {found.version} is installed and its plugin not in use"


def how_to_install(requirement: str, in_use: Container[str | None] | None = None) -> str:
    """What to do to get what `requirement` brings; a package that is installed and does not bring it is too old, or
    `left_out`, which can be told where `in_use` is given."""
    from importlib_metadata import PackageNotFoundError, version

    if in_use is not None and (said := left_out(requirement, in_use)):
        return f"{said}: {HOW_TO_USE}"
    try:
        installed = version(requirement.partition("[")[0])
    except PackageNotFoundError:
        return f'pip install "{requirement}"'
    return f'pip install --upgrade "{requirement}", for the installed {installed} does not bring it'


def how_to_restore(requirement: str) -> str:
    """What to do to have what exactly `requirement`, such as "apt-plugin-moe==2.0.0", brought to an earlier run."""
    from importlib_metadata import PackageNotFoundError, version

    name, _, wanted = requirement.partition("==")
    try:
        if version(name) == wanted:
            return f"{name} {wanted} is installed and its plugin not in use: see apt plugin-list"
    except PackageNotFoundError:
        pass
    return f'pip install "{requirement}"'
