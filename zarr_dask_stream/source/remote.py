"""Remote stores: fsspec file systems, obstore stores, and any other zarr store.

One loop per process serves them all: fsspec's own, in its own thread, which also survives a fork.
Only a foreign zarr store runs on zarr's loop, because it may already be bound to it.

A client that reads chunks tries once: trying again is the stream's business, which waits longer each time, slows
all workers down when a store asks for it, and counts. Only where options ask for more does a client try more often.
Listings are many requests in one call, of which each must be tried again alone: they have a client that does.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import errno
import os
import re
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import AsyncFileSystem, get_loop

from zarr_dask_stream.errors import StoreError, UsageError
from zarr_dask_stream.source.backend import RemoteBytes, TooLongError, check_key, collect
from zarr_dask_stream.source.files import Keyed
from zarr_dask_stream.source.secret import builtin_error

__all__ = ["FsspecFiles", "MemoryFiles", "ObstoreObjects", "ZarrKeys", "open_filesystem"]

#: Connections a client may open to one store: what the most eager reader keeps in flight.
POOL_SIZE = 128
_S3 = frozenset({"s3", "s3a"})
_CLAMPING = frozenset({*_S3, "gs", "gcs", "abfs", "abfss", "az", "adl"})
#: Retries of one request of a listing.
_LISTING_RETRIES = 4
#: Files removed at the same time.
_DELETED_AT_ONCE = 32
#: Read at once of a body of which only a part is wanted.
_PART_BYTES = 1 << 20
#: What S3 takes in one request, with some room.
_MOST_PUT_BYTES = 4 << 30


def open_filesystem(url: str, options: Mapping[str, Any], *, patient: bool = False) -> tuple[Any, str]:
    """Make a file system of our own for `url`, sized for many requests in flight.

    Parameters
    ----------
    url : str
        Where; protocols may be chained with ``::``.
    options : mapping
        What fsspec takes for it.
    patient : bool
        Whether it shall try again by itself. Where `options` say so it does in any case.

    Returns
    -------
    tuple
        The fsspec file system and the root inside it.
    """
    first, *behind = [part.partition("://")[0] for part in url.split("::")]
    options = {"skip_instance_cache": True, **options}
    if first in _S3:
        options = _s3_options(options, patient=patient)
    for protocol in _S3.intersection(behind):
        options[protocol] = _s3_options(options.get(protocol) or {}, patient=patient)
    fs, root = fsspec.core.url_to_fs(url, **options)
    return (fs if patient else _hasty(fs)), str(root)


def _s3_options(options: Mapping[str, Any], *, patient: bool) -> dict[str, Any]:
    """Complete options of s3fs where they say nothing."""
    # A pool of ten connections (botocore's default) would queue what we send. max_concurrency=1
    # makes one GET of a read where s3fs would send a HEAD before it.
    config = {"max_pool_connections": POOL_SIZE, **(options.get("config_kwargs") or {})}
    if not patient:
        config.setdefault("retries", {"total_max_attempts": 1, "mode": "standard"})
    ours = {"max_concurrency": 1, "use_listings_cache": False, "skip_instance_cache": True}
    return {**ours, **options, "config_kwargs": config}


def _hasty(fs: Any) -> Any:
    """Take from s3fs the five tries that it makes beside those of botocore, which the options speak of."""
    inner = _s3_of(fs)
    if inner is not None:
        inner.retries = 1
    return fs


def _s3_of(fs: Any) -> Any:
    """Return the S3 file system that this one is, or that it wraps; None where there is none."""
    while isinstance(fs, fsspec.AbstractFileSystem):
        if not _S3.isdisjoint([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol):
            return fs
        fs = getattr(fs, "fs", None)
    return None


def rebuild_filesystem(fs: Any, *, patient: bool = False) -> Any:
    """Make a fresh file system like `fs`: its sessions may be bound to another loop or process."""
    if not isinstance(fs, fsspec.AbstractFileSystem):
        return fs
    inner = getattr(fs, "sync_fs", None)
    if inner is not None:  # zarr wraps file systems that are not asynchronous
        return rebuild_filesystem(inner, patient=patient)
    options = {name: rebuild_filesystem(value, patient=patient) for name, value in fs.storage_options.items()}
    for name in ("asynchronous", "loop", "skip_instance_cache"):
        options.pop(name, None)
    args = [rebuild_filesystem(value, patient=patient) for value in fs.storage_args]
    if _s3_of(fs) is fs and not args:
        options = _s3_options(options, patient=patient)
    elif options.get("target_protocol") in _S3:
        options["target_options"] = _s3_options(options.get("target_options") or {}, patient=patient)
    fresh = type(fs)(*args, **{**options, "skip_instance_cache": True})
    return fresh if patient else _hasty(fresh)


def memory_contents() -> dict[str, Any]:
    """Return what ``memory://`` holds in this process."""
    contents: dict[str, Any] = fsspec.get_filesystem_class("memory").store
    return contents


class MemoryFiles(Keyed):
    """Files of fsspec's ``memory://``, which belong to this process alone."""

    def __init__(self, url: str, root: str) -> None:
        super().__init__(url)
        self._lead = f"/{root.strip('/')}/" if root.strip("/") else "/"

    def get(self, key: str) -> bytes | None:
        """Return the file's value."""
        file = memory_contents().get(self._lead + check_key(key))
        return None if file is None else bytes(file.getvalue())

    def put(self, key: str, data: Any, *, aside: str = "") -> None:  # noqa: ARG002  # needs no such place
        """Write the file."""
        fsspec.get_filesystem_class("memory")().pipe_file(self._lead + check_key(key), bytes(data))

    def remove(self, keys: Any) -> None:
        """Remove files."""
        for key in list(keys):
            memory_contents().pop(self._lead + key, None)

    def _names(self) -> Any:
        lead = self._lead
        return (path[len(lead) :] for path in list(memory_contents()) if path.startswith(lead))


def _is_asynchronous(fs: Any) -> bool:
    """Whether a file system has coroutines: its own, and those of one that it wraps."""
    inner = getattr(fs, "fs", None)
    wraps = isinstance(inner, fsspec.AbstractFileSystem)
    return isinstance(fs, AsyncFileSystem) and fs.async_impl and (not wraps or _is_asynchronous(inner))


def _close_with(owner: Any, fs: Any) -> None:
    """Close the connections of `fs` once nobody uses its owner any more.

    Left to itself a file system goes when Python looks for rings of objects: its methods refer back to it.
    """
    if _is_asynchronous(fs):
        # Not when Python ends: file systems see to that themselves.
        weakref.finalize(owner, _close_soon, fs, os.getpid()).atexit = False


def _close_soon(fs: Any, pid: int) -> None:
    if pid == os.getpid() and fs.loop.is_running():
        asyncio.run_coroutine_threadsafe(_close(fs), fs.loop)


async def _close(fs: Any) -> None:
    for one in (fs, _s3_of(fs)):  # others behind a cache may be shared with whoever uses fsspec beside us
        # What `set_session` of s3fs and of fsspec's own file systems has returned, "to be closed later".
        session = getattr(one, "_s3", None) or getattr(one, "_session", None)
        if session is not None:
            with contextlib.suppress(Exception):
                await session.close()


class FsspecFiles(RemoteBytes):
    """Files of an fsspec file system below a root; synchronous ones run in threads.

    `patient` makes the file system to list with, where that is another one.
    """

    def __init__(
        self,
        url: str,
        fs: Any,
        root: str,
        *,
        query: str = "",
        secrets: tuple[str, ...] = (),
        patient: Callable[[], Any] | None = None,
    ) -> None:
        super().__init__(url, secrets)
        self._fs = fs
        _close_with(self, fs)
        self._make_patient = patient if patient is not None and _s3_of(fs) is not None else lambda: fs
        self._lead = f"{root.rstrip('/')}/" if root.strip("/") else root
        self._query = f"?{query}" if query else ""
        self._asynchronous = _is_asynchronous(fs)
        protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
        self._listable = protocol not in {"http", "https"}
        self._read_body = self._body_reader()
        # Whether a range that reaches beyond the end of a value is known to give what there is of it.
        plain = getattr(type(fs), "cat_file", None) is fsspec.AbstractFileSystem.cat_file
        inner = getattr(fs, "fs", None) if str(protocol).endswith("cache") else None
        self._clamps = protocol in _CLAMPING or (plain and not self._asynchronous and inner is None)
        self._reading: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._behind = None if inner is None else FsspecFiles(url, inner, root, query=query, secrets=secrets)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop of the file system."""
        loop: asyncio.AbstractEventLoop = self._fs.loop if self._asynchronous else get_loop()
        return loop

    @cached_property
    def _patient(self) -> Any:
        fs = self._make_patient()
        _close_with(self, fs)
        return fs

    async def _run(self, fs: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if self._asynchronous:
            return await getattr(fs, f"_{name}")(*args, **kwargs)
        return await asyncio.to_thread(getattr(fs, name), *args, **kwargs)

    def _body_reader(self) -> Callable[..., Any] | None:
        """Return the function that reads bodies of answers in parts, for the file systems that let one do so."""
        if not self._asynchronous:
            return None
        if not self._listable:
            return _read_http
        one_request = getattr(self._fs, "max_concurrency", 1) == 1  # asked for several, s3fs cuts values into parts
        return _read_s3 if _s3_of(self._fs) is self._fs and hasattr(self._fs, "_call_s3") and one_request else None

    async def _read(self, key: str, start: int | None, stop: int | None, most: int | None) -> bytes | None:
        path = f"{self._lead}{key}{self._query}"
        if self._read_body is not None:
            data: bytes = await self._read_body(self._fs, path, _Wanted(key, start, stop, most))
            return data
        if start is None and most is not None and self._clamps:
            return await self._read_some(path, most)
        if start is not None and start < 0 and not self._asynchronous:
            # Files opened by synchronous file systems often don't know their size, which a negative start needs.
            stop = int(await self._run(self._fs, "size", path))
            start = max(0, stop + start)
        limits = {} if start is None else {"start": start, "end": stop}
        if self._behind is None:
            return bytes(await self._run(self._fs, "cat_file", path, **limits))
        # One reader of a key at a time: a caching file system gives a second one the half of the file that the
        # first has fetched so far.
        lock = self._reading.setdefault(key, asyncio.Lock())
        async with lock:
            try:
                return bytes(await self._run(self._fs, "cat_file", path, **limits))
            except FileNotFoundError:
                pass
        # It also says "not found" to whatever happened behind it: ask there.
        return await self._behind.fetch(key, start, stop)

    async def _read_some(self, path: str, most: int) -> bytes:
        """Read a value up to a byte more than `most`, by its range."""
        try:
            return bytes(await self._run(self._fs, "cat_file", path, start=0, end=most + 1))
        except Exception as error:
            # Of an empty value there is no first byte.
            if builtin_error(error, "", ()).errno == errno.EINVAL:
                return b""
            raise

    def _relative(self, path: str) -> str:
        lead = self._lead.lstrip("/")
        return path.lstrip("/")[len(lead) :]

    @property
    def tells_digests(self) -> bool:
        """Whether it is S3, or something that speaks as S3 does."""
        return _s3_of(self._fs) is not None

    async def _write(self, key: str, data: bytes) -> str | None:
        if self._behind is not None:
            raise UsageError(
                f"{self.url} can't be written to: its cache would go on giving what was there before; leave it out"
            )
        if not self._listable:
            raise UsageError(f"{self.url} can't be written to: plain HTTP is for reading")
        path = f"{self._lead}{key}"
        try:
            answer = await self._run(self._fs, "pipe_file", path, data)
        except FileNotFoundError:  # folders are no more than names on an object store, and have to be made elsewhere
            if _s3_of(self._fs) is not None:
                raise
            await self._run(self._fs, "makedirs", path.rpartition("/")[0], exist_ok=True)
            answer = await self._run(self._fs, "pipe_file", path, data)
        tag = answer.get("ETag") if isinstance(answer, Mapping) else None
        return tag if isinstance(tag, str) else None

    async def _size(self, key: str) -> int | None:
        info = await self._run(self._fs, "info", f"{self._lead}{key}")
        size = info.get("size")
        return None if size is None else int(size)

    async def _delete(self, keys: list[str]) -> None:
        for at in range(0, len(keys), _DELETED_AT_ONCE):
            some = [self._remove_one(f"{self._lead}{key}") for key in keys[at : at + _DELETED_AT_ONCE]]
            await asyncio.gather(*some)

    async def _remove_one(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            await self._run(self._fs, "rm_file", path)

    async def _list(self, prefix: str) -> list[str]:
        self._need_listing()
        try:
            found = await self._run(self._patient, "find", f"{self._lead}{prefix}".rstrip("/"))
        except FileNotFoundError:
            return []
        return [name for name in map(self._relative, found) if name]  # some servers list the folder itself

    async def _dir(self, prefix: str) -> tuple[list[str], list[str]]:
        self._need_listing()
        try:
            entries = await self._run(self._patient, "ls", f"{self._lead}{prefix}".rstrip("/"), detail=True)
        except FileNotFoundError:
            return [], []
        folders: list[str] = []
        keys: list[str] = []
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if self._relative(entry["name"]).strip("/") != prefix and name:
                (folders if entry["type"] == "directory" else keys).append(name)
        return folders, keys

    def _need_listing(self) -> None:
        if not self._listable:
            raise StoreError(f"{self.url} can't be listed: plain HTTP has no listings; name the array's path")


@dataclass(frozen=True)
class _Wanted:
    """What is to be read, as `RemoteBytes._read` takes it."""

    key: str
    start: int | None
    stop: int | None
    most: int | None

    @property
    def header(self) -> dict[str, str]:
        """The range, where there is one, in the words of HTTP."""
        if self.start is None:
            return {}
        return {"Range": f"bytes={self.start}" if self.start < 0 else f"bytes={self.start}-{(self.stop or 0) - 1}"}

    @property
    def nbytes(self) -> int:
        """Length of the range."""
        start = self.start or 0
        return -start if start < 0 else (self.stop or 0) - start

    def is_met_by(self, part: str) -> bool:
        """Whether a server sends the range, and not the value from its beginning, by what it says of that."""
        found = _PART.match(part)
        return found is None or self.start == int(found[1]) or (self.start or 0) + int(found[2]) < int(found[1])


async def _read_s3(fs: Any, path: str, wanted: _Wanted) -> bytes:
    """Read an object with one request, no further than wanted whatever the server sends."""
    bucket, name, version = fs.split_path(path)
    options = {"VersionId": version, **wanted.header} if version else wanted.header
    # What cat_file does, but that reads to the end whatever comes.
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=name, **options)  # noqa: SLF001
    body, partial = answer["Body"], answer["ResponseMetadata"]["HTTPStatusCode"] == _PARTIAL
    part = answer.get("ContentRange", "") if partial else None
    try:
        return await _some(body.read, wanted, part=part, stated=answer.get("ContentLength"))
    finally:
        body.close()


async def _read_http(fs: Any, path: str, wanted: _Wanted) -> bytes:
    """Read a file, no further than wanted whatever the server sends."""
    options = dict(fs.kwargs)
    if wanted.start is not None:
        options["headers"] = {**options.get("headers", {}), **wanted.header}
    session = await fs.set_session()
    async with session.get(fs.encode_url(path), **options) as answer:
        read = answer.content.read
        if not answer.ok:
            await collect(read, _PART_BYTES)  # a connection is used again only where nothing is left to read
        if answer.status == _ABSENT:
            raise FileNotFoundError(path)
        answer.raise_for_status()
        plain = "Content-Encoding" not in answer.headers
        stated = answer.content_length if plain else None
        part = answer.headers.get("Content-Range", "") if answer.status == _PARTIAL else None
        try:
            return await _some(read, wanted, part=part, stated=stated)
        finally:
            answer.close()  # at its end the connection has been given back already


_PARTIAL, _ABSENT = 206, 404
_PART = re.compile(r"bytes (\d{1,20})-(\d{1,20})/")


async def _some(read: Callable[[int], Any], wanted: _Wanted, *, part: str | None, stated: int | None) -> bytes:
    """Read what is wanted of a body: all of it, or a part; `part` is the one that the server says it sends."""
    if wanted.start is None:
        if wanted.most is not None and stated is not None and stated > wanted.most:
            raise TooLongError(wanted.key, stated, wanted.most)
        return await collect(read, wanted.most)
    if part is None or not wanted.is_met_by(part):
        return await _cut(read, wanted.start, wanted.stop)
    return (await collect(read, wanted.nbytes))[: wanted.nbytes]


async def _cut(read: Callable[[int], Any], start: int, stop: int | None) -> bytes:
    """Read a body from its beginning and keep ``start:stop`` of it, or its last bytes."""
    kept, begin = bytearray(), 0  # what is kept begins at this place
    while (stop is None or begin + len(kept) < stop) and (part := await read(_PART_BYTES)):
        kept += part
        drop = len(kept) + start if start < 0 else min(start - begin, len(kept))
        if drop > 0:
            del kept[:drop]
            begin += drop
    return bytes(kept[: None if stop is None else max(stop - begin, 0)])


_runtime_pid = [0]
_LET_GO_S = 0.1


def claim_runtime(url: str) -> None:
    """Note that obstore runs in this process, or refuse where it ran in the one that was forked.

    Its threads stay behind in the parent; a read in the child would wait for them for ever.
    """
    pid = os.getpid()
    if _runtime_pid[0] not in {0, pid}:
        raise StoreError(
            f"{url} is read by obstore, which does not survive a fork; start processes with 'spawn' or "
            "'forkserver' (for a torch DataLoader: multiprocessing_context='spawn')"
        )
    if not _runtime_pid[0]:
        atexit.register(_let_threads_finish)
    _runtime_pid[0] = pid


def _let_threads_finish() -> None:
    """Give obstore's threads time to let go of Python objects: one that does so while Python ends aborts it."""
    time.sleep(_LET_GO_S)


class ObstoreObjects(RemoteBytes):
    """Objects of an obstore store; `patient` is the store to list with, where that is another one."""

    def __init__(
        self, url: str, store: Any, *, secrets: tuple[str, ...] = (), lead: str = "", patient: Any = None
    ) -> None:
        super().__init__(url, secrets)
        claim_runtime(url)
        self._patient = store if patient is None else patient
        self._lead = lead
        self._store = store
        self._get: Callable[..., Any] = store.get_async

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop shared by all stores of this process."""
        loop: asyncio.AbstractEventLoop = get_loop()
        return loop

    async def _read(self, key: str, start: int | None, stop: int | None, most: int | None) -> bytes | None:
        path = self._lead + key
        if start is None:
            result = await self._get(path)
            size = int(result.meta["size"])
            if most is not None and size > most:
                raise TooLongError(key, size, most)
            return await _body(result, size)
        option: Any = (start, stop)
        if stop is None:
            option = {"suffix": -start} if start < 0 else {"offset": start}
        result = await self._get(path, options={"range": option})
        first, last = result.range
        return await _body(result, last - first)

    @property
    def tells_digests(self) -> bool:
        """Whether it is S3, or something that speaks as S3 does."""
        return type(self._store).__name__ == "S3Store"

    async def _write(self, key: str, data: bytes) -> str | None:
        # One request as far as S3 takes one; it cuts larger objects into parts that show when all are there.
        answer = await self._store.put_async(self._lead + key, data, use_multipart=len(data) > _MOST_PUT_BYTES)
        tag = answer.get("e_tag")
        return tag if isinstance(tag, str) else None

    async def _size(self, key: str) -> int | None:
        return int((await self._store.head_async(self._lead + key))["size"])

    async def _delete(self, keys: list[str]) -> None:
        try:
            await self._patient.delete_async([self._lead + key for key in keys])
        except FileNotFoundError:  # one of several: which, is not said
            for key in keys:
                with contextlib.suppress(FileNotFoundError):
                    await self._patient.delete_async(self._lead + key)

    async def _list(self, prefix: str) -> list[str]:
        lead = f"{self._lead}{prefix}"
        found = []
        async for page in self._patient.list(lead or None):
            found += [item["path"][len(self._lead) :] for item in page]
        return found

    async def _dir(self, prefix: str) -> tuple[list[str], list[str]]:
        result = await self._patient.list_with_delimiter_async(f"{self._lead}{prefix}" or None)
        return (
            [path.rstrip("/").rpartition("/")[2] for path in result["common_prefixes"]],
            [item["path"].rpartition("/")[2] for item in result["objects"]],
        )


async def _body(result: Any, nbytes: int) -> bytes:
    """Read the body of an answer that says to have `nbytes`, and no further: a server may send anything."""
    parts, length = [], 0
    stream = aiter(result.stream(min_chunk_size=max(nbytes, 1)))
    while length < nbytes:  # no step more than it takes: each one crosses from thread to thread
        part = await anext(stream, None)
        if part is None:
            break
        parts.append(bytes(part))
        length += len(part)
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return data if length <= nbytes else data[:nbytes]


class ZarrKeys(RemoteBytes):
    """Keys of any zarr store, through its own coroutines."""

    def __init__(self, url: str, store: Any, secrets: tuple[str, ...] = ()) -> None:
        super().__init__(url, secrets)
        self._store = store
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop of zarr itself."""
        if self._loop is None:
            # zarr has no public way to its loop; `sync` has been at this place in all 3.x.
            from zarr.core.sync import sync  # noqa: PLC0415  # only where such a store is read

            self._loop = sync(_running_loop())
        return self._loop

    async def _read(
        self,
        key: str,
        start: int | None,
        stop: int | None,
        most: int | None,  # noqa: ARG002  # a store may refuse a range that goes beyond the end of a value
    ) -> bytes | None:
        from zarr.abc import store as abc  # noqa: PLC0415  # zarr takes long to import
        from zarr.buffer import default_buffer_prototype  # noqa: PLC0415

        request: Any = None
        if start is not None and stop is not None:
            request = abc.RangeByteRequest(start, stop)
        elif start is not None:
            request = abc.SuffixByteRequest(-start) if start < 0 else abc.OffsetByteRequest(start)
        value = await self._store.get(key, default_buffer_prototype(), request)
        return None if value is None else bytes(value.to_bytes())

    async def _write(self, key: str, data: bytes) -> str | None:
        from zarr.buffer import cpu  # noqa: PLC0415  # as above

        if self._store.read_only:
            raise UsageError(f"{self.url} can't be written to: it was opened for reading only")
        await self._store.set(key, cpu.Buffer.from_bytes(data))
        return None

    async def _size(self, key: str) -> int | None:
        return int(await self._store.getsize(key))

    async def _delete(self, keys: list[str]) -> None:
        for key in keys:
            with contextlib.suppress(FileNotFoundError, KeyError):
                await self._store.delete(key)

    async def _list(self, prefix: str) -> list[str]:
        return [key async for key in self._store.list_prefix(f"{prefix}/" if prefix else "")]

    async def _dir(self, prefix: str) -> tuple[list[str], list[str]]:
        names: AsyncIterator[str] = self._store.list_dir(prefix)
        folders: list[str] = []
        keys: list[str] = []
        async for name in names:
            # A zarr store does not say which is which.
            key = f"{prefix}/{name}" if prefix else name
            (keys if await self._store.exists(key) else folders).append(name)
        return folders, keys


async def _running_loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


def hasty_store(store: Any) -> Any:
    """Make an obstore store like `store` that tries once, unless its maker said how often it shall try."""
    if getattr(store, "retry_config", 0) is not None:
        return store
    args, options = store.__getnewargs_ex__()
    return type(store)(*args, **options, retry_config={"max_retries": 0})


def obstore_for_s3(url: str, options: Mapping[str, Any], *, patient: bool = False) -> Any:
    """Make an obstore store for an ``s3://`` URL, where that surely means what s3fs would do with it.

    obstore sends several times the requests a second that s3fs does. It is taken where it is installed and
    every option has a counterpart, and where credentials and region need no look into configuration files.

    Returns
    -------
    obstore.store.S3Store or None
    """
    protocol, _, place = url.partition("://")
    if protocol not in {"s3", "s3a"} or "@" in place or _runtime_pid[0] not in {0, os.getpid()}:
        return None
    try:
        from obstore.store import S3Store  # noqa: PLC0415  # an optional dependency
    except ImportError:
        return None
    config = _s3_config(options)
    if config is None:
        return None
    bucket, _, prefix = place.strip("/").partition("/")
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options={"allow_http": True},
        retry_config={"max_retries": _LISTING_RETRIES if patient else 0},
        **config,
    )


def _s3_config(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """Translate s3fs's options to obstore's; None where one has no counterpart or something is not said."""
    client = options.get("client_kwargs") or {}
    if set(options) - {"key", "secret", "token", "anon", "endpoint_url", "client_kwargs"} or set(client) - {
        "endpoint_url",
        "region_name",
    }:
        return None
    environment = os.environ
    endpoint = options.get("endpoint_url") or client.get("endpoint_url") or environment.get("AWS_ENDPOINT_URL")
    region = client.get("region_name") or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    key = options.get("key") or environment.get("AWS_ACCESS_KEY_ID")
    secret = options.get("secret") or environment.get("AWS_SECRET_ACCESS_KEY")
    token = options.get("token") or (None if options.get("key") else environment.get("AWS_SESSION_TOKEN"))
    if not region or not (options.get("anon") or (key and secret)):
        return None
    config: dict[str, Any] = {"region": region, "virtual_hosted_style_request": endpoint is None}
    if endpoint:
        config["endpoint"] = endpoint
    if options.get("anon"):
        return config | {"skip_signature": True}
    return config | {"access_key_id": key, "secret_access_key": secret} | ({"session_token": token} if token else {})


def split_query(url: str) -> tuple[str, str]:
    """Take the query off an HTTP URL: it belongs after each key, not before it.

    Examples
    --------
    >>> split_query("https://host/data.zarr?sig=abc")
    ('https://host/data.zarr', 'sig=abc')
    """
    if urlsplit(url).scheme in {"http", "https"}:
        base, _, query = url.partition("?")
        return base.rstrip("/"), query
    return url, ""
