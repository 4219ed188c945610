"""PlanCache: what has been measured and planned before, in memory or in one file that many processes share.

The file, schema 1 (`.json`, or `.pkl` with the same content):

    {"format": "autoplan cache", "schema": 1,
     "records": {"timings": {key: record}, "sensitivities": {key: record}, "plans": {key: record}}}

A record is `{"fingerprint": {...}, "value": {...}}`: all that the value depends on, readable, beside the value. Its key
is the digest of its fingerprint, so that nothing is ever found under a key that it does not belong to.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import filelock
import platformdirs

from autoplan.cache import codec
from autoplan.cache.codec import Plain
from autoplan.errors import CacheError

Kind = Literal["timings", "sensitivities", "plans"]
Record: TypeAlias = dict[str, Any]  # {"fingerprint": {...}, "value": {...}}
_Records: TypeAlias = dict[str, dict[str, Plain]]  # kind -> key -> record

KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = "autoplan cache"
SCHEMA = 1
# What makes data of schema n into schema n + 1. Files of every schema from 1 on stay readable.
MIGRATIONS: dict[int, Callable[[dict[str, Plain]], dict[str, Plain]]] = {}

_LOCK_SECONDS = 60.0
_logger = logging.getLogger(__name__)


class PlanCache:
    """Timings, sensitivities and plans by key: in memory, or kept in the file at `path` (`.json` or `.pkl`).

    With a path, what is put is merged into the file at once, under a lock, and the file is replaced whole. A file that
    cannot be trusted is set aside as `<name>.unreadable-<n>`; where the file cannot be read or written at all (no
    permission, disk full, made by a newer autoplan) it is left as it is and the cache works in memory. Either is one
    logged warning: a file never makes planning fail. A pickled cache arrives as a cache in memory.

    Raises:
        CacheError: the suffix of `path` is neither .json nor .pkl.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._records: _Records = _empty()
        self._unsaved: _Records = _empty()
        self._keeps_off = False  # whether the file is one that we must not touch
        self._lock = threading.RLock()
        if self.path is not None:
            codec.check_suffix(self.path)
            self._records = self._read()

    @classmethod
    def default(cls) -> PlanCache:
        """The user's own cache: the file that AUTOPLAN_CACHE names, else `autoplan/cache.json` in the cache folder."""
        named = os.environ.get("AUTOPLAN_CACHE")
        return cls(named or platformdirs.user_cache_path("autoplan", appauthor=False) / "cache.json")

    def get(self, kind: Kind, key: str) -> Record | None:
        """A copy of the record, or None where there is none that is whole."""
        _check_kind(kind)
        with self._lock:
            record = self._records[kind].get(key)
        if record is None or _problem(key, record):
            return None
        return cast(Record, codec.plain(record))

    def put(self, kind: Kind, key: str, record: Mapping[str, object]) -> None:
        """Keep a record (see `entry`); one that is there under the same key is replaced.

        Raises:
            CacheError: the record is not plain data, lacks its fingerprint or value, or is under another key than the
                digest of its fingerprint.
        """
        self.put_many(kind, {key: record})

    def put_many(self, kind: Kind, records: Mapping[str, Mapping[str, object]]) -> None:
        """Keep several records with one write of the file: all of them, or none and a CacheError as for `put`."""
        _check_kind(kind)
        checked = _empty()
        for key, record in records.items():
            copy = codec.plain(dict(record))
            problem = _problem(key, copy)
            if problem:
                raise CacheError(f"cannot keep this in {kind} under {key!r}: {problem}")
            checked[kind][key] = copy
        self._add(checked)

    def merge(self, other: PlanCache) -> None:
        """Keep all whole records of `other` too, with one write; under a key that both hold, the record of `other`."""
        records = _from_data(other.to_dict())
        self._add(
            {
                kind: {key: record for key, record in found.items() if not _problem(key, record)}
                for kind, found in records.items()
            }
        )

    def keys(self, kind: Kind) -> list[str]:
        """The keys of one kind, in order."""
        _check_kind(kind)
        with self._lock:
            return sorted(self._records[kind])

    def __iter__(self) -> Iterator[tuple[Kind, str]]:
        return iter([(kind, key) for kind in KINDS for key in self.keys(kind)])

    def __len__(self) -> int:
        return sum(len(records) for records in self._records.values())

    def __bool__(self) -> bool:
        return True  # an empty cache is still a cache: `if cache:` asks whether there is one

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same records, wherever they keep them."""
        return self._records == other._records if isinstance(other, PlanCache) else NotImplemented

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self._records[kind])} {kind}" for kind in KINDS)
        return f"PlanCache({counts}, {'in memory' if self.path is None else self.path})"

    def to_dict(self) -> dict[str, Plain]:
        """All of it as plain data, in the form of the file."""
        with self._lock:
            return cast("dict[str, Plain]", codec.plain(_to_data(self._records)))

    @classmethod
    def from_dict(cls, data: object) -> PlanCache:
        """A cache in memory with the records of `to_dict`, of this schema or an older one.

        Raises:
            CacheError: `data` is something else, or of a newer schema.
        """
        cache = cls()
        cache._records = _from_data(codec.plain(data))
        return cache

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all records to `path` (`.json` or `.pkl`), in place of what is there.

        Raises:
            CacheError: the suffix is unknown or the file cannot be written.
        """
        codec.write(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlanCache:
        """A cache in memory with the records of the file; `PlanCache(path)` is one that keeps to the file.

        Raises:
            CacheError: the file cannot be read or trusted, or was written by a newer autoplan.
        """
        data = codec.read(path)
        try:
            return cls.from_dict(data)
        except CacheError as error:
            raise CacheError(f"cannot use {path}: {error}") from error

    def __getstate__(self) -> dict[str, Plain]:
        return self.to_dict()

    def __setstate__(self, state: object) -> None:
        # In memory: the path may mean nothing where this arrives.
        self.__dict__.update(PlanCache.from_dict(state).__dict__)

    # -- the file ----------------------------------------------------------------------------------------------------

    def _add(self, records: _Records) -> None:
        with self._lock:
            _update(self._records, records)
            if self.path is not None:
                _update(self._unsaved, records)  # stays there until a write succeeds
                self._write()

    def _write(self) -> None:
        if self.path is None or self._keeps_off:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._file_lock():
                stored = self._read(locked=True)
                if self._keeps_off:
                    return
                _update(stored, self._unsaved)
                codec.write(self.path, _to_data(stored))
        except (OSError, CacheError) as error:
            _warn_once(f"the plan cache {self.path} was not written, its new records are in memory only: {error}")
            return
        _update(self._records, stored)
        self._unsaved = _empty()

    def _read(self, locked: bool = False) -> _Records:
        """What the file holds. One that cannot be trusted is set aside, one that is not ours to judge is left alone."""
        path = cast(Path, self.path)
        try:
            return _from_data(codec.read(path))
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return _empty()
            problem = str(error)
            if not isinstance(error.__cause__, OSError) and not isinstance(error, _ForeignError):
                try:
                    if locked:
                        aside = _set_aside(path)
                        _warn_once(
                            f"the plan cache {path} was set aside as {aside.name} and a new one begun: {problem}"
                        )
                        return _empty()
                    with self._file_lock():
                        return self._read(locked=True)  # another process may have put it right by now
                except OSError as refusal:
                    problem = f"{problem}; it could not be set aside either: {refusal}"
            self._keeps_off = True
            _warn_once(f"the plan cache {path} is left alone, this run works in memory: {problem}")
            return _empty()

    def _file_lock(self) -> filelock.BaseFileLock:
        return filelock.FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS)


def entry(fingerprint: Mapping[str, object], value: Mapping[str, object]) -> tuple[str, Record]:
    """The key and the record for `value`, which depends on `fingerprint` alone: `cache.put(kind, *entry(...))`."""
    return codec.digest(dict(fingerprint)), {"fingerprint": dict(fingerprint), "value": dict(value)}


def resolve(cache: PlanCache | str | os.PathLike[str] | bool | None) -> PlanCache | None:
    """The cache that a caller's `cache=` means: one as it is, a path, None for the user's own, False for none.

    Raises:
        CacheError: it is none of these.
    """
    if isinstance(cache, PlanCache):
        return cache
    if cache is None:
        return PlanCache.default()
    if cache is False:
        return None
    if not isinstance(cache, str | os.PathLike) or "://" in os.fspath(cache):
        raise CacheError(f"cache={cache!r}: use a PlanCache, a path to a .json or .pkl file, None or False")
    return PlanCache(cache)


class _ForeignError(CacheError):
    """A file that is whole, but that this version must neither read nor replace."""


def _empty() -> _Records:
    return {kind: {} for kind in KINDS}


def _update(records: _Records, added: _Records) -> None:
    for kind, found in added.items():
        records[kind].update(found)


def _to_data(records: _Records) -> dict[str, Plain]:
    # Sorted, so that two files with the same records are the same bytes and a diff shows what was added.
    ordered: dict[str, Plain] = {kind: {key: records[kind][key] for key in sorted(records[kind])} for kind in KINDS}
    return {"format": FORMAT, "schema": SCHEMA, "records": ordered}


def _from_data(data: Plain) -> _Records:
    """The records in the data of a file. Each is judged only when it is asked for: a bad one spoils no other."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _ForeignError(f"it holds something else than an {FORMAT} (a plan, perhaps?); give another path")
    schema = data.get("schema")
    if type(schema) is not int or schema < 1:
        raise CacheError(f"schema {schema!r} is not a version")
    if schema > SCHEMA:
        raise _ForeignError(f"written by a newer autoplan (schema {schema} > {SCHEMA})")
    for older in range(schema, SCHEMA):
        try:
            data = MIGRATIONS[older](data)
        except Exception as error:  # a migration expects the data of its schema, and this may be anything
            raise CacheError(f"not of schema {older}: {error!r}") from error
    kinds = data.get("records")
    if not isinstance(kinds, dict) or set(kinds) != set(KINDS):
        raise CacheError(f"records are not {', '.join(KINDS)}")
    records = _empty()
    for kind, found in kinds.items():
        if not isinstance(found, dict):
            raise CacheError(f"{kind} is not a dict")
        records[kind] = found
    return records


def _problem(key: str, record: Plain) -> str | None:
    """Why this is no record to trust under `key`; None if it is."""
    if not isinstance(record, dict) or not {"fingerprint", "value"} <= set(record):
        return "a record is {'fingerprint': {...}, 'value': {...}}"
    fingerprint, value = record["fingerprint"], record["value"]
    if not isinstance(fingerprint, dict) or not isinstance(value, dict):
        return "fingerprint and value are dicts"
    expected = codec.digest(fingerprint)
    return None if key == expected else f"the digest of its fingerprint is {expected}"


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise CacheError(f"there is no kind of record {kind!r}, only {', '.join(KINDS)}")


def _set_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.unreadable-{number}")).exists():
        number += 1
    return path.rename(aside)


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
