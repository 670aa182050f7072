"""An encoder-decoder learns to copy words and to write them backwards, and is asked for words that it has never seen.

    python examples/pairs.py
    python examples/pairs.py --task reverse --epochs 16 --out runs/pairs

Each task takes two to three minutes on one CPU core. What remains is a run as any other: `apt chat runs/pairs/reverse`.
"""

from __future__ import annotations

import argparse
import random
import string
import tempfile
import time
from pathlib import Path

from apt.api import Generator, RunFolder, Trainer

TASKS = {"copy": lambda word: word, "reverse": lambda word: word[::-1]}
SHORTEST, LONGEST = 3, 10
"""Letters. Of shorter words hardly any would be left to ask for."""


def words(count: int, seed: int) -> list[str]:
    """Different words of 3 to 10 letters, each length equally likely."""
    choose = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(choose.choices(string.ascii_lowercase, k=choose.randint(SHORTEST, LONGEST)))] = None
    return list(found)


def learn(task: str, folder: Path, epochs: int, attention: str) -> float:
    """Train on pairs, print how many of 500 new words come out exactly right, and return their share."""
    answer = TASKS[task]
    drawn = words(20_500, seed=0)
    asked, learned = drawn[:500], drawn[500:]
    folder.mkdir(parents=True, exist_ok=True)
    pairs = folder / f"{task}.txt"
    pairs.write_text("".join(f"{word}\t{answer(word)}\n" for word in learned))
    profile = {
        "name": task,
        "model": {
            "backbone": "encdec", "attention_name": attention, "d_model": 64, "num_heads": 4, "num_layers": 2,
            "max_seq_len": 16, "positions": "learned",
        },
        "data": {"train_path": str(pairs), "tokenizer": "char", "val_fraction": 0.05},
        "training": {"max_epochs": epochs, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 100},
    }  # fmt: skip
    start = time.perf_counter()
    run = Trainer(profile, run_dir=folder / task).train()
    seconds = time.perf_counter() - start
    made = Generator.from_run(RunFolder(run)).complete(asked, temperature=0, batch_size=100)
    right = sum(given.text == answer(word) for given, word in zip(made, asked, strict=True))
    print(f"{task}: {right} of {len(asked)} new words exactly right, after {seconds:.0f} s of training")
    return right / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", choices=TASKS, action="append", help="one of them alone")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--attention", default="tva_default")
    parser.add_argument("--out", type=Path, help="where to keep pairs and runs; a temporary folder if left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for task in arguments.task or TASKS:
            learn(task, arguments.out or Path(temporary), arguments.epochs, arguments.attention)


if __name__ == "__main__":
    main()
