"""Keys of the profile on the command line: `--training.learning_rate 3e-4`, `--model.attention_name=mha`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from apt.core.errors import UsageError

TOP_LEVEL = ("name", "description", "on_plugin_error", "output_dir")
"""The profile's keys that lie in no section. (`plugins` is an option of its own.)"""

_OVERRIDE = re.compile(rf"--([A-Za-z_][\w-]*(?:\.[\w-]*)+|{'|'.join(TOP_LEVEL)})(?:=(.*))?", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(\d|\.\d|\.inf|\.nan)\S*")


def parse_overrides(texts: Mapping[str, str]) -> dict[str, Any]:
    """The values that were typed. Raises ConfigError for what begins like a list or a mapping and is none."""
    from apt.core.profiles import parse_override

    return {key: parse_override(key, text) for key, text in texts.items()}


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Part the overrides from the other arguments.

    Returns:
        The other arguments, and {dotted key: text}; of a key that is given twice the last text counts.

    Raises:
        UsageError: an override without a value.
    """
    others: list[str] = []
    overrides: dict[str, str] = {}
    rest = iter(enumerate(arguments))
    for index, argument in rest:
        match = _OVERRIDE.fullmatch(argument)
        if match is None:
            others.append(argument)
            continue
        key, value = match.groups()
        if value is None:
            value = arguments[index + 1] if index + 1 < len(arguments) else None
            if value is None or (value.startswith("-") and not _NUMBER.fullmatch(value)):
                raise UsageError(f"--{key} needs a value", hint=f"write --{key} VALUE, or --{key}=VALUE")
            next(rest)
        overrides[key] = value
    return others, overrides
