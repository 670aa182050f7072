"""Size, perplexity and speed of each scheme of quantisation, on one trained run.

    apt train -p shakespeare_char --data.train_path input.txt --model.attention_name mha --run-dir runs/mha
    python benchmarks/quantisation.py runs/mha

Every variant of the model is in one process, on one thread, and they take turns; a speed is a median of ratios to fp32
as it is without compiling, of CPU time. `decode` makes one token after another from a cache, one row; `score` predicts
every token of a batch. `--width` times a model of that width instead, with the weights it was born with: no perplexity,
but a size at which the weights no longer fit into the processor's caches.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apt.api import LoadedRun, ModelBuilder, evaluate, find_run, load_run, save_run
from apt.core.device import tune_cpu_memory
from apt.data.prepare import prepare_data
from apt_plugin_quant.providers import Int4Weights, Int8Dynamic, Int8Weights

SCHEMES = {"int8": Int8Weights, "int8_dynamic": Int8Dynamic, "int4": Int4Weights}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run's folder; not with --width")
    parser.add_argument("--width", type=int, help="d_model of a model of 4 layers and 8,192 tokens, not trained")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48, help="tokens that one turn decodes")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled columns out")
    args = parser.parse_args()
    if (args.run is None) == (args.width is None):
        parser.error("give a run, or --width")
    torch.set_num_threads(1)
    tune_cpu_memory()
    warnings.simplefilter("ignore")

    loaded = load_run(find_run(args.run), device="cpu") if args.run else None
    plain = loaded.model if loaded is not None else untrained(args.width)
    models = {"fp32": plain, "bf16": copy.deepcopy(plain).bfloat16()}
    models |= {name: scheme().quantize(copy.deepcopy(plain)).eval() for name, scheme in SCHEMES.items()}
    perplexity = {name: measured(loaded, model) for name, model in models.items()} if loaded is not None else {}
    size = {name: bytes_of(model, loaded) for name, model in models.items()}
    shape = plain.d_model, len(plain.blocks), sum(p.numel() for p in plain.parameters())
    print(f"torch {torch.__version__}, 1 thread; d_model {shape[0]}, {shape[1]} layers, {shape[2]:,} weights")

    batch = torch.randint(0, plain.vocab_size, (12 if loaded else 1, min(plain.max_seq_len, 64)))
    work: dict[str, Callable[[Any], object]] = {
        "decode": partial(decode, count=args.tokens),
        "score": partial(score, batch),
    }
    contest = {"reference": copy.deepcopy(plain), **models}
    columns = {name: turns(contest, does, args.turns) for name, does in work.items()}
    if not args.no_compile:
        torch._dynamo.config.recompile_limit = 64  # all of them share their code
        for model in models.values():
            model.compile()
        columns |= {f"{name}, compiled": turns(contest, does, args.turns) for name, does in work.items()}
    counts = {"decode": args.tokens, "score": batch.numel()}
    base = {name: counts[name] / statistics.median(columns[name]["reference"]) for name in counts}
    print("fp32: " + ", ".join(f"{name} {speed:,.0f} tokens/s" for name, speed in base.items()))
    print(f"| scheme | MB | of fp32 | perplexity | {' | '.join(columns)} |\n|---|---|---|---|{'---|' * len(columns)}")
    for name in models:
        speeds = [
            f"{statistics.median(a / b for a, b in zip(seconds['reference'], seconds[name], strict=True)):.2f}"
            for seconds in columns.values()
        ]
        lost = f"{perplexity[name]:.4f}" if name in perplexity else ""
        print(
            f"| `{name}` | {size[name] / 1e6:.2f} | {size[name] / size['fp32']:.0%} | {lost} | {' | '.join(speeds)} |"
        )
    return 0


def untrained(width: int) -> Any:
    torch.manual_seed(0)
    model = {"d_model": width, "num_heads": width // 64, "num_layers": 4, "max_seq_len": 128, "vocab_size": 8192}
    return ModelBuilder({"model": {**model, "attention_name": "mha"}}).build_model().eval()


def measured(loaded: LoadedRun, model: Any) -> float:
    """Perplexity over the whole held-out text."""
    data = prepare_data(loaded.config, loaded.in_use)
    return evaluate(model, data.val, loaded.config.training.batch_size, loaded.device)["perplexity"]


def bytes_of(model: Any, loaded: LoadedRun | None) -> int:
    """Of the file of weights that a run keeps; without a run, of what would lie in it."""
    if loaded is None:
        return sum(tensor.nbytes for tensor in model.state_dict().values())
    with tempfile.TemporaryDirectory() as folder:
        run = save_run(Path(folder) / "run", replace(loaded, model=model))
        return next(run.checkpoints.glob("*/model.safetensors")).stat().st_size


def decode(model: Any, count: int) -> Tensor:
    """The likeliest tokens, one by one."""
    cache, token = model.make_cache(1, count), torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(count):
        token = model(token, cache=cache, last_only=True).logits.argmax(-1)
    return token


def score(batch_BT: Tensor, model: Any) -> Tensor:
    """Every token of the batch predicted at once."""
    logits_BTV: Tensor = model(batch_BT).logits
    return logits_BTV


def turns(models: dict[str, Any], work: Callable[[Any], object], count: int) -> dict[str, list[float]]:
    """Seconds of CPU time of each turn, by model; each has had three before that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(count + 3):
            for name, model in models.items():
                started = time.process_time()
                work(model)
                if turn >= 3:
                    seconds[name].append(time.process_time() - started)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
