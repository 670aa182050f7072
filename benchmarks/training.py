"""Training speed of the profile shakespeare_char with `mha`, beside a bare PyTorch loop over the same model.

    python benchmarks/training.py --text tinyshakespeare.txt

Both run in one process, in turn; the figure is the median of the ratios of their CPU time, stretch by stretch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile

import torch
from bare import Alternate

from apt.api import Trainer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", default=os.environ.get("APT_SHAKESPEARE"), help="tiny Shakespeare; else $APT_SHAKESPEARE"
    )
    parser.add_argument("--attention", default="mha")
    parser.add_argument("--stretches", type=int, default=60, help="of each, in turn")
    parser.add_argument("--steps", type=int, default=8, help="per stretch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-least", type=float, help="exit 1 if the ratio is lower")
    args = parser.parse_args()
    if not args.text:
        print("skipped: give the text with --text or APT_SHAKESPEARE")
        return 0
    alternate = Alternate(args.steps)
    with tempfile.TemporaryDirectory() as folder:
        steps = args.steps * (args.stretches + 1)
        trainer = Trainer(
            "shakespeare_char",
            overrides={
                "data.train_path": args.text,
                "model.attention_name": args.attention,
                "training.max_steps": steps,
                "training.eval_every": None,
                "training.eval_batches": 1,
                "hardware.threads": args.threads,
                "hardware.device": "cpu",
                "output_dir": folder,
            },
            quiet=True,
        )
        trainer.register_hook(alternate)
        trainer.train()
    pairs = alternate.results()
    tokens = trainer.data.train.tokens_per_batch
    ours, bare = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / t for t, b in pairs)
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {args.attention}, "
        f"{len(pairs)} stretches of {args.steps} steps"
    )
    print(f"apt train   {tokens / ours:>9,.0f} tokens/s")
    print(f"bare loop   {tokens / bare:>9,.0f} tokens/s")
    print(f"ratio       {ratio:.3f}")
    return int(args.at_least is not None and ratio < args.at_least)


if __name__ == "__main__":
    sys.exit(main())
