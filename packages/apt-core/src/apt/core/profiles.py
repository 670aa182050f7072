"""Profiles: a run described in a YAML file, found by path or name, with `extends` and overrides from the command line.

The way of a profile: file -> plain data with the origin of every value -> `extends` merged -> overrides merged -> a
frozen `RunConfig`. Errors name the file and line, or the option, that a value came from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from apt.core.catalogue import SECTIONS, WORDS_OF_OTHERS
from apt.core.errors import ConfigError, did_you_mean
from apt.core.problems import (
    COMMAND_LINE,
    Problem,
    bool_problems,
    dotted,
    not_finite_problems,
    raise_problems,
    show,
    unknown_key,
    validation_problems,
)
from apt.core.sections import PARENTS, check_sections, schema
from apt.core.yaml_dumper import dump_yaml
from apt.core.yaml_loader import MAX_BYTES, Path, load_value, load_yaml, resolve_scalar

if TYPE_CHECKING:
    from apt.core.config import RunConfig

__all__ = [
    "Profile", "check_sections", "dump_yaml", "find_profile", "is_shipped", "list_profiles", "load_profile_data",
    "parse_override", "resolve", "schema",
]  # fmt: skip

SHIPPED = FilePath(__file__).parents[1] / "profiles"
MAX_EXTENDS = 10

Origins = dict[Path, str]
"""Where each value was given: "file:line" or "command line". The entry at () stands for what has none of its own."""


@dataclass(frozen=True, slots=True)
class Profile:
    """A profile, complete and checked."""

    config: RunConfig
    data: dict[str, Any]
    """What was given, merged, as plain data, without defaults."""
    origins: Origins
    source: str
    """The file, or "config" for what came from Python."""


def resolve(
    source: str | os.PathLike[str] | Mapping[str, Any] | RunConfig, overrides: Mapping[str, Any] | None = None
) -> Profile:
    """Load, merge and check a profile.

    Args:
        source: a path, the name of a profile that ships, a plain dict (`extends` works there too), or a `RunConfig`.
        overrides: {dotted key: value}, such as {"model.attention_name": "flash_v2"}; mappings replace.

    Raises:
        ConfigError: it cannot be found, read or used; one line for each problem. The sections of providers are not
            looked into: that is `check_sections`.
    """
    from pydantic import ValidationError

    from apt.core.config import RunConfig

    origins: Origins
    if isinstance(source, RunConfig):
        name, data, origins = "config", source.model_dump(mode="json", exclude_unset=True), {(): "config"}
    elif isinstance(source, Mapping):
        name = "config"
        data, origins = _extend(_plain(source), {(): name}, FilePath(), ())
    else:
        path = find_profile(source)
        name = _label(path)
        data, origins = load_profile_data(path)
    _override(data, origins, overrides or {})
    try:
        config = RunConfig.model_validate(data)
        problems = bool_problems(data, config, RunConfig)
    except ValidationError as error:
        problems = validation_problems(error, RunConfig, data, elsewhere=names_of_keys())
    raise_problems([*problems, *_stray_keys(data), *_not_finite(data), *_schedule_problems(data)], origins)
    return Profile(config, data, origins, name)


def parse_override(key: str, text: str) -> Any:
    """The value of an option as it was typed: a YAML 1.2 plain scalar, or a flow list, flow mapping or quoted string.

    So `3e-5` is a number, `[a, b]` a list, `"3"` a string, and `C:/data: new.txt` just that.

    Raises:
        ConfigError: what begins like a list, a mapping or a quoted string does not end like one.
    """
    where = f"{COMMAND_LINE}: --{key}"
    if text.lstrip()[:1] in ("[", "{", '"', "'"):
        try:
            return load_value(text, where)
        except ConfigError as error:
            message = error.message.replace(f"{where}:1:", f"{where}:")  # lines mean nothing here
            raise ConfigError(message, hint=error.hint or "quote it, inside the shell's own quotes") from None
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{where}: {text!r} is not UTF-8", hint="rename the file, or set a UTF-8 locale")
    try:
        return resolve_scalar(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def find_profile(name: str | os.PathLike[str], folder: FilePath = FilePath()) -> FilePath:
    """The file of a profile: `name` as a path (seen from `folder`), else the profile of that name that ships.

    Raises:
        ConfigError: there is no such file and no such name.
    """
    text = os.fspath(name)
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if not text:  # an unset variable of the shell's; as a path it would be the folder itself
        raise ConfigError("the name of the profile is empty", hint=f"give a path, or one of {', '.join(shipped)}")
    try:
        path = folder / text
        if path.is_file():
            return path
        is_folder, is_else = path.is_dir(), path.exists()
    except (OSError, ValueError):  # a name too long, or with NUL
        is_folder = is_else = False
    stem = text.removesuffix(".yaml").removesuffix(".yml")
    if stem in shipped:
        return shipped[stem]
    if is_folder:
        raise ConfigError(f"profile {show(text)} is a folder", hint="give a .yaml file in it")
    if is_else:
        raise ConfigError(f"profile {show(text)} is a device or a pipe, not a file", hint="write it to a .yaml file")
    near = did_you_mean(FilePath(stem).name, shipped)
    hint = f"did you mean {near!r}? " if near else ""
    raise ConfigError(f"there is no profile {show(text)}", hint=f"{hint}give a path, or one of {', '.join(shipped)}")


def is_shipped(path: FilePath) -> bool:
    """Whether a profile is one of those that ship."""
    return path.parent == SHIPPED


def names_of_keys() -> dict[str, list[str]]:
    """{key: its dotted names} of every key of a profile that core knows, under the words of other trainers too."""
    names: dict[str, list[str]] = {}
    for top, keys in _fields().items():
        names.setdefault(top, []).append(top)
        for key in keys:
            names.setdefault(key, []).append(f"{top}.{key}")
    for section in SECTIONS:
        names.setdefault(section, []).append(f"model.{section}")
    return {word: [name] for word, name in WORDS_OF_OTHERS.items()} | names


def list_profiles() -> list[tuple[str, str]]:
    """(name, description) of the profiles that ship."""
    found = []
    for path in sorted(SHIPPED.glob("*.yaml")):
        data, _ = load_profile_data(path)
        found.append((path.stem, str(data.get("description", ""))))
    return found


def load_profile_data(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Origins]:
    """The plain data of a profile, what it extends merged in, and the origin of every value.

    Mappings merge key by key; anything else replaces what the extended profile says.

    Raises:
        ConfigError: a file cannot be read or is not a profile's YAML, or `extends` runs in a circle or too deep.
    """
    return _load(FilePath(path), ())


def _load(path: FilePath, chain: tuple[FilePath, ...]) -> tuple[dict[str, Any], Origins]:
    label = _label(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{label}: cannot be read: {error.strerror}") from None
    data, lines = load_yaml(content, label)
    origins: Origins = {(): label} | {key: f"{label}:{line}" for key, line in lines.items()}
    return _extend(data, origins, path.parent, (*chain, path.resolve()))


def _extend(
    data: dict[str, Any], origins: Origins, folder: FilePath, chain: tuple[FilePath, ...]
) -> tuple[dict[str, Any], Origins]:
    """`data` merged over the profile that it extends, if it does."""
    if "extends" not in data:
        return data, origins
    name = data.pop("extends")
    origin = origins.pop(("extends",), origins[()])
    where = f"{origin}: extends"
    if not isinstance(name, str):
        raise ConfigError(f"{where}: expected the path or name of one profile, got {show(name)}")
    try:
        path = find_profile(name, folder)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}", hint=error.hint) from None
    if path.resolve() in chain:
        circle = " -> ".join(_label(p) for p in (*chain[chain.index(path.resolve()) :], path))
        raise ConfigError(f"{where}: runs in a circle: {circle}", hint="take one 'extends' out")
    if len(chain) > MAX_EXTENDS:
        raise ConfigError(f"{where}: more than {MAX_EXTENDS} profiles extend one another")
    base, base_origins = _load(path, chain)
    _merge(base, base_origins, data, origins, ())
    return base, base_origins | {(): origins[()]}


def _merge(into: dict[str, Any], into_origins: Origins, data: Mapping[str, Any], origins: Origins, path: Path) -> None:
    """Merge `data` over `into`, and the origins with it."""
    for key, value in data.items():
        here = (*path, key)
        old = into.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            into_origins[here] = _origin(here, origins)
            _merge(old, into_origins, value, origins, here)
        else:
            into[key] = value
            _record(into_origins, here, value, origins)


def _record(into: Origins, path: Path, value: Any, origins: Origins) -> None:
    """Write down where `value`, and all that lies in it, comes from."""
    into[path] = _origin(path, origins)
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        _record(into, (*path, key), inner, origins)


def _origin(path: Path, origins: Origins) -> str:
    return next(origins[path[:n]] for n in range(len(path), -1, -1) if path[:n] in origins)


def _override(data: dict[str, Any], origins: Origins, overrides: Mapping[str, Any]) -> None:
    """Merge dotted overrides into `data`, in place."""
    problems = []
    for key, value in overrides.items():
        path = tuple(key.split("."))
        if not all(path):
            problems.append(Problem((key,), "not a dotted key", "write it as in --training.batch_size"))
            origins[(key,)] = COMMAND_LINE
            continue
        holder: Any = data
        for depth, part in enumerate(path[:-1], 1):
            if part not in holder:
                origins[path[:depth]] = COMMAND_LINE
            holder = holder.setdefault(part, {})
            if not isinstance(holder, dict):
                given = dotted(path[:depth])
                problems.append(Problem(path, f"{given} is {show(holder)}, not a section", f"override {given} itself"))
                origins[path] = COMMAND_LINE
                break
        else:
            holder[path[-1]] = _plain(value)
            _record(origins, path, holder[path[-1]], {(): COMMAND_LINE})
    raise_problems(problems, origins)


def _stray_keys(data: Mapping[str, Any]) -> list[Problem]:
    """Unknown keys of the sections that also hold providers' sections, which are mappings."""
    problems = []
    for parent in PARENTS:
        known = _fields()[parent]
        section = data.get(parent)
        for key, value in section.items() if isinstance(section, dict) else ():
            if key in known or isinstance(value, dict):
                continue
            if parent == "model" and key in SECTIONS:
                message, hint = f"expected a mapping, got {show(value)}", None
            else:
                message, hint = unknown_key(key, known, names_of_keys())
                hint = hint or "only a plugin's section may be added, a mapping"
            problems.append(Problem((parent, key), message, hint))
    return problems


def _not_finite(data: Mapping[str, Any]) -> list[Problem]:
    """NaN and infinity in providers' sections: no number of a profile is one, whoever reads it, and a slip is told
    before anything is imported."""
    return [
        problem
        for parent in PARENTS
        if isinstance(section := data.get(parent), dict)
        for key, value in section.items()
        if isinstance(value, dict)
        for problem in not_finite_problems(value, (parent, key))
    ]


def _schedule_problems(data: Mapping[str, Any]) -> list[Problem]:
    from apt.core.schedules import faults

    section = data.get("schedules")
    if not isinstance(section, dict):
        return []
    return [Problem(("schedules", *fault.path), fault.message, fault.hint) for fault in faults(section)]


def _fields() -> dict[str, list[str]]:
    """{key at the top level: the keys of that section, empty for a plain value}."""
    from apt.core.config import RunConfig

    return {name: list(getattr(field.annotation, "model_fields", ())) for name, field in RunConfig.model_fields.items()}


def _plain(value: Any) -> Any:
    """A copy as plain data: dicts, lists, and paths as strings."""
    if isinstance(value, Mapping):
        if stray := next((key for key in value if not isinstance(key, str)), None):
            raise ConfigError(f"config: the key {stray!r} is no string", hint="put it in quotes")
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _label(path: FilePath) -> str:
    """A path as messages show it: a shipped profile by its file name, else seen from here if it lies below."""
    if is_shipped(path):
        return path.name
    try:
        return str(path.resolve().relative_to(FilePath.cwd()))
    except (ValueError, OSError):
        return str(path)
