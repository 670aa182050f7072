"""Says in plain words, with file and line, what is wrong with a profile.

pydantic finds the faults; what was expected is read off the model's JSON Schema, so that one description of a field
serves its errors, `apt profile schema` and editors alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apt.core.errors import HINT, ConfigError, did_you_mean
from apt.core.yaml_loader import Path

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

COMMAND_LINE = "command line"
MAX_SHOWN = 10
MAX_NAME = 60

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a profile."""

    path: Path
    message: str
    hint: str | None = None


def raise_problems(problems: Iterable[Problem], origins: Mapping[Path, str]) -> None:
    """Raise one ConfigError for all problems, one line each; return if there are none."""
    order = {path: place for place, path in enumerate(origins)}
    found = sorted(dict.fromkeys(problems), key=lambda problem: order.get(problem.path, len(order)))
    if len(found) == 1:
        raise ConfigError(locate(found[0].path, origins) + found[0].message, hint=found[0].hint)
    if found:
        lines = [str(ConfigError(locate(p.path, origins) + p.message, hint=p.hint)) for p in found[:MAX_SHOWN]]
        if len(found) > MAX_SHOWN:
            lines.append(f"and {len(found) - MAX_SHOWN} more")
        raise ConfigError("\n".join(lines))


def locate(path: Path, origins: Mapping[Path, str]) -> str:
    """Where a value was given and what it is called there: "tiny.yaml:7: model.d_modle: "."""
    known = next((path[:n] for n in range(len(path), -1, -1) if path[:n] in origins), None)
    origin = origins[known] if known is not None else "config"
    name = dotted(path)
    if origin == COMMAND_LINE:
        name = "--" + name
    return f"{origin}: {name}: " if path else f"{origin}: "


def dotted(path: Path) -> str:
    """The path as it is written on the command line, list indices in brackets: model.moe.experts[0]."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{_readable(key)}" for key in path).removeprefix(".")


def _readable(key: str) -> str:
    """A key as messages show it: what is no name at all could fill the screen, or steer the terminal."""
    return key if key.isprintable() and len(key) <= MAX_NAME else show(key)


def validation_problems(
    error: ValidationError,
    model: type[BaseModel],
    data: Any,
    base: Path = (),
    elsewhere: Mapping[str, list[str]] | None = None,
) -> list[Problem]:
    """What pydantic found, in plain words.

    Args:
        model: what `data` was validated with.
        base: where `data` lies in the profile.
        elsewhere: {key: dotted names} of other parts of the profile, to look a misplaced key up in.
    """
    schema = json_schema(model)
    found: dict[tuple[Path, bool], Problem] = {}
    for detail in error.errors(include_url=False, include_context=False):
        path, value = _path_in(data, detail["loc"], keep_last=detail["type"] == "missing")
        unknown = detail["type"] == "extra_forbidden"
        message, hint = _explain(detail, schema, path, value, elsewhere or {})
        # The branches of a union fail one by one at the same place.
        found.setdefault((path, unknown), Problem((*base, *path), message, hint))
    return list(found.values())


def bool_problems(data: Any, built: Any, model: type[BaseModel], base: Path = ()) -> list[Problem]:
    """`true` and `false` where a number belongs: pydantic reads them as 1 and 0."""
    schema = None
    problems = []
    for path in _bools_read_as_numbers(data, built, ()):
        schema = schema or json_schema(model)
        expected = _expected(schema, path) or "a number"
        problems.append(Problem((*base, *path), f"expected {expected}, got {show(_value_at(data, path))}"))
    return problems


def not_finite_problems(data: Any, path: Path) -> Iterator[Problem]:
    """NaN and infinity anywhere in plain data, which lies at `path`."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from not_finite_problems(value, (*path, key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from not_finite_problems(value, (*path, index))
    elif isinstance(data, float) and not math.isfinite(data):
        yield Problem(path, _not_finite(data))


def _not_finite(value: Any) -> str:
    return f"expected a finite number, got {show(value)}"


def unknown_key(
    key: str, properties: Iterable[str], elsewhere: Mapping[str, list[str]] | None = None
) -> tuple[str, str]:
    """Message and hint for a key that is not among `properties`."""
    elsewhere = elsewhere or {}
    near = None if key in elsewhere else did_you_mean(key, properties, cutoff=HINT)
    if near:
        return "unknown key", f"did you mean {near!r}?"
    near = key if key in elsewhere else did_you_mean(key, elsewhere)
    if near:
        names = [repr(name) if "." in name else f"{name!r} at the top level" for name in elsewhere[near]]
        return "unknown key", f"did you mean {' or '.join(names)}?"
    return "unknown key", "'apt profile schema' lists the keys"


def show(value: Any) -> str:
    """A value as the user wrote it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if value != value else ".inf" if value > 0 else "-.inf"
    text = repr(value)
    return text if len(text) <= MAX_NAME else text[: MAX_NAME - 3] + "..."


def json_schema(model: type[BaseModel]) -> Schema:
    """The model's JSON Schema; empty for a model that has none, such as one with fields of types of its own."""
    from pydantic.errors import PydanticInvalidForJsonSchema

    try:
        return model.model_json_schema()
    except PydanticInvalidForJsonSchema:
        return {}


def properties_at(schema: Schema, path: Path) -> list[str]:
    """The keys that a mapping at `path` may have."""
    return [name for branch in _descend(schema, path) for name in branch.get("properties", ())]


def _explain(
    detail: Mapping[str, Any], schema: Schema, path: Path, value: Any, elsewhere: Mapping[str, list[str]]
) -> tuple[str, str | None]:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return unknown_key(str(path[-1]), properties_at(schema, path[:-1]), elsewhere)
    if kind == "missing":
        return "is missing", "add it"
    if kind == "finite_number":
        return _not_finite(value), None
    expected = _expected(schema, path)
    if expected and (kind.endswith(("_type", "_parsing")) or kind in _WRONG_VALUE):
        return f"expected {expected}, got {show(value)}", _hint(schema, path, value)
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return message[:1].lower() + message[1:], None


_WRONG_VALUE = frozenset({
    "int_from_float", "greater_than", "greater_than_equal", "less_than", "less_than_equal", "literal_error", "enum",
})  # fmt: skip


def _hint(schema: Schema, path: Path, value: Any) -> str | None:
    branches = _descend(schema, path)
    words = [str(word) for branch in branches for word in _words(branch)]
    near = did_you_mean(value, words, cutoff=HINT) if isinstance(value, str) else None
    if near:
        return f"did you mean {near!r}?"
    if isinstance(value, int | float) and any(branch.get("type") == "string" for branch in branches) and not words:
        return "put it in quotes"
    return None


def _expected(schema: Schema, path: Path) -> str | None:
    """What belongs at `path`, in words."""
    phrases = [phrase for branch in _descend(schema, path) if (phrase := _phrase(branch))]
    return ", or ".join(dict.fromkeys(phrases)) or None


def _phrase(schema: Schema) -> str | None:
    words = _words(schema)
    if words:
        return (f"one of {', '.join(map(repr, words))}") if len(words) > 1 else repr(words[0])
    noun = _NOUNS.get(schema.get("type", ""))
    bounds = [f"{word} {_number(schema[key])}" for key, word in _BOUNDS.items() if key in schema]
    return f"{noun} {' and '.join(bounds)}".rstrip() if noun else None


def _number(bound: float) -> str:
    return f"{bound:.0f}" if bound == int(bound) else f"{bound:g}"


_NOUNS = {
    "integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a string",
    "null": "nothing", "array": "a list", "object": "a mapping",
}  # fmt: skip
_BOUNDS = {
    "exclusiveMinimum": "greater than", "minimum": "at least", "exclusiveMaximum": "less than", "maximum": "at most",
}  # fmt: skip


def _words(schema: Schema) -> list[Any]:
    return schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else []


def _descend(root: Schema, path: Path) -> list[Schema]:
    """The schemas that a value at `path` may follow."""
    level = list(_branches(root, root))
    for key in path:
        below = [
            schema.get("items") if isinstance(key, int)
            else schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            for schema in level
        ]  # fmt: skip
        level = [branch for schema in below if isinstance(schema, dict) for branch in _branches(schema, root)]
    return level


def _branches(schema: Schema, root: Schema) -> Iterator[Schema]:
    if "$ref" in schema:
        yield from _branches(root["$defs"][schema["$ref"].rpartition("/")[2]], root)
    elif alternatives := schema.get("anyOf") or schema.get("oneOf"):
        for alternative in alternatives:
            yield from _branches(alternative, root)
    else:
        yield schema


def _path_in(data: Any, loc: Iterable[str | int], *, keep_last: bool) -> tuple[Path, Any]:
    """The part of pydantic's `loc` that leads through `data`, without the branches of unions, and what lies there."""
    path: list[str | int] = []
    loc = tuple(loc)
    for key in loc:
        inside = (isinstance(data, Mapping) and key in data) or (
            isinstance(data, list | tuple) and isinstance(key, int) and key < len(data)
        )
        if inside:
            path.append(key)
            data = data[key]
    if keep_last:
        path.append(loc[-1])
    return tuple(path), data


def _value_at(data: Any, path: Path) -> Any:
    for key in path:
        data = data[key]
    return data


def _bools_read_as_numbers(data: Any, built: Any, path: Path) -> Iterator[Path]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            inner = built.get(key) if isinstance(built, Mapping) else getattr(built, key, None)
            yield from _bools_read_as_numbers(value, inner, (*path, key))
    elif isinstance(data, list | tuple) and isinstance(built, list | tuple):
        for index, (value, inner) in enumerate(zip(data, built, strict=False)):
            yield from _bools_read_as_numbers(value, inner, (*path, index))
    elif isinstance(data, bool) and isinstance(built, int | float) and not isinstance(built, bool):
        yield path
