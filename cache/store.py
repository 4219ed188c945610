"""PlanCache: what has been measured and planned before, in memory, in a folder, in one file, or at a URL.

A file, schema 1 (`.json`, or `.pkl` with the same content):

    {"format": "autoplan cache", "schema": 1,
     "records": {"timings": {key: record}, "sensitivities": {key: record}, "plans": {key: record}}}

A record is `{"fingerprint": {...}, "value": {...}, "stored": "2026-01-31T12:00:00+00:00", "digest": "..."}`: all that
the value depends on, readable, beside the value; when it was put; and a digest of these, so that no changed letter goes
unseen. Its key is the digest of its fingerprint, so that nothing is ever found under a key that it does not belong to.

A folder holds one such file per record, `<folder>/<kind>/<key>.json`, on one line. So opening it reads nothing, finding
a record reads one small file, and a write touches no record but its own: that is what many processes can share, and
what an object store can hold, where nothing can be locked.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard, cast, get_args

import platformdirs

from autoplan.cache import codec, files, peek
from autoplan.cache.codec import Plain
from autoplan.errors import CacheError

Kind = Literal["timings", "sensitivities", "plans"]
Record: TypeAlias = dict[str, Any]  # {"fingerprint": {...}, "value": {...}}; in files also "stored" and "digest"
_Records: TypeAlias = dict[str, dict[str, Any]]  # kind -> key -> record as in the file; bytes: its JSON, yet to be read
Location: TypeAlias = "str | os.PathLike[str]"

KINDS: tuple[Kind, ...] = get_args(Kind)
FORMAT = "autoplan cache"
SCHEMA = 1
MIGRATIONS: dict[int, codec.Migration] = {}  # files of every schema from 1 on stay readable

_FIELDS = {"fingerprint", "value", "stored", "digest"}
_KEY = re.compile(r"[0-9a-f]{64}")
_logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """A record as `list` and `prune` see it."""

    kind: Kind
    key: str
    stored: datetime | None  # when it was put; None where the record does not say
    nbytes: int  # as a file in a folder


class _Found(NamedTuple):
    """A record that is whole."""

    held: Record | bytes  # to put elsewhere: as dicts or as JSON; of a folder on one line, of a large file on many
    record: Record


class PlanCache:
    """Timings, sensitivities and plans by key: in memory, or kept at `path`.

    `path` is a folder (best: any number of processes write to it at once, and none rewrites what another wrote), one
    file (`.json` or `.pkl`, rewritten under a lock at every put), or an fsspec URL of either (`s3://bucket/plans/`; a
    URL has no lock, so let several processes write to a folder only).

    `site` is a cache that is looked into first and never written, such as one that a fleet shares. With `read_only`,
    what is put stays in memory.

    What cannot be trusted is set aside as `<name>.unreadable-<n>` (at a URL it is left alone); what cannot be read or
    written at all (no permission, disk full, made by a newer autoplan) is left as it is, and the cache works in memory.
    Either is one logged warning: no file makes planning fail. A pickled cache arrives as a cache in memory.

    Raises:
        CacheError: `path` is no such place, or what its URL needs is not installed.
    """

    def __init__(
        self, path: Location | None = None, *, site: PlanCache | Location | None = None, read_only: bool = False
    ) -> None:
        self.path = None if path is None else path if "://" in os.fspath(path) else Path(path)
        self.read_only = read_only
        self.site = PlanCache(site, read_only=True) if isinstance(site, str | os.PathLike) else site
        self._store = None if path is None else _open(path, read_only)
        self._records = _empty()  # what no file holds: everything without a path, else what could not be written
        self._lock = threading.RLock()

    @classmethod
    def default(cls, *, site: PlanCache | Location | None = None) -> PlanCache:
        """The user's own cache: what AUTOPLAN_CACHE names, else the folder `autoplan` in the user's cache folder."""
        return cls(default_path(), site=site)

    def get(self, kind: Kind, key: str) -> Record | None:
        """A copy of the record, or None where there is none that is whole."""
        _check_kind(kind)
        found = self._find(kind, key)
        return None if found is None else cast(Record, codec.plain(_content(found.record)))

    def put(self, kind: Kind, key: str, record: Mapping[str, object]) -> None:
        """Keep a record (see `entry`); one that is there under the same key is replaced.

        Raises:
            CacheError: the record is not plain data, lacks its fingerprint or value, or is under another key than the
                digest of its fingerprint.
        """
        self.put_many(kind, {key: record})

    def put_many(self, kind: Kind, records: Mapping[str, Mapping[str, object]]) -> None:
        """Keep several records under one lock: all of them, or none and a CacheError as for `put`."""
        _check_kind(kind)
        checked, now = _empty(), datetime.now(timezone.utc).isoformat(timespec="seconds")
        for key, record in records.items():
            copy: Any = codec.plain(dict(record))
            problem = _problem(key, copy)
            if problem:
                raise CacheError(f"cannot keep this in {kind} under {key!r}: {problem}")
            checked[kind][key] = codec.sealed_plain({**_content(copy), "stored": now})
        self._add(checked)

    def merge(self, other: PlanCache) -> None:
        """Keep all whole records of `other` too; under a key that both hold, the record of `other`."""
        self._add(other._whole())

    def discard(self, kind: Kind, keys: Collection[str]) -> None:
        """Forget own records under these keys, if there are any.

        Raises:
            CacheError: the cache is read-only, or cannot be written.
        """
        _check_kind(kind)
        with self._writing():
            self._discard(kind, keys)

    def prune(self, *, older_than: timedelta | None = None, max_bytes: int | None = None) -> list[Entry]:
        """Forget own records put longer ago than `older_than`, then the oldest until the rest fit; returns what went.

        Records that do not say when they were put count as oldest.

        Raises:
            CacheError: the cache is read-only, or cannot be written.
        """
        with self._writing():
            oldest = datetime.min.replace(tzinfo=timezone.utc)
            found = sorted(self._entries(), key=lambda entry: (entry.stored or oldest, entry.kind, entry.key))
            size, gone = sum(entry.nbytes for entry in found), []
            now = datetime.now(timezone.utc)
            for entry in found:
                too_old = older_than is not None and (entry.stored is None or now - entry.stored > older_than)
                if too_old or (max_bytes is not None and size > max_bytes):
                    gone.append(entry)
                    size -= entry.nbytes
            for kind in KINDS:
                self._discard(kind, [entry.key for entry in gone if entry.kind == kind])
            if isinstance(self._store, _Folder):
                self._store.sweep()
        return gone

    def entries(self) -> list[Entry]:
        """All whole own records, without their content."""
        with self._lock:
            return self._entries()

    def problems(self) -> dict[str, str]:
        """What of the own records and files cannot be used, and why: {where: reason}. Reads every record."""
        with self._lock:
            return _problems(self._records) | (self._store.problems() if self._store else {})

    @property
    def unsaved(self) -> int:
        """How many records no file holds: all without a path, else those that could not be written."""
        return sum(map(len, self._records.values()))

    def keys(self, kind: Kind) -> list[str]:
        """The keys of one kind, in order."""
        _check_kind(kind)
        with self._lock:
            return sorted({*self._own_keys(kind), *(self.site.keys(kind) if self.site else ())})

    def __iter__(self) -> Iterator[tuple[Kind, str]]:
        return iter([(kind, key) for kind in KINDS for key in self.keys(kind)])

    def __len__(self) -> int:
        return sum(len(self.keys(kind)) for kind in KINDS)

    def __bool__(self) -> bool:
        return True  # an empty cache is still a cache: `if cache:` asks whether there is one

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same records, wherever they keep them and whenever they were put."""
        return self._contents() == other._contents() if isinstance(other, PlanCache) else NotImplemented

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.keys(kind))} {kind}" for kind in KINDS)
        where = "in memory" if self.path is None else f"{self.path}{', read-only' if self.read_only else ''}"
        return f"PlanCache({counts}, {where}{f', site {self.site!r}' if self.site else ''})"

    def to_dict(self) -> dict[str, Plain]:
        """All whole records, those of the site cache too, as plain data in the form of the file.

        Raises:
            CacheError: they come from files that hold more than is built in memory at once.
        """
        return cast("dict[str, Plain]", codec.plain(_to_data(_all_parsed(self._whole()))))

    @classmethod
    def from_dict(cls, data: object) -> PlanCache:
        """A cache in memory with the records of `to_dict`, of this schema or an older one.

        Raises:
            CacheError: `data` is something else, or of a newer schema.
        """
        cache = cls()
        cache._records = _from_data(codec.plain(data))
        return cache

    def save(self, path: Location) -> None:
        """Write all records to one file, a path or URL ending in `.json` or `.pkl`, in place of what is there.

        Raises:
            CacheError: the suffix is unknown, the file cannot be written, or it would be larger than what is read.
        """
        _write(files.place(path), self._whole())

    @classmethod
    def load(cls, path: Location) -> PlanCache:
        """A cache in memory with the records of one file; `PlanCache(path)` is one that keeps to its place.

        Raises:
            CacheError: the file cannot be read or trusted, or was written by a newer autoplan.
        """
        cache = cls()
        cache._records = _read(files.place(path))
        return cache

    def __getstate__(self) -> dict[str, Plain]:
        return self.to_dict()

    def __setstate__(self, state: object) -> None:
        # In memory: the path may mean nothing where this arrives.
        self.__dict__.update(PlanCache.from_dict(state).__dict__)

    # -- inside: records as they are in files ------------------------------------------------------------------------

    def _find(self, kind: Kind, key: str) -> _Found | None:
        if self.site is not None and (found := self.site._find(kind, key)) is not None:
            return found
        with self._lock:
            return self._find_own(kind, key)

    def _find_own(self, kind: Kind, key: str) -> _Found | None:
        held = self._records[kind].get(key)
        if held is None and self._store is not None:
            return self._store.get(kind, key)
        return _found(key, held)

    def _own_keys(self, kind: Kind) -> set[str]:
        return {*self._records[kind], *(self._store.keys(kind) if self._store else ())}

    def _whole(self) -> _Records:
        records = _empty()
        for kind, key in self:
            if found := self._find(kind, key):
                records[kind][key] = found.held
        return records

    def _contents(self) -> dict[tuple[str, str], str]:
        found = ((kind, key, self._find(kind, key)) for kind, key in self)
        return {(kind, key): codec.digest_of_plain(_content(its.record)) for kind, key, its in found if its}

    def _entries(self) -> list[Entry]:
        found = ((kind, key, self._find_own(kind, key)) for kind in KINDS for key in sorted(self._own_keys(kind)))
        return [_entry(kind, key, its.record) for kind, key, its in found if its]

    def _add(self, records: _Records) -> None:
        with self._lock:
            _update(self._records, records)
            if self._store is None or self.read_only:
                return
            try:
                self._records = self._store.put(self._records)
            except (OSError, CacheError) as error:  # they stay in memory, and go with the next write that succeeds
                _warn_once(f"the plan cache {self.path} was not written, its new records are in memory only: {error}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        if self.read_only:
            raise CacheError(f"the plan cache {self.path} was opened to be read only")
        try:
            with self._lock, self._store.locked() if self._store else contextlib.nullcontext():
                yield
        except OSError as error:
            raise CacheError(f"cannot write {self.path}: {error}") from error

    def _discard(self, kind: Kind, keys: Collection[str]) -> None:
        for key in keys:
            self._records[kind].pop(key, None)
        if self._store and keys:
            self._store.remove(kind, keys)


class _File:
    """All records in one file, held in memory and merged into the file under its lock.

    Those of a .json file are held as its text, and parsed when they are asked for.
    """

    def __init__(self, place: files.Place, read_only: bool) -> None:
        self._place, self._read_only = place, read_only
        self._lock = place.lock()
        self._keeps_off = ""  # why the file is one that we must not touch
        self._records = self._glance() or self._read()

    def keys(self, kind: Kind) -> Collection[str]:
        return self._records[kind].keys()

    def get(self, kind: Kind, key: str) -> _Found | None:
        return _found(key, self._records[kind].get(key))

    def put(self, records: _Records) -> _Records:
        """Merge these into the file; returns those that it cannot hold."""
        if self._keeps_off:
            return records
        with self.locked():
            _update(self._records, records)
            _write(self._place, self._records)
        return _empty()

    def remove(self, kind: Kind, keys: Collection[str]) -> None:
        with self.locked():
            for key in keys:
                self._records[kind].pop(key, None)
            _write(self._place, self._records)

    def problems(self) -> dict[str, str]:
        if self._keeps_off:
            return {str(self._place): self._keeps_off}
        return _problems(self._records)

    def _glance(self) -> _Records | None:
        """The records as text, none looked into; None where it takes a parser to find them."""
        try:
            return _glance(self._place)
        except OSError:
            return None  # whoever reads it next will say why

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file's lock, with its newest records in memory. Raises CacheError for a file that is left alone."""
        self._place.parent.make_folder()
        with self._lock:
            self._records = self._read(locked=True)
            if self._keeps_off:
                raise CacheError(f"{self._place} is left alone: {self._keeps_off}")
            yield

    def _read(self, locked: bool = False) -> _Records:
        """What the file holds. One that cannot be trusted is set aside, one that is not ours to judge is left alone."""
        try:
            return _read(self._place)
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return _empty()
            problem = str(error)
            if _is_untrusted(error) and not self._read_only and not self._place.is_shared:
                try:
                    if locked:
                        aside = self._place.set_aside()
                        _warn_once(
                            f"the plan cache {self._place} was set aside as {aside} and a new one begun: {problem}"
                        )
                        return _empty()
                    with self._lock:
                        return self._read(locked=True)  # another process may have put it right by now
                except OSError as refusal:
                    problem = f"{problem}; it could not be set aside either: {refusal}"
            self._keeps_off = problem
            _warn_once(f"the plan cache {self._place} is left alone, this run works in memory: {problem}")
            return _empty()


class _Folder:
    """One file per record. Reading takes no lock: files are replaced whole."""

    def __init__(self, place: files.Place, read_only: bool) -> None:
        self._place, self._read_only = place, read_only
        self._lock = (place / "cache").lock()
        self._listed: dict[str, set[str]] = {}  # of a URL, where asking for what is not there takes a round trip

    def keys(self, kind: Kind) -> Collection[str]:
        try:
            names = (self._place / kind).names()
        except OSError as error:
            _warn_once(f"the plan cache {self._place} cannot be listed, this run works in memory: {error}")
            return []
        return [name[:-5] for name in names if name.endswith(".json") and _KEY.fullmatch(name[:-5])]

    def get(self, kind: Kind, key: str) -> _Found | None:
        if not _KEY.fullmatch(key):
            return None
        if self._place.is_shared:
            if kind not in self._listed:
                self._listed[kind] = set(self.keys(kind))
            if key not in self._listed[kind]:
                return None
        try:
            record = self._read(kind, key)
            return None if record is None else _Found(_line(record), record)
        except codec.ForeignError as error:
            _warn_once(f"some records in the plan cache {self._place} are not used: {error}")
            return None

    def put(self, records: _Records) -> _Records:
        """Write a file for each of these; returns those whose file is not ours to replace."""
        refused = _empty()
        with self.locked():
            for kind in KINDS:
                if records[kind]:
                    (self._place / kind).make_folder()
                present = set(self.keys(kind)) if len(records[kind]) > 1 else records[kind].keys()
                for key, held in records[kind].items():
                    file, data = self._file(kind, key), _record_file(kind, key, held)
                    there = _bytes_in(file, len(data)) if key in present else None
                    if there == data:
                        continue
                    if there is not None:
                        try:
                            self._read(kind, key)  # what cannot be trusted is set aside, not written over
                        except codec.ForeignError:
                            refused[kind][key] = held
                            continue
                    file.write(data, durable=False)
                    self._listed.get(kind, set()).add(key)
        return refused

    def remove(self, kind: Kind, keys: Collection[str]) -> None:
        with self.locked():
            for key in filter(_KEY.fullmatch, keys):
                self._file(kind, key).remove()
                self._listed.get(kind, set()).discard(key)

    def problems(self) -> dict[str, str]:
        found = {}
        for kind in KINDS:
            for key in sorted(self.keys(kind)):
                try:
                    _record_in(self._file(kind, key), kind, key)
                except CacheError as error:
                    found[f"{kind}/{key}"] = str(error)
        return found

    def sweep(self) -> None:
        """Remove what killed writers left; call it with the lock held, since files being written look the same."""
        for kind in KINDS:
            folder = self._place / kind
            for name in folder.names():
                if name.startswith(".") and name.endswith(".tmp"):
                    (folder / name).remove()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep out other writers: what a reader found bad, or too old, must not be replaced while it is moved away."""
        self._place.make_folder()
        with self._lock:
            yield

    def _file(self, kind: Kind, key: str) -> files.Place:
        return self._place / kind / f"{key}.json"

    def _read(self, kind: Kind, key: str, locked: bool = False) -> Record | None:
        """The record; None where there is none to trust. Raises ForeignError for one that is not ours to judge."""
        file = self._file(kind, key)
        try:
            return _record_in(file, kind, key)
        except codec.ForeignError:
            raise
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            problem = str(error)
            if _is_untrusted(error) and not self._read_only and not self._place.is_shared:
                try:
                    if locked:
                        aside = file.set_aside()
                        _warn_once(f"the record {file} was set aside as {aside}: {problem}")
                        return None
                    with self.locked():
                        return self._read(kind, key, locked=True)  # another process may have put it right by now
                except OSError as refusal:
                    problem = f"{problem}; it could not be set aside either: {refusal}"
            _warn_once(f"a record in the plan cache {self._place} is not used: {problem}")
            return None


def entry(fingerprint: Mapping[str, object], value: Mapping[str, object]) -> tuple[str, Record]:
    """The key and the record for `value`, which depends on `fingerprint` alone: `cache.put(kind, *entry(...))`."""
    return codec.digest(dict(fingerprint)), {"fingerprint": dict(fingerprint), "value": dict(value)}


def default_path() -> str:
    """Where the user's own cache is."""
    folder = platformdirs.user_cache_path("autoplan", appauthor=False)
    return os.environ.get("AUTOPLAN_CACHE") or f"{folder}{os.sep}"  # a folder, whether it is there or not


def resolve(cache: PlanCache | Location | bool | None) -> PlanCache | None:
    """The cache that a caller's `cache=` means: one as it is, a path or URL, None for the user's own, False for none.

    Raises:
        CacheError: it is none of these.
    """
    if isinstance(cache, PlanCache):
        return cache
    if cache is None:
        return PlanCache.default()
    if cache is False:
        return None
    if not isinstance(cache, str | os.PathLike):
        raise CacheError(
            f"cache={cache!r}: use a PlanCache, a folder, a .json or .pkl file, a URL of either, None or False"
        )
    return PlanCache(cache)


def _open(path: Location, read_only: bool) -> _File | _Folder:
    place = files.place(path)
    if place.suffix in codec.SUFFIXES and not place.is_folder():
        return _File(place, read_only)
    if place.is_shared or not place.suffix or os.fspath(path).endswith(("/", os.sep)) or place.is_folder():
        return _Folder(place, read_only)
    raise CacheError(
        f"{path} is no place for a plan cache: use a .json or .pkl file, or a folder (one yet to be made: ending in /)"
    )


def _is_untrusted(error: CacheError) -> bool:
    """Whether it is the content that is wrong, rather than that the file cannot be had or is none of ours."""
    return not isinstance(error.__cause__, OSError) and not isinstance(error, codec.ForeignError)


def _empty() -> _Records:
    return {kind: {} for kind in KINDS}


def _parsed(held: object) -> Any:
    if not isinstance(held, bytes):
        return held
    try:
        return codec.loads_json(held)
    except CacheError:
        return None  # no record, and said to be none


def _is_laid_out(held: object) -> TypeGuard[bytes]:
    """Whether this is a record as the text that it is in a .json file; in a folder it is on one line."""
    return isinstance(held, bytes) and b"\n" in held


def _all_parsed(records: _Records) -> _Records:
    texts = [held for own in records.values() for held in own.values() if _is_laid_out(held)]
    codec.check_memory(sum(map(codec.json_memory, texts)))  # one small file may hold them all
    return {kind: {key: _parsed(record) for key, record in own.items()} for kind, own in records.items()}


def _found(key: str, held: object) -> _Found | None:
    """The record that is held, if it is one to trust."""
    record = _parsed(held)
    return None if _problem(key, record) else _Found(cast("Record | bytes", held), cast(Record, record))


def _update(records: _Records, added: _Records) -> None:
    for kind, found in added.items():
        records[kind].update(found)


def _to_data(records: _Records) -> dict[str, Plain]:
    # Sorted, so that two files with the same records are the same bytes and a diff shows what was added.
    ordered: dict[str, Plain] = {kind: dict(sorted(records.get(kind, {}).items())) for kind in KINDS}
    return {"format": FORMAT, "schema": SCHEMA, "records": ordered}


def _from_data(data: Plain) -> _Records:
    """The records in the data of a file. Each is judged only when it is asked for: a bad one spoils no other."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise codec.ForeignError(f"it holds something else than an {FORMAT} (a plan, perhaps?); give another path")
    kinds = codec.migrated(data, SCHEMA, MIGRATIONS).get("records")
    if not isinstance(kinds, dict) or set(kinds) != set(KINDS):
        raise CacheError(f"records are not {', '.join(KINDS)}")
    records = _empty()
    for kind, found in kinds.items():
        if not isinstance(found, dict):
            raise CacheError(f"{kind} is not a dict")
        records[kind] = found
    return records


def _glance(place: files.Place) -> _Records | None:
    """The records of a file as text, none looked into; None where it takes a parser to find them. Raises OSError."""
    data = place.read(peek.MAX_BYTES) if place.suffix == ".json" else b""
    return cast("_Records | None", peek.records_in(data, FORMAT, SCHEMA, KINDS))


def _read(place: files.Place) -> _Records:
    """The records of a file. Raises CacheError where it cannot be read, or not all of it is plain data."""
    try:
        records = _glance(place)
    except OSError as error:
        raise CacheError(f"cannot read {place}: {error}") from error
    if records is None:
        data = codec.read(place)
        try:
            return _from_data(data)
        except CacheError as error:
            raise type(error)(f"cannot use {place}: {error}") from error
    for kind, own in records.items():
        for key, text in own.items():
            try:
                codec.loads_json(text)
            except CacheError as error:
                raise CacheError(f"cannot read {place}: {kind}/{key}: {error}") from error
    return records


def _write(place: files.Place, records: _Records) -> None:
    """Put a file of these records in place of what is there. Raises CacheError."""
    if place.suffix == ".json" and any(records.values()):
        codec.write_bytes(place, peek.file_of({kind: _texts(records[kind]) for kind in KINDS}, FORMAT, SCHEMA))
    else:
        codec.write(place, _to_data(_all_parsed(records)))


def _texts(records: dict[str, Any]) -> dict[str, bytes]:
    return {
        key: held if _is_laid_out(held) else codec.dumps_part(_parsed(held), peek.DEPTH, len(key) + 4)
        for key, held in records.items()
    }


def _bytes_in(file: files.Place, most: int) -> bytes | None:
    """What there is, up to `most` + 1 bytes; none of it where it cannot be had: whoever reads it then says why."""
    try:
        return file.read(most)
    except FileNotFoundError:
        return None
    except OSError:
        return b""


def _record_in(file: files.Place, kind: Kind, key: str) -> Record:
    """The record in the file of a folder. Raises CacheError unless it is whole."""
    record = _from_data(codec.read(file))[kind].get(key)
    if problem := _problem(key, record):
        raise CacheError(f"{file}: {problem}")
    return cast(Record, record)


def _problem(key: str, record: object) -> str | None:
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


def _problems(records: _Records) -> dict[str, str]:
    found = {
        f"{kind}/{key}": _problem(key, _parsed(held)) for kind, own in records.items() for key, held in own.items()
    }
    return {where: problem for where, problem in found.items() if problem}


def _content(record: Mapping[str, Any]) -> Record:
    return {"fingerprint": record["fingerprint"], "value": record["value"]}


def _entry(kind: Kind, key: str, record: Record) -> Entry:
    try:
        stored = datetime.fromisoformat(str(record.get("stored")))
    except ValueError:
        stored = None
    nbytes = len(_record_file(kind, key, record))
    return Entry(kind, key, stored if stored is not None and stored.tzinfo else None, nbytes)


def _record_file(kind: Kind, key: str, held: Any) -> bytes:
    """The file of one record in a folder."""
    before, after = codec.dumps_line(_to_data({kind: {key: None}})).split(b"null")
    text = held if isinstance(held, bytes) and not _is_laid_out(held) else _line(_parsed(held))
    return before + text + after


def _line(record: Any) -> bytes:
    """A record as the text that it is in a folder."""
    return codec.dumps_line(record).rstrip()


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise CacheError(f"there is no kind of record {kind!r}, only {', '.join(KINDS)}")


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)
