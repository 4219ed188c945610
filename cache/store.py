"""PlanCache: what has been measured and planned before, in memory, in a folder, in one file, or at a URL."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple, cast

import platformdirs

from autoplan.cache import backends, codec, files, form
from autoplan.cache.backends import Location
from autoplan.cache.codec import Plain
from autoplan.cache.form import KINDS, Kind, Record
from autoplan.errors import CacheError


class Entry(NamedTuple):
    """A record as `list` and `prune` see it."""

    kind: Kind
    key: str
    stored: datetime | None  # when it was put; None where the record does not say
    nbytes: int  # as a file in a folder


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
        self._store = None if path is None else backends.open_place(path, read_only)
        self._records = form.empty()  # what no file holds: everything without a path, else what could not be written
        self._lock = threading.RLock()

    @classmethod
    def default(cls, *, site: PlanCache | Location | None = None) -> PlanCache:
        """The user's own cache: what AUTOPLAN_CACHE names, else the folder `autoplan` in the user's cache folder."""
        return cls(default_path(), site=site)

    def get(self, kind: Kind, key: str) -> Record | None:
        """A copy of the record, or None where there is none that is whole."""
        _check_kind(kind)
        found = self._find(kind, key)
        return None if found is None else cast(Record, codec.plain(form.content(found.record)))

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
        checked, now = form.empty(), datetime.now(timezone.utc).isoformat(timespec="seconds")
        for key, record in records.items():
            copy: Any = codec.plain(dict(record))
            problem = form.problem_of(key, copy)
            if problem:
                raise CacheError(f"cannot keep this in {kind} under {key!r}: {problem}")
            checked[kind][key] = codec.sealed_plain({**form.content(copy), "stored": now})
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
            if isinstance(self._store, backends.Folder):
                self._store.sweep()
        return gone

    def entries(self) -> list[Entry]:
        """All whole own records, without their content."""
        with self._lock:
            return self._entries()

    def problems(self) -> dict[str, str]:
        """What of the own records and files cannot be used, and why: {where: reason}. Reads every record."""
        with self._lock:
            return form.problems_of(self._records) | (self._store.problems() if self._store else {})

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
        return cast("dict[str, Plain]", codec.plain(form.to_data(form.all_parsed(self._whole()))))

    @classmethod
    def from_dict(cls, data: object) -> PlanCache:
        """A cache in memory with the records of `to_dict`, of this schema or an older one.

        Raises:
            CacheError: `data` is something else, or of a newer schema.
        """
        cache = cls()
        cache._records = form.from_data(codec.plain(data))
        return cache

    def save(self, path: Location) -> None:
        """Write all records to one file, a path or URL ending in `.json` or `.pkl`, in place of what is there.

        Raises:
            CacheError: the suffix is unknown, the file cannot be written, or it would be larger than what is read.
        """
        form.write(files.place(path), self._whole())

    @classmethod
    def load(cls, path: Location) -> PlanCache:
        """A cache in memory with the records of one file; `PlanCache(path)` is one that keeps to its place.

        Raises:
            CacheError: the file cannot be read or trusted, or was written by a newer autoplan.
        """
        cache = cls()
        cache._records = form.read(files.place(path))
        return cache

    def __getstate__(self) -> dict[str, Plain]:
        return self.to_dict()

    def __setstate__(self, state: object) -> None:
        # In memory: the path may mean nothing where this arrives.
        self.__dict__.update(PlanCache.from_dict(state).__dict__)

    # -- inside: records as they are in files ------------------------------------------------------------------------

    def _find(self, kind: Kind, key: str) -> form.Found | None:
        if self.site is not None and (found := self.site._find(kind, key)) is not None:
            return found
        with self._lock:
            return self._find_own(kind, key)

    def _find_own(self, kind: Kind, key: str) -> form.Found | None:
        held = self._records[kind].get(key)
        if held is None and self._store is not None:
            return self._store.get(kind, key)
        return form.found(key, held)

    def _own_keys(self, kind: Kind) -> set[str]:
        return {*self._records[kind], *(self._store.keys(kind) if self._store else ())}

    def _whole(self) -> form.Records:
        records = form.empty()
        for kind, key in self:
            if found := self._find(kind, key):
                records[kind][key] = found.held
        return records

    def _contents(self) -> dict[tuple[str, str], str]:
        found = ((kind, key, self._find(kind, key)) for kind, key in self)
        return {(kind, key): codec.digest_of_plain(form.content(its.record)) for kind, key, its in found if its}

    def _entries(self) -> list[Entry]:
        found = ((kind, key, self._find_own(kind, key)) for kind in KINDS for key in sorted(self._own_keys(kind)))
        return [_entry(kind, key, its.record) for kind, key, its in found if its]

    def _add(self, records: form.Records) -> None:
        with self._lock:
            form.update(self._records, records)
            if self._store is None or self.read_only:
                return
            try:
                self._records = self._store.put(self._records)
            except (OSError, CacheError) as error:  # they stay in memory, and go with the next write that succeeds
                backends.warn_once(
                    f"the plan cache {self.path} was not written, its new records are in memory only: {error}"
                )

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


def _entry(kind: Kind, key: str, record: Record) -> Entry:
    try:
        stored = datetime.fromisoformat(str(record.get("stored")))
    except ValueError:
        stored = None
    nbytes = len(form.record_file(kind, key, record))
    return Entry(kind, key, stored if stored is not None and stored.tzinfo else None, nbytes)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise CacheError(f"there is no kind of record {kind!r}, only {', '.join(KINDS)}")
