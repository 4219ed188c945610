"""Where each record of a large cache file lies, without parsing the file: that is left for when a record is asked for.

It goes by the layout that `codec.dumps_json` gives a file, where the depth of every line shows in its indent. Of any
other layout, and of a file that is cut off, nothing is said; whoever asks then has to parse all of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_KEY = re.compile(rb'\n      "([0-9a-f]{64})": ')  # a line that is three deep: no string can hold a newline


def records_in(data: bytes, format: str, schema: int, kinds: Sequence[str]) -> dict[str, dict[str, bytes]] | None:
    """The JSON of every record by kind and key, not looked into; None for a file of another layout or schema."""
    start = f'{{\n  "format": "{format}",\n  "schema": {schema},\n  "records": {{'.encode()
    if not data.startswith(start):
        return None
    position, found = len(start), dict[str, dict[str, bytes]]()
    for i, kind in enumerate(kinds):
        opening, comma = f'\n    "{kind}": {{'.encode(), b"," if i < len(kinds) - 1 else b""
        if not data.startswith(opening, position):
            return None
        position += len(opening)
        if data.startswith(b"}" + comma, position):
            found[kind], position = {}, position + 1 + len(comma)
            continue
        end = data.find(b"\n    }" + comma, position)
        first, *pieces = _KEY.split(data[position:end])
        keys, records = pieces[::2], pieces[1::2]
        if end < 0 or first or not all(record.endswith(b",") for record in records[:-1]):
            return None
        records[:-1] = [record[:-1] for record in records[:-1]]
        found[kind] = {key.decode(): record for key, record in zip(keys, records, strict=True)}
        if len(found[kind]) < len(keys):  # a key comes twice
            return None
        position = end + 6 + len(comma)
    return found if data[position:] == b"\n  }\n}\n" else None
