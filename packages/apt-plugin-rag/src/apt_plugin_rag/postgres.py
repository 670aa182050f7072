"""A store on a PostgreSQL server with pgvector, for those who outgrow a folder.

Everything lies in one schema of a database. A change is one transaction. BM25 is computed by the server from the terms'
counts, and the nearest vectors are found by pgvector, exactly unless somebody creates an index on `vectors.embedding`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, LiteralString
from urllib.parse import urldefrag, urlsplit

import numpy as np
from numpy.typing import NDArray

from apt.api import ConfigError, DataError, ProviderError
from apt.core.providers.retrieval import Passage
from apt_plugin_rag.contents import Document, Fit, Floats, TermCounts, Vectors
from apt_plugin_rag.store import Manifest, Neighbours, Size, Store, damaged, missing

if TYPE_CHECKING:
    import psycopg

SCHEMA = "apt_rag"

TABLES: tuple[LiteralString, ...] = (
    "create table manifest (content jsonb not null)",
    "create table documents (id bigint generated always as identity primary key, name text not null unique,"
    " sha256 text not null)",
    "create table passages (id bigint generated always as identity primary key,"
    " document bigint not null references documents on delete cascade, source text not null, text text not null,"
    " length int not null)",
    "create index on passages (document)",
    "create table terms (term text not null, passage bigint not null references passages on delete cascade,"
    " count int not null, primary key (term, passage))",
    "create index on terms (passage)",
    "create table vectors (id bigint generated always as identity primary key,"
    " passage bigint not null references passages on delete cascade, value bigint not null, embedding vector not null)",
    "create index on vectors (passage)",
    "create table arrays (name text primary key, dtype text not null, shape int[] not null, data bytea not null)",
)

ORDER: LiteralString = 'documents.name collate "C", passages.id'
"""The order of the passages, the same as in a folder."""

BM25: LiteralString = """
    with query as (select term, count(*) as weight from unnest(%(terms)s::text[]) as term group by term),
    whole as (select count(*)::float8 as size, avg(length)::float8 as length from passages),
    frequency as (select term, count(*)::float8 as n from terms where term = any(%(terms)s::text[]) group by term)
    select passages.id, sum(
        query.weight * ln(1 + (whole.size - frequency.n + 0.5) / (frequency.n + 0.5)) * terms.count
        / (terms.count + %(k1)s::float8 * (1 - %(b)s::float8 + %(b)s::float8 * passages.length / whole.length))
    ) as score
    from query join frequency using (term) join terms using (term)
    join passages on passages.id = terms.passage join documents on documents.id = passages.document cross join whole
    group by passages.id, documents.name
    order by score desc, """


class PostgresStore(Store):
    """A store in one schema of a PostgreSQL database.

    Args:
        address: postgresql://USER@HOST/DATABASE, and #SCHEMA for another schema than apt_rag.
        create: whether it may be new.

    Raises:
        ProviderError: psycopg or pgvector is not installed here, or the server lacks the extension.
        DataError: the server cannot be reached, or holds no such store.
    """

    def __init__(self, address: str, *, create: bool = False) -> None:
        url, schema = urldefrag(address)
        parts = urlsplit(url)
        self.where = address.replace(f":{parts.password}@", ":***@") if parts.password else address
        self._schema = schema or SCHEMA
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", self._schema):
            raise ConfigError(
                f"{self._schema!r} is not the name of a schema", hint="use lower-case letters, digits and _"
            )
        try:
            import psycopg
            from pgvector.psycopg import register_vector
        except ImportError as error:
            raise ProviderError(
                f"a store on a server needs psycopg and pgvector ({error})",
                hint='pip install "apt-plugin-rag[postgres]"',
            ) from error
        self._errors: Any = psycopg
        with self._told():
            self._connection: psycopg.Connection[Any] = psycopg.connect(url, autocommit=True, connect_timeout=10)
            there = self._one("select to_regclass(%s)", f"{self._schema}.manifest") is not None
            if not there and not create:
                raise missing(self.where)
            if self._one("select true from pg_extension where extname = 'vector'") is None:
                self._connection.execute("create extension if not exists vector")
            register_vector(self._connection)
            self._connection.execute("select set_config('search_path', %s, false)", [f"{self._schema}, public"])
        content = self._one("select content from manifest") if there else None
        self._manifest = Manifest.from_json(content, self.where) if content is not None else None

    @property
    def manifest(self) -> Manifest | None:
        return self._manifest

    def documents(self) -> Mapping[str, str]:
        return dict(self._all("select name, sha256 from documents")) if self._manifest is not None else {}

    def size(self) -> Size:
        if self._manifest is None:
            return Size(0, 0, 0, 0, 0)
        row = self._all(
            "select (select count(*) from documents), (select count(*) from passages),"
            " (select count(distinct term) from terms), (select count(*) from vectors),"
            " coalesce((select vector_dims(embedding) from vectors limit 1), 0)"
        )[0]
        return Size(*row)

    def update(
        self, manifest: Manifest, removed: Collection[str], added: Iterable[Document], fit: Fit | None = None
    ) -> None:
        from psycopg.types.json import Jsonb

        with self._told(), self._connection.transaction():
            if self._manifest is None:
                self._create()
            # Nobody else writes until this transaction ends; readers go on.
            self._connection.execute("lock table manifest in exclusive mode")
            added = list(added)
            names = [*removed, *(document.name for document in added)]
            self._connection.execute("delete from documents where name = any(%s)", [names])
            for document in added:
                self._insert(document)
            if fit is not None:
                self._fit(fit)
            self._connection.execute("delete from manifest")
            self._connection.execute("insert into manifest values (%s)", [Jsonb(manifest.to_json())])
        self._manifest = manifest

    def match(self, terms: Sequence[str], k: int, *, k1: float, b: float) -> list[tuple[int, float]]:
        if self._manifest is None or not terms:
            return []
        rows = self._all(BM25 + ORDER + " limit %(k)s", {"terms": list(terms), "k1": k1, "b": b, "k": k})
        return [(int(passage), float(score)) for passage, score in rows]

    def nearest(self, queries_QD: Floats, k: int) -> list[Neighbours]:
        found = []
        for query_D in queries_QD:
            rows = self._all(
                "select passage, value, embedding <-> %s as distance from vectors order by distance limit %s",
                [np.asarray(query_D, np.float32), k],
            ) if self._manifest is not None else []  # fmt: skip
            passages, values, distances = zip(*rows, strict=True) if rows else ((), (), ())
            found.append(
                Neighbours(
                    np.array(passages, np.int64), np.array(values, np.int64), np.square(np.array(distances, np.float32))
                )
            )
        return found

    def sample(self, count: int) -> Floats:
        step = max(1, -(-self.size().vectors // count))
        rows = self._all(
            "select embedding::real[] from"
            " (select embedding, row_number() over (order by id) - 1 as number from vectors) as every"
            " where number %% %s = 0", [step]
        ) if self._manifest is not None else []  # fmt: skip
        return np.array([row[0] for row in rows], np.float32).reshape(len(rows), -1)

    def read(self, ids: Sequence[int]) -> list[Passage]:
        rows = self._all("select id, text, source from passages where id = any(%s)", [list(ids)]) if ids else []
        found = {number: Passage(text, source) for number, text, source in rows}
        return [found[number] for number in ids]

    def array(self, name: str) -> NDArray[Any] | None:
        rows = (
            self._all("select dtype, shape, data from arrays where name = %s", [name])
            if self._manifest is not None
            else []
        )
        if not rows:
            return None
        dtype, shape, data = rows[0]
        return np.frombuffer(data, np.dtype(dtype)).reshape(shape)

    def close(self) -> None:
        self._connection.close()

    def _create(self) -> None:
        from psycopg import sql

        self._connection.execute(sql.SQL("create schema if not exists {}").format(sql.Identifier(self._schema)))
        for table in TABLES:
            self._connection.execute(table)

    def _insert(self, document: Document) -> None:
        number = self._one("insert into documents (name, sha256) values (%s, %s) returning id", document.name,
                           document.sha256)  # fmt: skip
        lengths = [0] * len(document.passages)
        if document.terms is not None:
            lengths = [sum(counts.values()) for counts in document.terms]
        with self._connection.cursor() as cursor:
            cursor.execute(
                "insert into passages (document, source, text, length)"
                " select %s, * from unnest(%s::text[], %s::text[], %s::int[]) returning id",
                [number, [p.source for p in document.passages], [p.text for p in document.passages], lengths],
            )
            ids = sorted(row[0] for row in cursor)
            if document.terms is not None:
                with cursor.copy("copy terms (term, passage, count) from stdin") as copy:
                    for passage_id, counts in zip(ids, document.terms, strict=True):
                        for term, count in counts.items():
                            copy.write_row((term, passage_id, count))
        if document.vectors is not None:
            self._insert_vectors(document.vectors, ids)

    def _insert_vectors(self, vectors: Vectors, ids: Sequence[int]) -> None:
        if self._one("select true from vectors limit 1") is None:
            from psycopg import sql

            # A column with a fixed number of dimensions can have an index.
            width = sql.Literal(vectors.points.shape[1])
            self._connection.execute(
                sql.SQL("alter table vectors alter column embedding type vector({})").format(width)
            )
        with (
            self._connection.cursor() as cursor,
            cursor.copy("copy vectors (passage, value, embedding) from stdin (format binary)") as copy,
        ):
            copy.set_types(["int8", "int8", "vector"])
            for owner, value, point in zip(
                vectors.owners.tolist(), vectors.values.tolist(), vectors.points, strict=True
            ):
                copy.write_row((ids[owner], value, point))

    def _fit(self, fit: Fit) -> None:
        """Make all vectors anew out of the terms of all passages."""
        ids = [row[0] for row in self._all(
            "select passages.id from passages join documents on documents.id = passages.document order by " + ORDER
        )]  # fmt: skip
        rows = self._all("select passage, term, count from terms order by passage")
        counts = {
            passage: {term: count for _, term, count in own} for passage, own in groupby(rows, key=lambda row: row[0])
        }
        self._connection.execute("delete from vectors")
        self._connection.execute("delete from arrays")
        if counts:
            vectors, arrays = fit(TermCounts.of([counts.get(number, {}) for number in ids]))
            self._insert_vectors(vectors, ids)
            for name, array in arrays.items():
                row = [name, array.dtype.str, list(array.shape), array.tobytes()]
                self._connection.execute("insert into arrays values (%s, %s, %s, %s)", row)

    def _all(self, statement: LiteralString, values: Any = None) -> list[Any]:
        with self._told():
            return self._connection.execute(statement, values).fetchall()

    def _one(self, statement: LiteralString, *values: Any) -> Any:
        rows = self._all(statement, values)
        return rows[0][0] if rows else None

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the server has to say, in one line."""
        errors = self._errors.errors
        try:
            yield
        except errors.FeatureNotSupported as error:
            raise ProviderError(
                f"{self.where}: {_line(error)}", hint="install pgvector on the server, or keep the store in a folder"
            ) from error
        except errors.UndefinedTable as error:
            raise damaged(self.where, _line(error)) from error
        except errors.Error as error:
            raise DataError(
                f"the server of {self.where} refused: {_line(error)}", hint="check the address, and that it may be used"
            ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
