"""The norms of the residual stream, against their definitions."""

from __future__ import annotations

import pytest
import torch

from apt.core.errors import ConfigError
from apt.modeling.compose import ModelBuilder
from apt.modeling.layers.norm import make_norm


@pytest.mark.parametrize(("eps", "used"), [(None, {"rmsnorm": 1e-6, "layernorm": 1e-5}), (0.5, {})])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_what_is_added_under_the_root(kind: str, eps: float | None, used: dict[str, float]) -> None:
    x_TD = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 0.01  # so small that it shows
    centred = x_TD - x_TD.mean(-1, keepdim=True) if kind == "layernorm" else x_TD
    wanted = centred / (centred.square().mean(-1, keepdim=True) + used.get(kind, 0.5)).sqrt()
    torch.testing.assert_close(make_norm(kind, 8, eps)(x_TD), wanted)


def test_a_profile_sets_it_for_every_norm() -> None:
    sizes = {"d_model": 8, "num_heads": 2, "num_layers": 2}
    model = ModelBuilder({"model": sizes | {"norm": "rmsnorm", "norm_eps": 0.25}}).build_model(5)
    norms = [module for name, module in model.named_modules() if "norm" in name]
    assert [norm.eps for norm in norms] == [0.25] * 5
    with pytest.raises(ConfigError, match=r"model\.norm_eps"):
        ModelBuilder({"model": sizes | {"norm_eps": 0.0}})
