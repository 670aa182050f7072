"""What a datastore of hidden states does to the validation perplexity of a run, and what it costs per token.

    apt train --profile shakespeare_char --data.train_path input.txt --run-dir runs/shakespeare
    python benchmarks/knn_lm.py --run runs/shakespeare --text input.txt

The datastore holds the training split alone: the first nine tenths of the text's tokens, as the run was trained on.
lambda and the temperature are chosen on every `--every`-th token of the first half of the validation split, and
reported on every `--every`-th token of the second half. The model alone is measured on the very same tokens with the
very same context (32 to 64 tokens, where its longest context is 64). Times are CPU time of one thread
(OMP_NUM_THREADS=1), in memory that has been read before. With `--store` the datastore is kept, and used again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from apt.api import Generator, find_run
from apt_plugin_rag.knn_lm import KNNRetriever, Mixer, hidden_states
from apt_plugin_rag.passages import cut

LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TEMPERATURES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
PAPERS = 0.25
"""The lambda that Khandelwal et al. chose for WikiText-103."""
BATCH = 64
TIMED = 50


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--text", type=Path, default=os.environ.get("APT_SHAKESPEARE"))
    parser.add_argument("--val-fraction", type=float, default=0.1, help="of the run (%(default)s)")
    parser.add_argument("--every", type=int, default=8, help="measure every so many tokens (%(default)s)")
    parser.add_argument("--neighbours", type=int, default=1024, help="k (%(default)s)")
    parser.add_argument("--store", help="where to keep the datastore; in a temporary folder if left out")
    parser.add_argument("--check", action="store_true", help="exit 1 unless the perplexity is lower")
    args = parser.parse_args()
    if args.text is None:
        parser.error("name the text of the run: --text FILE, or APT_SHAKESPEARE")
    generator = Generator.from_run(find_run(args.run), device="cpu")
    text = args.text.read_text(encoding="utf-8")
    ids = np.array(generator.tokenizer.encode(text), np.int64)
    held_out = int(len(ids) * args.val_fraction)
    training_text = generator.tokenizer.decode(ids[: len(ids) - held_out].tolist())
    with tempfile.TemporaryDirectory() as folder:
        where = args.store or f"{folder}/store"
        retriever = KNNRetriever({"run": args.run, "store": where, "neighbours": args.neighbours})
        started = time.process_time()
        if not retriever.store.documents():
            retriever.update((), [("training", "", list(cut(training_text, "training", 100)))])
        seconds = time.process_time() - started
        size = sum(file.stat().st_size for file in Path(where).rglob("*"))
        keys = retriever.store.size().vectors
        print(
            f"{keys:,} keys of {generator.model.d_model} in {seconds:.0f} s, {size / 1e6:,.0f} MB on disk", flush=True
        )

        val_ids = ids[len(ids) - held_out :]
        states = hidden_states(generator.model, val_ids)
        half = len(val_ids) // 2
        first, second = (
            Measured(generator, retriever, states, val_ids, range(start, end - 1, args.every))
            for start, end in ((0, half), (half, len(val_ids)))
        )
        share, temperature = min(itertools.product(LAMBDAS, TEMPERATURES), key=lambda both: first.loss(*both))
        alone, mixed = second.loss(0.0, 1.0), second.loss(share, temperature)
        rows = {
            "model alone": alone,
            "with kNN": mixed,
            f"lambda {PAPERS}": second.loss(PAPERS, temperature),
            "kNN alone": second.loss(1 - 1e-6, temperature),
        }
        print(f"chosen on {len(first.targets):,} tokens of the first half: lambda {share}, temperature {temperature}")
        print(f"on {len(second.targets):,} tokens of the second half:")
        print(f"{'':<14} {'nats':>8} {'perplexity':>11}")
        for name, loss in rows.items():
            print(f"{name:<14} {loss:>8.4f} {math.exp(loss):>11.3f}")
        print(f"difference: {mixed - alone:+.4f} nats, perplexity {math.exp(mixed - alone) - 1:+.2%}")
        for name, milliseconds in costs(generator, retriever, val_ids).items():
            print(f"{name:<14} {milliseconds:>8.2f} ms per token")
    return int(args.check and mixed >= alone)


class Measured:
    """What the model says of some positions, and what their neighbours say."""

    def __init__(self, generator: Any, retriever: KNNRetriever, states: Any, ids: Any, positions: range) -> None:
        where = np.array(positions)
        self.targets = ids[where + 1]
        head = generator.model.head or generator.model.token_embedding
        with torch.inference_mode():
            logits = F.linear(torch.from_numpy(states[where]), head.weight)
            self.p_lm = logits.double().softmax(dim=-1).numpy()[np.arange(len(where)), self.targets]
        self.mixer = Mixer(retriever.store, retriever.config)
        self.found = [
            found
            for start in range(0, len(where), BATCH)
            for found in self.mixer.find(states[where[start : start + BATCH]])
        ]
        self._p_knn: dict[float, Any] = {}

    def loss(self, share: float, temperature: float) -> float:
        """Mean nats per token."""
        if temperature not in self._p_knn:
            self.mixer.settings = self.mixer.settings.model_copy(update={"temperature": temperature})
            self._p_knn[temperature] = np.array(
                [
                    self.mixer.weigh(found)[found.values == target].sum()
                    for found, target in zip(self.found, self.targets, strict=True)
                ]
            )
        return float(-np.log(share * self._p_knn[temperature] + (1 - share) * self.p_lm).mean())


def costs(generator: Any, retriever: KNNRetriever, ids: Any) -> dict[str, float]:
    """Median milliseconds of decoding one token with a cache, and of what the datastore adds to it."""
    mixer = Mixer(retriever.store, retriever.config)
    model, decoding, searching = generator.model, [], []
    cache = model.make_cache(1, model.max_seq_len)
    with torch.inference_mode():
        for token in ids[: min(TIMED, model.max_seq_len)]:
            started = time.process_time()
            output = model(torch.tensor([[token]]), cache=cache, last_only=True)
            decoded = time.process_time()
            mixer.mix(output.logits[:, -1], mixer.find(output.hidden[:, -1].numpy()))
            decoding.append(decoded - started)
            searching.append(time.process_time() - decoded)
    return {"the model": 1e3 * statistics.median(decoding), "kNN adds": 1e3 * statistics.median(searching)}


if __name__ == "__main__":
    sys.exit(main())
