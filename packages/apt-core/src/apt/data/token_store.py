"""Tokens on disk: a dataset is tokenized once and memory-mapped from then on.

A file holds a header, the tokens, and where each document starts. It is named by a key that stands for the content of
the dataset and for the tokenizer: it never goes out of date, it only falls out of use.
"""

from __future__ import annotations

import errno
import os
import struct
import warnings
import zlib
from array import array
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from apt.core.cache import atomic_write
from apt.core.errors import AptWarning, DataError, ProviderError
from apt.core.providers.dataset import Piece
from apt.core.providers.tokenizer import Tokenizer

FORMAT_VERSION = 1

_MAGIC = b"APTTOKEN"
_HEADER = struct.Struct("<8sHHIQQ32s")
"""Magic, version, bytes per token, CRC-32 (of what follows the header, then of the header with 0 in its place),
tokens, documents, key."""

Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """A stretch of text as token ids."""

    ids: Ids
    """[n] uint8, uint16 or uint32, memory-mapped and read-only."""
    starts: npt.NDArray[np.int64]
    """[documents] where each document starts, ascending, the first at 0."""

    def __len__(self) -> int:
        return len(self.ids)

    def slice(self, start: int, stop: int) -> Tokens:
        """The tokens from `start` to before `stop`; a document that `start` cuts is a document of its own."""
        first, last = np.searchsorted(self.starts, (start, stop))
        inner = self.starts[first:last] - start
        return Tokens(self.ids[start:stop], inner if len(inner) and inner[0] == 0 else np.concatenate(([0], inner)))


def load_or_tokenize(
    folder: Path,
    key: bytes,
    pieces: Callable[[], Iterable[Piece]],
    tokenizer: Tokenizer,
) -> Tokens:
    """The tokens stored under `key` in `folder`; the text is read and tokenized only if they are not there.

    Documents are joined by the tokenizer's end-of-document id, if it has one.

    Args:
        key: 32 bytes that stand for the dataset's content and the tokenizer.
        pieces: starts a pass over the documents.

    Raises:
        DataError: the dataset holds no text, or the tokens cannot be written; whatever `pieces` and `encode` raise.
        ProviderError: the tokenizer makes ids outside its vocabulary.
    """
    path = folder / f"{key.hex()}.tokens"
    try:
        found = _open(path, key)
    except FileNotFoundError:
        found = None
    except (OSError, ValueError) as error:
        warnings.warn(f"the cached tokens {path} are unusable ({error}): tokenizing again", AptWarning, stacklevel=2)
        found = None
    if found is None:
        try:
            with atomic_write(path) as file:
                _write(file, key, pieces(), tokenizer)
        except OSError as error:
            raise _cannot_write(path, error) from error
        found = _open(path, key)
    return found


def _write(file: BinaryIO, key: bytes, pieces: Iterable[Piece], tokenizer: Tokenizer) -> None:
    dtype = _dtype(tokenizer.vocab_size)
    eos = b"" if tokenizer.eos_id is None else np.asarray(tokenizer.eos_id, dtype).tobytes()
    starts = array("q")
    count = checksum = 0

    def put(data: bytes) -> None:
        nonlocal checksum
        checksum = zlib.crc32(data, checksum)
        file.write(data)

    file.write(bytes(_HEADER.size))
    new = True
    for text, continues in pieces:
        new = new or not continues
        if not text:
            continue
        if new:
            if starts and eos:
                put(eos)
                count += 1
            starts.append(count)
            new = False
        ids = np.asarray(tokenizer.encode(text), dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
            raise ProviderError(
                f"the tokenizer made ids from {ids.min()} to {ids.max()}; its vocabulary has {tokenizer.vocab_size}"
            )
        put(ids.astype(dtype).tobytes())
        count += ids.size
    if not count:
        raise DataError("the dataset holds no text", hint="give files with text in them")
    put(bytes(-count * dtype.itemsize % 8))
    put(starts.tobytes())
    checksum = zlib.crc32(_header(dtype.itemsize, 0, count, len(starts), key), checksum)
    file.seek(0)
    file.write(_header(dtype.itemsize, checksum, count, len(starts), key))


def _header(itemsize: int, checksum: int, count: int, documents: int, key: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, FORMAT_VERSION, itemsize, checksum, count, documents, key)


def _open(path: Path, key: bytes) -> Tokens:
    """Map a file and verify it. Raises OSError, or ValueError with the reason, if it is not what it should be."""
    with open(path, "rb") as file:
        header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise ValueError("not a file of tokens")
    _, version, itemsize, checksum, count, documents, written_key = _HEADER.unpack(header)
    if version != FORMAT_VERSION or written_key != key:
        raise ValueError("written for another text, tokenizer or version")
    token_bytes = count * itemsize + -count * itemsize % 8
    if size != _HEADER.size + token_bytes + documents * 8:
        raise ValueError(f"{size} bytes instead of {_HEADER.size + token_bytes + documents * 8}")
    content = np.memmap(path, dtype=np.uint8, mode="r", offset=_HEADER.size)
    if zlib.crc32(_header(itemsize, 0, count, documents, key), zlib.crc32(content.data)) != checksum:
        raise ValueError("its checksum does not match")
    with suppress(OSError):
        os.utime(path)  # when it was used last decides when it is cleared away
    # Plain arrays over the mapping: indexing the memmap class itself costs microseconds each time.
    data = content.view(np.ndarray)
    ids = data[: count * itemsize].view(f"u{itemsize}")
    return Tokens(ids, data[token_bytes:].view(np.int64))


def _dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The smallest type that holds every id."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _cannot_write(path: Path, error: OSError) -> DataError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return DataError(
        f"the tokens cannot be written to {path}: {error.strerror or error}",
        hint=("free space there, or " if full else "") + "set data.cache_dir to another folder",
    )
