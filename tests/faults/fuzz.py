"""Every parser of ours that takes a file which a user may have from elsewhere, and files that are nearly right for it.

Real files are changed at random: bits, bytes, cuts, doubled and foreign pieces; and, where they hold JSON, values of
another type or size in any place. What comes out of the parser is a result or an `AptError`, in one line and promptly.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from apt.checkpoint.lock import (
    check_frozen,
    check_lock,
    read_lock,
    recorded_layouts,
    requirement_of_listener,
    requirements_of,
)
from apt.checkpoint.manifest import MANIFEST, SHARDED, STRUCTURE, seal
from apt.checkpoint.shards import WEIGHTS, write_shards
from apt.checkpoint.store import CheckpointStore, hashes
from apt.checkpoint.summary import summaries, tensors_of
from apt.cli.inspect import inspect_run
from apt.core.errors import AptError, AptWarning, CheckpointError, PluginError
from apt.core.profiles import parse_override, resolve
from apt.core.providers.dataset import Piece
from apt.core.providers.retrieval import Passage
from apt.core.runs import RunFolder
from apt.data.pairs import PairsDataset
from apt.data.sources import FilesDataset
from apt.data.token_store import load_or_tokenize
from apt.data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from apt.evaluation.answers import read_questions
from apt.inference.loading import load_run
from apt.testing.record import Record
from apt.testing.record import read as read_record
from apt.testing.record import write as write_record
from apt.training.metrics import MetricsFile
from apt.training.trainer import Trainer

SECONDS = 3.0
"""Of a core, for one file."""

VERSES = "".join(f"{number} green bottles hanging on the wall\n" for number in range(24))

CONFIG: dict[str, Any] = {
    "name": "fuzz",
    "plugins": [],
    "model": {"d_model": 8, "num_heads": 1, "num_layers": 1, "max_seq_len": 16},
    "training": {"max_epochs": 1, "max_steps": 2, "batch_size": 8, "log_every": 1},
    "hardware": {"device": "cpu"},
}


@dataclass(frozen=True)
class Parser:
    """Args:
    make: writes what is read into a folder, and returns the files of it that are to be changed.
    read: reads it.
    mend: makes a file's hashes fit what it holds now, so that what lies behind them is reached.
    """

    make: Callable[[Path], list[Path]]
    read: Callable[[Path], object]
    mend: Callable[[Path], None] | None = None


# What is read


def written(name: str, content: str | bytes) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return [folder / name]

    return make


def pieces_of(dataset: type[FilesDataset], name: str) -> Callable[[Path], object]:
    return lambda folder: list(dataset({"train_path": str(folder / name)}).pieces())


def profile(folder: Path) -> list[Path]:
    from apt.core.profiles import SHIPPED

    (folder / "p.yaml").write_text("extends: base.yaml\nmodel: {tva: {r: 4}, dropout: 0.1}\n")
    (folder / "base.yaml").write_bytes((SHIPPED / "gpt5_moe_reasoning.yaml").read_bytes())
    return [folder / "p.yaml", folder / "base.yaml"]


def token_cache(folder: Path) -> list[Path]:
    tokens(folder)
    return list(folder.glob("*.tokens"))


def tokens(folder: Path) -> None:
    """A cache is made again where it is damaged: what comes out is right in any case."""
    found = load_or_tokenize(folder, bytes(32), lambda: [Piece(VERSES)], ByteTokenizer())
    assert found.ids.tobytes() == VERSES.encode()


def parquet(folder: Path) -> list[Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": VERSES.splitlines(), "n": range(24)}), folder / "a.parquet")
    return [folder / "a.parquet"]


def own_tokenizer(folder: Path) -> list[Path]:
    CharTokenizer(VERSES).save(folder / "tokenizer.json")
    return [folder / "tokenizer.json"]


def library_tokenizer(folder: Path) -> list[Path]:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator([VERSES], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return [folder / "tokenizer.json"]


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    tokenizer.decode(tokenizer.encode("7 green bottles"))
    tokenizer.save(folder / "again.json")


def run(folder: Path) -> RunFolder:
    """A run of two steps."""
    data = {"train_path": str(folder / "text.txt"), "cache_dir": str(folder / "cache")}
    if not (folder / "run").exists():
        (folder / "text.txt").write_text(VERSES)
        Trainer({**CONFIG, "data": data}, quiet=True, run_dir=folder / "run").train()
    return RunFolder(folder / "run")


def files_of_run(*names: str) -> Callable[[Path], list[Path]]:
    return lambda folder: [path for name in names for path in run(folder).path.glob(name)]


def read_checkpoint(folder: Path) -> None:
    store = CheckpointStore(run(folder).checkpoints)
    store.load()
    store.load_weights()


def in_shards(folder: Path) -> list[Path]:
    """The last checkpoint of a run as several processes write theirs: in shards, here of one."""
    store = CheckpointStore(run(folder).checkpoints)
    snapshot = store.snapshot(store.load())
    place = store.folder / f"step-{snapshot.facts['step']:08d}"
    for path in place.iterdir():
        path.unlink()
    (place / STRUCTURE).write_bytes(snapshot.structure)
    tensors = {WEIGHTS + name: weight for name, weight in snapshot.weights.items()} | snapshot.tensors
    files = hashes(place, [STRUCTURE, *write_shards(tensors, place, 0, 1)])
    (place / MANIFEST).write_bytes(seal({**snapshot.facts, "format": SHARDED, "files": files}))
    return list(place.iterdir())


def look_at_checkpoint(folder: Path) -> None:
    for summary in summaries(run(folder).checkpoints):
        tensors_of(summary.folder)


def resume(folder: Path) -> None:
    profile = resolve(run(folder).profile, {"training.max_steps": 3})
    Trainer(profile, quiet=True, resume=run(folder)).train()


def compare_lock(folder: Path) -> None:
    lock = read_lock(run(folder).lock)
    recorded_layouts(lock), requirements_of(lock), requirement_of_listener(lock, "x")
    with suppress(CheckpointError):  # nothing is in effect here, and that is refused
        check_lock(lock, [])
    with suppress(PluginError):
        check_frozen(lock, run(folder).lock, [], [], [])


def seal_checkpoint(changed: Path) -> None:
    """Give a manifest the hash of itself, and those of the other files."""
    folder = changed.parent
    if not (folder / MANIFEST).exists():
        return
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        content.pop("sha256", None)
        if changed.name != MANIFEST:
            for name, facts in content["files"].items():
                data = (folder / name).read_bytes()
                facts |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / MANIFEST).write_bytes(seal(content))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return


def conformance(folder: Path) -> list[Path]:
    os.environ["APT_CACHE_DIR"] = str(folder / "own-cache")
    write_record(Record("ffn", "fuzz", None, "1", 3, 0, 0))
    return list((folder / "own-cache").rglob("ffn-fuzz.json"))


def read_conformance(folder: Path) -> None:
    record = read_record("ffn", "fuzz")
    assert record is None or record.summary("1")


def llama(folder: Path) -> list[Path]:
    """A folder as transformers saves it, in two shards."""
    from apt_plugin_quant.export.llama import Layout

    sizes = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    shapes = Layout(300, 8, 12, 1, 2, 1, tied=True).shapes()
    names = sorted(shapes)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: torch.zeros(shapes[name]) for name in held}, folder / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rope_scaling": None, **sizes, **heads}))
    library_tokenizer(folder)
    return [folder / name for name in (*shards, "model.safetensors.index.json", "config.json", "tokenizer.json")]


def import_llama(folder: Path) -> None:
    from apt_plugin_quant.export.hf_import import import_hf

    try:
        import_hf(folder, folder / "imported")
    finally:
        shutil.rmtree(folder / "imported", ignore_errors=True)


SETTINGS = {"language": "none", "dimensions": 2}


def store(folder: Path) -> list[Path]:
    """A store of passages, with both indices."""
    from apt_plugin_rag.retrievers import HybridRetriever

    passages = [Passage(f"{word} and {word}s", f"{word}:1") for word in ("bear", "bird", "bee", "fish")]
    HybridRetriever(SETTINGS | {"store": str(folder / "store")}).add(passages)
    return [path for path in (folder / "store").rglob("*") if path.is_file() and not path.name.startswith(".")]


def search(folder: Path) -> None:
    from apt_plugin_rag.retrievers import HybridRetriever

    HybridRetriever(SETTINGS | {"store": str(folder / "store")}).retrieve("a bear and a bird", 2)


def seal_store(changed: Path) -> None:
    manifest = next(parent / "manifest.json" for parent in changed.parents if (parent / "manifest.json").exists())
    try:
        content = json.loads(manifest.read_text())
        content.pop("sha256", None)
        if changed != manifest:
            name = changed.relative_to(manifest.parent / content["data"]).as_posix()
            content["files"][name] = changed.stat().st_size, hashlib.sha256(changed.read_bytes()).hexdigest()
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        manifest.write_text(json.dumps({**content, "sha256": digest}))
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return


def cut_passages(folder: Path) -> None:
    from apt_plugin_rag.passages import cut_file, read

    for path in folder.glob("notes.*"):
        cut_file(path, read(path)[0], 20)


RECORDS = "".join(json.dumps({"text": line, "n": n}) + "\n" for n, line in enumerate(VERSES.splitlines()))
PAIRS = "".join(json.dumps({"source": str(n), "target": str(n * n)}) + "\n" for n in range(9))
QUESTIONS = "".join(json.dumps({"prompt": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(9))

PARSERS: dict[str, Parser] = {
    "a profile, and one that it extends": Parser(profile, lambda folder: resolve(folder / "p.yaml")),
    "a value on the command line": Parser(
        written("value", "{experts: 8, top_k: [1, 2.5e-3], name: 'x'}"),
        lambda folder: parse_override("model.moe", (folder / "value").read_bytes().decode("utf-8", "surrogateescape")),
    ),
    ".txt": Parser(written("a.txt", VERSES), pieces_of(FilesDataset, "a.txt")),
    ".jsonl": Parser(written("a.jsonl", RECORDS), pieces_of(FilesDataset, "a.jsonl")),
    ".parquet": Parser(parquet, pieces_of(FilesDataset, "a.parquet")),
    "pairs in .jsonl": Parser(written("a.jsonl", PAIRS), pieces_of(PairsDataset, "a.jsonl")),
    "pairs in .tsv": Parser(written("a.tsv", "1\tone\n2\ttwo\n3\tthree\n"), pieces_of(PairsDataset, "a.tsv")),
    "questions": Parser(written("a.jsonl", QUESTIONS), lambda folder: read_questions(folder / "a.jsonl")),
    "cached tokens": Parser(token_cache, tokens),
    "a tokenizer of ours": Parser(own_tokenizer, use_tokenizer),
    "a tokenizer of the library": Parser(library_tokenizer, use_tokenizer),
    "a checkpoint": Parser(files_of_run("checkpoints/*/*"), read_checkpoint),
    "a checkpoint, hashed anew": Parser(files_of_run("checkpoints/*/*"), read_checkpoint, seal_checkpoint),
    "a checkpoint in shards, hashed anew": Parser(in_shards, read_checkpoint, seal_checkpoint),
    "a checkpoint to look at, hashed anew": Parser(
        files_of_run("checkpoints/*/*"), look_at_checkpoint, seal_checkpoint
    ),
    "plugins.lock.json": Parser(files_of_run("plugins.lock.json"), compare_lock),
    "metrics.jsonl": Parser(
        files_of_run("metrics.jsonl"), lambda folder: MetricsFile(run(folder).metrics, 2).on_training_end(None)
    ),
    "a run to look at": Parser(
        files_of_run("*.yaml", "*.json", "checkpoints/*/*"), lambda folder: inspect_run(run(folder)), seal_checkpoint
    ),
    "a run to use": Parser(
        files_of_run("*.yaml", "*.json", "checkpoints/*/*"),
        lambda folder: load_run(run(folder), device="cpu"), seal_checkpoint,
    ),
    "a run to resume": Parser(
        files_of_run("*.yaml", "*.json*", "checkpoints/*/*"), resume, seal_checkpoint
    ),
    "what a conformance check has left": Parser(conformance, read_conformance),
    "a folder of transformers": Parser(llama, import_llama),
    "a store of passages": Parser(store, search),
    "a store of passages, hashed anew": Parser(store, search, seal_store),
    "notes to index": Parser(written("notes.jsonl", RECORDS), cut_passages),
}  # fmt: skip
"""All of them, by name."""

SLOW = {"a run to resume"}
"""Takes ten times as long as the others."""


NEEDS = {".parquet": "pyarrow"} | dict.fromkeys((name for name in PARSERS if "store" in name), "bm25s")
"""What is read with a library that need not be installed."""


def can_be_read(name: str) -> bool:
    return name not in NEEDS or find_spec(NEEDS[name]) is not None


# How it is changed

ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -1e308, "", "x", "../x", "/dev/zero", "\0", "\ud800", "a" * 5000,
    [], {}, [[]], {"": None}, ["x"] * 50, {"$tensor": "x"}, {"$int": "z"}, {"$dict": [1]}, {"$bytes": "="}, {"$x": 1},
]  # fmt: skip

PIECES = [
    b"\0", b"\xff", b"\xed\xa0\x80", b"\n", b"\r", b"\t", b"'", b'"', b"[" * 2000, b"{" * 99, b"]", b"}", b":", b", ",
    b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"!!x ", b"&a ", b"*a", b"<<: ", b"\\ud800", b"\\", b"- ",
]  # fmt: skip


def changed(data: bytes, rng: random.Random) -> bytes:
    """One of the ways in which a file can be wrong."""
    if rng.random() < 0.5:
        line = rng.randrange(data.count(b"\n") + 1) if data.count(b"}\n") > 1 else None  # .jsonl
        lines = data.split(b"\n") if line is not None else [data]
        try:
            content = json.loads(lines[line or 0])
        except ValueError:
            pass
        else:
            lines[line or 0] = json.dumps(with_another_value(content, rng)).encode()
            return b"\n".join(lines)
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        # What comes first in a file says how the rest is read.
        at = rng.randrange(len(out) + 1) if rng.random() < 0.5 else rng.randrange(min(len(out), 200) + 1)
        match rng.randrange(6):
            case 0:
                out[at : at + 1] = bytes([out[at] ^ 1 << rng.randrange(8)]) if at < len(out) else b""
            case 1:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                out[at:at] = rng.choice(PIECES)
            case 3:
                del out[at : at + rng.choice([1, 4, 100])]
            case 4:
                out[at:at] = out[rng.randrange(len(out) + 1) :][: rng.choice([1, 20, 500])]
            case 5:
                del out[at:]
    return bytes(out)


def with_another_value(content: Any, rng: random.Random) -> Any:
    """The JSON value with one value in it that is odd, missing, or under another name."""
    places = list(places_in(content))
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    match rng.randrange(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(["x", "", "$tensor", "../x", key + "x"])] = holder.pop(key)
        case _:
            holder[key] = rng.choice(ODD)
    return content


def places_in(content: Any) -> Iterator[tuple[Any, Any]]:
    """(the dict or list, the key or index) of every value."""
    for key, value in (
        list(content.items()) if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    ):
        yield content, key
        yield from places_in(value)


# What comes out


def problems(parser: Parser, folder: Path, times: int, seed: object = 0) -> Iterator[str]:
    """What goes wrong with files changed so many times; "" for each that goes well."""
    rng = random.Random(str(seed))
    pristine, place = folder / "pristine", folder / "place"
    pristine.mkdir(parents=True)
    shutil.copytree(pristine, place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AptWarning)
        files = parser.make(place)
        parser.read(place)
        shutil.rmtree(pristine)
        shutil.copytree(place, pristine)
        for number in range(times):
            path = rng.choice(files)
            path.write_bytes(changed(path.read_bytes(), rng))
            if parser.mend is not None:
                parser.mend(path)
            kept = path.read_bytes()
            started = time.process_time()
            problem = ""
            try:
                parser.read(place)
            except AptError as error:
                if "\n" in error.message and path.suffix != ".yaml":
                    problem = f"more than one line: {error.message!r}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                frame = error.__traceback__
                while frame and frame.tb_next:
                    frame = frame.tb_next
                where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
                problem = f"{type(error).__name__} at {where}: {error}"
            seconds = time.process_time() - started
            if seconds > SECONDS:
                problem = problem or f"{seconds:.1f} s"
            yield f"{path.name}, change {number}: {problem[:300]}; {kept[:60]!r}..." if problem else ""
            shutil.rmtree(place)
            shutil.copytree(pristine, place)
