"""The retrievers on the Cranfield collection: 1,400 abstracts, 225 queries and their relevance judgements.

    python benchmarks/retrieval.py --cranfield FOLDER --check

FOLDER (or the variable APT_CRANFIELD) holds cran.all.1400, cran.qry and cranqrel. Each abstract is one passage.
nDCG@10 with binary gain: codes 1 to 4 are relevant, -1 is not; the ideal is over all relevant abstracts, cut at 10.
Times are CPU time of one thread (OMP_NUM_THREADS=1), of a store in memory, and of one query at a time.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from apt.core.providers.retrieval import Passage
from apt_plugin_rag.retrievers import BM25Retriever, DenseRetriever, HybridRetriever

BM25_AT_LEAST = 0.38
CUT = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cranfield", type=Path, default=os.environ.get("APT_CRANFIELD"))
    parser.add_argument("--dimensions", type=int, default=100, help="of latent semantic indexing (%(default)s)")
    parser.add_argument("--language", default="english", help="whose stems; none for none (%(default)s)")
    parser.add_argument("--model", help="folder of an embedding model, in place of latent semantic indexing")
    parser.add_argument(
        "--check", action="store_true", help=f"exit 1 if bm25 is below {BM25_AT_LEAST} or hybrid not above both parts"
    )
    args = parser.parse_args()
    if args.cranfield is None:
        parser.error("name the folder of the collection: --cranfield FOLDER, or APT_CRANFIELD")
    passages = [Passage(text, name) for name, text in read(Path(args.cranfield, "cran.all.1400"))]
    queries = [text for _, text in read(Path(args.cranfield, "cran.qry"))]
    relevant = read_judgements(Path(args.cranfield, "cranqrel"))
    for library in ("bm25s", "sklearn.decomposition", "sklearn.feature_extraction.text"):
        importlib.import_module(library)  # so that importing them is in no figure
    print(f"{'':<22} {'nDCG@10':>8} {'index':>10} {'query':>10}")
    terms = {"language": args.language}
    vectors = {**terms, "model": args.model, "dimensions": args.dimensions}
    label = "model" if args.model else f"LSI {args.dimensions}"
    scores = {}
    for name, retriever in {
        "bm25": BM25Retriever(terms),
        f"dense ({label})": DenseRetriever(vectors),
        f"hybrid ({label})": HybridRetriever(vectors),
    }.items():
        started = time.process_time()
        retriever.add(passages)
        retriever.retrieve(queries[0])  # what is made at the first query belongs to the index
        indexed = time.process_time() - started
        found, seconds = [], []
        for query in queries:
            started = time.process_time()
            found.append([passage.source for passage in retriever.retrieve(query, CUT)])
            seconds.append(time.process_time() - started)
        scores[name] = score = statistics.fmean(
            ndcg(ranked, relevant[number]) for number, ranked in enumerate(found, start=1)
        )
        print(f"{name:<22} {score:>8.4f} {indexed:>8.2f} s {1e3 * statistics.median(seconds):>7.2f} ms")
    bm25, dense, hybrid = scores.values()
    return int(args.check and not (bm25 >= BM25_AT_LEAST and hybrid > max(bm25, dense)))


def ndcg(ranked: Sequence[str], relevant: Collection[str], cut: int = CUT) -> float:
    """Normalised discounted cumulative gain (Järvelin and Kekäläinen 2002) with gains of 0 and 1."""
    gain = sum(1 / math.log2(rank + 1) for rank, name in enumerate(ranked[:cut], start=1) if name in relevant)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(cut, len(relevant)) + 1))


def read(path: Path) -> list[tuple[str, str]]:
    """(number, text) of each document or query, numbered by their order."""
    records = re.split(r"^\.I .*\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [(str(number), record.partition(".W\n")[2]) for number, record in enumerate(records, start=1)]


def read_judgements(path: Path) -> dict[int, set[str]]:
    """{query: the numbers of what is relevant to it}."""
    relevant: dict[int, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        query, document, code = line.split()
        if int(code) >= 1:
            relevant.setdefault(int(query), set()).add(document)
    return relevant


if __name__ == "__main__":
    sys.exit(main())
