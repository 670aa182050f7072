"""The snippets and commands of the migration guide's first two stages. Those of the first, and of the schedules, are as
they stand there; the experts and the alignment come from the packages that bring them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT, Apt

SNIPPETS = {
    "1.1 the core's modules": "from apt.core import config, logging, registry",
    "1.2 the registry": """
from apt.core.registry import registry, Provider

class DummyAttention(Provider):
    def __init__(self, config): pass
    def get_name(self): return "dummy"
    def get_version(self): return "1.0.0"

registry.register('attention', 'dummy', DummyAttention)
attn = registry.get('attention', 'dummy')
print(f"ok: {attn}")
""",
    "1.3 an interface": "from apt.core.providers.attention import AttentionProvider",
    "1.4 TVA as a provider": """
from apt.modeling.layers.attention_tva import TVAAttention
from apt.core.registry import registry

providers = registry.list_providers('attention')
assert 'tva_default' in providers['attention']

tva = registry.get('attention', 'tva_default', {'r': 4, 'tau': 0.18})
layer = tva.create_layer(d_model=768, num_heads=12)
""",
    "1.5 the builder": """
import yaml
from apt.modeling.compose import ModelBuilder

config = yaml.safe_load(open('examples/profiles/tiny_debug.yaml'))
builder = ModelBuilder(config)

block = builder.build_block(d_model=64, num_heads=4, d_ff=256)
print(f"ok: {block}")

model = builder.build_model()
print(f"ok: {model}")
""",
    "2.1 schedules": """
from apt.core.schedules import Schedule

config = {
    'training': {'max_epochs': 10},
    'schedules': {
        'enable_moe_at_epoch': 2,
        'route_temp': {'start': 1.5, 'end': 0.8, 'by': 'epoch'}
    }
}

schedule = Schedule(config)

assert schedule.should_enable_plugin('moe', epoch=1) == False
assert schedule.should_enable_plugin('moe', epoch=2) == True

temp_e0 = schedule.get_param('route_temp', epoch=0)
temp_e5 = schedule.get_param('route_temp', epoch=5)
temp_e10 = schedule.get_param('route_temp', epoch=10)

assert temp_e0 == 1.5
assert 1.0 < temp_e5 < 1.5
assert temp_e10 == 0.8
""",
    "2.2 the experts": """
import torch
from torch import nn
from apt_plugin_moe.router import MoERouter
from apt.core.registry import registry

registry.register('router', 'topk_moe', MoERouter)

class SomeDummyFFN(nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.d_model = d_model
        self.net = nn.Sequential(nn.Linear(d_model, d_ff), nn.GELU(), nn.Linear(d_ff, d_model))
    def forward(self, x):
        return self.net(x)

moe_config = {'experts': 8, 'top_k': 2, 'capacity': 1.5}
moe = registry.get('router', 'topk_moe', moe_config)

base_ffn = SomeDummyFFN(d_model=64, d_ff=256)
moe_ffn = moe.wrap_ffn(base_ffn, moe_config)

x = torch.randn(2, 10, 64)
output, aux_loss = moe_ffn(x)

assert output.shape == x.shape
assert aux_loss.item() >= 0
assert (moe.experts, moe.top_k, moe.capacity, moe.balance_loss_weight) == (8, 2, 1.5, 0.01)
""",
    "2.3 the alignment": """
import torch
from apt_plugin_align.align import BistateAlign

align = BistateAlign({})
assert (align.alpha, align.beta, align.tau_align, align.enabled) == (0.35, 0.20, 0.15, False)
assert (align.get_name(), align.get_version()) == ('bistate_default', '1.0.0')
logits, targets = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
assert align.compute_align_loss(logits, targets, {}) == torch.tensor(0.0)
align.enabled = True
hidden = torch.randn(2, 3, 4)
state = {'stable': {'logits': torch.randn(2, 3, 5), 'hidden': torch.randn(2, 3, 4)}, 'align': {'hidden': hidden}}
assert align.compute_align_loss(logits, targets, state) > 0
""",
}


@pytest.mark.parametrize("step", SNIPPETS)
def test_a_snippet_runs_as_written(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = (str(ROOT / f"packages/{package}/src") for package in ("apt-core", "apt-plugin-moe", "apt-plugin-align"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sources))
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", SNIPPETS[step]], cwd=ROOT, check=True, timeout=120
    )


def test_the_commands_of_the_command_line_step(apt: Apt) -> None:
    assert "tva_default" in apt("plugin-list").stdout
    assert "swiglu" not in apt("plugin-list", "--kind", "attention").stdout
    info = apt("plugin-info", "attention", "tva_default").stdout
    assert "1.0.0" in info
    assert "apt.modeling.layers.attention_tva:TVAAttention" in info


def test_the_functions_that_the_guide_names(capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import Namespace

    from apt.cli.commands import load_profile, run_plugin_info_command, run_plugin_list_command
    from apt.cli.parser import parse_arguments

    assert load_profile(Path(ROOT, "examples/profiles/tiny_debug.yaml"))["training"]["max_epochs"] == 3
    run_plugin_list_command(Namespace(kind="ffn"))
    run_plugin_info_command(parse_arguments(["plugin-info", "ffn", "default"]))
    said = capsys.readouterr().out
    assert "swiglu" in said
    assert "ffn:default" in said
