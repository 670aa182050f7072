"""Runs whose plugins are gone: what they brought is named with its version, what they kept is kept."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fixture_types import MakeDistribution, Result, RunApt
from safetensors import safe_open

HEAD = "from apt.hookspecs import hookimpl\nAPI_VERSION = (1, 0)\n"
OBSERVER = (
    HEAD
    + """
kept = {"n": 0, "words": ["a", "\\ud800"], "nested": {"none": None, 3: 0.1}}

@hookimpl
def on_step_end(step, loss):
    if "ema" not in kept:
        kept["ema"] = loss.new_tensor([0.0, 1 / 3, 2 / 3])
    kept["n"] += 1

@hookimpl
def on_checkpoint_save():
    return kept

@hookimpl
def on_checkpoint_load(state):
    kept.update(state)
    kept["loaded"] = kept.get("loaded", 0) + 1
"""
)
PROVIDES = (
    HEAD
    + """
@hookimpl
def apt_register_providers(registry):
    registry.register("{kind}", "{name}", "{module}:Own", version="0.3")
"""
)
FFN = """
from apt.modeling.layers.ffn import DefaultFFN

class Own(DefaultFFN):
    def get_name(self): return "own_ffn"
    def get_version(self): return "0.3"
"""
ALIGN = """
from apt.core.providers.align import AlignProvider

class Own(AlignProvider):
    def get_name(self): return "own_align"
    def get_version(self): return "0.3"
    def compute_align_loss(self, logits, targets, model_state): return logits.float().logsumexp(-1).mean() * 1e-3
"""
PROFILE = """\
name: small
model: {d_model: 16, num_heads: 2, num_layers: 1, max_seq_len: 16}
data: {train_path: text.txt, cache_dir: tokens}
training: {max_steps: 2, batch_size: 8, eval_batches: 1}
hardware: {device: cpu}
"""


@pytest.fixture
def train(run_apt: RunApt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    (tmp_path / "small.yaml").write_text(PROFILE)
    (tmp_path / "text.txt").write_text("".join(f"{n} green bottles\n" for n in range(200)))

    def train(*arguments: str) -> Result:
        source = ("--resume", "runs/small-1") if (tmp_path / "runs").exists() else ("-p", "small.yaml")
        return run_apt("train", *source, "--quiet", *arguments)

    return train


def uninstall(site: Path) -> None:
    """Take away every made-up distribution, and what of them was imported."""
    for path in list(site.iterdir()):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(site)):
            del sys.modules[name]


def state_in(checkpoint: Path, plugin: str) -> tuple[str, dict[str, bytes]]:
    """A plugin's state as it lies on the disk: its structure, and the bytes of its tensors."""
    structure = json.loads((checkpoint / "state.json").read_text())["plugins"][plugin]
    with safe_open(checkpoint / "state.safetensors", framework="np") as file:
        names = [name for name in file.keys() if name.startswith(f"plugins.{plugin}.")]  # noqa: SIM118
        return json.dumps(structure), {name: file.get_tensor(name).tobytes() for name in names}


def test_the_state_of_an_observer_that_is_gone_is_carried_unchanged(
    make_distribution: MakeDistribution, run_apt: RunApt, train: Callable[..., Result], tmp_path: Path
) -> None:
    def install() -> Path:
        return make_distribution("apt-seen", "4.2", plugins={"seen": "seen_plugin"}, modules={"seen_plugin": OBSERVER})

    site = install()
    assert train().code == 0
    checkpoints = tmp_path / "runs/small-1/checkpoints"
    structure, tensors = state_in(checkpoints / "step-00000002", "seen")
    assert '"n": 2' in structure and list(tensors) == ["plugins.seen.ema"]

    uninstall(site)
    refused = train("--training.max_steps", "4", "--strict")
    assert refused.code == 2
    assert refused.err == (
        "error: the checkpoint holds state of 'seen', which is not here\n  fix: pip install \"apt-seen==4.2\"\n"
    )
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    for steps in (4, 6):  # twice: what is carried is carried on
        result = train("--training.max_steps", str(steps))
        assert result.code == 0
        assert (
            "the checkpoint holds state of 'seen', which is not here; it is kept for the next checkpoint "
            '(to use it again: pip install "apt-seen==4.2")\n' in result.err
        )
        assert state_in(checkpoints / f"step-{steps:08d}", "seen") == (structure, tensors)
    facts = json.loads(run_apt("inspect", "runs/small-1", "--json").out)
    assert facts["checkpoints"][-1]["states"] == ["seen"]
    assert {plugin["name"]: plugin["install"] for plugin in facts["plugins"]}["seen"] == 'pip install "apt-seen==4.2"'

    install()
    result = train("--training.max_steps", "8")
    assert (result.code, result.err) == (0, "")
    structure, again = state_in(checkpoints / "step-00000008", "seen")
    assert '"n": 4' in structure and '"loaded": 1' in structure and again == tensors, "where it left off"


def test_one_that_is_left_out_is_not_to_be_installed_again(
    make_distribution: MakeDistribution, train: Callable[..., Result]
) -> None:
    make_distribution("apt-seen", "4.2", plugins={"seen": "seen_plugin"}, modules={"seen_plugin": OBSERVER})
    assert train().code == 0
    result = train("--training.max_steps", "4", "--no-plugin", "seen")
    assert result.code == 0
    assert "apt-seen 4.2 is installed and its plugin not in use: see apt plugin-list" in result.err


@pytest.mark.parametrize(
    ("kind", "name", "source", "key"),
    [("ffn", "own_ffn", FFN, "model.ffn_name"), ("align", "own_align", ALIGN, "model.align_name")],
)
def test_what_to_install_for_a_checkpoint_is_said_exactly(
    make_distribution: MakeDistribution, run_apt: RunApt, train: Callable[..., Result], tmp_path: Path,
    kind: str, name: str, source: str, key: str,
) -> None:  # fmt: skip
    module = f"{name}_module"
    site = make_distribution(
        "apt-own",
        "3.1",
        plugins={"own": "own_plugin"},
        modules={"own_plugin": PROVIDES.format(kind=kind, name=name, module=module), module: source},
    )
    assert train(f"--{key}", name).code == 0
    before = sorted(path.name for path in (tmp_path / "runs/small-1/checkpoints").iterdir())
    uninstall(site)
    said = f'error: {kind}:{name} is not installed\n  fix: pip install "apt-own==3.1"\n'
    assert train("--training.max_steps", "4") == (2, "", said), "and nothing is said to stand in for it"
    assert sorted(path.name for path in (tmp_path / "runs/small-1/checkpoints").iterdir()) == before
    for command in ("generate", "eval"):
        result = run_apt(command, "runs/small-1", "--device", "cpu", *(["--batches", "1"] if command == "eval" else []))
        if kind == "ffn":
            assert result == (2, "", said)
        else:
            assert result.code == 0, "a model that is only used needs no alignment"
    assert run_apt("inspect", "runs/small-1").code == 0
    other = train("--training.max_steps", "4", f"--{key}", "default" if kind == "ffn" else "null")
    assert other.code == 2 and f"this run was built with {kind}:{name} 0.3 (apt-own 3.1)" in other.err


def test_a_profile_that_names_a_plugin_which_is_gone_says_what_brought_it(
    make_distribution: MakeDistribution, run_apt: RunApt, train: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "small.yaml").write_text(f"{PROFILE}plugins: [seen]\n")
    site = make_distribution("apt-seen", "4.2", plugins={"seen": "seen_plugin"}, modules={"seen_plugin": OBSERVER})
    assert train().code == 0
    uninstall(site)
    said = "the profile's plugins: plugin 'seen' is not installed; going on without it"
    result = train("--training.max_steps", "4")
    assert result.code == 0 and f'warning: {said} (to get it: pip install "apt-seen==4.2")\n' in result.err
    strict = train("--training.max_steps", "6", "--strict")
    assert strict.code == 2 and 'fix: pip install "apt-seen==4.2"' in strict.err
    evaluated = run_apt("eval", "runs/small-1", "--batches", "1")
    assert evaluated.code == 0 and said in evaluated.err
    slip = train("--plugins", "sen")
    assert slip.code == 2 and "there is no plugin 'sen'" in slip.err


# Older ones


def provided() -> dict[str, str]:
    return {"own_plugin": PROVIDES.format(kind="ffn", name="own_ffn", module="own_ffn_module"), "own_ffn_module": FFN}


def test_a_provider_of_an_older_distribution_is_refused_and_its_weights_can_be_used(
    make_distribution: MakeDistribution, run_apt: RunApt, train: Callable[..., Result], tmp_path: Path
) -> None:
    def install(version: str) -> Path:
        return make_distribution("apt-own", version, plugins={"own": "own_plugin"}, modules=provided())

    site = install("3.1")
    assert train("--model.ffn_name", "own_ffn").code == 0
    run = tmp_path / "runs/small-1"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    uninstall(site), install("3.0.9")
    assert train("--training.max_steps", "4") == (
        2,
        "",
        "error: this run was made with apt-own 3.1, and 3.0.9 is here, which is older\n"
        '  fix: pip install "apt-own>=3.1", or start a new run; the weights alone can be used as they are\n',
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "run.log"} == {
        path: data for path, data in before.items() if path.name != "run.log"
    }
    assert run_apt("eval", str(run), "--batches", "1").code == 0
    uninstall(site), install("3.10")
    assert train("--training.max_steps", "4").code == 0, "versions are no strings"


def test_of_those_that_listen_only_what_they_kept_has_an_age(
    make_distribution: MakeDistribution, train: Callable[..., Result]
) -> None:
    silent = HEAD + "@hookimpl\ndef on_step_end(step):\n    pass\n"

    def install(version: str) -> Path:
        make_distribution("apt-silent", version, plugins={"silent": "silent_plugin"}, modules={"silent_plugin": silent})
        return make_distribution(
            "apt-seen", version, plugins={"seen": "seen_plugin"}, modules={"seen_plugin": OBSERVER}
        )

    site = install("2.0")
    assert train().code == 0
    uninstall(site), install("2.0rc1")
    result = train("--training.max_steps", "4")
    assert result.code == 2 and "this run was made with apt-seen 2.0, and 2.0rc1 is here" in result.err
    assert "apt-silent" not in result.err
    assert train("--training.max_steps", "4", "--no-plugin", "seen").code == 0, "its state is carried"
    uninstall(site), install("odd")
    assert train("--training.max_steps", "6").code == 0, "what is no version has no age"
