"""Ways to the bytes: one class per kind of store, all with the same few synchronous calls.

A key that is not there reads as None. Everything else that goes wrong is a builtin OSError
(or a `StoreError`), never None: a permission problem must not look like an empty chunk.
Remote stores add `fetch`, a coroutine for many requests in flight on one loop per process.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import threading
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from random import random
from time import monotonic, sleep
from typing import Any, TypeVar

import numpy as np

from zarr_dask_stream.errors import StoreError, StoreNotFoundError, UsageError
from zarr_dask_stream.source.secret import builtin_error, service_code

__all__ = ["ByteStore", "LocalFiles", "MappingBytes", "RemoteBytes", "ZipEntries", "check_key"]

T = TypeVar("T")

#: Seconds for one synchronous call on a remote store (metadata, listings); chunk reads have their own.
CALL_TIMEOUT_S = 120.0
# How often such a read is tried, the wait before the second try (later ones wait longer), and after which errors.
_TRIES = 5
_WAIT_S = 0.1
_PASSING = frozenset({
    errno.EAGAIN, errno.EBUSY, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.EPIPE, errno.EREMOTEIO, errno.ETIMEDOUT,
})  # fmt: skip
_FIRST_READ_BYTES = 1 << 16
_MAX_HINT_BYTES = 1 << 25
# Files up to this size are read in one call, without asking for their length.
_SMALL_BYTES = 1 << 18
# O_NONBLOCK: a FIFO in place of a chunk must not hang the worker. No effect on regular files.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def check_key(key: str) -> str:
    """Return `key` if it names something inside a store; raise UsageError otherwise.

    Examples
    --------
    >>> check_key("a/c/0/0")
    'a/c/0/0'
    >>> check_key("../secret")
    Traceback (most recent call last):
    ...
    zarr_dask_stream.errors.UsageError: '../secret' is not a key inside the store: keys are relative, \
without '..' and NUL
    """
    parts = key.replace("\\", "/").split("/") if os.name == "nt" else key.split("/")
    if ".." in parts or key.startswith("/") or "\0" in key or (os.name == "nt" and ":" in key):
        raise UsageError(f"{key!r} is not a key inside the store: keys are relative, without '..' and NUL")
    return key


class ByteStore(ABC):
    """Read access to the keys of one store.

    Attributes
    ----------
    url : str
        Display form of where it is.
    is_local : bool
        True where a read is a cheap synchronous call (files, zip, memory); such a store has no `fetch`.
    """

    is_local: bool = True

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def get(self, key: str) -> bytes | None:
        """Return the whole value of `key`, or None where the key is not there."""

    def get_buffer(self, key: str) -> bytes | memoryview | None:
        """Return a chunk's whole value like `get`, where possible in memory that the caller may write to."""
        return self.get(key)

    @abstractmethod
    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Return bytes ``start:stop`` of `key` (fewer where it ends before), or None."""

    @abstractmethod
    def get_suffix(self, key: str, count: int) -> bytes | None:
        """Return the last `count` bytes of `key` (all of a shorter one), or None."""

    @abstractmethod
    def list_prefix(self, prefix: str) -> Iterator[str]:
        """Walk all keys below the folder `prefix` ("" for all), in no particular order."""

    @abstractmethod
    def list_dir(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the keys directly below the folder `prefix`."""

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""
        return self.get(key) is not None

    def version(self, key: str) -> Any:  # noqa: ARG002  # for those that have versions
        """Return something that changes when the value of `key` does, or None where that is not cheap."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class LocalFiles(ByteStore):
    """Files below a directory.

    The directory itself must be there: a path that only another host can see is an error, not an
    empty store.
    """

    def __init__(self, url: str, root: str) -> None:
        super().__init__(url)
        self._root = root.rstrip("/") + "/"
        self._hint = _FIRST_READ_BYTES

    def _path(self, key: str) -> str:
        if ".." in key or key[:1] == "/" or "\0" in key:
            check_key(key)
        return self._root + key

    def _open(self, key: str) -> int | None:
        try:
            return os.open(self._path(key), _OPEN_FLAGS)
        except FileNotFoundError:
            self._check_root()
            return None

    def _check_root(self) -> None:
        if not os.path.isdir(self._root):  # noqa: PTH112  # a Path object would cost more than the call
            raise StoreNotFoundError(f"there is no directory {self.url} on this host")

    def get(self, key: str) -> bytes | None:
        """Return the whole file."""
        fd = self._open(key)
        if fd is None:
            return None
        try:
            # One call for a file no longer than those before it: a regular file is read short only at its end.
            hint = self._hint
            data = os.read(fd, hint)
            return data if len(data) < hint else self._read_rest(fd, data)
        finally:
            os.close(fd)

    def get_buffer(self, key: str) -> bytes | memoryview | None:
        """Return the whole file; a large one in memory that can become the chunk's array as it is."""
        if self._hint <= _SMALL_BYTES:
            return self.get(key)
        fd = self._open(key)
        if fd is None:
            return None
        try:
            # NumPy's memory is not cleared first, as a bytearray's would be.
            buffer = memoryview(np.empty(os.fstat(fd).st_size, np.uint8))  # type: ignore[arg-type]  # it is a buffer
            length = 0
            while length < len(buffer) and (read := os.readv(fd, [buffer[length:]])):
                length += read
            return buffer[:length]
        finally:
            os.close(fd)

    def _read_rest(self, fd: int, data: bytes) -> bytes:
        size = os.fstat(fd).st_size
        self._hint = max(self._hint, min(size + size // 4 + 1, _MAX_HINT_BYTES))
        parts = [data]
        while part := os.read(fd, max(size - sum(map(len, parts)), 0) + 1):
            parts.append(part)
        return b"".join(parts)

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Return a part of the file."""
        fd = self._open(key)
        if fd is None:
            return None
        try:
            return os.pread(fd, max(stop - start, 0), start)
        finally:
            os.close(fd)

    def get_suffix(self, key: str, count: int) -> bytes | None:
        """Return the end of the file."""
        fd = self._open(key)
        if fd is None:
            return None
        try:
            start = max(0, os.fstat(fd).st_size - count)
            return os.pread(fd, count, start)
        finally:
            os.close(fd)

    def exists(self, key: str) -> bool:
        """Whether the file is there."""
        try:
            return not stat.S_ISDIR(os.stat(self._path(key)).st_mode)  # noqa: PTH116  # as below
        except FileNotFoundError:
            self._check_root()
            return False

    def version(self, key: str) -> Any:
        """Return inode, size and time of change."""
        try:
            info = os.stat(self._path(key))  # noqa: PTH116  # a Path object would cost more than the call
        except FileNotFoundError:
            return None
        return info.st_ino, info.st_size, info.st_mtime_ns

    def list_prefix(self, prefix: str) -> Iterator[str]:
        """Walk the files below `prefix`; links to folders are followed, each once."""
        self._check_root()
        folders = [check_key(prefix.strip("/"))]
        linked: set[tuple[int, int]] = set()
        while folders:
            folder = folders.pop()
            lead = f"{folder}/" if folder else ""
            for entry in self._scan(folder):
                if not entry.is_dir():
                    yield lead + entry.name
                elif not entry.is_symlink() or self._first_visit(lead + entry.name, linked):
                    folders.append(lead + entry.name)

    def _first_visit(self, folder: str, linked: set[tuple[int, int]]) -> bool:
        """Whether a linked folder has not been walked yet: links can lead round in a ring."""
        info = os.stat(self._root + folder)  # noqa: PTH116  # as above
        place = info.st_dev, info.st_ino
        if place in linked:
            return False
        linked.add(place)
        return True

    def list_dir(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the folders and the files directly below `prefix`."""
        folders: list[str] = []
        keys: list[str] = []
        for entry in self._scan(prefix.strip("/")):
            (folders if entry.is_dir() else keys).append(entry.name)
        return folders, keys

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._path(folder)) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return []


class _Keyed(ByteStore):
    """What stores with a flat set of names share."""

    @abstractmethod
    def _names(self) -> Iterator[str]: ...

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        data = self.get(key)
        return None if data is None else data[start:stop]

    def get_suffix(self, key: str, count: int) -> bytes | None:
        data = self.get(key)
        return None if data is None else data[max(0, len(data) - count) :]

    def list_prefix(self, prefix: str) -> Iterator[str]:
        lead = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        return (name for name in self._names() if name.startswith(lead))

    def list_dir(self, prefix: str) -> tuple[list[str], list[str]]:
        lead = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        folders: dict[str, None] = {}
        keys = []
        for name in self.list_prefix(prefix):
            head, slash, _ = name[len(lead) :].partition("/")
            if slash:
                folders[head] = None
            else:
                keys.append(head)
        return list(folders), keys


class MappingBytes(_Keyed):
    """A mapping of keys to bytes in this process."""

    def __init__(self, url: str, mapping: Mapping[str, Any]) -> None:
        super().__init__(url)
        self._mapping = mapping

    def get(self, key: str) -> bytes | None:
        """Return the value of `key`."""
        try:
            value = self._mapping[check_key(key)]
        except KeyError:
            return None
        if isinstance(value, bytes):
            return value
        to_bytes = getattr(value, "to_bytes", None)  # zarr's buffers
        return bytes(value) if to_bytes is None else bytes(to_bytes())

    def _names(self) -> Iterator[str]:
        return iter(list(self._mapping))


class ZipEntries(_Keyed):
    """Entries of a zip file."""

    def __init__(self, url: str, path: str) -> None:
        super().__init__(url)
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError:
            raise StoreNotFoundError(f"there is no zip file {url} on this host") from None
        except zipfile.BadZipFile as error:
            raise StoreError(f"{url} is not a zip file that can be read: {error}") from error
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """Return the entry; its checksum is checked."""
        try:
            info = self._zip.getinfo(check_key(key))
        except KeyError:
            return None
        try:
            with self._lock:
                return self._zip.read(info)
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
            raise OSError(errno.EIO, f"entry {key} of {self.url} can't be read: {error}") from error

    def exists(self, key: str) -> bool:
        """Whether the entry is there."""
        return check_key(key) in self._zip.NameToInfo

    def _names(self) -> Iterator[str]:
        return (name for name in self._zip.namelist() if not name.endswith("/"))

    def close(self) -> None:
        """Close the file."""
        self._zip.close()


class RemoteBytes(ByteStore):
    """A store behind coroutines; the synchronous calls run them on its loop and wait.

    Subclasses give `_read` and `_list`/`_dir`, and raise what their client raises: it is turned into
    a builtin OSError here.
    """

    is_local = False

    def __init__(self, url: str, secrets: tuple[str, ...] = ()) -> None:
        super().__init__(url)
        self._secrets = secrets

    @property
    @abstractmethod
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, in a thread of its own, on which `fetch` must be awaited."""

    @abstractmethod
    async def _read(self, key: str, start: int | None, stop: int | None) -> bytes | None:
        """Read ``start:stop`` of `key`; a negative start with no stop means the last bytes."""

    @abstractmethod
    async def _list(self, prefix: str) -> list[str]: ...

    @abstractmethod
    async def _dir(self, prefix: str) -> tuple[list[str], list[str]]: ...

    async def fetch(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """Read `key`, or ``start:stop`` of it, or with a negative `start` and no `stop` its last bytes.

        Raises
        ------
        OSError
            For whatever is not "this key is not there".
        """
        check_key(key)
        problem: OSError
        try:
            data = await self._read(key, start, stop)
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001  # client libraries raise anything; none may be lost
            if not isinstance(error, KeyError) and _is_absent(error):
                return None
            problem = builtin_error(error, f"reading {key} of {self.url}", self._secrets)
        else:
            return data if data is None or start is None else _trim(data, start, stop)
        # Outside the handler: no context, which could hold a request with credentials in it.
        raise problem

    def call(self, work: Coroutine[Any, Any, T], what: str) -> T:
        """Run a coroutine on the loop and wait for it."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        problem: BaseException
        try:
            return future.result(CALL_TIMEOUT_S)
        except TimeoutError as error:
            future.cancel()
            problem = error
        except (StoreError, UsageError):
            raise
        except Exception as error:  # noqa: BLE001  # as in fetch
            problem = error
        except BaseException:
            future.cancel()
            raise
        raise builtin_error(problem, what, self._secrets)

    def get(self, key: str) -> bytes | None:
        """Return the whole value of `key`."""
        return self._fetch_now(key)

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Return bytes ``start:stop`` of `key`."""
        return self._fetch_now(key, start, stop)

    def get_suffix(self, key: str, count: int) -> bytes | None:
        """Return the last `count` bytes of `key`."""
        return self._fetch_now(key, -count)

    def _fetch_now(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        """Read, and try again where that may help: for what is no chunk nobody above does."""
        deadline = monotonic() + CALL_TIMEOUT_S
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._fetch_once(key, start, stop, deadline - monotonic())
            except OSError as error:
                # Half of the wait is drawn: many processes may have been refused at the same moment.
                pause_s = _WAIT_S * 2 ** (attempt - 1) * (0.5 + random() / 2)  # noqa: S311  # no secret is made of it
                if error.errno not in _PASSING or attempt == _TRIES or monotonic() + pause_s > deadline:
                    raise
            sleep(pause_s)

    def _fetch_once(self, key: str, start: int | None, stop: int | None, seconds: float) -> bytes | None:
        future = asyncio.run_coroutine_threadsafe(self.fetch(key, start, stop), self.loop)
        try:
            return future.result(seconds)
        except BaseException as error:
            late = isinstance(error, TimeoutError) and not future.done()
            future.cancel()
            if not late:
                raise
        text = f"reading {key} of {self.url} took longer than {CALL_TIMEOUT_S:g} s"
        raise TimeoutError(errno.ETIMEDOUT, text)

    def list_prefix(self, prefix: str) -> Iterator[str]:
        """Walk the keys below `prefix`."""
        return iter(self.call(self._list(check_key(prefix.strip("/"))), f"listing {self.url}"))

    def list_dir(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the folders and the keys directly below `prefix`."""
        return self.call(self._dir(check_key(prefix.strip("/"))), f"listing {self.url}")


_ABSENT_CODES = frozenset({"404", "NoSuchKey", "NoSuchVersion"})


def _is_absent(error: BaseException) -> bool:
    """Whether an error of a client means "no such key" and nothing worse.

    Some clients raise FileNotFoundError for whatever happened, with what really happened as its cause.
    """
    code = service_code(error)
    if code == "NoSuchBucket" or ("NotFound" in type(error).__name__ and "NoSuchBucket" in str(error)):
        raise StoreNotFoundError("there is no such bucket; check its name and the endpoint")
    if code is not None:
        return code in _ABSENT_CODES
    if isinstance(error, FileNotFoundError):
        return error.__cause__ is None or _is_absent(error.__cause__)
    return "NotFound" in type(error).__name__ or isinstance(error, KeyError) or getattr(error, "status", 0) == 404


def _trim(data: bytes, start: int, stop: int | None) -> bytes:
    """Cut the wanted part out of what a server sent that ignores ranges and answers with everything."""
    wanted = -start if stop is None and start < 0 else None if stop is None else stop - start
    if wanted is None or len(data) <= wanted:
        return data
    return data[start:stop]
