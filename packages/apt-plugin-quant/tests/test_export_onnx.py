"""ONNX: what onnxruntime computes is what the model computes, in full passes and position by position."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from export_samples import LLAMA, SIZES, export, logits, make_run, quietly, some_tokens
from torch import Tensor

from apt.api import AptWarning, Generator, ProviderError, RunFolder
from apt_plugin_quant.export import onnx_export

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason="the extra apt-plugin-quant[onnx]")

EXAMPLE = Path(__file__).parents[3] / "examples/onnx_generate.py"

KINDS: dict[str, dict[str, Any]] = {
    "tva_default": SIZES,
    "mha": LLAMA | {"mha": {"num_kv_heads": 2, "qk_norm": True}, "tie_embeddings": False},
}


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Path]:
    """A run and its graph, of each attention."""
    folder = tmp_path_factory.mktemp("onnx")
    run = make_run(folder / "run", KINDS[request.param])
    assert quietly(export, run.path, "--format", "onnx", "--out", folder / "out") == 0
    return run, folder / "out"


class Session:
    """The graph, and a cache of no position."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
        self.inputs = {each.name: each.shape for each in self.session.get_inputs()}

    def empty(self, batch: int) -> list[Any]:
        shapes = [shape for name, shape in self.inputs.items() if name != "tokens"]
        return [np.zeros([{"batch": batch, "past": 0}.get(n, n) for n in shape], np.float32) for shape in shapes]

    def __call__(self, tokens: Tensor, past: list[Any]) -> tuple[Tensor, list[Any]]:
        values = dict(zip(self.inputs, [tokens.numpy(), *past], strict=True))
        found, *present = self.session.run(None, values)
        return torch.from_numpy(found), present


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 2), (3, 64), (1, 33)])
def test_a_full_pass(exported: tuple[RunFolder, Path], batch: int, length: int) -> None:
    run, folder = exported
    session, tokens = Session(folder), some_tokens(batch, length)
    found, _ = session(tokens, session.empty(batch))
    wanted = logits(run, tokens)
    assert wanted.std() > 0.5, "weights so small that nothing shows"
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("batch", "stretches"), [(1, (1,) * 12), (2, (2, 1, 1, 1)), (3, (7, 5, 1, 1)), (1, (1, 2, 3))])
def test_decoding(exported: tuple[RunFolder, Path], batch: int, stretches: tuple[int, ...]) -> None:
    run, folder = exported
    session, tokens = Session(folder), some_tokens(batch, sum(stretches))
    past, found = session.empty(batch), []
    for new in tokens.split(stretches, 1):
        part, past = session(new, past)
        found.append(part)
    torch.testing.assert_close(torch.cat(found, 1), logits(run, tokens), rtol=0, atol=1e-4)


def test_the_cache_is_as_small_as_the_layers_own(exported: tuple[RunFolder, Path]) -> None:
    _, folder = exported
    session = Session(folder)
    _, past = session(some_tokens(2, 9), session.empty(2))
    shapes = {name: list(array.shape) for name, array in zip(list(session.inputs)[1:], past, strict=True)}
    if "past.0.vein" in shapes:
        assert shapes["past.0.vein"] == [2, 9, 8]
        assert shapes["past.0.recent"] == [2, 2, 8]
    else:
        assert shapes["past.0.keys"] == shapes["past.1.values"] == [2, 9, 2, 8]
    assert len(shapes) == 4


def test_nothing_in_it_says_where_it_was_made(exported: tuple[RunFolder, Path]) -> None:
    _, folder = exported
    here = str(Path(onnx_export.__file__).parent).encode()
    assert not any(here in path.read_bytes() for path in folder.iterdir())
    assert str(folder.parent) not in (folder / "export.json").read_text()


def test_the_command_has_measured_it(exported: tuple[RunFolder, Path]) -> None:
    _, folder = exported
    manifest = json.loads((folder / "export.json").read_text())
    assert manifest["differences"].keys() == {"full pass", "decoding with a cache"}
    assert all(difference < 1e-4 for difference in manifest["differences"].values())
    assert manifest["inputs"] == list(Session(folder).inputs)


def test_the_example_writes_what_apt_generate_writes(exported: tuple[RunFolder, Path]) -> None:
    if not EXAMPLE.is_file():
        pytest.skip("the examples are in the repository alone")
    run, folder = exported
    command = [sys.executable, str(EXAMPLE), str(folder), "To be", "20"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    stream = Generator.from_run(run, device="cpu").stream("To be", max_new_tokens=20, temperature=0)
    wanted = "".join(["To be", *stream])
    assert done.stdout.removesuffix("\n").startswith(wanted)  # which ends at the end of a document, if there is one


class Written:
    """In the place of what `torch.onnx.export` returns, which takes seconds to make."""

    model = SimpleNamespace(graph=SimpleNamespace(all_nodes=tuple))

    def save(self, path: str, external_data: bool) -> None:
        Path(path).touch()


def test_a_difference_is_refused(exported: tuple[RunFolder, Path], tmp_path: Path, monkeypatch: Any) -> None:
    run, folder = exported
    right = onnx_export._session

    def wrong(path: Path, *names: list[str]) -> Any:
        real = right(folder / "model.onnx", *names)
        return lambda tokens, past: [tensor * 1.001 for tensor in real(tokens, past)]

    monkeypatch.setattr(onnx_export, "_session", wrong)
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Written())
    with pytest.raises(ProviderError, match=r"off by .*full pass"):
        export(run.path, "--format", "onnx", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_a_cache_it_is_a_full_pass_alone(tmp_path: Path, monkeypatch: Any) -> None:
    run = make_run(tmp_path / "run", SIZES)
    given: dict[str, Any] = {}

    def record(module: torch.nn.Module, arguments: tuple[Tensor, ...], **options: Any) -> Written:
        given.update(options, logits=module(*arguments))
        return Written()

    monkeypatch.setattr(onnx_export, "cache_tensors", lambda model: None)
    monkeypatch.setattr(onnx_export, "_session", lambda *_: lambda tokens, past: [logits(run, tokens)])
    monkeypatch.setattr(torch.onnx, "export", record)
    with pytest.warns(AptWarning, match="no cache that ONNX can carry"):
        export(run.path, "--format", "onnx", "--out", tmp_path / "out")
    assert (given["input_names"], given["output_names"]) == (["tokens"], ["logits"])
    assert given["logits"].shape == (2, 3, 256)
    differences = json.loads((tmp_path / "out/export.json").read_text())["differences"]
    assert differences.keys() == {"full pass"}


def test_learned_positions_go_on_up_to_the_last_one_and_large_weights_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(onnx_export, "ONE_FILE", 0)
    run = make_run(tmp_path / "run", SIZES | {"num_layers": 1, "positions": "learned", "max_seq_len": 16})
    export(run.path, "--format", "onnx", "--out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/export.json").read_text())
    assert manifest["files"]["model.onnx.data"]["bytes"] > manifest["files"]["model.onnx"]["bytes"]
    session, tokens = Session(tmp_path / "out"), some_tokens(1, 16)
    first, past = session(tokens[:, :11], session.empty(1))
    second, past = session(tokens[:, 11:], past)
    torch.testing.assert_close(torch.cat((first, second), 1), logits(run, tokens), rtol=0, atol=1e-4)
    _, past = session(tokens[:, :15], session.empty(1))
    for length in (2, 3):
        with pytest.raises(Exception, match=r"out of data bounds"):
            session(tokens[:, :length], past)
