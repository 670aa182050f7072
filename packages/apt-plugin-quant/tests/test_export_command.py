"""`apt export` as a command: what it writes, prints and refuses; the formats `safetensors` and `torch-export`."""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from export_samples import LLAMA, SIZES, export, import_, logits, make_run, quietly, some_tokens
from safetensors.torch import load_file
from small_disk import mounted
from small_run import register_for_one_test

from apt.api import GPT, AptError, AptWarning, CheckpointError, ConfigError, ProviderError, RunFolder, load_run
from apt.checkpoint.store import CheckpointStore
from apt_plugin_quant import plugin
from apt_plugin_quant.export import commands, exporting, tracing
from apt_plugin_quant.export.commands import configure_export


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return make_run(tmp_path / "runs/sample", SIZES)


def test_safetensors(run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quietly(export, run.path, "--format", "safetensors") == 0
    out = run.path / "export/safetensors"
    said = capsys.readouterr().out
    assert f"{run.path}, step 0, as safetensors in {out}" in said
    assert "model.safetensors" in said
    weights = load_file(out / "model.safetensors")
    own = load_run(run, device="cpu").model.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in own)
    manifest = json.loads((out / "export.json").read_text())
    assert (manifest["kind"], manifest["step"], manifest["dtype"]) == ("safetensors", 0, "fp32")
    assert manifest["model"]["d_model"] == 32
    assert {"kind": "attention", "name": "tva_default"}.items() <= manifest["providers"][0].items()
    assert manifest["providers"][0]["config"]["tau"] == 0.18
    assert (out / "tokenizer.json").is_file()


def test_bf16(run: RunFolder, tmp_path: Path) -> None:
    export(run.path, "--format", "safetensors", "--dtype", "bf16", "--out", tmp_path / "out")
    own = load_run(run, device="cpu").model.state_dict()
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert torch.equal(tensor, own[name].bfloat16())


def test_what_is_there_is_replaced_only_if_it_is_an_export_and_force_is_given(run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (run.path, "--format", "safetensors", "--out", out)
    out.mkdir()
    assert export(*arguments) == 0  # an empty folder is nothing
    with pytest.raises(AptError, match="exists already"):
        export(*arguments)
    (out / "stray").touch()
    assert export(*arguments, "--force") == 0
    assert not (out / "stray").exists()
    (out / "export.json").unlink()
    with pytest.raises(AptError, match="is no export"):
        export(*arguments, "--force")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_nothing_is_left_of_an_export_that_fails(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    export(run.path, "--format", "safetensors", "--out", out)
    before = (out / "model.safetensors").read_bytes()

    def fail(*_: Any) -> dict[str, Any]:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setitem(exporting.WRITERS, "safetensors", fail)
    with pytest.raises(AptError, match=r"cannot write .*out: Read-only file system"):
        export(run.path, "--format", "safetensors", "--out", out, "--force")
    assert (out / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


@pytest.mark.parametrize(("code", "cause"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk quota is used up")])
def test_a_program_that_does_not_fit_on_the_disk(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, cause: str
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(code, "words of the system")

    monkeypatch.setattr(Path, "write_bytes", fail)
    weights = 4 * load_run(run, device="cpu").model.num_params()
    with pytest.raises(
        AptError, match=rf"cannot write .*out: the {cause}: more than {weights:,} bytes are needed, [\d,]+ are free;"
    ) as caught:
        export(run.path, "--format", "torch-export", "--out", tmp_path / "out")
    assert caught.value.hint == "free some space, or give an --out on another disk"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system on which the tokenizer of a run fits, and none of its weights."""
    with mounted(tmp_path / "disk", "32k") as disk:
        yield disk


@pytest.mark.parametrize("format", exporting.WRITERS)
def test_a_disk_that_is_really_full(
    tmp_path: Path, small_disk: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format == "onnx":
        monkeypatch.setattr("apt_plugin_quant.export.onnx_export.ONE_FILE", 0)  # the weights lie beside the graph
        pytest.importorskip("onnxscript", reason="the extra apt-plugin-quant[onnx]")
    run = make_run(tmp_path / "run", LLAMA | {"num_layers": 1})
    said = r"cannot write .*disk/out: the disk is full: more than [\d,]+ bytes are needed, 32,768 are free;"
    with pytest.raises(AptError, match=said):
        export(run.path, "--format", format, "--out", small_disk / "out")
    (small_disk / "filler").write_bytes(bytes(28_672))  # now the tokenizer does not fit
    with pytest.raises(AptError, match="the disk is full"):
        export(run.path, "--format", format, "--out", small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_checkpoint_and_state(run: RunFolder, tmp_path: Path) -> None:
    model = load_run(run, device="cpu").model
    store = CheckpointStore(run.checkpoints)
    checkpoint = store.load()
    names = list(dict(model.named_parameters()))
    checkpoint.step = 7
    checkpoint.model = {name: tensor + 1 for name, tensor in checkpoint.model.items()}
    checkpoint.optimizer = {
        "state": {0: {"stable": checkpoint.model[names[0]] * 2}},
        "param_groups": [{"params": list(range(len(names))), "param_names": names}],
    }
    store.save(checkpoint)
    first = model.state_dict()[names[0]]
    for arguments, wanted in (
        ((), first + 1),
        (("--checkpoint", "step-00000000"), first),
        (("--state", "stable"), (first + 1) * 2),
    ):
        export(run.path, "--format", "safetensors", "--out", tmp_path / "out", "--force", *arguments)
        found = load_file(tmp_path / "out/model.safetensors")
        assert torch.equal(found[names[0]], wanted)
        manifest = json.loads((tmp_path / "out/export.json").read_text())
        assert manifest["step"] == (0 if "--checkpoint" in arguments else 7)
    for arguments, said in ((("--checkpoint", "3"), "no checkpoint of step 3"), (("--state", "mean"), "no state")):
        with pytest.raises(CheckpointError, match=said):
            export(run.path, "--format", "safetensors", "--out", tmp_path / "other", *arguments)


def test_torch_export(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", LLAMA | {"mha": {"num_kv_heads": 2}, "num_layers": 1})
    assert quietly(export, run.path, "--format", "torch-export", "--out", tmp_path / "out") == 0
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    for batch, length in ((1, 1), (1, 9), (4, 64)):
        tokens = some_tokens(batch, length)
        torch.testing.assert_close(program(tokens), logits(run, tokens), rtol=0, atol=1e-5)
    differences = json.loads((tmp_path / "out/export.json").read_text())["differences"]
    assert 0 <= differences["reloaded"] < 1e-5


def test_torch_export_with_learned_positions(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", SIZES | {"positions": "learned", "max_seq_len": 16, "num_layers": 1})
    export(run.path, "--format", "torch-export", "--out", tmp_path / "out")
    program = torch.export.load(tmp_path / "out/model.pt2").module()
    tokens = some_tokens(2, 17)
    torch.testing.assert_close(program(tokens[:, :16]), logits(run, tokens[:, :16]), rtol=0, atol=1e-5)
    with pytest.raises(Exception, match=r"16|range"):
        program(tokens)


def test_the_part_that_cannot_be_traced_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    moe = pytest.importorskip("apt_plugin_moe.plugin", reason="experts are what cannot be traced")

    register_for_one_test(monkeypatch, moe)
    run = make_run(tmp_path / "run", LLAMA | {"moe": {"enabled": True, "experts": 3}})
    with pytest.raises(ProviderError, match=r"as torch-export: model\.router_name: topk_moe cannot be traced") as said:
        export(run.path, "--format", "torch-export", "--out", tmp_path / "out")
    assert "\n" not in str(said.value)
    assert not (tmp_path / "out").exists()
    assert "def forward" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("wrong", [1.0002, float("nan")])
def test_a_difference_is_refused(wrong: float) -> None:
    theirs = torch.tensor([[1.0, -3.0]])
    assert tracing.check_difference("full pass", theirs + 2e-4, theirs) == pytest.approx(2e-4, rel=1e-2)
    with pytest.raises(ProviderError, match=r"a logit is off by .*\(full pass\)"):
        tracing.check_difference("full pass", theirs * wrong, theirs)


def test_a_tokenizer_of_a_plugin_is_left_out_aloud(run: RunFolder, tmp_path: Path) -> None:
    class Plugins:
        def __call__(self, path: Path) -> None:
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "as_library_tokenizer", Plugins())
        with pytest.warns(AptWarning, match="cannot be written as a tokenizer.json"):
            export(run.path, "--format", "safetensors", "--out", tmp_path / "out")
    assert not (tmp_path / "out/tokenizer.json").exists()


def test_what_is_refused_before_torch_is_imported(run: RunFolder, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(AptError, match="--dtype bf16 with --format onnx"):
        export(run.path, "--format", "onnx", "--dtype", "bf16")
    with pytest.raises(ConfigError, match="nothing is not the folder of a run"):
        export("nothing", "--format", "hf")
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(AptError, match="--format onnx needs onnxscript") as said:
        export(run.path, "--format", "onnx")
    assert said.value.hint == 'pip install "apt-plugin-quant[onnx]"'


def test_a_quantised_run_is_refused(run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(run, device="cpu")
    loaded.config = loaded.config.model_copy(
        update={"model": loaded.config.model.model_copy(update={"quant_name": "int8"})}
    )
    monkeypatch.setattr(exporting, "load_run", lambda *_, **__: loaded)
    with pytest.raises(ConfigError, match="is quantised"):
        export(run.path, "--format", "safetensors", "--out", tmp_path / "out")


@pytest.mark.parametrize("text", ["latest", "-1", "step-", "1.5", "²"])
def test_a_checkpoint_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    configure_export(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--format", "hf", f"--checkpoint={text}"])
    assert "expected best, last or a step" in capsys.readouterr().err


def test_the_plugin_adds_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    added: dict[str, Any] = {}

    class Commands:
        def add(self, name: str, help: str, configure: Any, run: Any) -> None:
            added[name] = (configure, run)

    plugin.apt_register_commands(Commands())
    for name, arguments in (("export", ["--format", "hf"]), ("import", ["hf", "folder"])):
        parser = argparse.ArgumentParser()
        configure, run = added[name]
        configure(parser)
        seen = []
        monkeypatch.setattr(commands, f"run_{name}", lambda args, seen=seen: seen.append(args) or 0)
        assert run(parser.parse_args(arguments)) == 0
        assert "hf" in vars(seen[0]).values()


def test_import_takes_hf_alone() -> None:
    with pytest.raises(SystemExit):
        import_("gguf", "folder")


def test_what_a_layer_keeps_is_known_for_every_cache(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model: GPT = load_run(run, device="cpu").model
    names = [tensor.name for tensor in tracing.cache_tensors(model) or ()]
    assert names == ["0.vein", "0.recent", "1.vein", "1.recent"]

    class Stranger:
        layers = (object(),)

    monkeypatch.setattr(GPT, "make_cache", lambda *_: Stranger())
    assert tracing.cache_tensors(model) is None
    monkeypatch.setattr(GPT, "supports", lambda *_: False)
    assert tracing.cache_tensors(model) is None
