"""The layout of a large .json cache file, by which its records are found and put together without parsing any.

It is the layout that `codec.dumps_json` gives a file, where the depth of every line shows in its indent: each record
is kept as the text that it is, and parsed when it is asked for. So a file may be larger than what is read as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from autoplan.cache import codec
from autoplan.errors import CacheError

MAX_BYTES = 64 << 20  # of a file in this layout
MAX_CONTAINERS = 2 << 20  # of its lists and dicts, parsed one record after the other: some seconds
DEPTH = 3  # of a record
_KEY = re.compile(rb'\n      "([0-9a-f]{64})": ')  # a line that is three deep: no string can hold a newline
_ENTRY_BYTES = 512  # CPython: a key, the head of its bytes, a match and their slots


def records_in(data: bytes, format: str, schema: int, kinds: Sequence[str]) -> dict[str, dict[str, bytes]] | None:
    """The JSON of every record by kind and key, not looked into; None for what is too large or laid out otherwise."""
    start = _start(format, schema)
    if not data.startswith(start) or not _fits(data):
        return None
    position, found = len(start), dict[str, dict[str, bytes]]()
    for i, kind in enumerate(kinds):
        opening, comma = _opening(kind), b"," if i < len(kinds) - 1 else b""
        if not data.startswith(opening, position):
            return None
        position += len(opening)
        if data.startswith(b"}" + comma, position):
            found[kind], position = {}, position + 1 + len(comma)
            continue
        end = data.find(b"\n    }" + comma, position)
        keys = list(_KEY.finditer(data, position, max(end, position)))
        if not keys or keys[0].start() != position:
            return None
        ends = [following.start() - 1 for following in keys[1:]]
        if any(data[at] != ord(",") for at in ends):
            return None
        pairs = zip(keys, [*ends, end], strict=True)
        found[kind] = {key[1].decode(): data[key.end() : record_end] for key, record_end in pairs}
        if len(found[kind]) < len(keys):  # a key comes twice
            return None
        position = end + 6 + len(comma)
    return found if data[position:] == b"\n  }\n}\n" else None


def file_of(records: Mapping[str, Mapping[str, bytes]], format: str, schema: int) -> bytes:
    """The file that holds the JSON of these records, by kind and key, in the order of their keys.

    Raises:
        CacheError: there are too many for one file.
    """
    parts = [_start(format, schema)]
    for kind, own in records.items():
        parts.append(_opening(kind))
        for key in sorted(own):
            parts += [b"\n      ", codec.dumps_part(key, 0, 0), b": ", own[key], b","]
        if own:
            parts[-1] = b"\n    "
        parts += [b"}", b","]
    parts[-1] = b"\n  }\n}\n"
    data = b"".join(parts)
    if not _fits(data):
        raise CacheError(f"too much to be read again ({len(data)} bytes): keep fewer records in one file")
    return data


def _start(format: str, schema: int) -> bytes:
    return f'{{\n  "format": "{format}",\n  "schema": {schema},\n  "records": {{'.encode()


def _opening(kind: str) -> bytes:
    return f'\n    "{kind}": {{'.encode()


def _fits(data: bytes) -> bool:
    """Whether it is to be read. The records found in it are copies, and count in full."""
    claimed = 2 * len(data) + _ENTRY_BYTES * data.count(b'\n      "')
    containers = data.count(b"{") + data.count(b"[")
    return len(data) <= MAX_BYTES and claimed <= codec.MAX_MEMORY and containers <= MAX_CONTAINERS
