"""What alignment does to the loss: the profile shakespeare_char with and without it, in pairs of equal seeds.

    python benchmarks/align.py --text tinyshakespeare.txt --seeds 0 1 2
    python benchmarks/align.py --seeds 0 1 2          # 2 MB of the standard library's sources

Both runs of a pair begin with the same weights and see the same batches; until alignment goes on they are the same run.
Every loss is that of the whole held-out text after the last step. `share` is what the InfoNCE, its weight applied, adds
to the gradient: its norm over that of the whole loss's gradient, the mean over every 50th step from the switch on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apt.api import Trainer, evaluate, registry
from apt.training.step import cross_entropy
from apt_plugin_align import plugin
from apt_plugin_align.losses import contrast

NAME = "bistate_default"


class Share:
    """Measures, in every `every`-th step, how much of the gradient's norm comes from the InfoNCE."""

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self.measured: list[float] = []

    # Providers are called before the hooks of a script, so that the stable state is there.
    def extra_losses(self, trainer: Any, logits: Tensor, targets: Tensor, model_state: dict[str, Any]) -> None:
        if trainer.step % self.every or "stable" not in model_state:
            return
        align = trainer.providers["align", NAME]
        stable, hidden = model_state["stable"], model_state["align"]["hidden"]
        infonce = align.beta * contrast(
            hidden, stable["hidden"], targets, align.tau_align, align.config.contrast_tokens
        )
        whole = cross_entropy(logits, targets) + align.compute_align_loss(logits, targets, model_state)
        weights = list(trainer.model.parameters())
        self.measured.append(_norm(infonce, weights) / _norm(whole, weights))


def _norm(loss: Tensor, weights: list[Tensor]) -> float:
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return float(torch.stack([g.norm() for g in gradients if g is not None]).norm())


def train(overrides: Mapping[str, Any], share: Share | None = None) -> Trainer:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer("shakespeare_char", overrides={**overrides, "output_dir": folder}, quiet=True)
        if share is not None:
            trainer.register_hook(share)
        trainer.train()
    return trainer


@torch.no_grad()
def stable_loss(trainer: Trainer) -> float:
    """The held-out loss of the stable state; the weights are overwritten with it."""
    for parameter in trainer.model.parameters():
        parameter.copy_(trainer.optimizer.state[parameter]["stable"])
    return evaluate(trainer.model, trainer.data.val, 64, trainer.device)["val_loss"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="a text; left out, 2 MB of the standard library's sources")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--switch", type=int, default=500, help="the step at which alignment goes on")
    parser.add_argument("--lag", type=float, help="model.bistate.stable_lag; else its default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="exit 1 unless the means are as good as the README says")
    args = parser.parse_args()
    plugin.apt_register_providers(registry)
    common: dict[str, Any] = {
        "training.max_epochs": args.steps,  # the steps end the run
        "training.max_steps": args.steps,
        "training.eval_every": None,
        "checkpoint.keep_best": False,
        "hardware.threads": args.threads,
        "hardware.device": "cpu",
    }
    text = {"data.train_path": args.text} if args.text else {"data.dataset": "stdlib", "data.stdlib.max_bytes": 2000000}
    aligned: dict[str, Any] = {"model.align_name": NAME, "schedules.enable_align_at_step": args.switch}
    if args.lag is not None:
        aligned["model.bistate.stable_lag"] = args.lag
    print(
        f"torch {torch.__version__}, {args.threads} thread(s), {args.steps} steps, aligned from step {args.switch} on"
    )
    print(f"{'seed':>6}  {'without':>8}  {'with':>8}  {'difference':>10}  {'stable':>8}  {'share':>6}")
    rows: list[tuple[float, ...]] = []
    for seed in args.seeds:
        settings = {**common, **text, "training.seed": seed}
        without = train(settings).metrics["val_loss"]
        share = Share()
        trainer = train({**settings, **aligned}, share)
        loss = trainer.metrics["val_loss"]
        rows.append((without, loss, loss - without, stable_loss(trainer), statistics.mean(share.measured)))
        _print(str(seed), rows[-1])
    without, loss, difference, stable, mean_share = means = tuple(map(statistics.mean, zip(*rows, strict=True)))
    _print("mean", means)
    good = difference <= 0 and stable < min(without, loss) and mean_share >= 0.01
    return int(args.check and not good)


def _print(name: str, row: tuple[float, ...]) -> None:
    without, loss, difference, stable, share = row
    print(f"{name:>6}  {without:>8.4f}  {loss:>8.4f}  {difference:>+10.4f}  {stable:>8.4f}  {share:>6.1%}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
