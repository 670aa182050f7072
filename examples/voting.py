"""Several answers, and the one that most agree on: a small model adds numbers, and votes.

    python examples/voting.py

A model of 223,000 parameters learns to add seven numbers step by step, from generated lines such as

    4+7+2+8+5+6+9=11;13;21;26;32;41

It is then asked new sums, none of which it was trained on. The table has the share of them answered exactly: by the
likeliest tokens (greedy), by one sample, by the majority of k sampled answers (`self_consistency`), and by `entropy`,
which votes within an answer wherever the model is unsure of the next token. Behind each share stands its binomial
standard error. Training takes three to five minutes on one CPU core, the questions as long; `--run` asks a run that
was trained before.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from apt.api import Generator, Trainer
from apt.core.runs import RunFolder

TERMS = 7
KS = (1, 3, 5, 9)
PATTERN = r"\d+"
"""The last number is the answer."""


def problem(chance: random.Random) -> tuple[str, str, str]:
    """A sum: the prompt, the steps to its answer, and the answer."""
    terms = [chance.randrange(1, 10) for _ in range(TERMS)]
    steps = [str(total) for total in accumulate(terms)][1:]
    return "\n" + "+".join(map(str, terms)) + "=", ";".join(steps), steps[-1]


def write_data(folder: Path, lines: int, questions: int) -> list[dict[str, str]]:
    """Write sums to learn from, and others to answer."""
    chance = random.Random(0)
    asked: dict[str, dict[str, str]] = {}
    while len(asked) < questions:
        prompt, _, answer = problem(chance)
        asked[prompt] = {"prompt": prompt, "answer": answer}
    with (folder / "sums.txt").open("w") as file:
        for _ in range(lines):
            prompt, steps, _ = problem(chance)
            if prompt not in asked:
                file.write(prompt + steps)
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in asked.values()))
    return list(asked.values())


def train(folder: Path, steps: int) -> RunFolder:
    trainer = Trainer(
        {
            "name": "sums",
            "output_dir": str(folder / "runs"),
            "model": {
                "d_model": 96, "num_heads": 4, "num_layers": 2, "max_seq_len": 64, "attention_name": "mha",
                "voting": {"pattern": PATTERN},
            },
            "data": {
                "train_path": str(folder / "sums.txt"), "tokenizer": "char", "val_fraction": 0.01,
                "cache_dir": str(folder / "cache"),
            },
            "training": {
                "max_epochs": 100, "max_steps": steps, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 100,
                "beta2": 0.99, "log_every": 100,
            },
            "checkpoint": {"keep_last": 1, "keep_best": False},
        }
    )  # fmt: skip
    return RunFolder(trainer.train())


def share(given: Sequence[str | None], questions: Sequence[dict[str, str]]) -> str:
    """The share of right answers with its standard error, in per cent."""
    right = sum(answer == question["answer"] for answer, question in zip(given, questions, strict=True))
    p, n = right / len(questions), len(questions)
    return f"{100 * p:5.1f} +- {100 * math.sqrt(p * (1 - p) / n):.1f} %"


def answer(text: str) -> str | None:
    found = re.findall(PATTERN, text)
    return found[-1] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to keep the data and the run; a temporary one if left out")
    parser.add_argument("--run", type=Path, help="ask this run, instead of training one")
    parser.add_argument("--steps", type=int, default=900, help="optimizer steps (%(default)s)")
    parser.add_argument("--questions", type=int, default=1000, help="sums to ask (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of every sample (%(default)s)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5], help="of the voter `entropy`, in nats")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        questions = write_data(folder, 200_000, args.questions)
        run = RunFolder(args.run) if args.run else train(folder, args.steps)
        ask(run, questions, args.temperature, args.thresholds)


def ask(run: RunFolder, questions: list[dict[str, str]], temperature: float, thresholds: Sequence[float]) -> None:
    prompts = [question["prompt"] for question in questions]

    def measured(name: str, generator: Generator, **settings: Any) -> None:
        started = time.perf_counter()
        completions = generator.complete(
            prompts, max_new_tokens=24, stop=["\n"], seed=0, batch_size=64, **{"temperature": temperature, **settings}
        )
        seconds = time.perf_counter() - started
        votes = sum(len(completion.votes) for completion in completions) / len(completions)
        text = share([answer(completion.text) for completion in completions], questions)
        print(f"{name:<34} {text:>16} {votes:>8.1f} {1000 * seconds / len(prompts):>10.0f} ms", flush=True)

    print(f"\n{len(questions)} sums, temperature {temperature}\n")
    print(f"{'':<34} {'right':>16} {'votes':>8} {'a sum':>13}")
    plain = Generator.from_run(run)
    measured("greedy", plain, temperature=0.0)
    measured("one sample", plain)
    for k in KS:
        generator = Generator.from_run(run, overrides={"model.voting.k": k})
        measured(f"majority of {k} answers", generator, voter=generator.voter("self_consistency"))
    for threshold in thresholds:
        for k in KS[1:]:
            voting = {"model.voting.threshold": threshold, "model.voting.k": k}
            generator = Generator.from_run(run, overrides=voting)
            measured(f"entropy above {threshold}, k {k}", generator, voter=generator.voter("entropy"))


if __name__ == "__main__":
    sys.exit(main())
