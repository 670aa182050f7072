"""A layer of experts, forward and backward, beside the Mixtral block of Hugging Face transformers.

    pip install transformers
    python benchmarks/moe.py

Both get the same input, sizes and number of experts, in fp32 on one thread, and step in turn. Each lives in a process
of its own, as its users run it: transformers as it comes (its block as a default `MixtralModel` has it, which uses
torch's grouped product), ours as `apt train` runs it, which has the C library keep freed pages and torch use huge ones.
With `--equal` the process of transformers does so too: what is left is the layers alone. The figure is the median of
the ratios.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

D_MODEL, D_FF, TOP_K = 256, 512, 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--equal", action="store_true", help="tune the memory of both processes")
    parser.add_argument("--no-capacity", action="store_true", help="ours without a limit per expert, as transformers'")
    parser.add_argument(
        "--at-least", type=float, nargs="+", help="exit 1 if a ratio is lower; one for each of --experts"
    )
    args = parser.parse_args()
    capacity = None if args.no_capacity else 1.25
    print(
        f"torch {torch.__version__}, 1 thread, fp32, {args.tokens} tokens, d_model {D_MODEL}, d_ff {D_FF}, top {TOP_K}"
    )
    print(f"{'experts':>8} {'transformers':>14} {'ours':>10} {'ratio':>7}")
    missed = False
    for index, experts in enumerate(args.experts):
        peer, own = (
            Worker(kind, experts, args.tokens, capacity, keep) for kind, keep in (("peer", args.equal), ("own", True))
        )
        pairs = [(peer.step(), own.step()) for _ in range(args.turns + 3)][3:]
        peer.close(), own.close()
        ratio = statistics.median(theirs / ours for theirs, ours in pairs)
        theirs, ours = (1e3 * statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{experts:>8} {theirs:>11.1f} ms {ours:>7.1f} ms {ratio:>7.3f}")
        missed |= bool(args.at_least) and ratio < args.at_least[index]
    return int(missed)


class Worker:
    """A layer in a process of its own, which takes a step when it is told to."""

    def __init__(self, kind: str, experts: int, tokens: int, capacity: float | None, tuned: bool) -> None:
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(theirs, kind, experts, tokens, capacity, tuned), daemon=True
        )
        self._process.start()

    def step(self) -> float:
        """Seconds of CPU time that one step took."""
        self._connection.send("step")
        return float(self._connection.recv())

    def close(self) -> None:
        self._connection.send("stop")
        self._process.join()


def serve(connection: Connection, kind: str, experts: int, tokens: int, capacity: float | None, tuned: bool) -> None:
    torch.set_num_threads(1)
    if tuned:
        from apt.core.device import tune_cpu_memory

        tune_cpu_memory()
    torch.manual_seed(0)
    layer = mixtral_block(experts) if kind == "peer" else moe_layer(experts, capacity)
    x = torch.randn(1, tokens, D_MODEL)
    grad = torch.randn(1, tokens, D_MODEL)
    while connection.recv() == "step":
        own = x.clone().requires_grad_()
        started = time.process_time()
        out: Any = layer(own)
        if isinstance(out, tuple):
            out, aux_loss = out
            torch.autograd.backward((out, aux_loss), (grad, torch.ones_like(aux_loss)))
        else:
            out.backward(grad)
        connection.send(time.process_time() - started)
        for parameter in layer.parameters():
            parameter.grad = None


def mixtral_block(experts: int) -> nn.Module:
    """The block of a default Mixtral of these sizes."""
    from transformers import MixtralConfig, MixtralModel

    config = MixtralConfig(
        hidden_size=D_MODEL, intermediate_size=D_FF, num_local_experts=experts, num_experts_per_tok=TOP_K,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, vocab_size=16,
    )  # fmt: skip
    block = MixtralModel(config).layers[0].mlp
    assert block.experts.config._experts_implementation == "grouped_mm"
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    return block


def moe_layer(experts: int, capacity: float | None) -> nn.Module:
    """Ours, around the gated layer that Mixtral's experts are."""
    from apt.modeling.layers.config import FFNConfig
    from apt.modeling.layers.ffn import GatedFeedForward
    from apt_plugin_moe.router import MoERouter

    config = {"experts": experts, "top_k": TOP_K, "capacity": capacity}
    return MoERouter(config).wrap_ffn(GatedFeedForward(D_MODEL, D_FF, FFNConfig()), {}).train()


if __name__ == "__main__":
    sys.exit(main())
