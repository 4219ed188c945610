"""Records as builtins and back, every field checked against its annotation."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from typing import Any

from autoplan.cache import codec
from autoplan.errors import BudgetError, CacheError

_hints = functools.cache(typing.get_type_hints)  # a plan has many layers of one kind


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts, tuples as lists, all the way down."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: Any, data: Any, path: str) -> Any:
    """`data` as an instance of the annotation `kind`, every field checked. Raises CacheError naming the field."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        try:
            return codec.plain(data)
        except CacheError as error:
            raise CacheError(f"{path}: {error}") from None
    if origin in (types.UnionType, typing.Union):
        if data is None and type(None) in args:
            return None
        (kind,) = (arg for arg in args if arg is not type(None))
        return from_plain(kind, data, path)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
        if not isinstance(data, dict) or not required <= set(data) <= set(hints):
            raise CacheError(f"{path} must hold {', '.join(hints)}")
        try:
            return kind(**{key: from_plain(hints[key], item, f"{path}.{key}") for key, item in data.items()})
        except BudgetError as error:
            raise CacheError(f"{path}: {error}") from error
    if origin is tuple:
        if not isinstance(data, list):
            raise CacheError(f"{path} must be a list, not {type(data).__name__}")
        return tuple(from_plain(args[0], item, f"{path}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
            raise CacheError(f"{path} must be a mapping with string keys")
        return {key: from_plain(args[1], item, f"{path}.{key}") for key, item in data.items()}
    if kind is float and type(data) is int and abs(data) < 1 << 64:  # JSON of others may say 1 for 1.0
        data = float(data)
    signed = path.endswith("sqnr_db")  # the only number that may be negative
    if type(data) is not kind or (kind in (int, float) and not (signed or data >= 0)):  # nan is not either
        raise CacheError(f"{path} must be {kind.__name__}, not {data!r}")
    if kind is float and not math.isfinite(data):
        raise CacheError(f"{path} must be a finite float, not {data!r}")
    return data
