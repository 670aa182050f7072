"""Tokens a second of the generator with `mha`, beside `generate` of a Llama of transformers of the same size.

    pip install transformers
    python benchmarks/generation.py

Both have random weights of one shape and take the likeliest token; they run in one process, in turn, on one thread, and
the figure is the median of the ratios of their CPU time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from apt.api import Generator, ModelBuilder
from apt.core.hooks import Hooks

VOCABULARY, PROMPT = 4096, 32


class Numbers:
    """A tokenizer whose texts are numbers."""

    vocab_size, eos_id = VOCABULARY, None

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{i} " for i in ids)


def ours(layers: int, width: int, heads: int, attention: str) -> Generator:
    shape = {
        "num_layers": layers, "d_model": width, "num_heads": heads, "d_ff": 4 * width, "max_seq_len": 512,
        "attention_name": attention, "ffn_name": "swiglu", "norm": "rmsnorm",
    }  # fmt: skip
    model = ModelBuilder({"model": shape}).build_model(vocab_size=VOCABULARY).eval()
    cpu = torch.device("cpu")
    loaded = SimpleNamespace(model=model, tokenizer=Numbers(), device=cpu, hooks=Hooks(), in_use=None)
    return Generator(loaded)  # type: ignore[arg-type]


def theirs(layers: int, width: int, heads: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=None,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="mha")
    parser.add_argument("--tokens", type=int, default=64, help="new ones in each turn (%(default)s)")
    parser.add_argument("--turns", type=int, default=9, help="of each (%(default)s)")
    parser.add_argument("--at-least", type=float, help="exit 1 if a ratio is lower")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lowest = float("inf")
    print(
        f"{'layers, width, heads':<22} {'batch':>5} {'ours':>10} {'theirs':>10} {'ratio':>6}   (tokens per CPU second)"
    )
    for shape in ((4, 128, 4), (6, 384, 6)):
        generator, llama = ours(*shape, args.attention), theirs(*shape)
        for batch in (1, 8):
            prompts = torch.randint(VOCABULARY, (batch, PROMPT))
            texts = [" ".join(map(str, row)) for row in prompts.tolist()]
            mask = torch.ones_like(prompts)

            def run_ours(texts: list[str] = texts, generator: Generator = generator) -> None:
                generator.complete(texts, max_new_tokens=args.tokens, temperature=0.0, batch_size=len(texts))

            def run_theirs(prompts: torch.Tensor = prompts, mask: torch.Tensor = mask, llama=llama) -> None:
                with torch.inference_mode():
                    llama.generate(prompts, attention_mask=mask, max_new_tokens=args.tokens, do_sample=False)

            run_ours(), run_theirs()
            pairs = [(cpu_seconds(run_ours), cpu_seconds(run_theirs)) for _ in range(args.turns)]
            ratio = statistics.median(b / a for a, b in pairs)
            lowest = min(lowest, ratio)
            speeds = [batch * args.tokens / statistics.median(column) for column in zip(*pairs, strict=True)]
            print(f"{shape!s:<22} {batch:>5} {speeds[0]:>10,.0f} {speeds[1]:>10,.0f} {ratio:>6.2f}", flush=True)
    return int(args.at_least is not None and lowest < args.at_least)


if __name__ == "__main__":
    sys.exit(main())
