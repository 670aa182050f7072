"""How long training stands still for a checkpoint, in the background and in line.

    python benchmarks/checkpoint.py --folder /some/disk

For each size: a stack of matrices with AdamW's moments is saved ROUNDS times each way, alternating, and the medians are
shown. `pause` is how long `save` keeps the training thread; `whole` is until the checkpoint is on the disk. `slower` is
how much longer a training step (matrix products on one thread) takes while a save is on its way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from apt.checkpoint.background import BackgroundSaver
from apt.checkpoint.rng import rng_state
from apt.checkpoint.store import Checkpoint, CheckpointStore
from apt.core.device import tune_cpu_memory

ROUNDS = 5
WIDTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where to save; the system's folder for temporary files if left out"
    )
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 8, 32], help="millions of parameters")
    args = parser.parse_args()
    tune_cpu_memory()
    torch.set_num_threads(1)
    print("parameters      bytes  in line     pause  of in line     whole    slower")
    for millions in args.millions:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            measure(millions, Path(folder))


def measure(millions: int, folder: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(millions * 4)))
    optimizer = torch.optim.AdamW(model.parameters())
    x_BD = torch.randn(8, WIDTH)

    def step() -> None:
        model(x_BD).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    numbers = iter(range(1, 1000))

    def checkpoint() -> Checkpoint:
        return Checkpoint(next(numbers), 0, 0, model.state_dict(), optimizer.state_dict(), rng_state())

    store = CheckpointStore(folder, keep_last=1)
    saver = BackgroundSaver(store)
    saver.save(checkpoint())
    saver.wait()
    in_line, pauses, wholes, alone, beside = [], [], [], [], []
    for _ in range(ROUNDS):
        alone.append(timed(step))
        in_line.append(timed(lambda: store.save(checkpoint())))
        started = time.perf_counter()
        pauses.append(timed(lambda: saver.save(checkpoint())))
        while saver.is_busy:
            beside.append(timed(step))
        saver.wait()
        wholes.append(time.perf_counter() - started)
    there, pause, whole = map(statistics.median, (in_line, pauses, wholes))
    size = sum(path.stat().st_size for path in (folder / f"step-{store.latest():08d}").iterdir())
    slower = statistics.mean(beside) / statistics.mean(alone) - 1
    print(
        f"{sum(p.numel() for p in model.parameters()):10,} {size / 1e6:7,.0f} MB {there * 1e3:5,.0f} ms "
        f"{pause * 1e3:6,.1f} ms {pause / there:11.1%} {whole * 1e3:6,.0f} ms {slower:9.0%}"
    )


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
