"""Stores of this host and of this process: files, entries of a zip file, mappings; read and written by plain calls."""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import os
import shutil
import stat
import threading
import uuid
import zipfile
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from typing import Any

import numpy as np
from zarr.buffer import cpu

from zarr_dask_stream.errors import StoreError, StoreNotFoundError, UsageError
from zarr_dask_stream.source.backend import ByteStore, TooLongError, check_key
from zarr_dask_stream.source.memory import lend

__all__ = ["Keyed", "LocalFiles", "MappingBytes", "ZipEntries"]

_FIRST_READ_BYTES = 1 << 16
_MAX_HINT_BYTES = 1 << 25
# Files up to this size are read in one call, without asking for their length.
_SMALL_BYTES = 1 << 18
# Zip entries up to this size are inflated whole, so that their checksum is checked, for a part of them.
_CHECKED_BYTES = 1 << 25
# O_NONBLOCK: a FIFO in place of a chunk must not hang the worker. No effect on regular files.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_PREFIX = ".zds-"  # of files that are not whole yet: no chunk and no document is called so
_serial = itertools.count()


class _Scratch:
    """Memory to read into, again and again; it grows to what the longest read needs."""

    def __init__(self) -> None:
        self.view = self._made(_FIRST_READ_BYTES)

    def grow(self, nbytes: int, keep: int) -> memoryview:
        """Make room for so many bytes; the first `keep` stay."""
        view = self._made(1 << (nbytes - 1).bit_length())  # powers of two, so that others find a use for it
        view[:keep] = self.view[:keep]
        self.view = view
        return view

    @staticmethod
    def _made(nbytes: int) -> memoryview:
        return memoryview(lend(nbytes))  # type: ignore[arg-type]  # it is a buffer


class _Parts:
    """Reads parts of files into the same memory. The file that was read last stays open until another one is read.

    The parts of a shard are read one after the other, and opening it takes as long as reading one. Whoever replaces it
    meanwhile does not mix an old index with new bytes either.
    """

    def __init__(self, open_key: Callable[[str], int | None]) -> None:
        self._open = open_key
        self._scratch = _Scratch()
        self._key = ""
        self._fd: int | None = None

    def __call__(self, key: str, start: int, stop: int) -> memoryview | None:
        if self._fd is None or key != self._key:
            self.close()
            self._fd, self._key = self._open(key), key
            if self._fd is None:
                return None
        count = max(stop - start, 0)
        view = self._scratch.view if count <= len(self._scratch.view) else self._scratch.grow(count, 0)
        try:
            length = os.preadv(self._fd, [view[:count]], start)
        except OSError:
            self.close()
            raise
        if length < count:  # by the next time another file may be in its place
            self.close()
        return view[:length]

    def close(self) -> None:
        """Close the file that is open."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


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
        return self._get(key, None)

    def _get(self, key: str, most: int | None) -> bytes | None:
        fd = self._open(key)
        if fd is None:
            return None
        try:
            # One call for a file no longer than those before it: a regular file is read short only at its end.
            hint = self._hint
            data = os.read(fd, hint)
            return data if len(data) < hint else self._read_rest(fd, data, key, most)
        finally:
            os.close(fd)

    def get_head(self, key: str, count: int) -> bytes | None:
        """Return the file, or its beginning."""
        fd = self._open(key)
        if fd is None:
            return None
        try:
            # What the system says of a file's length is a guess: a device has none, and a file may grow.
            data = os.read(fd, min(os.fstat(fd).st_size + 1, count))
            parts, length = [data], len(data)
            while data and length < count:
                data = os.read(fd, min(_FIRST_READ_BYTES, count - length))
                parts.append(data)
                length += len(data)
            return b"".join(parts)
        finally:
            os.close(fd)

    def get_buffer(self, key: str, most: int) -> bytes | memoryview | None:
        """Return the whole file; a large one in memory that can become the chunk's array as it is."""
        if self._hint <= _SMALL_BYTES:
            return self._get(key, most)
        fd = self._open(key)
        if fd is None:
            return None
        try:
            size = os.fstat(fd).st_size
            if size > most:
                raise TooLongError(key, size, most)
            # NumPy's memory is not cleared first, as a bytearray's would be.
            buffer = memoryview(np.empty(size, np.uint8))  # type: ignore[arg-type]  # it is a buffer
            length = 0
            while length < len(buffer) and (read := os.readv(fd, [buffer[length:]])):
                length += read
            return buffer[:length]
        finally:
            os.close(fd)

    def borrow(self, most: int) -> Callable[[str], memoryview | None]:
        """Return a function that reads whole files, each into the same memory."""
        scratch = _Scratch()

        def get(key: str) -> memoryview | None:
            fd = self._open(key)
            if fd is None:
                return None
            try:
                # A regular file is read short only at its end.
                view = scratch.view
                length = os.readv(fd, [view])
                if length < len(view):
                    return view[:length]
                while length == len(view):
                    size = os.fstat(fd).st_size
                    if size > most or length > most:  # a device has no length
                        raise TooLongError(key, size if size > most else None, most)
                    view = scratch.grow(max(size + 1, 2 * length), length)
                    while length < len(view) and (read := os.readv(fd, [view[length:]])):
                        length += read
                return view[:length]
            finally:
                os.close(fd)

        return get

    def borrow_range(self) -> Callable[[str, int, int], memoryview | None]:
        """Return a function that reads parts of files, each into the same memory."""
        return _Parts(self._open)

    def _read_rest(self, fd: int, data: bytes, key: str, most: int | None) -> bytes:
        size = os.fstat(fd).st_size
        if most is not None and size > most:
            raise TooLongError(key, size, most)
        self._hint = max(self._hint, min(size + size // 4 + 1, _MAX_HINT_BYTES))
        parts, length = [data], len(data)
        # A device has no length, and a file may grow.
        while part := os.read(fd, size + 1 - length if length <= size else _FIRST_READ_BYTES):
            parts.append(part)
            length += len(part)
            if most is not None and length > most:
                raise TooLongError(key, None, most)
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

    def size(self, key: str) -> int | None:
        """Return the length of the file."""
        try:
            return os.stat(self._path(key)).st_size  # noqa: PTH116  # as above
        except FileNotFoundError:
            self._check_root()
            return None

    def put(self, key: str, data: Any, *, aside: str = "") -> None:
        """Write a file beside its place, below `aside`, and rename it."""
        path = self._path(key)
        folder = self._path(aside) if aside else os.path.dirname(path)  # noqa: PTH120  # as above
        temporary = f"{folder}/{_PREFIX}{_this_process(os.getpid())}-{next(_serial)}"
        try:
            if not aside:
                os.makedirs(folder, exist_ok=True)  # noqa: PTH103  # as above
            self._write(temporary, data)
            try:
                os.replace(temporary, path)  # noqa: PTH105  # as above
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120  # as above
                os.replace(temporary, path)  # noqa: PTH105  # as above
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)  # noqa: PTH108  # as above
            raise OSError(error.errno, f"writing {key} of {self.url}: {error.strerror}") from error

    def _write(self, path: str, data: Any) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        try:
            rest = memoryview(data).cast("B")
            while rest:
                rest = rest[os.write(fd, rest) :]
        finally:
            os.close(fd)

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files; their folders stay."""
        for key in keys:
            with suppress(FileNotFoundError):
                os.unlink(self._path(key))  # noqa: PTH108  # as above

    def clear(self, prefix: str, last: Iterable[str] = ()) -> None:
        """Remove what is in a folder; the folder stays."""
        late = set(last)
        for entry in self._scan(prefix):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name not in late:
                os.unlink(entry.path)  # noqa: PTH108  # as above
        self.remove(f"{prefix}/{name}" if prefix else name for name in late)

    def prepare(self, folder: str) -> None:
        """Make a folder."""
        os.makedirs(self._path(folder), exist_ok=True)  # noqa: PTH103  # as above

    def is_prepared(self, folder: str) -> bool:
        """Whether there is such a folder."""
        return os.path.isdir(self._path(folder))  # noqa: PTH112  # as above

    def discard(self, folder: str) -> None:
        """Remove a folder and what is in it."""
        shutil.rmtree(self._path(folder), ignore_errors=True)

    def flush(self) -> None:
        """Have the file system below the directory write all that it still holds in memory."""
        fd = os.open(self._root, os.O_RDONLY)
        try:
            _sync_file_system(fd)
        finally:
            os.close(fd)

    def list_prefix(self, prefix: str) -> Iterator[str]:
        """Walk the files below `prefix`; links to folders are followed, each once."""
        return self._walk(prefix, with_folders=False)

    def list_names(self, prefix: str) -> Iterator[str]:
        """Walk the files and the folders below `prefix`."""
        return self._walk(prefix, with_folders=True)

    def _walk(self, prefix: str, *, with_folders: bool) -> Iterator[str]:
        self._check_root()
        folders = [check_key(prefix.strip("/"))]
        linked: set[tuple[int, int]] = set()
        while folders:
            folder = folders.pop()
            lead = f"{folder}/" if folder else ""
            for entry in self._scan(folder):
                is_folder = _is_folder(entry)
                if with_folders or not is_folder:
                    yield lead + entry.name
                if is_folder and (not entry.is_symlink() or self._first_visit(lead + entry.name, linked)):
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
        folder = prefix.strip("/")
        for entry in self._scan(folder):
            if not _is_folder(entry):
                keys.append(entry.name)
            elif not (entry.is_symlink() and self._leads_back(folder, entry.name)):
                folders.append(entry.name)
        return folders, keys

    def _leads_back(self, folder: str, name: str) -> bool:
        """Whether a link in `folder` leads to that folder, or to one above it: whoever follows it goes round."""
        parts = folder.split("/") if folder else []
        above = ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]
        there = os.stat(self._root + "/".join([*parts, name]))  # noqa: PTH116  # as above
        return any(os.path.samestat(there, os.stat(self._root + place)) for place in above)  # noqa: PTH116  # as above

    def _scan(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self._path(folder)) as entries:
                return list(entries)
        except (FileNotFoundError, NotADirectoryError):
            self._check_root()
            return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to one another, and nowhere
        return False


@functools.lru_cache(maxsize=1)
def _this_process(pid: int) -> str:
    """Return a name that no other process has on any host, a forked one neither."""
    return f"{pid}-{uuid.uuid4().hex[:12]}"


def _sync_file_system(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):  # an older or another kernel: all file systems, then
        os.sync()
    elif libc.syncfs(fd):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Keyed(ByteStore):
    """What stores with a flat set of names share."""

    @abstractmethod
    def _names(self) -> Iterator[str]: ...

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Return a part of the value."""
        data = self.get(key)
        return None if data is None else data[start:stop]

    def get_suffix(self, key: str, count: int) -> bytes | None:
        """Return the end of the value."""
        data = self.get(key)
        return None if data is None else data[max(0, len(data) - count) :]

    def list_prefix(self, prefix: str) -> Iterator[str]:
        """Walk the keys below `prefix`."""
        lead = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        return (name for name in self._names() if name.startswith(lead))

    def list_dir(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the folders and the keys directly below `prefix`."""
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


class MappingBytes(Keyed):
    """A mapping of keys to bytes in this process."""

    def __init__(self, url: str, mapping: Mapping[str, Any]) -> None:
        super().__init__(url)
        self._mapping = mapping

    @property
    def mapping(self) -> Mapping[str, Any]:
        """The mapping itself."""
        return self._mapping

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

    def put(self, key: str, data: Any, *, aside: str = "") -> None:  # noqa: ARG002  # a mapping needs no such place
        """Set the value of `key`, as the kind of buffer that zarr keeps in mappings."""
        self._writable()[check_key(key)] = cpu.Buffer.from_bytes(bytes(data))

    def remove(self, keys: Iterable[str]) -> None:
        """Remove keys."""
        for key in list(keys):
            self._writable().pop(key, None)

    def _writable(self) -> MutableMapping[str, Any]:
        if not isinstance(self._mapping, MutableMapping):
            raise UsageError(f"{self.url} can't be written to: it is a {type(self._mapping).__name__}")
        return self._mapping

    def _names(self) -> Iterator[str]:
        return iter(list(self._mapping))


class ZipEntries(Keyed):
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
        return self._read(key, -1)

    def get_buffer(self, key: str, most: int) -> bytes | None:
        """Return the entry, unless the archive's directory says that it is too long: no more than that is inflated."""
        info = self._zip.NameToInfo.get(check_key(key))
        if info is not None and info.file_size > most:
            raise TooLongError(key, info.file_size, most)
        return self._read(key, -1)

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Return a part of the entry; of a long one without its checksum, and nothing else is held in memory."""
        return self._part(key, start, max(stop - start, 0))

    def get_suffix(self, key: str, count: int) -> bytes | None:
        """Return the end of the entry."""
        info = self._zip.NameToInfo.get(check_key(key))
        return None if info is None else self._part(key, max(0, info.file_size - count), count)

    def _part(self, key: str, start: int, count: int) -> bytes | None:
        info = self._zip.NameToInfo.get(check_key(key))
        if info is None or info.file_size > _CHECKED_BYTES:
            return self._read(key, count, start)
        data = self._read(key, -1)
        return None if data is None else data[start : start + count]

    def get_head(self, key: str, count: int) -> bytes | None:
        """Return the entry, or its beginning: inflated no further."""
        return self._read(key, count)

    def _read(self, key: str, count: int, start: int = 0) -> bytes | None:
        try:
            info = self._zip.getinfo(check_key(key))
        except KeyError:
            return None
        try:
            with self._lock, self._zip.open(info) as entry:
                if start:
                    entry.seek(start)
                return entry.read(count)
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
