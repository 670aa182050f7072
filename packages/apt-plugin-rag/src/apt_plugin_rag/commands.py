"""`apt rag index`, `apt rag query`, `apt rag info`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import textwrap
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from apt.api import AptWarning, ConfigError, DataError
from apt_plugin_rag.folder import is_store
from apt_plugin_rag.passages import SUFFIXES, cut_file, find_files, read
from apt_plugin_rag.plugin import whole_number
from apt_plugin_rag.store import Store, open_store

DEFAULT = "bm25"

SHOWN = 6
"""Lines of a passage that are shown."""


def configure(parser: argparse.ArgumentParser) -> None:
    """The actions and their arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="index|query|info")

    what = "index files and folders of text; what is unchanged since the last time is not indexed again"
    index = actions.add_parser("index", help=what, description=_sentence(what))
    index.add_argument("paths", nargs="+", metavar="PATH", help=f"a file, or a folder with {', '.join(SUFFIXES)}")
    _add_store(index)
    index.add_argument("--retriever", metavar="R", help=f"bm25, dense, hybrid or knn_lm ({DEFAULT}, or the store's)")
    index.add_argument(
        "--model", metavar="DIR", help="embeddings of sentence-transformers or model2vec, for dense and hybrid"
    )
    index.add_argument("--run", metavar="RUN", help="the run whose hidden states are kept, for knn_lm")
    index.add_argument("--passage-words", type=whole_number, metavar="N", help="most words of a passage (100)")
    index.add_argument("--language", metavar="L", help="whose stems, for bm25, dense and hybrid (english)")
    index.add_argument("--text-field", default="text", metavar="F", help="the field of .jsonl (%(default)s)")
    index.set_defaults(run_rag=run_index)

    what = "show the passages that answer a query best"
    query = actions.add_parser("query", help=what, description=_sentence(what))
    query.add_argument("query", metavar="QUERY", help="what is sought")
    _add_store(query)
    query.add_argument("-k", type=whole_number, default=5, metavar="N", help="passages to show (%(default)s)")
    query.add_argument("--model", metavar="DIR", help="where the store's embedding model lies now")
    query.add_argument("--run", metavar="RUN", help="where the run of a knn_lm store lies now")
    query.add_argument("--json", action="store_true", help="print JSON")
    query.set_defaults(run_rag=run_query)

    what = "say what a store holds, and check that it is whole"
    info = actions.add_parser("info", help=what, description=_sentence(what))
    _add_store(info)
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run_rag=run_info)


def run_index(args: argparse.Namespace) -> int:
    """Bring a store up to date with files and folders."""
    started = time.monotonic()
    given = {name: getattr(args, name) for name in ("model", "run", "passage_words", "language")}
    retriever = open_retriever(
        args.store, args.retriever, create=True, **{name: value for name, value in given.items() if value is not None}
    )
    retriever.check()
    known = retriever.store.documents()
    paths = [Path(path).absolute() for path in args.paths]
    # A path that is gone takes its documents with it.
    gone = [path for path in paths if not path.exists() and any(_is_under(name, [path]) for name in known)]
    files, left_out = find_files((path for path in paths if path not in gone), skip=is_store)
    removed = {name for name in known if _is_under(name, paths)} - set(map(str, files))
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(SHOWN))
        warnings.warn(f"files that are not {', '.join(SUFFIXES)} are left out: {kinds}", AptWarning, stacklevel=2)

    counts: Counter[str] = Counter(removed=len(removed))
    changed = []
    with _Progress(len(files)) as progress:
        for number, path in enumerate(files, start=1):
            text, sha256 = read(path)
            progress.read(number)
            what = "unchanged" if known.get(str(path)) == sha256 else "changed" if str(path) in known else "new"
            if what != "unchanged":
                passages = cut_file(path, text, retriever.config.passage_words, args.text_field)
                what = what if passages else "empty"
                changed.append((str(path), sha256, passages))
            counts[what] += 1
        total = sum(len(passages) for _, _, passages in changed)
        if not known and not total:
            where = ", ".join(args.paths)
            raise DataError(f"there is no text to index in {where}", hint=f"give {', '.join(SUFFIXES)} files with text")
        if changed or removed:
            progress.start(total)
            retriever.update(removed, changed, progress.indexed)
    size = retriever.store.size()
    said = [f"{counts[what]:,} {what}" for what in ("new", "changed", "removed", "unchanged")]
    said += [f"{counts['empty']:,} empty"] if counts["empty"] else []
    print(f"{', '.join(said)} files in {time.monotonic() - started:.1f} s")
    print(f"{retriever.get_name()} store {retriever.store.where}: {_describe(size)}")
    return 0


def run_query(args: argparse.Namespace) -> int:
    """Show the best passages."""
    given = {name: getattr(args, name) for name in ("model", "run") if getattr(args, name) is not None}
    retriever = open_retriever(args.store, **given)
    found = retriever.retrieve(args.query, args.k)
    if args.json:
        print(json.dumps([{"source": p.source, "score": p.score, "text": p.text} for p in found]))
        return 0
    for rank, passage in enumerate(found, start=1):
        lines = textwrap.wrap(_printable(" ".join(passage.text.split())), 100)
        shown = lines[:SHOWN] + (["..."] if len(lines) > SHOWN else [])
        print(f"{rank}. {_printable(passage.source)}  ({passage.score:.4f})")
        print(textwrap.indent("\n".join(shown), "   "))
    print(f"{len(found)} of {retriever.store.size().passages:,} passages")
    return 0


def run_info(args: argparse.Namespace) -> int:
    """Say what a store holds."""
    store = open_store(args.store)
    manifest, size = store.manifest, store.size()
    assert manifest is not None
    data: dict[str, Any] = {
        "store": store.where,
        "retriever": f"{manifest.retriever} {manifest.version}",
        **size._asdict(),
        "settings": manifest.settings,
        "embeddings": manifest.embeddings,
    }
    if args.json:
        print(json.dumps(data))
        return 0
    data["settings"] = ", ".join(f"{name} {value}" for name, value in manifest.settings.items())
    data["embeddings"] = "{kind} {model}".format(**manifest.embeddings) if manifest.embeddings else "none of a model"
    width = max(map(len, data))
    for name, value in data.items():
        print(f"{name:<{width}}  {value:,}" if isinstance(value, int) else f"{name:<{width}}  {value}")
    return 0


def open_retriever(where: str, name: str | None = None, *, create: bool = False, **settings: Any) -> Any:
    """The retriever of a store, with the store's own settings where none are given.

    Args:
        where: the store.
        name: which retriever it must be; the store's own if None.
        create: whether the store may be new.

    Raises:
        ConfigError: a setting is not one of that retriever.
        DataError: there is no store, or it is damaged.
        ProviderNotFoundError: no such retriever is installed.
    """
    from apt.api import registry
    from apt_plugin_rag.retrievers import StoredRetriever

    store: Store = open_store(where, create=create)
    manifest = store.manifest
    name = name or (manifest.retriever if manifest is not None else DEFAULT)
    claim = registry.find("retrieval", name).load()
    if not issubclass(claim, StoredRetriever):
        raise ConfigError(f"the retriever {name} keeps no store", hint="use bm25, dense, hybrid or knn_lm")
    known = claim.Config.model_fields
    if strange := [f"--{option.replace('_', '-')}" for option in settings if option not in known]:
        raise ConfigError(f"the retriever {name} has no {', '.join(strange)}", hint="leave it out")
    own: dict[str, Any] = {}
    if manifest is not None and manifest.retriever == name:
        own = dict(manifest.settings)
        source = manifest.embeddings or {}
        own |= {option: source["model"] for option in ("model", "run") if option in known and "model" in source}
    retriever: StoredRetriever = registry.get("retrieval", name, {**own, **settings, "store": where}, fallback=False)
    retriever.store = store
    return retriever


class _Progress:
    """A bar on a terminal, nothing elsewhere. Inside it Ctrl-C is an exception, which leaves the terminal and the store
    in order."""

    def __init__(self, files: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty())
        self._task = self._bar.add_task("reading", total=files)
        self._handler: Any = None

    def __enter__(self) -> _Progress:
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)

    def read(self, number: int) -> None:
        self._bar.update(self._task, completed=number)

    def start(self, passages: int) -> None:
        self._bar.update(self._task, description="indexing", completed=0, total=passages)

    def indexed(self, passages: int) -> None:
        self._bar.advance(self._task, passages)


def _describe(size: Any) -> str:
    counts = [(number, name) for name, number in size._asdict().items() if name != "dimensions"]
    parts = [f"{number:,} {name if number != 1 else name.removesuffix('s')}" for number, name in counts if number]
    return ", ".join(parts) + (f" of {size.dimensions} dimensions" if size.vectors else "") if parts else "empty"


def _printable(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _is_under(name: str, paths: list[Path]) -> bool:
    return any(Path(name).is_relative_to(path) for path in paths)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", required=True, metavar="STORE", help="a folder, or postgresql://USER@HOST/DATABASE#SCHEMA"
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
