"""The model as a function of tensors alone, which is what an exporter can trace.

A layer's cache is an object that it fills in place. Here it becomes a pair of functions: tensors in, made into a cache
that grows by concatenation and leaves what it was given alone; tensors out, of one more stretch of positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from apt.api import GPT, AptError, LoadedRun, ProviderError
from apt.modeling.layers.kv_cache import ModelCache, PositionCache
from apt.modeling.layers.vein import TAPS, VeinCache

LIMIT = 1e-4
"""How far a logit may be from the run's own, as a share of the largest logit, or of 1 if that is smaller."""


class GrowingCache(PositionCache):
    """A cache of given tensors [B, P, ...], P = 0 included, to which new positions are joined.

    Positions are consecutive and belong to one document.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        first = next(iter(tensors.values()))
        self.batch_size, self.length = first.shape[:2]
        self.tensors = tensors

    def write(self, name: str, new: Tensor) -> Tensor:
        self.tensors[name] = torch.cat((self.tensors[name], new), 1)
        return self.tensors[name]

    def write_documents(self, ids_BT: Tensor | None) -> Tensor | None:
        return None

    def write_positions(self, positions: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        return None

    def state(self) -> list[Tensor]:
        """The tensors, in the order of `names`."""
        return list(self.tensors.values())


class GrowingVein(GrowingCache, VeinCache):
    """The same of TVA, whose last two raw positions are a tensor more, [B, 2, Dc], zeros before the first ones."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        *_, (_, self.recent_BPDc) = tensors.items()
        super().__init__({name: tensor for name, tensor in tensors.items() if name != "recent"})

    def write_recent(self, c_BTDc: Tensor) -> None:
        assert self.recent_BPDc is not None
        self.recent_BPDc = torch.cat((self.recent_BPDc, c_BTDc), 1)[:, -TAPS:]

    def state(self) -> list[Tensor]:
        assert self.recent_BPDc is not None
        return [*super().state(), self.recent_BPDc]


class CacheTensor:
    """One tensor of the cache: what it is called, and its shape for a batch and a past."""

    def __init__(self, layer: int, name: str, shape: tuple[int, ...], grows: bool) -> None:
        self.name = f"{layer}.{name}"
        self.key = name
        self.shape = shape
        """Beyond [B, P]; of one that does not grow, P is `TAPS`."""
        self.grows = grows

    def empty(self, batch: int, past: int = 0) -> Tensor:
        """Zeros for a past of so many positions."""
        return torch.zeros(batch, past if self.grows else TAPS, *self.shape)


def cache_tensors(model: GPT) -> list[CacheTensor] | None:
    """The tensors of the model's cache, layer by layer; None where a layer has no cache or one of another kind."""
    if not model.supports("cache"):
        return None
    found: list[CacheTensor] = []
    for index, layer in enumerate(model.make_cache(1, 1).layers):
        if type(layer) not in (PositionCache, VeinCache):
            return None
        for name, tensor in layer.tensors.items():  # type: ignore[attr-defined]
            found.append(CacheTensor(index, name, tuple(tensor.shape[2:]), grows=True))
        if isinstance(layer, VeinCache):
            found.append(CacheTensor(index, "recent", tuple(layer.tensors["vein"].shape[2:]), grows=False))
    return found


def decoder_only(loaded: LoadedRun, target: str) -> GPT:
    """The model.

    Raises:
        ProviderError: it is no decoder-only model, which is all that this form of export knows.
    """
    if not isinstance(loaded.model, GPT):
        raise ProviderError(
            f"a model of model.backbone {loaded.config.model.backbone} cannot be exported as {target}",
            hint="export the weights: --format safetensors",
        )
    return loaded.model


class FullPass(nn.Module):
    """Tokens [B, T] to logits [B, T, V]."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits_BTV: Tensor = self.model(tokens).logits
        return logits_BTV


class CachedPass(nn.Module):
    """Tokens [B, T] and the cache of P positions before them, to logits [B, T, V] and the cache of P + T."""

    def __init__(self, model: GPT, cache: Sequence[CacheTensor]) -> None:
        super().__init__()
        self.model = model
        self.cache = list(cache)

    def forward(self, tokens: Tensor, past: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        layers: dict[str, dict[str, Tensor]] = {}
        for tensor, value in zip(self.cache, past, strict=True):
            layers.setdefault(tensor.name.partition(".")[0], {})[tensor.key] = value
        caches = [(GrowingVein if "recent" in held else GrowingCache)(held) for held in layers.values()]
        positions, start = None, caches[0].length
        if self.model.position_embedding is not None:
            # A look-up fails beyond the last one, where the slice that the model takes, and that onnxruntime makes of
            # a look-up of one range, is too short, and a single row of it is added to every position.
            positions = torch.arange(tokens.shape[1], device=tokens.device) + start
        logits_BTV = self.model(tokens, positions=positions, cache=ModelCache(caches)).logits
        return logits_BTV, [tensor for cache in caches for tensor in cache.state()]


def trace(loaded: LoadedRun, target: str, make: Callable[[], Any]) -> Any:
    """What `make` makes of the model.

    Raises:
        ProviderError: it cannot be traced; the message names the part that stands in the way.
    """
    try:
        with torch.no_grad(), _silence():
            return make()
    except AptError:
        raise
    except Exception as error:
        culprit, why = _culprit(loaded) or ("the model as a whole", error)
        raise ProviderError(
            f"the model cannot be exported as {target}: {culprit} cannot be traced ({_reason(why)})",
            hint="train with parts that can, such as mha or tva_default with swiglu or default, "
            "or export the weights: --format hf or safetensors",
        ) from error


def _culprit(loaded: LoadedRun) -> tuple[str, Exception] | None:
    """The first part of a block that cannot be traced alone, and why."""
    block: Any = decoder_only(loaded, "a graph").blocks[0]
    x_BTD = torch.zeros(2, 3, loaded.model.d_model)
    length = torch.export.Dim("length")
    slots = {slot.kind: slot.name for slot in loaded.in_use.slots.values()}
    places = {"attention": "attention", "router" if slots.get("router") else "ffn": "ffn"}
    for kind, place in places.items():
        part = _Alone(block.get_submodule(place), self_attention=kind == "attention")
        try:
            with torch.no_grad(), _silence():
                torch.export.export(part, (x_BTD,), dynamic_shapes=({1: length},), strict=False)
        except Exception as error:
            return f"model.{kind}_name: {slots.get(kind)}", error
    return None


@contextmanager
def _silence() -> Iterator[None]:
    """Where it fails, the tracer prints the whole graph that it has so far."""
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        yield


def _reason(error: BaseException) -> str:
    """The first line of an error."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


class _Alone(nn.Module):
    def __init__(self, part: nn.Module, *, self_attention: bool) -> None:
        super().__init__()
        self.part = part
        self.self_attention = self_attention

    def forward(self, x_BTD: Tensor) -> Tensor:
        out = self.part(x_BTD, x_BTD, x_BTD) if self.self_attention else self.part(x_BTD)
        out_BTD: Tensor = out[0] if isinstance(out, tuple) else out
        return out_BTD


def check_difference(what: str, mine: Tensor, theirs: Tensor) -> float:
    """The largest difference of a logit. Raises ProviderError where it is above `LIMIT`."""
    difference = float((mine - theirs).abs().max())
    if not difference <= LIMIT * max(1.0, float(theirs.abs().max())):
        raise ProviderError(
            f"the exported model is not the run's: a logit is off by {difference:.1e} ({what})",
            hint="report it, with the profile of the run; nothing was written",
        )
    return difference
