"""Reads a profile's YAML: version 1.2, core schema, within bounds, and with the line of every key.

The parser's events are consumed one by one, so that a bound is checked before what exceeds it is built: a document that
nests too deeply, or whose aliases multiply, is refused after reading a few of its lines. There are no tags and no merge
keys: a profile holds plain data.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apt.core.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_LINE = 16 * 1024
MAX_DEPTH = 50
MAX_NODES = 10_000
MAX_KEYS = 256
"""Of one mapping; each key that is wrong is compared with all that are known."""
MAX_DIGITS = 30

_TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"

Path = tuple[str | int, ...]
"""Where a value lies: keys and list indices from the top."""

_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL_OR_HEX = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    spelling: word == "true" for word in ("true", "false") for spelling in (word, word.title(), word.upper())
}
_UNPRINTABLE = re.compile(r"[^\t\n\r -~\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NO_CHARACTER = re.compile(r"[\0\ud800-\udfff]")


def load_yaml(text: str | bytes, source: str) -> tuple[dict[str, Any], dict[Path, int]]:
    """The mapping that a YAML document holds.

    Args:
        text: the document; bytes are UTF-8.
        source: the name under which errors speak of it, such as a path.

    Returns:
        The data (dicts with string keys, lists, strings, ints, floats, bools, None), and {path: line} of every key and
        list item, counted from 1. What an alias repeats has no lines of its own below the alias.

    Raises:
        ConfigError: it is not such a document or exceeds a bound; the message begins with "source:line".
    """
    data, lines = _load(text, source)
    if not isinstance(data, dict):
        what = "nothing" if data is None else "a list" if isinstance(data, list) else "a single value"
        raise ConfigError(f"{source}:1: expected keys and values, got {what}", hint="write 'key: value' lines")
    return data, lines


def load_value(text: str, source: str) -> Any:
    """The value of a piece of YAML that need not be a mapping. Raises ConfigError as `load_yaml`."""
    return _load(text, source)[0]


def resolve_scalar(text: str) -> Any:
    """What a plain (unquoted) scalar stands for: None, a bool, an int, a float, or the text itself.

    Source: YAML 1.2.2, section 10.3.2, the core schema. So `3e-5` is a float; `yes`, `on`, `12:30:00` and `1_000` are
    strings; `010` is ten.

    Raises:
        ValueError: an integer of more than `MAX_DIGITS` digits.
    """
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text) or _OCTAL_OR_HEX.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"an integer of {len(text)} digits; at most {MAX_DIGITS} are read")
        return int(text, 0) if text[1:2] in ("o", "x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


@dataclass(slots=True)
class _Node:
    """A value together with what the bounds count."""

    value: Any
    size: int
    """Nodes in it, itself included, aliases expanded."""
    height: int
    """Levels of collections in it."""


def _load(text: str | bytes, source: str) -> tuple[Any, dict[Path, int]]:
    builder = _Builder(_decode(text, source), source)
    return builder.document(), builder.lines


def _decode(text: str | bytes, source: str) -> str:
    """The text, once it is known to be short enough and free of characters that YAML does not allow."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BYTES // 1024} KiB", hint="give a profile, a short YAML file")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            where = f"{source}:{error.object.count(10, 0, error.start) + 1}"
            byte = f"0x{error.object[error.start]:02x}"
            raise ConfigError(f"{where}: byte {byte} is not UTF-8", hint="save the file as UTF-8 text") from None
    text = text.removeprefix("\ufeff")
    bad = _UNPRINTABLE.search(text)
    if bad:
        where = f"{source}:{text.count(chr(10), 0, bad.start()) + 1}"
        raise ConfigError(f"{where}: control character U+{ord(bad[0]):04X}", hint="take it out; a profile is text")
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > MAX_LINE:
            raise ConfigError(f"{source}:{number}: a line of {len(line)} characters; at most {MAX_LINE} are read")
    return text


class _Builder:
    """Builds plain data from the parser's events."""

    def __init__(self, text: str, source: str) -> None:
        self.text = text
        self.source = source
        self.lines: dict[Path, int] = {}
        self.size = 0
        self.anchors: dict[str, _Node | None] = {}
        self.events = self._parse()

    def document(self) -> Any:
        """The value of the one document; None if there is none."""
        from ruamel.yaml.events import DocumentEndEvent, DocumentStartEvent, StreamEndEvent, StreamStartEvent

        value = None
        documents = 0
        for event in self.events:
            if isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error(event, "a second document begins here", "keep one document per file")
                if event.version and tuple(event.version) != (1, 2):
                    raise self._error(event, "profiles are YAML 1.2", "take the %YAML line out")
                value = self._node(next(self.events), (), 1).value
            else:
                assert isinstance(event, StreamStartEvent | DocumentEndEvent | StreamEndEvent)
        return value

    def _parse(self) -> Iterator[Any]:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError
        from ruamel.yaml.scanner import Scanner, ScannerError

        class ShallowScanner(Scanner):
            """The scanner reads ahead; what it does for each bracket grows with how many are open."""

            def fetch_flow_collection_start(self, *args: Any, **more: Any) -> None:
                if self.flow_level >= MAX_DEPTH:
                    raise ScannerError(None, None, _TOO_DEEP, self.reader.get_mark())
                super().fetch_flow_collection_start(*args, **more)

        yaml = YAML(typ="safe", pure=True)
        yaml.Scanner = ShallowScanner
        try:
            yield from yaml.parse(self.text)
        except MarkedYAMLError as error:
            raise self._syntax_error(error) from None
        except Exception as error:  # the scanner lets out errors of int(), chr() and the like on odd escapes
            raise ConfigError(f"{self.source}: not YAML: {error}") from None

    def _node(self, event: Any, path: Path, depth: int) -> _Node:
        from ruamel.yaml.events import AliasEvent, MappingStartEvent, ScalarEvent

        if isinstance(event, AliasEvent):
            return self._alias(event, depth)
        if event.tag is not None:
            raise self._error(event, f"the tag {_shorten(event.tag)}", "take it out; a profile holds plain data")
        if event.anchor:
            self.anchors[event.anchor] = None
        self._grow(event, 1)
        before = self.size
        if isinstance(event, ScalarEvent):
            node = _Node(self._scalar(event), 1, 0)
        else:
            self._check_depth(event, depth)
            build = self._mapping if isinstance(event, MappingStartEvent) else self._sequence
            value, height = build(path, depth)
            node = _Node(value, self.size - before + 1, height + 1)
        if event.anchor:
            self.anchors[event.anchor] = node
        return node

    def _mapping(self, path: Path, depth: int) -> tuple[dict[str, Any], int]:
        from ruamel.yaml.events import MappingEndEvent

        mapping: dict[str, Any] = {}
        height = 0
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self._key(event, path, depth)
            if key in mapping:
                first = self.lines[*path, key]
                raise self._error(event, f"the key {key!r} is given twice", f"line {first} has it already")
            if len(mapping) == MAX_KEYS:
                raise self._error(event, f"more than {MAX_KEYS} keys in one mapping")
            self.lines[*path, key] = event.start_mark.line + 1
            node = self._node(next(self.events), (*path, key), depth + 1)
            mapping[key] = node.value
            height = max(height, node.height)
        return mapping, height

    def _sequence(self, path: Path, depth: int) -> tuple[list[Any], int]:
        from ruamel.yaml.events import SequenceEndEvent

        items: list[Any] = []
        height = 0
        while not isinstance(event := next(self.events), SequenceEndEvent):
            self.lines[*path, len(items)] = event.start_mark.line + 1
            node = self._node(event, (*path, len(items)), depth + 1)
            items.append(node.value)
            height = max(height, node.height)
        return items, height

    def _key(self, event: Any, path: Path, depth: int) -> str:
        if getattr(event, "value", None) == "<<" and not event.style:
            raise self._error(event, "merge keys (<<) are not read", "use 'extends: other-profile' instead")
        key = self._node(event, path, depth + 1).value
        if not isinstance(key, str):
            shown = "a list or mapping" if isinstance(key, dict | list) else repr(key)
            raise self._error(event, f"{shown} as a key, which must be a string", "put a simple key in quotes")
        return key

    def _scalar(self, event: Any) -> Any:
        if event.style:
            if _NO_CHARACTER.search(event.value):
                raise self._error(event, "an escape for NUL or half a surrogate pair", "write the character itself")
            return event.value
        try:
            return resolve_scalar(event.value)
        except ValueError as error:
            raise self._error(event, str(error)) from None

    def _alias(self, event: Any, depth: int) -> _Node:
        if event.anchor not in self.anchors:
            raise self._error(event, f"the alias *{_shorten(event.anchor)} has no anchor before it")
        node = self.anchors[event.anchor]
        if node is None:
            raise self._error(event, f"the alias *{_shorten(event.anchor)} lies inside what it stands for")
        self._grow(event, node.size)
        self._check_depth(event, depth + node.height - 1)
        return _Node(copy.deepcopy(node.value), node.size, node.height)

    def _grow(self, event: Any, size: int) -> None:
        self.size += size
        if self.size > MAX_NODES:
            raise self._error(event, f"more than {MAX_NODES:,} values, aliases counted in full")

    def _check_depth(self, event: Any, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(event, _TOO_DEEP)

    def _error(self, event: Any, message: str, hint: str | None = None) -> ConfigError:
        return ConfigError(f"{self.source}:{event.start_mark.line + 1}: {message}", hint=hint)

    def _syntax_error(self, error: Any) -> ConfigError:
        # An unfinished key or string is best looked for where it begins; the scanner notices it where it should end.
        unfinished = error.context_mark and str(error.context).endswith(("simple key", "quoted scalar"))
        mark = error.context_mark if unfinished else error.problem_mark
        where = f"{self.source}:{mark.line + 1}" if mark else self.source
        if mark and self.text[mark.index : mark.index + 1] == "\t":
            return ConfigError(f"{where}: a tab where YAML wants spaces", hint="indent and align with spaces")
        message = f"{error.context}: {error.problem}" if error.context else str(error.problem)
        return ConfigError(f"{where}: {_shorten(message, 200)}", hint=_SYNTAX_HINTS.get(error.problem))


_SYNTAX_HINTS = {
    "mapping values are not allowed here": "check the indentation, and quote a text that holds ': '",
    "could not find expected ':'": "write 'key: value', with the colon and a space",
    "found unexpected end of stream": "close the quotation mark",
}


def _shorten(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
