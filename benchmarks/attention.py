"""One layer of attention on each kernel that is here, beside `mha`: how many times as fast.

    python benchmarks/attention.py
    python benchmarks/attention.py --sizes 1x8192 16x1024 --d-model 2048 --heads 16

Each case is measured turn by turn, `mha` and the others one after the other, and a figure is the median of the ratios
of the turns: above 1 is faster than `mha`. On a CPU it is CPU time of one thread in fp32, on a GPU the time until the
device has finished, in bf16. The projections, which are the same for all, are part of the layer. `decode` is one token
behind a full cache. What is compiled is compiled before the first turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from apt.core.device import keep_freed_pages
from apt.core.providers.attention import AttentionContext
from apt.modeling.layers.attention_mha import MHAAttention

CASES = ("causal", "documents", "window")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["8x512", "1x4096"], metavar="BxT", help="rows and positions")
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=None)
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    keep_freed_pages()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, 1 thread"
    print(
        f"torch {torch.__version__}, {where}, {dtype}, d_model {args.d_model}, {args.heads} heads".replace("torch.", "")
    )
    print("documents: 8 a row; window: an eighth of the row; times as fast as mha, -: it cannot\n")
    print(f"{'B x T':>9} {'case':<10} {'what':<9} {'mha':>10}", end="")
    names = ("flash_sdpa", "flex", "flash_v2")
    print("".join(f" {name:>10}" for name in names))
    for size in args.sizes:
        B, T = map(int, size.split("x"))
        for case in CASES:
            section = {"num_kv_heads": args.kv_heads}
            layers = {"mha": make("mha", args.d_model, args.heads, section, device, dtype)}
            narrow = section | ({"window": T // 8} if case == "window" else {})
            layers |= {name: make(name, args.d_model, args.heads, narrow, device, dtype) for name in names}
            for what in ("forward", "backward", "decode"):
                calls = {n: call_of(n, layer, what, case, B, T) for n, layer in layers.items() if layer is not None}
                times = measure({n: call for n, call in calls.items() if call is not None}, args.turns, device)
                row = "".join(f" {ratio(times, name):>10}" for name in names)
                print(
                    f"{size:>9} {case:<10} {what:<9} {1e3 * statistics.median(times['mha']):>7.2f} ms{row}", flush=True
                )
    return 0


def make(
    name: str, d_model: int, heads: int, section: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> nn.Module | None:
    """A layer, or None where it cannot be had."""
    from apt.api import ProviderError
    from apt_plugin_flash.flash import FlashAttention
    from apt_plugin_flash.flex import FlexAttention
    from apt_plugin_flash.sdpa import SDPAAttention

    providers = {"mha": MHAAttention, "flash_sdpa": SDPAAttention, "flex": FlexAttention, "flash_v2": FlashAttention}
    torch.manual_seed(0)
    try:
        return providers[name](section).create_layer(d_model, heads, device=device).to(device, dtype)
    except ProviderError:
        return None


def call_of(name: str, layer: nn.Module, what: str, case: str, B: int, T: int) -> Callable[[], None] | None:
    """What is measured; None where this attention cannot do it on this device."""
    weight: Tensor = layer.w_o.weight  # type: ignore[union-attr, assignment]
    if what == "backward" and name == "flex" and not weight.is_cuda:
        return None
    x = torch.randn(B, T, weight.shape[0], device=weight.device, dtype=weight.dtype)
    at = torch.arange(T, device=weight.device)
    documents = (at * 8 // T).expand(B, T).contiguous() if case == "documents" else None
    # What mha is given in place of a window: the mask it needs for the same result.
    mask = at[:, None] - at >= T // 8 if case == "window" and name == "mha" else None
    context = AttentionContext(document_ids=documents)
    if what == "backward":
        grad = torch.randn_like(x)

        def step() -> None:
            layer(x, x, x, mask, context=context)[0].backward(grad)
            layer.zero_grad(set_to_none=True)

        return step
    if what == "forward":

        @torch.no_grad()
        def full() -> None:
            layer(x, x, x, mask, context=context)

        return full
    cache = layer.make_cache(B, T, device=x.device, dtype=x.dtype)  # type: ignore[operator]
    last, own = x[:, -1:], None if documents is None else documents[:, -1:]
    with torch.no_grad():
        layer(x, x, x, mask, context=AttentionContext(document_ids=documents, cache=cache))

    @torch.no_grad()
    def token() -> None:
        cache.truncate(T - 1)
        own_mask = None if mask is None else mask[-1:]
        layer(last, last, last, own_mask, context=AttentionContext(document_ids=own, cache=cache))

    return token


def measure(calls: dict[str, Callable[[], None]], turns: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 2):
        for name, call in calls.items():
            repeats = 1
            if turn:  # a short call is repeated until the clock can tell it
                repeats = max(1, min(200, int(0.02 / times[name][0])))
            started = now(device)
            for _ in range(repeats):
                call()
            times[name].append((now(device) - started) / repeats)
    return {name: each[2:] for name, each in times.items()}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def ratio(times: dict[str, list[float]], name: str) -> str:
    if name not in times:
        return "-"
    return f"{statistics.median(m / own for m, own in zip(times['mha'], times[name], strict=True)):.2f}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
