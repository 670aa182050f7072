"""The sections of core's datasets."""

from __future__ import annotations

from apt.core.config import PositiveInt, Section


class FilesConfig(Section):
    """Which files, and where the text lies in them."""

    train_path: str
    """A .txt, .jsonl or .parquet file, or a folder of them, read with its subfolders in order of their names."""
    text_field: str = "text"
    """The field or column of .jsonl and .parquet that holds the text."""


class PairsConfig(Section):
    """Which files, and where source and target lie in them."""

    train_path: str
    """A .jsonl, .txt or .tsv file, or a folder of them, read with its subfolders in order of their names."""
    source_field: str = "source"
    """The field of .jsonl that holds the source."""
    target_field: str = "target"
    """The field of .jsonl that holds the target."""


class StdlibConfig(Section):
    """How much of the standard library."""

    max_bytes: PositiveInt | None = None
    """At most so many bytes, in whole files; all files if left out."""
    tests: bool = False
    """Whether to read the standard library's tests as well."""
