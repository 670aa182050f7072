"""Comparisons whose failures speak in numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from apt.testing.check import CheckFailure

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far two ways to compute the same may be apart, as a share of the largest number there is, or of 1."""

NOTICEABLE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""How far a result must move, likewise, to count as changed."""


def require(condition: object, message: str) -> None:
    """Raise CheckFailure with `message` unless `condition` holds."""
    if not condition:
        raise CheckFailure(message)


def require_finite(tensor: Tensor, what: str, advice: str) -> None:
    """Raise CheckFailure if `tensor` holds NaN or infinity."""
    if not bool(tensor.isfinite().all()):
        index = (~tensor.isfinite()).nonzero()[0].tolist()
        count = int((~tensor.isfinite()).sum())
        raise CheckFailure(
            f"{what}: {count} of {tensor.numel()} numbers are not finite, the first at {index}; {advice}"
        )


def require_equal(actual: Tensor, expected: Tensor, what: str, advice: str, tolerance: float | None = None) -> None:
    """Raise CheckFailure if the two differ by more than rounding.

    Args:
        what: what was compared, for the message.
        advice: where to look.
        tolerance: in place of that of the dtype.
    """
    if actual.shape != expected.shape:
        raise CheckFailure(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}; {advice}")
    require_finite(actual, what, advice)
    actual, expected = actual.detach(), expected.detach()
    allowed = _allowed(actual, expected, TOLERANCE) if tolerance is None else tolerance
    difference = (actual.double() - expected.double()).abs()
    if difference.numel() and float(difference.max()) > allowed:
        at = [int(i) for i in torch.unravel_index(difference.argmax(), difference.shape)]
        got, wanted = float(actual[tuple(at)]), float(expected[tuple(at)])
        raise CheckFailure(
            f"{what}: off by {float(difference.max()):.3g} at {at} (got {got:.6g}, expected {wanted:.6g}, "
            f"{allowed:.1g} allowed); {advice}"
        )


def require_change(after: Tensor, before: Tensor, what: str, advice: str) -> None:
    """Raise CheckFailure if nothing beyond rounding changed."""
    after, before = after.detach(), before.detach()
    moved = float((after.double() - before.double()).abs().max())
    wanted = _allowed(after, before, NOTICEABLE)
    if not moved > wanted:
        raise CheckFailure(f"{what}: nothing changed by more than {moved:.3g}; {advice}")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in norm."""
    exact = expected.detach().double()
    return float((actual.detach().double() - exact).norm() / exact.norm())


def _allowed(actual: Tensor, expected: Tensor, table: dict[torch.dtype, float]) -> float:
    coarser = max(table.get(tensor.dtype, table[torch.float32]) for tensor in (actual, expected))
    scale = float(expected.double().abs().max()) if expected.numel() else 1.0
    return coarser * max(1.0, scale)


__all__ = ["NOTICEABLE", "TOLERANCE", "relative_error", "require", "require_change", "require_equal", "require_finite"]
