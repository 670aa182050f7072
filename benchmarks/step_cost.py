"""The trainer's own cost per step, with five empty hook objects, beyond a bare loop that also clips and schedules.

    python benchmarks/step_cost.py

The model is as small as models get, so that the difference is not lost in the noise of the maths. Both loops run in one
process, in turn; the figure is the median of the differences of their CPU time, stretch by stretch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from bare import Alternate

from apt.api import Trainer


class Empty:
    """Listens to everything that happens in a step, and does nothing."""

    def on_step_start(self, step: int, batch: Any, trainer: Any) -> None: ...
    def on_before_optimizer_step(self, optimizer: Any, trainer: Any) -> None: ...
    def on_step_end(self, step: int, loss: Any, trainer: Any) -> None: ...
    def on_log(self, record: Any) -> None: ...


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stretches", type=int, default=400, help="of each, in turn")
    parser.add_argument("--steps", type=int, default=20, help="per stretch; a record is due every ten")
    parser.add_argument("--hooks", type=int, default=5)
    parser.add_argument("--at-most", type=float, help="microseconds; exit 1 if it costs more")
    args = parser.parse_args()
    alternate = Alternate(args.steps)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("the quick brown fox jumps over the lazy dog\n" * 5000)
        trainer = Trainer(
            {
                "model": {
                    "d_model": 8, "num_heads": 1, "num_layers": 1, "d_ff": 8, "max_seq_len": 8, "attention_name": "mha",
                },
                "data": {"train_path": str(text)},
                "training": {
                    "batch_size": 12, "max_epochs": 100, "eval_batches": 1,
                    "max_steps": args.steps * (args.stretches + 1),
                },
                "hardware": {"device": "cpu", "threads": 1},
                "output_dir": folder,
            },
            quiet=True,
        )  # fmt: skip
        trainer.register_hook(alternate)
        for _ in range(args.hooks):
            trainer.register_hook(Empty())
        trainer.train()
    pairs = alternate.results()
    ours, bare = (statistics.median(column) * 1e6 for column in zip(*pairs, strict=True))
    cost = statistics.median(t - b for t, b in pairs) * 1e6
    print(f"{len(pairs)} stretches of {args.steps} steps, {args.hooks} empty hook objects")
    print(f"apt train   {ours:>8.1f} us a step")
    print(f"bare loop   {bare:>8.1f} us a step")
    print(f"difference  {cost:>8.1f} us a step")
    return int(args.at_most is not None and cost > args.at_most)


if __name__ == "__main__":
    sys.exit(main())
