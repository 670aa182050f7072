"""FFN: what each position computes on its own."""

from __future__ import annotations

from apt.testing.check import check
from apt.testing.compare import require, require_equal
from apt.testing.subjects import FFNSubject, T


@check("ffn")
def positions_are_independent(subject: FFNSubject) -> None:
    """A position's output depends on that position alone: what mixes positions is attention's to do, and a layer that
    does it here looks into the future."""
    layer, x_BTD = subject.layer(), subject.x()
    before = subject.forward(layer, x_BTD)
    for position in (0, 3, T - 1):
        after = subject.forward(layer, subject.perturbed(x_BTD, slice(None), position))
        others = [t for t in range(T) if t != position]
        require_equal(
            after[:, others],
            before[:, others],
            f"with another input at position {position}, the outputs of the others",
            "look for sums, norms and convolutions over the dimension of positions",
        )


@check("ffn")
def d_ff_is_used(subject: FFNSubject) -> None:
    """A larger `d_ff` has more parameters: one that is ignored gives a model of another size than the profile says."""
    sizes = {d_ff: sum(p.numel() for p in subject.build(d_ff=d_ff).parameters()) for d_ff in (32, 64)}
    require(sizes[64] > sizes[32], f"d_ff 32 and 64 give {sizes[32]} and {sizes[64]} parameters: use d_ff")
