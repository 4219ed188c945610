"""Where bytes lie: a file or folder of this machine, or an fsspec URL. Files are replaced whole, never written into."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import PurePath
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import filelock

from autoplan.errors import CacheError

_FORMER_URL = re.compile(r"[a-z][a-z0-9+.-]+:/(?!/)")
_LOCK_SECONDS = 60.0
_LOCK_POLL_SECONDS = 0.002


class Local:
    """A file or folder of this machine."""

    is_shared = False  # whether others may be seen half way through a write

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def __truediv__(self, name: str) -> Local:
        return Local(os.path.join(self.path, name))

    def __str__(self) -> str:
        return self.path

    @property
    def parent(self) -> Local:
        return Local(os.path.dirname(self.path) or os.curdir)

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.path)[1]

    def exists(self) -> bool:
        return os.path.exists(self.path)

    def is_folder(self) -> bool:
        return os.path.isdir(self.path)

    def read(self, most: int) -> bytes:
        """The bytes of the file, but no more than `most` + 1 of them. Raises OSError."""
        with open(self.path, "rb", opener=_open_file) as file:
            return file.read(most + 1)

    def write(self, data: bytes, durable: bool = True) -> None:
        """Put a file with these bytes in place of what is there, which stays whole if this fails. Raises OSError.

        `durable` waits until the disk has it; without, a power cut (not a kill) may cost the newest files.
        """
        target = os.path.realpath(self.path) if os.path.islink(self.path) else self.path  # a link stays a link
        folder, name = os.path.split(target)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise

    def make_folder(self) -> None:
        os.makedirs(self.path, exist_ok=True)

    def names(self) -> list[str]:
        """What the folder holds; nothing where there is no folder."""
        try:
            return os.listdir(self.path)
        except FileNotFoundError:
            return []

    def remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def set_aside(self) -> str:
        """Rename the file to `<name>.unreadable-<n>`; returns that name. Raises OSError."""
        number = 1
        while os.path.lexists(aside := f"{self.path}.unreadable-{number}"):
            number += 1
        os.rename(self.path, aside)
        return os.path.basename(aside)

    def lock(self) -> AbstractContextManager[object]:
        """Keeps out every other process that asks for the lock of this file. Raises OSError after a minute."""
        return filelock.FileLock(f"{self.path}.lock", timeout=_LOCK_SECONDS, poll_interval=_LOCK_POLL_SECONDS)


class Remote:
    """A file or folder at a URL. There is no lock: of two that write one file at once, the last one wins.

    Raises:
        CacheError: fsspec, or what it needs for this kind of URL, is not installed.
    """

    is_shared = True

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise CacheError(f'{url} needs fsspec: pip install "autoplan[urls]"') from None
        self._url = url
        try:
            self._fs, self._path = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:  # no s3fs for s3://, or nobody knows the protocol
            raise CacheError(f"{url} cannot be used: {error}") from error

    def __truediv__(self, name: str) -> Remote:
        return self._at(*(f"{start.rstrip('/')}/{name}" for start in (self._url, self._path)))

    def __str__(self) -> str:
        return self._url

    @property
    def parent(self) -> Remote:
        return self._at(*(path.rstrip("/").rpartition("/")[0] for path in (self._url, self._path)))

    def _at(self, url: str, path: str) -> Remote:
        there: Remote = object.__new__(Remote)
        there._fs, there._url, there._path = self._fs, url, path
        return there

    @property
    def suffix(self) -> str:
        return os.path.splitext(str(self._path))[1]

    def exists(self) -> bool:
        with _as_os_errors():
            return bool(self._fs.exists(self._path))

    def is_folder(self) -> bool:
        return False  # it is not asked for: a URL says by its suffix what it means

    def read(self, most: int) -> bytes:
        with _as_os_errors(), self._fs.open(self._path, "rb") as file:
            data: bytes = file.read(most + 1)
            return data

    def write(self, data: bytes, durable: bool = True) -> None:
        with _as_os_errors():
            try:
                self._fs.pipe_file(self._path, data)
            except FileNotFoundError:  # where folders are not just names
                self._fs.makedirs(self.parent._path, exist_ok=True)
                self._fs.pipe_file(self._path, data)

    def make_folder(self) -> None:
        pass  # an object store has none; elsewhere `write` makes it

    def names(self) -> list[str]:
        with _as_os_errors():
            try:
                self._fs.invalidate_cache(self._path)
                return [path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._path, detail=False)]
            except FileNotFoundError:
                return []

    def remove(self) -> None:
        with _as_os_errors(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path)

    def set_aside(self) -> str:
        raise OSError("what others share is not renamed")

    def lock(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()


Place: TypeAlias = Local | Remote


def place(path: str | os.PathLike[str] | Place) -> Place:
    """What a path or URL means. `file://` is this machine.

    Raises:
        CacheError: what the URL needs is not installed, or it is a URL that was made a Path.
    """
    if isinstance(path, Local | Remote):
        return path
    text = os.fspath(path)
    if isinstance(path, PurePath) and _FORMER_URL.match(text):
        raise CacheError(f"{text} was a URL: a Path makes one slash of two, so pass it as a str")
    if "://" not in text:
        return Local(path)
    if text.startswith("file://"):
        return Local(unquote(urlsplit(text).path))
    return Remote(text)


def _open_file(path: str, flags: int) -> int:
    """Opens files only: a pipe would hang, and a folder or a device is none."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a file")
    return descriptor


@contextlib.contextmanager
def _as_os_errors() -> Iterator[Any]:
    """Every file system has errors of its own; here they all mean that the file cannot be had."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
