"""What APT loads of this package: the retrievers as import strings, the command `apt rag`, and `--retrieve`.

Nothing here imports torch or scikit-learn: what a call needs is imported when it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apt.hookspecs import hookimpl

if TYPE_CHECKING:
    import argparse

API_VERSION = (1, 0)


@hookimpl
def apt_register_providers(registry: Any) -> None:
    for name, where in {
        "bm25": "retrievers:BM25Retriever",
        "dense": "retrievers:DenseRetriever",
        "hybrid": "retrievers:HybridRetriever",
        "knn_lm": "knn_lm:KNNRetriever",
    }.items():
        registry.register("retrieval", name, f"apt_plugin_rag.{where}", version="1.0.0")


@hookimpl
def apt_register_commands(commands: Any) -> None:
    def configure(parser: argparse.ArgumentParser) -> None:
        from apt_plugin_rag.commands import configure

        configure(parser)

    def run(args: argparse.Namespace) -> int:
        code: int = args.run_rag(args)
        return code

    commands.add("rag", "index texts and search them", configure, run)


@hookimpl
def apt_register_options(command: str, options: Any) -> None:
    if command not in ("generate", "chat"):
        return
    options.add_argument(
        "--retrieve",
        metavar="STORE",
        help="generate from what `apt rag index` has put into STORE, and name the sources",
    )
    options.add_argument(
        "--retrieve-k", type=whole_number, metavar="N", help="passages to read (3), of any store but knn_lm"
    )
    options.add_argument(
        "--knn-lambda", type=_share, metavar="L", help="share of the datastore in each prediction, for a knn_lm store"
    )
    options.add_argument(
        "--knn-temperature", type=_positive, metavar="T", help="how evenly neighbours count, for a knn_lm store"
    )


@hookimpl
def on_generation_start(prompt: str, generator: Any) -> str | None:
    # Any of them, so that one without --retrieve is not passed over in silence.
    given = ("retrieve", "retrieve_k", "knn_lambda", "knn_temperature")
    if all(getattr(generator.options, name, None) is None for name in given):
        return None
    from apt_plugin_rag.generation import start

    return start(prompt, generator)


@hookimpl
def on_next_token(logits: Any, generator: Any) -> Any:
    if getattr(generator.options, "retrieve", None) is None:
        return None
    from apt_plugin_rag.generation import next_token

    return next_token(logits, generator)


def whole_number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise _wrong(f"expected a whole number, at least 1, got {text!r}")
    return int(text)


def _share(text: str) -> float:
    if (number := _positive(text)) >= 1:
        raise _wrong(f"expected a number between 0 and 1, got {text!r}")
    return number


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise _wrong(f"expected a number above 0, got {text!r}")
    return number


def _wrong(text: str) -> Exception:
    from argparse import ArgumentTypeError

    return ArgumentTypeError(text)
