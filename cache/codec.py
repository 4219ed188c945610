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
import stat
import sys
import uuid
from collections.abc import Callable
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

from autoplan.errors import CacheError

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

MAX_BYTES = 32 << 20  # of a file
MAX_MEMORY = 192 << 20  # that a file may claim once read; estimated from above, before anything is built
MAX_DEPTH = 64  # of nested lists and dicts
_LEAF_BYTES, _CONTAINER_BYTES = (64, 256)  # CPython: an int, float or short str and its slot; a small dict
_LINE = 120


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
    return hashlib.sha256(json.dumps(plain(data), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def dumps_json(data: object) -> bytes:
    """Plain data as JSON (RFC 8259), ASCII only; what fits on one line stays on one."""
    encoded = (_lines(plain(data), "") + "\n").encode()
    _check_json_size(encoded)  # what is written can be read again
    return encoded


def loads_json(data: bytes) -> Plain:
    """The plain data in strict JSON: no duplicate keys, no NaN or Infinity.

    Raises:
        CacheError: `data` is something else, or too large.
    """
    _check_json_size(data)
    try:
        found = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"not JSON of plain data: {error}") from error
    return plain(found)


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


def write(path: str | os.PathLike[str], data: object) -> None:
    """Write plain data to `path`, as its suffix says; whatever goes wrong, a file that is there stays whole.

    Raises:
        CacheError: the suffix is unknown, `data` is not plain, or the file cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link stays a link
    encoded = _format(Path(path)).dumps(data)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(encoded)
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CacheError(f"cannot write {target}: {error}") from error


def read(path: str | os.PathLike[str]) -> Plain:
    """The plain data in the file `path`, read as its suffix says.

    Raises:
        CacheError: the suffix is unknown, or the file cannot be read (then the cause is an OSError) or trusted.
    """
    path = Path(path)
    loads = _format(path).loads
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would hang
            raise OSError("not a file")
        _check_bytes(status.st_size)
        data = path.read_bytes()
    except OSError as error:
        raise CacheError(f"cannot read {path}: {error}") from error
    except CacheError as error:
        raise CacheError(f"cannot read {path}: {error}") from None
    try:
        return loads(data)
    except CacheError as error:
        raise CacheError(f"cannot read {path}: {error}") from error.__cause__


class _Format(NamedTuple):
    dumps: Callable[[object], bytes]
    loads: Callable[[bytes], Plain]


_FORMATS = {".json": _Format(dumps_json, loads_json), ".pkl": _Format(dumps_pickle, loads_pickle)}


def _format(path: Path) -> _Format:
    if path.suffix not in _FORMATS:
        raise CacheError(f"the suffix of {str(path)!r} says no format that is known: use .json or .pkl")
    return _FORMATS[path.suffix]


def check_suffix(path: str | os.PathLike[str]) -> None:
    """Raise a CacheError unless the suffix of `path` is one that `read` and `write` know."""
    _format(Path(path))


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
    step = ""
    try:
        if type(data) is dict:
            entries: dict[str, Plain] = {}
            for key, value in data.items():
                step = f".{key}"
                if type(key) is not str:
                    raise _NotPlainError(f"has a key that is a {_type_name(key)}, not a str")
                _plain(key, depth)
                entries[key] = _plain(value, depth - 1)
            return entries
        if type(data) is list or type(data) is tuple:
            items: list[Plain] = []
            for value in data:
                step = f"[{len(items)}]"
                items.append(_plain(value, depth - 1))
            return items
    except _NotPlainError as error:
        error.path.append(step)
        raise
    raise _NotPlainError(f"is a {_type_name(data)}; only dict, list, str, int, float, bool and None are kept")


def _type_name(data: object) -> str:
    kind = type(data)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# -- JSON ------------------------------------------------------------------------------------------------------------


def _lines(data: Plain, indent: str, before: int = 0) -> str:
    """JSON for a place that is `indent` deep, after `before` letters of a key."""
    inner = indent + "  "
    if isinstance(data, dict):
        names = [encode_basestring_ascii(key) + ": " for key in data]
        parts = [name + _lines(value, inner, len(name)) for name, value in zip(names, data.values(), strict=True)]
        opening, closing = "{", "}"
    elif isinstance(data, list):
        parts = [_lines(value, inner) for value in data]
        opening, closing = "[", "]"
    else:  # as json.dumps would, without setting up an encoder for each
        if isinstance(data, str):
            return encode_basestring_ascii(data)
        return json.dumps(data) if data is None or isinstance(data, bool) else repr(data)
    if len(indent) + before + sum(map(len, parts)) + 2 * len(parts) < _LINE and not any("\n" in part for part in parts):
        return opening + ", ".join(parts) + closing
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} comes twice in one object")
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _check_bytes(size: int) -> None:
    if size > MAX_BYTES:
        raise CacheError(f"{size} bytes, more than the {MAX_BYTES} that are read: keep fewer records in one file")


def _check_json_size(data: bytes) -> None:
    _check_bytes(len(data))
    widest = 1 if data.isascii() and b"\\u" not in data else 4  # one emoji makes each letter of its str 4 bytes
    _check_memory(
        2 * widest * len(data)
        + _LEAF_BYTES * (data.count(b",") + data.count(b":"))
        + _CONTAINER_BYTES * (data.count(b"[") + data.count(b"{"))
    )


def _check_memory(claimed: int) -> None:
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
                _check_memory(claimed)
    except CacheError as error:
        raise CacheError(f"not a pickle of plain data: {error} (at byte {position})") from None
    except (ValueError, IndexError) as error:
        raise CacheError(f"not a pickle of plain data: {error} (after byte {position})") from error
    if position != len(data) - 1:
        raise CacheError("not a pickle of plain data: something follows its end")
