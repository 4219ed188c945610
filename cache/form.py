"""What a record is, and the files that hold records, of schema 1:

    {"format": "autoplan cache", "schema": 1,
     "records": {"timings": {key: record}, "sensitivities": {key: record}, "plans": {key: record}}}

A record is `{"fingerprint": {...}, "value": {...}, "stored": "2026-01-31T12:00:00+00:00", "digest": "..."}`: all that
the value depends on, readable, beside the value; when it was put; and a digest of these, so that no changed letter goes
unseen. Its key is the digest of its fingerprint, so that nothing is ever found under a key that it does not belong to.
A `.pkl` file has the same content, with each record as a str of its JSON: a dict would be a hundred opcodes to check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard, cast, get_args

from autoplan.cache import codec, files, peek
from autoplan.cache.codec import Plain
from autoplan.errors import CacheError

Kind = Literal["timings", "sensitivities", "plans"]
Record: TypeAlias = dict[str, Any]  # {"fingerprint": {...}, "value": {...}}; in files also "stored" and "digest"
Records: TypeAlias = dict[str, dict[str, Any]]  # kind -> key -> record as in the file; bytes: its JSON, yet to be read

KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = "autoplan cache"
SCHEMA = 1
MIGRATIONS: dict[int, codec.Migration] = {}  # files of every schema from 1 on stay readable
KEY = re.compile(r"[0-9a-f]{64}")

_FIELDS = {"fingerprint", "value", "stored", "digest"}


class Found(NamedTuple):
    """A record that is whole."""

    held: Record | bytes  # to put elsewhere: as dicts or as JSON; of a folder on one line, of a large file on many
    record: Record


def empty() -> Records:
    return {kind: {} for kind in KINDS}


def update(records: Records, added: Records) -> None:
    for kind, found in added.items():
        records[kind].update(found)


def content(record: Mapping[str, Any]) -> Record:
    return {"fingerprint": record["fingerprint"], "value": record["value"]}


def _parsed(held: object) -> Any:
    if not isinstance(held, bytes):
        return held
    try:
        return codec.loads_json(held)
    except CacheError:
        return None  # no record, and said to be none


def _is_text_of_many(held: object) -> TypeGuard[bytes]:
    """Whether this is a record as text from a file that holds others too: only that has a newline."""
    return isinstance(held, bytes) and b"\n" in held


def _is_laid_out(held: object) -> TypeGuard[bytes]:
    """Whether this is a record as the text that it is in a .json file; elsewhere it is on one line."""
    return isinstance(held, bytes) and b"\n" in held[:-1]


def all_parsed(records: Records) -> Records:
    texts = [held for own in records.values() for held in own.values() if _is_text_of_many(held)]
    codec.check_memory(sum(map(codec.json_memory, texts)))  # one small file may hold them all
    return {kind: {key: _parsed(record) for key, record in own.items()} for kind, own in records.items()}


def found(key: str, held: object) -> Found | None:
    """The record that is held, if it is one to trust."""
    record = _parsed(held)
    return None if problem_of(key, record) else Found(cast("Record | bytes", held), cast(Record, record))


def problem_of(key: str, record: object) -> str | None:
    """Why this is no record to trust under `key`; None if it is."""
    if not isinstance(record, dict) or not {"fingerprint", "value"} <= set(record) <= _FIELDS:
        return "a record is {'fingerprint': {...}, 'value': {...}}"
    fingerprint, value = record["fingerprint"], record["value"]
    if not isinstance(fingerprint, dict) or not isinstance(value, dict):
        return "fingerprint and value are dicts"
    expected = codec.digest_of_plain(fingerprint)
    if key != expected:
        return f"the digest of its fingerprint is {expected}"
    try:
        codec.unsealed(record)
    except CacheError as error:
        return str(error)
    return None


def problems_of(records: Records) -> dict[str, str]:
    found = {
        f"{kind}/{key}": problem_of(key, _parsed(held)) for kind, own in records.items() for key, held in own.items()
    }
    return {where: problem for where, problem in found.items() if problem}


def to_data(records: Records) -> dict[str, Plain]:
    # Sorted, so that two files with the same records are the same bytes and a diff shows what was added.
    ordered: dict[str, Plain] = {kind: dict(sorted(records.get(kind, {}).items())) for kind in KINDS}
    return {"format": FORMAT, "schema": SCHEMA, "records": ordered}


def from_data(data: Plain) -> Records:
    """The records in the data of a file. Each is judged only when it is asked for: a bad one spoils no other."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise codec.ForeignError(f"it holds something else than an {FORMAT} (a plan, perhaps?); give another path")
    kinds = codec.migrated(data, SCHEMA, MIGRATIONS).get("records")
    if not isinstance(kinds, dict) or set(kinds) != set(KINDS):
        raise CacheError(f"records are not {', '.join(KINDS)}")
    records = empty()
    for kind, found in kinds.items():
        if not isinstance(found, dict):
            raise CacheError(f"{kind} is not a dict")
        records[kind] = {key: held.encode() + b"\n" if isinstance(held, str) else held for key, held in found.items()}
    return records


def glance(place: files.Place) -> Records | None:
    """The records of a file as text, none looked into; None where it takes a parser to find them. Raises OSError."""
    data = place.read(peek.MAX_BYTES) if place.suffix == ".json" else b""
    return cast("Records | None", peek.records_in(data, FORMAT, SCHEMA, KINDS))


def read(place: files.Place) -> Records:
    """The records of a file. Raises CacheError where it cannot be read, or not all of it is plain data."""
    try:
        records = glance(place)
    except OSError as error:
        raise CacheError(f"cannot read {place}: {error}") from error
    if records is None:
        data = codec.read(place)
        try:
            return from_data(data)
        except CacheError as error:
            raise type(error)(f"cannot use {place}: {error}") from error
    for kind, own in records.items():
        for key, text in own.items():
            try:
                codec.loads_json(text)
            except CacheError as error:
                raise CacheError(f"cannot read {place}: {kind}/{key}: {error}") from error
    return records


def write(place: files.Place, records: Records) -> None:
    """Put a file of these records in place of what is there. Raises CacheError."""
    if place.suffix == ".pkl":
        lines: Records = {
            kind: {key: _on_one_line(held).decode() for key, held in records[kind].items()} for kind in KINDS
        }
        codec.write(place, to_data(lines))
    elif place.suffix == ".json" and any(records.values()):
        codec.write_bytes(place, peek.file_of({kind: _texts(records[kind]) for kind in KINDS}, FORMAT, SCHEMA))
    else:
        codec.write(place, to_data(records))


def _on_one_line(held: Any) -> bytes:
    return held.rstrip() if isinstance(held, bytes) and not _is_laid_out(held) else line(_parsed(held))


def _texts(records: dict[str, Any]) -> dict[str, bytes]:
    return {
        key: held if _is_laid_out(held) else codec.dumps_part(_parsed(held), peek.DEPTH, len(key) + 4)
        for key, held in records.items()
    }


def record_in(file: files.Place, kind: Kind, key: str) -> Record:
    """The record in the file of a folder. Raises CacheError unless it is whole."""
    record = from_data(codec.read(file))[kind].get(key)
    if problem := problem_of(key, record):
        raise CacheError(f"{file}: {problem}")
    return cast(Record, record)


def record_file(kind: Kind, key: str, held: Any) -> bytes:
    """The file of one record in a folder."""
    before, after = codec.dumps_line(to_data({kind: {key: None}})).split(b"null")
    return before + _on_one_line(held) + after


def line(record: Any) -> bytes:
    """A record as the text that it is in a folder."""
    return codec.dumps_line(record).rstrip()
