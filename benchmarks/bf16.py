"""Where bf16 autocast pays on this CPU: the time of a training step in fp32 over that in bf16, by width of the model.

    python benchmarks/bf16.py

Both run in turn in one process; each figure is the ratio of the fastest rounds. `apt.core.device.BF16_MIN_WIDTH`, from
which `mixed_precision: auto` uses bf16 on CPUs, is read off this table.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional as F

from apt.api import GPT, ModelBuilder
from apt.core.device import cpu_has_bf16, tune_cpu_memory


def seconds(model: GPT, tokens: torch.Tensor, precision: AbstractContextManager[Any], steps: int) -> float:
    """Wall-clock seconds of so many forward and backward passes."""
    started = time.perf_counter()
    for _ in range(steps):
        with precision:
            logits = model(tokens).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        model.zero_grad()
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512, 768])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_cpu_memory()
    print(f"torch {torch.__version__}, {args.threads} thread(s), bf16 in hardware: {'yes' if cpu_has_bf16() else 'no'}")
    for width in args.widths:
        config = {"model": {"d_model": width, "num_heads": width // 32, "num_layers": 2, "max_seq_len": 64}}
        model = ModelBuilder(config).build_model(vocab_size=1000)
        tokens = torch.randint(0, 1000, (12, 64))
        precisions = {"fp32": nullcontext(), "bf16": torch.autocast("cpu", torch.bfloat16)}
        best = dict.fromkeys(precisions, float("inf"))
        for _ in range(args.rounds):
            for name, precision in precisions.items():
                best[name] = min(best[name], seconds(model, tokens, precision, steps=8))
        print(f"d_model {width:>4}  fp32 / bf16 = {best['fp32'] / best['bf16']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
