"""Where a cache keeps its records: all in one file, or one file each in a folder, of this machine or at a URL.

A folder holds `<folder>/<kind>/<key>.json`, each on one line. So opening it reads nothing, finding a record reads one
small file, and a write touches no record but its own: that is what many processes can share, and what an object store
can hold, where nothing can be locked.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Collection, Iterator
from typing import TypeAlias

from autoplan.cache import codec, files, form
from autoplan.cache.form import KINDS, Kind, Record
from autoplan.errors import CacheError

Location: TypeAlias = "str | os.PathLike[str]"

_logger = logging.getLogger(__name__)


def open_place(path: Location, read_only: bool) -> OneFile | Folder:
    place = files.place(path)
    if place.suffix in codec.SUFFIXES and not place.is_folder():
        return OneFile(place, read_only)
    if place.is_shared or not place.suffix or os.fspath(path).endswith(("/", os.sep)) or place.is_folder():
        return Folder(place, read_only)
    raise CacheError(
        f"{path} is no place for a plan cache: use a .json or .pkl file, or a folder (one yet to be made: ending in /)"
    )


class OneFile:
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

    def get(self, kind: Kind, key: str) -> form.Found | None:
        return form.found(key, self._records[kind].get(key))

    def put(self, records: form.Records) -> form.Records:
        """Merge these into the file; returns those that it cannot hold."""
        if self._keeps_off:
            return records
        with self.locked():
            form.update(self._records, records)
            form.write(self._place, self._records)
        return form.empty()

    def remove(self, kind: Kind, keys: Collection[str]) -> None:
        with self.locked():
            for key in keys:
                self._records[kind].pop(key, None)
            form.write(self._place, self._records)

    def problems(self) -> dict[str, str]:
        if self._keeps_off:
            return {str(self._place): self._keeps_off}
        return form.problems_of(self._records)

    def _glance(self) -> form.Records | None:
        """The records as text, none looked into; None where it takes a parser to find them."""
        try:
            return form.glance(self._place)
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

    def _read(self, locked: bool = False) -> form.Records:
        """What the file holds. One that cannot be trusted is set aside, one that is not ours to judge is left alone."""
        try:
            return form.read(self._place)
        except CacheError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return form.empty()
            problem = str(error)
            if _is_untrusted(error) and not self._read_only and not self._place.is_shared:
                try:
                    if locked:
                        aside = self._place.set_aside()
                        warn_once(
                            f"the plan cache {self._place} was set aside as {aside} and a new one begun: {problem}"
                        )
                        return form.empty()
                    with self._lock:
                        return self._read(locked=True)  # another process may have put it right by now
                except OSError as refusal:
                    problem = f"{problem}; it could not be set aside either: {refusal}"
            self._keeps_off = problem
            warn_once(f"the plan cache {self._place} is left alone, this run works in memory: {problem}")
            return form.empty()


class Folder:
    """One file per record. Reading takes no lock: files are replaced whole."""

    def __init__(self, place: files.Place, read_only: bool) -> None:
        self._place, self._read_only = place, read_only
        self._lock = (place / "cache").lock()
        self._listed: dict[str, set[str]] = {}  # of a URL, where asking for what is not there takes a round trip

    def keys(self, kind: Kind) -> Collection[str]:
        try:
            names = (self._place / kind).names()
        except OSError as error:
            warn_once(f"the plan cache {self._place} cannot be listed, this run works in memory: {error}")
            return []
        return [name[:-5] for name in names if name.endswith(".json") and form.KEY.fullmatch(name[:-5])]

    def get(self, kind: Kind, key: str) -> form.Found | None:
        if not form.KEY.fullmatch(key):
            return None
        if self._place.is_shared:
            if kind not in self._listed:
                self._listed[kind] = set(self.keys(kind))
            if key not in self._listed[kind]:
                return None
        try:
            record = self._read(kind, key)
            return None if record is None else form.Found(form.line(record), record)
        except codec.ForeignError as error:
            warn_once(f"some records in the plan cache {self._place} are not used: {error}")
            return None

    def put(self, records: form.Records) -> form.Records:
        """Write a file for each of these; returns those whose file is not ours to replace."""
        refused = form.empty()
        with self.locked():
            for kind in KINDS:
                if records[kind]:
                    (self._place / kind).make_folder()
                present = set(self.keys(kind)) if len(records[kind]) > 1 else records[kind].keys()
                for key, held in records[kind].items():
                    file, data = self._file(kind, key), form.record_file(kind, key, held)
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
            for key in filter(form.KEY.fullmatch, keys):
                self._file(kind, key).remove()
                self._listed.get(kind, set()).discard(key)

    def problems(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for kind in KINDS:
            try:
                (self._place / kind).names()
            except OSError as error:
                found[kind] = f"cannot be listed: {error}"
            for key in sorted(self.keys(kind)):
                try:
                    form.record_in(self._file(kind, key), kind, key)
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
            return form.record_in(file, kind, key)
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
                        warn_once(f"the record {file} was set aside as {aside}: {problem}")
                        return None
                    with self.locked():
                        return self._read(kind, key, locked=True)  # another process may have put it right by now
                except OSError as refusal:
                    problem = f"{problem}; it could not be set aside either: {refusal}"
            warn_once(f"a record in the plan cache {self._place} is not used: {problem}")
            return None


def _is_untrusted(error: CacheError) -> bool:
    """Whether it is the content that is wrong, rather than that the file cannot be had or is none of ours."""
    return not isinstance(error.__cause__, OSError) and not isinstance(error, codec.ForeignError)


def _bytes_in(file: files.Place, most: int) -> bytes | None:
    """What there is, up to `most` + 1 bytes; none of it where it cannot be had: whoever reads it then says why."""
    try:
        return file.read(most)
    except FileNotFoundError:
        return None
    except OSError:
        return b""


@functools.cache
def warn_once(message: str) -> None:
    _logger.warning(message)
