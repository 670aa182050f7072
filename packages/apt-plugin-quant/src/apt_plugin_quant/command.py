"""`apt quantize`: a run written again with its weights in fewer bits."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from apt.api import (
    AptWarning,
    CheckpointError,
    ConfigError,
    RunConfig,
    RunFolder,
    find_run,
    load_run,
    registry,
    resolve,
    save_run,
)

MAX_SHOWN = 6
FEW = 0.5
"""Below this share of quantised weights the user is warned: something large was left."""


def run_quantize_command(args: Namespace) -> int:
    """Quantise `args.run_name` into a folder of its own, and say what became of each part."""
    run = find_run(args.run_name)
    config = resolve(run.profile).config
    if config.model.quant_name:
        raise ConfigError(
            f"{run.path} is quantised already, as {config.model.quant_name}",
            hint="name the run that it was made from",
        )
    scheme = args.scheme or config.model.qat_name
    if scheme is None:
        known = ", ".join(registry.list_providers("quant")["quant"])
        raise ConfigError("apt quantize: which scheme?", hint=f"give --scheme and one of: {known}")
    out = Path(args.out) if args.out else run.path.with_name(f"{run.path.resolve().name}-{scheme}")
    target = quantized_profile(run, config, scheme, args.group_size)
    if out.exists():
        raise CheckpointError(f"{out} exists already", hint="choose another folder with --out, or remove it")

    loaded = load_run(run, device="cpu", checkpoint=args.checkpoint, state=args.state, plugins=target.plugins)
    before = loaded.model.state_dict()
    loaded.in_use.sections = target.sections
    model: Any = loaded.in_use.use("quant", scheme, lambda provider: provider.quantize(loaded.model))
    written = save_run(out, replace(loaded, config=target, model=model))
    report(written, scheme, loaded.step, before, model.state_dict())
    return 0


def quantized_profile(run: RunFolder, config: RunConfig, scheme: str, group_size: str | None) -> RunConfig:
    """The profile of the quantised run: the run's own, with the scheme and its plugin.

    Raises:
        ProviderNotFoundError: no plugin brings the scheme.
        ConfigError: `group_size` is no whole number.
    """
    claim = registry.find("quant", scheme)
    changes: dict[str, Any] = {
        "description": f"{scheme} of {run.path.resolve().name}",
        "model.quant_name": scheme,
    }
    if config.plugins is not None and claim.plugin not in (*config.plugins, "script"):
        changes["plugins"] = [*config.plugins, claim.plugin]
    if group_size is not None:
        if not group_size.isascii() or not group_size.isdigit():
            raise ConfigError(f"apt quantize: --group-size {group_size!r} is no whole number", hint="use 32, say")
        changes[f"model.{claim.section}.group_size"] = int(group_size)
    return resolve(run.profile, changes).config


def report(run: RunFolder, scheme: str, step: int, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Print what was quantised, what was not, and the sizes."""
    kept = {name: tensor for name, tensor in after.items() if name in before and tensor.dtype == before[name].dtype}
    weights, left = (sum(tensor.numel() for tensor in of.values()) for of in (before, kept))
    share = 1 - left / weights
    sizes = [sum(tensor.nbytes for tensor in of.values()) for of in (before, after)]
    parts: Counter[str] = Counter()
    for name, tensor in kept.items():
        parts[_pattern(name)] += tensor.numel()
    names = [f"{name} {count:,}" for name, count in parts.most_common(MAX_SHOWN)]
    more = f" and {len(parts) - MAX_SHOWN} more" if len(parts) > MAX_SHOWN else ""
    rows = {
        "run": f"{run.path} (step {step})",
        "quantised": f"{weights - left:,} of {weights:,} weights ({share:.1%}) to {scheme}",
        "left": ", ".join(names) + more,
        "on disk": f"{sizes[0] / 1e6:,.2f} MB -> {sizes[1] / 1e6:,.2f} MB ({sizes[1] / sizes[0]:.1%})",
    }
    print("\n".join(f"{title:<11}{text}" for title, text in rows.items()))
    if share < FEW:
        warnings.warn(
            f"only {share:.1%} of the weights are quantised: a scheme takes linear maps alone, and the largest part "
            f"that is left is {names[0]}",
            AptWarning,
            stacklevel=2,
        )


def _pattern(name: str) -> str:
    """A parameter's name without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", name)
