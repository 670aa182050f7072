"""Folders from elsewhere that are made to do harm: models to import, runs, stores of passages, and names of plugins.

APT unpacks no archive; what it takes from others are folders, and in them files that name other files. Each is refused
in one line, and outside of what the caller has named not a byte is other than before.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import fuzz
import torch
from hostile import Result

from apt.checkpoint.manifest import MANIFEST, seal
from apt.core.errors import AptError, AptWarning
from apt.inference.loading import load_run

INDEX, SHARD = "model.safetensors.index.json", "a.safetensors"

Case = tuple[Callable[[Path], object], Callable[[Path], object], str]
"""(what makes a folder whole and then spoils it, what reads it, what is said)."""


# Models to import


def model(spoil: Callable[[Path], object]) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        fuzz.llama(folder)
        spoil(folder)

    return make


def edited(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def shard_is(name: str) -> Callable[[Path], object]:
    """The index says that a shard lies at `name`."""
    return edited(INDEX, lambda text: text.replace(SHARD, name))


def config_is(**sizes: object) -> Callable[[Path], object]:
    return edited("config.json", lambda text: json.dumps(json.loads(text) | sizes))


def linked(name: str) -> Callable[[Path], object]:
    """A file is a link to one outside."""

    def spoil(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside" / name)
        (folder / name).symlink_to(folder.parent / "outside" / name)

    return spoil


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return spoil


def with_header(header: dict[str, object] | bytes, size: int) -> Callable[[Path], object]:
    """A file of safetensors with this header, and `size` bytes of zeros behind it that take no room on the disk."""

    def make(path: Path) -> None:
        data = header if isinstance(header, bytes) else json.dumps(header).encode()
        with open(path, "wb") as file:
            file.write(len(data).to_bytes(8, "little") + data)
            file.truncate(8 + len(data) + size)

    return make


def twice(path: Path) -> None:
    """Two tensors of one name."""
    one = '"model.norm.weight": {"dtype": "F32", "shape": [8], "data_offsets": [%d, %d]}'
    with_header(f"{{{one % (0, 32)}, {one % (32, 64)}}}".encode(), 64)(path)


def larger_than_memory(folder: Path) -> None:
    """Weights of 275 GB in a file that takes none on the disk."""
    from apt_plugin_quant.export.llama import Layout

    vocabulary, width = 2**24, 4096
    config_is(vocab_size=vocabulary, hidden_size=width)(folder)
    header: dict[str, object] = {}
    end = 0
    for name, shape in Layout(vocabulary, width, 12, 1, 2, 1, tied=True).shapes().items():
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(header, SHARD)}))
    with_header(header, end)(folder / SHARD)


def import_model(folder: Path) -> None:
    from apt_plugin_quant.export.hf_import import import_hf

    import_hf(folder, folder.parent / "out")


# Runs, stores, names


def checkpoint_names(name: str) -> Callable[[Path], object]:
    """A manifest, with the right hash of itself, names a file elsewhere."""

    def make(folder: Path) -> None:
        [path, *_] = fuzz.run(folder).checkpoints.glob(f"*/{MANIFEST}")
        content = json.loads(path.read_bytes())
        del content["sha256"]
        content["files"][name] = {"bytes": 6, "sha256": "0" * 64}
        path.write_bytes(seal(content))

    return make


def run_with(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: replaced(name, make)(fuzz.run(folder).path)


def store_names(key: str, name: str) -> Callable[[Path], object]:
    """Likewise the manifest of a store of passages."""

    def make(folder: Path) -> None:
        fuzz.store(folder)
        path = folder / "store/manifest.json"
        content = json.loads(path.read_text())
        if key == "files":
            content["files"][name] = content["files"].pop("passages.jsonl")
        else:
            content[key] = name
        path.write_text(json.dumps(content))
        fuzz.seal_store(path)

    return make


def open_run(folder: Path) -> None:
    load_run(fuzz.run(folder), device="cpu")


def embeddings(kind: str, name: str) -> Callable[[Path], object]:
    """A model of sentence-transformers with a module of this class, and a file of this name."""

    def make(folder: Path) -> None:
        (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]))
        (folder / name).write_text("open('../outside/ran', 'w')\n")

    return make


def embed(folder: Path) -> None:
    from apt_plugin_rag.embeddings import Embedder

    Embedder(str(folder))


def new_plugin(name: str) -> Callable[[Path], object]:
    def call(folder: Path) -> None:
        from apt.cli.scaffold import names_of, write_plugin

        names = names_of(name)
        write_plugin(names, "ffn", folder / names.distribution)

    return call


def nothing(folder: Path) -> None:
    return None


PIPE, ZERO = os.mkfifo, lambda path: path.symlink_to("/dev/zero")

CASES: dict[str, Case] = {
    "a shard at ../": (model(shard_is("../outside/secret")), import_model, "which is no file of this folder"),
    "a shard at an absolute path": (model(shard_is("/etc/passwd")), import_model, "which is no file of this folder"),
    "a shard in a folder below": (model(shard_is("b/a.safetensors")), import_model, "which is no file of this folder"),
    "a shard that is not there": (model(shard_is("c.safetensors")), import_model, "c.safetensors cannot be read"),
    "a shard that is a link": (model(linked(SHARD)), import_model, f"{SHARD} is a link that leads out"),
    "an index that is a link": (model(linked(INDEX)), import_model, f"{INDEX} is a link that leads out"),
    "a config that is a link": (model(linked("config.json")), import_model, "config.json is a link that leads out"),
    "a tokenizer that is a link": (model(linked("tokenizer.json")), import_model, "tokenizer.json is a link"),
    "a shard that is a pipe": (model(replaced(SHARD, PIPE)), import_model, f"{SHARD} is no file"),
    "a config that is a device": (model(replaced("config.json", ZERO)), import_model, "is a link that leads out"),
    "a shard named twice": (
        model(edited(INDEX, lambda text: text.replace("{", '{"weight_map": {},', 1))), import_model, "is given twice",
    ),
    "a size given twice": (
        model(edited("config.json", lambda text: text.replace("{", '{"vocab_size": 1,', 1))), import_model,
        "the key 'vocab_size' is given twice",
    ),
    "a tensor held twice": (model(replaced(SHARD, twice)), import_model, "cannot be read"),
    "a header of 2^60 bytes": (
        model(replaced(SHARD, lambda path: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"))), import_model,
        "cannot be read",
    ),
    "a config of 1 GB": (
        model(lambda folder: os.truncate(folder / "config.json", 1 << 30)), import_model, "larger than 64 MiB",
    ),
    "655 million experts": (
        model(config_is(model_type="mixtral", num_local_experts=65536, num_hidden_layers=10000)), import_model,
        "lacks most of the model",
    ),
    "weights of 275 GB": (model(larger_than_memory), import_model, "GB to read"),
    "a checkpoint that names ../": (checkpoint_names("../../../outside/secret"), open_run, "manifest.json is damaged"),
    "a checkpoint that names an absolute path": (checkpoint_names("/etc/passwd"), open_run, "manifest.json is damaged"),
    "a run whose lock is a pipe": (run_with("plugins.lock.json", PIPE), open_run, "it is a pipe or a device"),
    "a run whose tokenizer is a device": (run_with("tokenizer.json", ZERO), open_run, "it is a pipe or a device"),
    "a store that lies at ../": (store_names("data", "../../outside"), fuzz.search, "which is no file of the store"),
    "a store that lies elsewhere": (store_names("data", "/etc"), fuzz.search, "which is no file of the store"),
    "a store that names ../": (store_names("files", "../../../outside/secret"), fuzz.search, "which is no file of"),
    "a model of embeddings that brings code": (
        embeddings("evil.Evil", "evil.py"), embed, "names 'evil.Evil', which is no module of sentence-transformers",
    ),
    "a model of embeddings that is a pickle": (
        embeddings("sentence_transformers.models.Transformer", "pytorch_model.bin"), embed, "is a pickle",
    ),
    "a plugin called ../x": (nothing, new_plugin("../outside/x"), "cannot be the name of a package"),
    "a plugin called /x": (nothing, new_plugin("/tmp/x"), "cannot be the name of a package"),
    "a plugin called ..": (nothing, new_plugin(".."), "cannot be the name of a package"),
}  # fmt: skip


def problem_of(case: str, root: Path) -> str:
    """What is wrong with how a folder is refused; "" if nothing is."""
    make, read, says = CASES[case]
    folder, outside = root / "folder", root / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text("secret")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AptWarning)
        make(folder)
        before = everything(root)
        try:
            read(folder)
        except AptError as error:
            said = error.message
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        else:
            return "it is not refused"
    if says not in said or "\n" in said:
        return f"it says {said!r}"
    changed = everything(root) ^ before
    return f"something is left, or changed: {sorted(changed)[:3]}" if changed else ""


def everything(root: Path) -> set[tuple[str, int, int]]:
    """(path, size, time of the last change) of all files below `root`, but for the caches of a run."""
    found = set()
    for path in root.rglob("*"):
        if not path.is_dir() and "cache" not in path.parts:
            status = path.lstat()
            found.add((str(path), status.st_size, status.st_mtime_ns))
    return found


def folders(root: Path) -> tuple[str, list[Result]]:
    """Every case."""
    results = [(case, problem_of(case, root / str(number))) for number, case in enumerate(CASES)]
    return "hostile folders: refused, and nothing changed outside", results
