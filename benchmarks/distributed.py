"""What each of several processes holds of a model, and what a step costs beside DistributedDataParallel used by hand.

    python benchmarks/distributed.py

The processes share this machine's CPU and talk over gloo. `held` are the bytes of weights, gradients and AdamW's
moments in one process. `speed` is the CPU time of a bare loop over DDP by that of the trainer's step, in the same
processes and in turn: the median of the ratios, stretch by stretch; above 1 the trainer is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bare import Alternate
from torch.nn.parallel import DistributedDataParallel

from apt.api import Trainer
from apt.core.world import leave, own_part

STEPS = 4
"""Of a stretch."""


class Measure(Alternate):
    """A hook that also weighs what this process holds, and whose bare loop reduces gradients as DDP does."""

    held = 0

    def on_training_start(self, trainer: Any) -> None:
        super().on_training_start(trainer)
        assert self.bare is not None
        self.bare.batch_size //= trainer.world.size
        if trainer.world.size > 1:
            self.bare.model = DistributedDataParallel(self.bare.model, gradient_as_bucket_view=True)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in weights if parameter.grad is not None]
        self.held = sum(own_part(tensor).nbytes for tensor in (*weights, *gradients, *moments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stretches", type=int, default=10, help="of each, in turn")
    parser.add_argument("--width", type=int, default=256, help="d_model of 4 layers")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "PARALLEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker[0]), args.worker[1], args.width, args.stretches)
        return
    print("processes  parallel  held by each  speed")
    for count, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")):
        with tempfile.TemporaryDirectory() as folder:
            processes = [start(rank, count, port, folder, parallel) for port in [free_port()] for rank in range(count)]
            if any([process.wait() for process in processes]):
                sys.exit("a process failed")
            told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
        held, speed = max(one["held"] for one in told), statistics.median(one["speed"] for one in told)
        print(f"{count:9}  {parallel:8}  {held / 1e6:9.2f} MB  {speed:5.2f}", flush=True)


def start(rank: int, count: int, port: int, folder: str, parallel: str) -> subprocess.Popen[bytes]:
    world = {
        "RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # fmt: skip
    variables = os.environ | {name: str(value) for name, value in world.items()}
    return subprocess.Popen([sys.executable, *sys.argv, "--worker", folder, parallel], env=variables)


def work(folder: Path, parallel: str, width: int, stretches: int) -> None:
    rank = os.environ["RANK"]
    text = folder / f"{rank}.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 2000)
    measure = Measure(STEPS)
    trainer = Trainer(
        {
            "output_dir": str(folder),
            "model": {"d_model": width, "num_heads": 4, "num_layers": 4, "max_seq_len": 64},
            "data": {"train_path": str(text), "cache_dir": str(folder / "cache")},
            "training": {
                "max_steps": STEPS * (stretches + 1),
                "batch_size": 16,
                "eval_batches": 1,
                "mixed_precision": "off",
            },
            "hardware": {"device": "cpu", "threads": 1, "parallel": parallel},
            "plugins": [],
        },
        quiet=True,
    )
    trainer.register_hook(measure)
    trainer.train()
    speed = statistics.median(bare / ours for ours, bare in measure.results())
    (folder / f"{rank}.json").write_text(json.dumps({"held": measure.held, "speed": speed}))
    leave(0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
