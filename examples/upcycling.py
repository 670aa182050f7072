"""Upcycling beside the same run kept dense: shakespeare_char, whose FFNs become 8 experts each at half time.

    pip install apt-plugin-moe matplotlib
    python examples/upcycling.py --text input.txt --picture upcycling.png

Three runs for each seed, with the same first weights and the same batches in the same order:

    upcycled         at half of its steps every FFN becomes 8 experts, of which a token visits 2
    dense, FLOPs     stays dense, for as many steps as cost the same training FLOPs
    dense, steps     stays dense, for the same number of steps

Each has a cosine schedule over its own length. Training FLOPs are three times the forward FLOPs that the model counts.
The table is the loss over the whole held-out text after the last step; the curves in the picture are that over its
first part. A run that is finished becomes a line of --results at once, and is not done again if it stands there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.api import Trainer, evaluate, registry
from apt_plugin_moe import plugin

EXPERTS = 8
EVAL_EVERY, EVAL_BATCHES = 100, 40
UPCYCLED, EQUAL_FLOPS, EQUAL_STEPS = "upcycled", "dense, FLOPs", "dense, steps"
COLOURS = {UPCYCLED: "#D55E00", EQUAL_FLOPS: "#0072B2", EQUAL_STEPS: "#666666"}  # Okabe and Ito's, and a grey
LINES = {UPCYCLED: "-", EQUAL_FLOPS: "--", EQUAL_STEPS: ":"}


class Recorder:
    """The curve of a run, and the losses and the cost of a step on either side of a switch.

    Args:
        switch: the step before which the experts go on, or None.

    `curve` is [(training FLOPs so far, loss on the first part of the held-out text)].
    """

    def __init__(self, switch: int | None) -> None:
        self.switch = switch
        self.flops = 0
        self.flops_per_step: list[int] = []
        self.curve: list[tuple[int, float]] = []
        self.at_switch: list[float] = []

    # Providers are called before the hooks of a script: at the switch, the experts are on.
    def on_step_start(self, step: int, trainer: Any) -> None:
        if step in (0, self.switch):
            forward = trainer.model.flops_per_token(trainer.config.model.max_seq_len)
            self.flops_per_step.append(3 * forward * trainer.data.train.tokens_per_batch)
        if step == self.switch:
            self.at_switch.append(whole_loss(trainer))
        self.flops += self.flops_per_step[-1]

    def on_step_end(self, step: int, trainer: Any) -> None:
        if step + 1 == self.switch:
            self.at_switch.append(whole_loss(trainer))

    def on_evaluation_end(self, metrics: Mapping[str, float], trainer: Any) -> None:
        self.curve.append((self.flops, metrics["val_loss"]))


def whole_loss(trainer: Trainer) -> float:
    return evaluate(trainer.model, trainer.data.val, 64, trainer.device)["val_loss"]


def train(text: str, seed: int, steps: int, switch: int | None) -> dict[str, Any]:
    """One run, as a line of the results."""
    overrides: dict[str, Any] = {
        "data.train_path": text,
        "training.seed": seed,
        "training.max_epochs": steps,  # the steps end the run
        "training.max_steps": steps,
        "training.eval_every": EVAL_EVERY,
        "training.eval_batches": EVAL_BATCHES,
        "checkpoint.keep_best": False,
        "hardware.device": "cpu",
        "hardware.threads": 1,
    }
    if switch is not None:
        overrides |= {
            "model.moe": {"enabled": True, "experts": EXPERTS},
            "schedules": {"enable_moe_at_step": switch},
        }
    recorder = Recorder(switch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer("shakespeare_char", overrides={**overrides, "output_dir": folder}, quiet=True, strict=True)
        trainer.register_hook(recorder)
        trainer.train()
    return {
        "steps": steps,
        "flops": recorder.flops,
        "flops_per_step": recorder.flops_per_step,
        "at_switch": recorder.at_switch,
        "loss": whole_loss(trainer),
        "curve": recorder.curve,
    }


class Results:
    """The finished runs, by name and seed, of one length."""

    def __init__(self, path: Path, steps: int) -> None:
        self.path, self.steps = path, steps
        self.runs: dict[tuple[str, int], dict[str, Any]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            run = json.loads(line)
            if run["of"] == steps:
                self.runs[run["name"], run["seed"]] = run

    def get(self, name: str, seed: int, text: str, steps: int, switch: int | None = None) -> dict[str, Any]:
        """The run, trained if it is not there yet."""
        if (name, seed) not in self.runs:
            run = {"name": name, "seed": seed, "of": self.steps, **train(text, seed, steps, switch)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            self.runs[name, seed] = run
        return self.runs[name, seed]


def draw(results: Results, seeds: list[int], path: Path) -> None:
    """The curves: a thin line for each seed, a thick one for their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        runs = [results.runs[name, seed] for seed in seeds]
        x = [flops / 1e12 for flops, _ in runs[0]["curve"]]
        losses = [[loss for _, loss in run["curve"]] for run in runs]
        for each in losses:
            axes.plot(x, each, color=colour, linewidth=0.7, alpha=0.4)
        mean = [statistics.mean(at) for at in zip(*losses, strict=True)]
        label = f"{name.replace('dense, ', 'dense, equal ')}: {runs[0]['steps']:,} steps"
        axes.plot(x, mean, LINES[name], color=colour, linewidth=2.2, label=label)
    switch = results.steps // 2 * results.runs[UPCYCLED, seeds[0]]["flops_per_step"][0] / 1e12
    axes.axvline(switch, color="black", linewidth=0.8)
    low = min(loss for run in results.runs.values() for _, loss in run["curve"])
    axes.set_ylim(low - 0.03, low + 0.7)
    axes.annotate(
        f"each FFN becomes {EXPERTS} experts", (switch, low + 0.66), xytext=(5, 0), textcoords="offset points"
    )
    axes.set_xlabel("training compute (TFLOP)")
    axes.set_ylabel("held-out loss (nats per character)")
    axes.set_title(f"shakespeare_char: the mean of {len(seeds)} seeds (thick) and each of them (thin)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="tiny Shakespeare, or another text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2000, help="of the upcycled run; it switches at half of them")
    parser.add_argument("--results", type=Path, default=Path("upcycling.jsonl"), help="the finished runs, one a line")
    parser.add_argument("--picture", type=Path, help="draw the curves into this file; needs matplotlib")
    args = parser.parse_args()
    if args.steps < 4:
        parser.error("--steps: 4 or more")
    if args.picture:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--picture needs matplotlib, which no package of APT brings: pip install matplotlib")
    plugin.apt_register_providers(registry)
    results, switch = Results(args.results, args.steps), args.steps // 2
    print(f"{'seed':>4}  {'run':<13} {'steps':>6}  {'TFLOP':>6}  {'loss':>7}   before and after the switch")
    for seed in args.seeds:
        upcycled = results.get(UPCYCLED, seed, args.text, args.steps, switch)
        dense_step = upcycled["flops_per_step"][0]
        results.get(EQUAL_FLOPS, seed, args.text, round(upcycled["flops"] / dense_step))
        results.get(EQUAL_STEPS, seed, args.text, args.steps)
        for name in COLOURS:
            run = results.runs[name, seed]
            around = " ".join(f"{loss:.6f}" for loss in run["at_switch"])
            numbers = f"{run['steps']:>6}  {run['flops'] / 1e12:>6.2f}  {run['loss']:>7.4f}"
            print(f"{seed:>4}  {name:<13} {numbers}   {around}".rstrip(), flush=True)
    for name in COLOURS:
        loss = statistics.mean(results.runs[name, seed]["loss"] for seed in args.seeds)
        print(f"mean  {name:<13} {'':>6}  {'':>6}  {loss:>7.4f}")
    if args.picture:
        draw(results, args.seeds, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
