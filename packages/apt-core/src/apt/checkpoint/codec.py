"""Nested state to JSON and tensors, and back, exactly.

A state is built of dicts (keys: strings and integers), lists, tuples, tensors, integers, floats, strings, bytes, bools
and None. It is written as a JSON structure beside named tensors. What JSON has stands for itself; the rest is an object
with one key that begins with "$":

    {"$tensor": name}   {"$tuple": [...]}   {"$dict": [[key, value], ...]}   {"$bytes": base64}
    {"$float": "nan"}   {"$int": "0x..."}   {"$str": base64}

Types are matched exactly: a subclass (a named tuple, a NumPy scalar, a tensor of another class) would come back as
something else, and is refused. The exceptions are OrderedDict, what `Module.state_dict` returns, which comes back as a
dict, and Parameter, which comes back as a tensor.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from apt.core.errors import CheckpointError

MAX_DEPTH = 100
"""Deeper than any sensible state, and within what the JSON parser can read; a state that holds itself ends here."""

DTYPES = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    }
)  # fmt: skip
"""What safetensors can hold exactly."""

_HINT = (
    "keep dicts with str or int keys, lists, tuples, tensors, numbers, strings, bytes, bools and None "
    "(from NumPy: .item(), .tolist() or torch.from_numpy)"
)


def encode(state: object, where: str = "state", *, copy: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """Split a state into a JSON structure and named tensors.

    Args:
        state: see above.
        where: what to call the state; names of tensors and error messages begin with it.
        copy: whether the tensors shall be copies, whatever becomes of the originals.

    Returns:
        The structure, and the tensors as `portable` leaves them.

    Raises:
        CheckpointError: the state holds something else; the message names its place and its type.
    """
    structure, tensors = split(state, where)
    return structure, portable(tensors, copy=copy)


def split(state: object, where: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """`encode`, with the tensors as they are, of whatever kind."""
    encoder = _Encoder()
    return encoder.encode(state, where, 0), encoder.tensors


def decode(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `encode` split; its tensors are those given, as they are. Anything else raises one of
    `manifest.DAMAGE`."""
    if isinstance(structure, list):
        return [decode(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    tag = next(iter(structure), "")
    if not tag.startswith("$"):
        return {key: decode(value, tensors) for key, value in structure.items()}
    value = structure[tag]
    match tag:
        case "$tensor":
            return tensors[value]
        case "$tuple":
            return tuple(decode(item, tensors) for item in value)
        case "$dict":
            return {decode(key, tensors): decode(item, tensors) for key, item in value}
        case "$bytes":
            return b64decode(value)
        case "$float":
            return float(value)
        case "$int":
            return int(value, 16)
        case "$str":
            return b64decode(value).decode("utf-8", "surrogatepass")
    raise ValueError(f"unknown tag {tag!r}")


def portable(tensors: Mapping[str, Tensor], where: str = "", *, copy: bool = False) -> dict[str, Tensor]:
    """The tensors as safetensors can write them: on the CPU, detached, contiguous, each with memory of its own.

    Dtype, shape and values stay; strides, sharing, device and `requires_grad` do not.

    Args:
        tensors: by name.
        where: what stands before a name in an error message.
        copy: whether to copy what is fit as it is, too; if not, write the result before the originals change.

    Raises:
        CheckpointError: a value is no plain, dense tensor of a dtype in `DTYPES`; the message names it.
    """
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if type(name) is not str or name == "__metadata__":
            raise CheckpointError(f"{where}{name!r} cannot be the name of a tensor in a checkpoint", hint="rename it")
        if type(tensor) not in (Tensor, Parameter):
            raise _refused(where + name, tensor)
        if tensor.layout != torch.strided or tensor.dtype not in DTYPES or tensor.is_meta:
            what = "on the meta device" if tensor.is_meta else f"of {tensor.dtype} and layout {tensor.layout}"
            raise CheckpointError(
                f"{where}{name} is a tensor {what}, which a checkpoint cannot keep",
                hint="keep dense tensors with data, of a dtype that safetensors has",
            )
        own = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # Storages without memory all have address 0, and nothing to share.
        address = own.untyped_storage().data_ptr()
        if address in storages or (copy and address == tensor.untyped_storage().data_ptr()):
            own = own.clone()
        elif address:
            storages.add(address)
        plain[name] = own
    return plain


class _Encoder:
    """One walk through a state, which gathers its tensors under unique names."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: object, where: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CheckpointError(
                f"{where[:80]}... is nested more than {MAX_DEPTH} deep", hint="flatten it; a state must not hold itself"
            )
        if value is None or type(value) is bool:
            return value
        if type(value) is int:
            # JSON's numbers are doubles to other readers, and Python refuses to parse integers of thousands of digits.
            return value if value.bit_length() < 54 else {"$int": hex(value)}
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": str(value)}
        if type(value) is str:
            return value if _is_text(value) else {"$str": _base64(value.encode("utf-8", "surrogatepass"))}
        if type(value) is bytes:
            return {"$bytes": _base64(value)}
        if type(value) is list:
            return self._items(value, where, depth)
        if type(value) is tuple:
            return {"$tuple": self._items(value, where, depth)}
        if type(value) in (dict, OrderedDict):
            return self._dict(value, where, depth)  # type: ignore[arg-type]
        if isinstance(value, Tensor):
            return {"$tensor": self._tensor(value, where)}
        raise _refused(where, value)

    def _items(self, values: list[Any] | tuple[Any, ...], where: str, depth: int) -> list[Any]:
        return [self.encode(value, f"{where}[{index}]", depth + 1) for index, value in enumerate(values)]

    def _dict(self, values: dict[Any, Any], where: str, depth: int) -> dict[str, Any]:
        pairs = []
        for key, value in values.items():
            if type(key) not in (str, int):
                raise CheckpointError(f"{where} has a key of type {_type_of(key)}: {key!r}", hint=_HINT)
            path = f"{where}.{key}" if type(key) is str else f"{where}[{key}]"
            pairs.append((key, self.encode(value, path, depth + 1)))
        if all(type(key) is str and not key.startswith("$") and _is_text(key) for key in values):
            return dict(pairs)
        return {"$dict": [[self.encode(key, where, depth), value] for key, value in pairs]}

    def _tensor(self, tensor: Tensor, where: str) -> str:
        name = where.encode("utf-8", "backslashreplace").decode()
        while name in self.tensors:  # {"a": {"b": x}, "a.b": y}
            name += "'"
        self.tensors[name] = tensor
        return name


def _refused(where: str, value: object) -> CheckpointError:
    return CheckpointError(f"{where} is of type {_type_of(value)}, which a checkpoint cannot keep", hint=_HINT)


def _type_of(value: object) -> str:
    cls = type(value)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _is_text(value: str) -> bool:
    """Whether it can be written as UTF-8: lone surrogates, from file names that are not UTF-8, cannot."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
