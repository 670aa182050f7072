"""What the checks work on: a provider, and for kinds that build layers the sizes, weights and inputs to try it with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apt.checkpoint.rng import torch_rng_kept
from apt.core.errors import ConfigError, ProviderError
from apt.core.providers.attention import AttentionContext, supports
from apt.core.providers.dataset import Piece
from apt.testing.check import CheckFailure, CheckSkipped

B, T = 2, 7
"""Rows and positions of an input, unless a check says otherwise."""


class Subject:
    """A provider under test.

    Args:
        kind: its kind.
        factory: builds a fresh one.
        name: the name it is registered under, if that is known.
        device: where layers are built and run.
    """

    def __init__(self, kind: str, factory: Callable[[], Any], *, name: str | None = None, device: str = "cpu") -> None:
        self.kind = kind
        self.factory = factory
        self.name = name
        self.device = torch.device(device)

    def provider(self) -> Any:
        """A fresh provider."""
        return self.factory()

    def try_out(self) -> None:
        """Use it once, in the simplest way: what is missing here, a library, a file or a setting, shows at once."""
        provider = self.provider()
        if self.kind == "retrieval":
            provider.retrieve("anything", 1)
        elif self.kind == "dataset":
            next(iter(provider.pieces()), None)
        elif self.kind == "tokenizer":
            provider.build(lambda: [Piece("a little text\n")])

    def lacks(self, need: str) -> str | None:
        """Why the provider cannot do what a check needs; None if it says that it can."""
        if need == "config":
            return None if getattr(self.provider(), "Config", None) is not None else "it has no Config"
        raise AssertionError(need)


class LayerSubject(Subject):
    """A provider that builds layers from [B, T, D] to [B, T, D].

    Layers are built small and, on a CPU, in float64, where a difference of 1e-9 is a mistake and not rounding.
    """

    def __init__(self, kind: str, factory: Callable[[], Any], *, name: str | None = None, device: str = "cpu") -> None:
        super().__init__(kind, factory, name=name, device=device)
        self.dtype = torch.float64 if self.device.type == "cpu" else torch.float32

    @property
    def d_model(self) -> int:
        """Width D of the layers under test."""
        return 16

    def try_out(self) -> None:
        self.build()

    def build(self, **options: Any) -> nn.Module:
        """A layer as the provider builds it."""
        raise NotImplementedError

    def forward(self, layer: nn.Module, x_BTD: Tensor) -> Tensor:
        """The layer's output for `x_BTD`, [B, T, D]."""
        return self.output_and_aux(layer, x_BTD)[0]

    def output_and_aux(self, layer: nn.Module, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layer's output, [B, T, D], and what else it adds to the loss, or None."""
        raise NotImplementedError

    def layer(
        self,
        *,
        seed: int = 0,
        training: bool = False,
        dtype: torch.dtype | None = None,
        as_built: bool = False,
        **options: Any,
    ) -> nn.Module:
        """A layer with weights so large that whatever it computes shows in its output: freshly drawn ones are tiny, or
        zero. `as_built` leaves them as they are."""
        torch.manual_seed(seed)
        layer = self.build(**options)
        if not as_built:
            enliven(layer, seed + 1000)
        return layer.to(self.device, dtype or self.dtype).train(training)

    def x(
        self, *, seed: int = 1, batch: int = B, length: int = T, dtype: torch.dtype | None = None, grad: bool = False
    ) -> Tensor:
        """A random input, [batch, length, D]."""
        generator = torch.Generator().manual_seed(seed)
        x_BTD = torch.randn(batch, length, self.d_model, generator=generator, dtype=torch.float64)
        return x_BTD.to(self.device, dtype or self.dtype).requires_grad_(grad)

    def loss(self, layer: nn.Module, x_BTD: Tensor) -> Tensor:
        """A 0-d function of everything that the layer returns."""
        out_BTD, aux = self.output_and_aux(layer, x_BTD)
        loss = (out_BTD * probe(out_BTD)).sum()
        return loss if aux is None else loss + aux

    def perturbed(self, x_BTD: Tensor, *index: Any) -> Tensor:
        """`x_BTD` with other content at `index`."""
        other = x_BTD.detach().clone()
        other[index] = self.x(seed=77, batch=x_BTD.shape[0], length=x_BTD.shape[1], dtype=x_BTD.dtype)[index] * 2
        return other


class AttentionSubject(LayerSubject):
    """A provider of attention layers."""

    SIZES: ClassVar = ((16, 4), (32, 4), (64, 4), (128, 2))
    """(D, H) to try: the first that the provider accepts is used."""

    _size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(D, H) of the layers under test."""
        if self._size is None:
            self._size = self._first_that_fits()
        return self._size

    @property
    def d_model(self) -> int:
        return self.size[0]

    @property
    def num_heads(self) -> int:
        """Heads H of the layers under test."""
        return self.size[1]

    def lacks(self, need: str) -> str | None:
        if need == "config":
            return super().lacks(need)
        if need == "mha":
            layout = getattr(self.provider(), "weights_layout", None)
            return None if layout == "mha" else "it does not claim to be plain softmax attention (weights_layout)"
        layer = self.build()
        if need == "context":
            return None if takes_context(layer) else "its forward takes no context"
        return None if supports(layer, need) else f"it does not claim {need!r} in its capabilities"

    def build(self, **options: Any) -> nn.Module:
        return self._create(*self.size, **options)

    def output_and_aux(self, layer: nn.Module, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attend(layer, x_BTD)[0], None

    def attend(
        self,
        layer: nn.Module,
        query_BTD: Tensor,
        memory_BSD: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        context: AttentionContext | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """What the layer returns; keys and values come from `memory_BSD`, or from the query itself."""
        memory = query_BTD if memory_BSD is None else memory_BSD
        options: dict[str, Any] = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
        if context is not None:
            options["context"] = context
        result = layer(query_BTD, memory, memory, **options)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], Tensor)):
            raise CheckFailure(
                f"forward returns {describe(result)}, not (output, weights or None); the contract is in "
                "apt.core.providers.attention"
            )
        return result

    def make_cache(self, layer: Any, length: int = 32, batch: int = B) -> Any:
        """An empty cache of the layer."""
        return layer.make_cache(batch, length, device=self.device, dtype=self.dtype)

    def step(self, layer: nn.Module, cache: Any, x_BTD: Tensor, **context: Any) -> Tensor:
        """The output for new positions behind those that the cache holds."""
        masks = {name: context.pop(name) for name in ("attn_mask", "key_padding_mask") if name in context}
        with torch.no_grad():
            return self.attend(layer, x_BTD, context=AttentionContext(cache=cache, **context), **masks)[0]

    def _create(
        self, d_model: int, num_heads: int, *, causal: bool = True, dropout: float = 0.0, **options: Any
    ) -> nn.Module:
        create = self.provider().create_layer
        given = {"causal": causal, "dropout": dropout, "num_layers": 2, "rope_theta": 10_000.0, **options}
        layer = create(d_model, num_heads, **_accepted(create, given, {"causal": True, "dropout": 0.0}))
        if not isinstance(layer, nn.Module):
            raise CheckFailure(f"create_layer returns {describe(layer)}, which is no torch.nn.Module")
        return layer

    def _first_that_fits(self) -> tuple[int, int]:
        self.provider()  # settings that do not fit at all are refused in the provider's own words, not as a size
        for d_model, num_heads in self.SIZES:
            try:
                with torch_rng_kept():  # whoever asks first has a seed of its own
                    self._create(d_model, num_heads)
            except ConfigError as error:
                refusal = error
                continue
            return d_model, num_heads
        raise CheckFailure(f"none of the sizes (d_model, num_heads) {self.SIZES} fits it: {refusal}") from refusal


class FFNSubject(LayerSubject):
    """A provider of feed-forward layers."""

    D_FF: ClassVar = 32

    def build(self, *, d_ff: int = D_FF, dropout: float = 0.0, **options: Any) -> nn.Module:
        create = self.provider().create_layer
        given = {"dropout": dropout, "num_layers": 2, **options}
        layer = create(self.d_model, d_ff, **_accepted(create, given, {"dropout": 0.0}))
        if not isinstance(layer, nn.Module):
            raise CheckFailure(f"create_layer returns {describe(layer)}, which is no torch.nn.Module")
        return layer

    def output_and_aux(self, layer: nn.Module, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        result = layer(x_BTD)
        return result if isinstance(result, tuple) else (result, None)


class RouterSubject(LayerSubject):
    """A provider that wraps feed-forward layers."""

    def build(self, *, base: nn.Module | None = None, **options: Any) -> nn.Module:
        wrapped = self.provider().wrap_ffn(DenseFFN(self.d_model, 32) if base is None else base, {})
        if not isinstance(wrapped, nn.Module):
            raise CheckFailure(f"wrap_ffn returns {describe(wrapped)}, which is no torch.nn.Module")
        return wrapped

    def output_and_aux(self, layer: nn.Module, x_BTD: Tensor) -> tuple[Tensor, Tensor | None]:
        result = layer(x_BTD)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise CheckFailure(f"forward returns {describe(result)}, not (output, aux_loss); see RouterProvider")
        return result


class DenseFFN(nn.Module):
    """What a router is given to wrap: two linear maps around a GELU."""

    def __init__(self, d_model: int, d_ff: int, *, bias: bool = True) -> None:
        super().__init__()
        self.d_model = d_model
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.down(nn.functional.gelu(self.up(x_BTD)))
        return out_BTD


def takes_context(layer: nn.Module) -> bool:
    """Whether an attention layer's forward takes a `context`."""
    parameters = inspect.signature(layer.forward).parameters
    return "context" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def enliven(module: nn.Module, seed: int) -> None:
    """Add noise to every parameter, so that none is zero and what it does shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 1 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.3
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
            parameter.add_(noise.to(parameter.device, parameter.dtype))


def probe(like: Tensor) -> Tensor:
    """Fixed numbers shaped like a tensor, to weigh its elements with."""
    generator = torch.Generator().manual_seed(4242)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def describe(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return f"{type(value).__name__} {value!r}"[:80]


def skip(reason: str) -> None:
    """End a check that cannot be run here."""
    raise CheckSkipped(reason)


def _accepted(function: Callable[..., Any], options: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that `function` takes, as the model builder passes them. One that it does not take and that
    asks for something unusual is refused."""
    from apt.modeling.compose import accepted

    taken = accepted(function, options)
    for name, value in usual.items():
        if name not in taken and options[name] != value:
            raise ProviderError(f"create_layer takes no {name}")
    return taken


SUBJECTS: dict[str, type[Subject]] = {"attention": AttentionSubject, "ffn": FFNSubject, "router": RouterSubject}
SUBJECTS |= dict.fromkeys(("align", "retrieval", "voter", "quant", "dataset", "tokenizer", "tracker"), Subject)
