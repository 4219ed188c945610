"""Plain data to and from files: JSON for people, pickle of builtins for Python. No byte of a file is trusted.

Plain data is None, bool, int (64 bits), finite float, str, list, and dict with str keys. Both formats give back equal
data.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import sys
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring_ascii
from typing import Any, NamedTuple, NoReturn, TypeAlias, cast

from autoplan.cache.files import Place, place
from autoplan.errors import CacheError

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
Migration: TypeAlias = "Callable[[dict[str, Plain]], dict[str, Plain]]"

MAX_BYTES = 32 << 20  # of a file
MAX_MEMORY = 192 << 20  # that a file may claim once read; estimated from above, before anything is built
MAX_DEPTH = 64  # of nested lists and dicts
_LEAF_BYTES, _CONTAINER_BYTES = (64, 256)  # CPython: an int, float or short str and its slot; a small dict
_BYTE_BYTES = 8 + _CONTAINER_BYTES  # the most that one byte of JSON can claim
_LINE = 120

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode
_one_line = json.JSONEncoder(allow_nan=False).encode


def plain(data: object) -> Plain:
    """A copy of `data` that shares no list or dict with it, tuples made lists.

    Raises:
        CacheError: something in it is not plain data; the message says where.
    """
    try:
        return _plain(data, MAX_DEPTH)
    except _NotPlainError as error:
        where = "".join(reversed(error.path)).removeprefix(".")
        raise CacheError(f"not plain data: {where or 'it'} {error}") from None


def digest(data: object) -> str:
    """The sha256 of plain data, as hex; the order of dict keys does not count."""
    return digest_of_plain(plain(data))


def digest_of_plain(data: Plain | dict[str, Any]) -> str:
    """The same for what is known to be plain data: what was read from a file, or copied by `plain`."""
    return hashlib.sha256(_canonical(data).encode()).hexdigest()


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """`data` and its digest: a change of any letter shows when it is unsealed."""
    return sealed_plain(cast("dict[str, Any]", plain(data)))


def sealed_plain(data: dict[str, Any]) -> dict[str, Any]:
    """The same for what is known to be plain data."""
    return {**data, "digest": digest_of_plain(data)}


def unsealed(data: Any) -> dict[str, Any]:
    """A plain dict without the digest that it was sealed with. What was never sealed (by hand) is taken as it is.

    Raises:
        CacheError: the digest is not that of the data.
    """
    content = {name: value for name, value in data.items() if name != "digest"}
    if "digest" in data and data["digest"] != digest_of_plain(content):
        raise CacheError('its content is not what was written: "digest" differs (delete that line after editing)')
    return content


class ForeignError(CacheError):
    """A file that is whole, but that this version must neither read nor replace."""


def migrated(data: dict[str, Plain], newest: int, migrations: Mapping[int, Migration]) -> dict[str, Plain]:
    """Data of any schema since the first as data of the `newest`; `migrations[n]` makes n into n + 1.

    Raises:
        ForeignError: it was written by a newer autoplan.
        CacheError: it is not of the schema that it says.
    """
    schema = data.get("schema")
    if type(schema) is not int or schema < 1:
        raise CacheError(f"schema {schema!r} is not a version")
    if schema > newest:
        raise ForeignError(f"written by a newer autoplan (schema {schema} > {newest}): upgrade")
    for older in range(schema, newest):
        try:
            data = {**migrations[older](data), "schema": older + 1}
        except Exception as error:  # a migration expects the data of its schema, and this may be anything
            raise CacheError(f"not of schema {older}: {error!r}") from error
    return data


def dumps_json(data: object) -> bytes:
    """Plain data as JSON (RFC 8259), ASCII only; what fits on one line stays on one."""
    encoded = (_lines(plain(data), "") + "\n").encode()
    _check_json_size(encoded)  # what is written can be read again
    return encoded


def dumps_part(data: Plain, depth: int, before: int) -> bytes:
    """Data that is known to be plain, laid out as in `dumps_json`: `depth` deep, after `before` letters of a key."""
    encoded = _lines(data, "  " * depth, before).encode()
    _check_json_size(encoded)
    return encoded


def dumps_line(data: Plain) -> bytes:
    """Data that is known to be plain, as JSON on one line: several times as quick."""
    encoded = (_one_line(data) + "\n").encode()
    _check_json_size(encoded)
    return encoded


def loads_json(data: bytes) -> Plain:
    """The plain data in strict JSON: no duplicate keys, no NaN or Infinity.

    Raises:
        CacheError: `data` is something else, or too large.
    """
    _check_json_size(data)
    try:
        found = _decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise CacheError(f"not JSON of plain data: {error}") from error
    return cast(Plain, found) if _is_surely_plain(data) else plain(found)


def _is_surely_plain(data: bytes) -> bool:
    """Whether JSON that was read holds plain data, by a look at the text: true of most small files, and much quicker.

    What else JSON can say is half a surrogate pair, and nesting too deep.
    """
    halves = b"\\ud" in data or b"\\uD" in data
    return data.count(b"[") + data.count(b"{") <= MAX_DEPTH and not halves


def dumps_pickle(data: object) -> bytes:
    """Plain data as a pickle, protocol 4."""
    encoded = pickle.dumps(plain(data), protocol=4)
    _check_opcodes(encoded)  # what is written can be read again
    return encoded


def loads_pickle(data: bytes) -> Plain:
    """The plain data in a pickle (protocol 2 to 5); nothing in it is imported, called or built before it is checked.

    Raises:
        CacheError: `data` is something else, or too large.
    """
    try:
        _check_opcodes(data)
        found = _BuiltinsUnpickler(io.BytesIO(data)).load()
    except CacheError:
        raise
    except Exception as error:  # the unpickler names no exception that it does not raise
        raise CacheError(f"not a pickle of plain data: {error}") from error
    return plain(found)


def write(path: str | os.PathLike[str] | Place, data: object) -> None:
    """Write plain data to a path or URL, as its suffix says; whatever goes wrong, a file that is there stays whole.

    Raises:
        CacheError: the suffix is unknown, `data` is not plain, or the file cannot be written.
    """
    target = place(path)
    write_bytes(target, _format(target).dumps(data))


def write_bytes(target: Place, encoded: bytes) -> None:
    """Write what is already encoded in the same way. Raises CacheError where the file cannot be written."""
    try:
        target.write(encoded)
    except OSError as error:
        raise CacheError(f"cannot write {target}: {error}") from error


def read(path: str | os.PathLike[str] | Place) -> Plain:
    """The plain data in the file at a path or URL, read as its suffix says.

    Raises:
        CacheError: the suffix is unknown, or the file cannot be read (then the cause is an OSError) or trusted.
    """
    source = place(path)
    loads = _format(source).loads
    try:
        return loads(source.read(MAX_BYTES))
    except OSError as error:
        raise CacheError(f"cannot read {source}: {error}") from error
    except CacheError as error:
        raise CacheError(f"cannot read {source}: {error}") from error.__cause__


class _Format(NamedTuple):
    dumps: Callable[[object], bytes]
    loads: Callable[[bytes], Plain]


_FORMATS = {".json": _Format(dumps_json, loads_json), ".pkl": _Format(dumps_pickle, loads_pickle)}
SUFFIXES = tuple(_FORMATS)


def _format(place: Place) -> _Format:
    if place.suffix not in _FORMATS:
        raise CacheError(f"the suffix of {str(place)!r} says no format that is known: use .json or .pkl")
    return _FORMATS[place.suffix]


class _NotPlainError(Exception):
    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.path: list[str] = []  # innermost first


def _plain(data: object, depth: int) -> Plain:
    # Exact types only: a subclass (numpy.float64, an Enum, an OrderedDict) would not come back as itself.
    if type(data) is str:
        if not data.isascii() and any("\ud800" <= letter <= "\udfff" for letter in data):
            raise _NotPlainError("holds half a surrogate pair, which no file can keep")
        return data
    if data is None or type(data) is bool:
        return data
    if type(data) is int:
        if not -(1 << 63) <= data < 1 << 64:
            raise _NotPlainError("is an int of more than 64 bits")
        return data
    if type(data) is float:
        if not math.isfinite(data):
            raise _NotPlainError(f"is {data}, not a finite number")
        return data
    if depth == 0:
        raise _NotPlainError(f"is nested deeper than {MAX_DEPTH}")
    if type(data) is dict:
        entries: dict[str, Plain] = {}
        key: object = None
        try:
            for key, value in data.items():
                if type(key) is not str:
                    raise _NotPlainError(f"has a key that is a {_type_name(key)}, not a str")
                if not key.isascii():
                    _plain(key, depth)
                ascii = type(value) is str and value.isascii()  # most are: without a call of this function
                entries[key] = value if ascii else _plain(value, depth - 1)
        except _NotPlainError as error:
            error.path.append(f".{key}")
            raise
        return entries
    if type(data) is list or type(data) is tuple:
        items: list[Plain] = []
        try:
            for value in data:
                items.append(value if type(value) is str and value.isascii() else _plain(value, depth - 1))
        except _NotPlainError as error:
            error.path.append(f"[{len(items)}]")
            raise
        return items
    raise _NotPlainError(f"is a {_type_name(data)}; only dict, list, str, int, float, bool and None are kept")


def _type_name(data: object) -> str:
    kind = type(data)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# -- JSON ------------------------------------------------------------------------------------------------------------


_LEAF_ENCODERS: dict[type, Callable[[Any], str]] = {  # as json.dumps would, without setting up an encoder for each
    str: encode_basestring_ascii,
    int: int.__repr__,
    float: float.__repr__,
    bool: lambda flag: "true" if flag else "false",
    type(None): lambda _: "null",
}


def _lines(data: Any, indent: str, before: int = 0) -> str:
    """JSON for a place that is `indent` deep, after `before` letters of a key."""
    if encode := _LEAF_ENCODERS.get(type(data)):
        return encode(data)
    inner = indent + "  "
    parts = []
    if isinstance(data, dict):
        opening, closing = "{}"
        for key, value in data.items():
            name = encode_basestring_ascii(key) + ": "
            encode = _LEAF_ENCODERS.get(type(value))  # most are leaves: without a call of this function
            parts.append(name + (encode(value) if encode else _lines(value, inner, len(name))))
    else:
        opening, closing = "[]"
        parts = [_lines(value, inner) for value in data]
    length = len(indent) + before + sum(map(len, parts)) + 2 * len(parts)
    if length < _LINE and not any("\n" in part for part in parts):
        return opening + ", ".join(parts) + closing
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {twice[:80]!r} comes twice in one object")
    return found


def _int(digits: str) -> int:
    found = int(digits) if len(digits) <= 20 else 1 << 64  # thousands of digits would take their time
    if not -(1 << 63) <= found < 1 << 64:
        raise ValueError(f"{digits[:80]} is an int of more than 64 bits")
    return found


def _float(digits: str) -> float:
    found = float(digits)
    if math.isinf(found):
        _refuse_constant(digits[:80])
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


_decode = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_int, parse_float=_float, parse_constant=_refuse_constant
).decode


def _check_bytes(size: int) -> None:
    if size > MAX_BYTES:
        raise CacheError(f"{size} bytes, more than the {MAX_BYTES} that are read: keep fewer records in one file")


def _check_json_size(data: bytes) -> None:
    _check_bytes(len(data))
    if _BYTE_BYTES * len(data) > MAX_MEMORY:  # most are small: without counting
        check_memory(json_memory(data))


def json_memory(data: bytes) -> int:
    """How many bytes of memory the data in JSON may claim once read, estimated from above."""
    widest = 1 if data.isascii() and b"\\u" not in data else 4  # one emoji makes each letter of its str 4 bytes
    leaves, containers = data.count(b",") + data.count(b":"), data.count(b"[") + data.count(b"{")
    return 2 * widest * len(data) + _LEAF_BYTES * leaves + _CONTAINER_BYTES * containers


def check_memory(claimed: int) -> None:
    """Raises CacheError where this is more than a file may claim."""
    if claimed > MAX_MEMORY:
        raise CacheError(f"it claims more than {MAX_MEMORY >> 20} MiB of memory: keep fewer records in one file")


# -- pickle ----------------------------------------------------------------------------------------------------------

_LEAVES = {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE"}
_CONTAINERS = {"EMPTY_LIST", "EMPTY_DICT"}
_CLOSERS = {"APPEND": 1, "SETITEM": 2, "APPENDS": None, "SETITEMS": None}  # how many they take off the stack
_MEMO_PUTS = {"MEMOIZE", "BINPUT", "LONG_BINPUT"}
_MEMO_GETS = {"BINGET", "LONG_BINGET"}


class _BuiltinsUnpickler(pickle.Unpickler):
    """The second wall: the opcodes that would come here have been refused before."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise CacheError(f"a pickle of plain data does not import {module_name[:80]}.{global_name[:80]}")

    def persistent_load(self, pid: object) -> NoReturn:
        raise CacheError("a pickle of plain data holds no persistent ids")


def _check_opcodes(data: bytes) -> None:
    """Walk the pickle as the unpickler would, and refuse all that builds anything but plain data within the limits.

    What is not on the lists above is refused, also what is harmless but never written for plain data. Opcodes:
    https://docs.python.org/3/library/pickletools.html
    """
    _check_bytes(len(data))
    claimed = position = 0
    argument: Any
    stack: list[int] = []  # the nesting depth of each value
    marks: list[int] = []
    memo: list[int | None] = []  # the size of a str; None for all else
    last: int | None = None  # the size of the str that the last opcode pushed
    try:
        for opcode, argument, at in pickletools.genops(data):
            name, position = opcode.name, at or 0
            size, last = last, None
            if name in _STRINGS:
                last = sys.getsizeof(argument)
                claimed += last
                stack.append(0)
            elif name in _MEMO_GETS:
                last = memo[argument]
                if last is None:  # would let ten lists stand for 10^10, or a list hold itself
                    raise CacheError("a value other than a str is used twice")
                claimed += last  # in JSON it is written out each time
                stack.append(0)
            elif name in _LEAVES:
                claimed += _LEAF_BYTES
                stack.append(0)
            elif name in _MEMO_PUTS:
                index = len(memo) if name == "MEMOIZE" else argument
                if index != len(memo):  # the memo is an array: a large index claims memory for all below it
                    raise CacheError(f"memo index {index} where {len(memo)} is next")
                memo.append(size)
            elif name == "MARK":
                claimed += _LEAF_BYTES
                marks.append(len(stack))
            elif name in _CONTAINERS:
                claimed += _CONTAINER_BYTES
                stack.append(1)
            elif name in _CLOSERS:
                count = _CLOSERS[name]
                first = marks.pop() if count is None else len(stack) - count
                if first < 1 or (marks and first <= marks[-1]):
                    raise IndexError("the stack is empty")
                stack[first - 1] = max(stack[first - 1], 1 + max(stack[first:], default=0))
                if stack[first - 1] > MAX_DEPTH:
                    raise CacheError(f"nested deeper than {MAX_DEPTH}")
                del stack[first:]
            elif name == "FRAME":
                if argument > len(data) - position - 9:
                    raise CacheError(f"a frame of {argument} bytes is longer than the file")
            elif name == "PROTO":
                if not 2 <= argument <= 5:
                    raise CacheError(f"protocol {argument}, where 2 to 5 are read")
            elif name != "STOP":
                raise CacheError(f"opcode {name} is not one that plain data needs")
            if claimed > MAX_MEMORY:
                check_memory(claimed)
    except CacheError as error:
        raise CacheError(f"not a pickle of plain data: {error} (at byte {position})") from None
    except (ValueError, IndexError) as error:
        raise CacheError(f"not a pickle of plain data: {error} (after byte {position})") from error
    if position != len(data) - 1:
        raise CacheError("not a pickle of plain data: something follows its end")
