"""Ways to the bytes: one class per kind of store, all with the same few synchronous calls.

A key that is not there reads as None. Everything else that goes wrong is a builtin OSError
(or a `StoreError`), never None: a permission problem must not look like an empty chunk.
What is written is there whole or not at all, for whoever reads meanwhile.
Remote stores add `fetch` and `send`, coroutines for many requests in flight on one loop per process.
"""

from __future__ import annotations

import asyncio
import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from random import random
from time import monotonic, sleep
from typing import Any, TypeVar

from zarr_dask_stream.errors import CorruptChunkError, StoreError, StoreNotFoundError, UsageError
from zarr_dask_stream.source.secret import builtin_error, service_code

__all__ = ["ByteStore", "RemoteBytes", "TooLongError", "check_key", "collect"]

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
# How stores answer who asks for what lies behind the end of a value; some can't put it in words.
_OUT_OF_RANGE = frozenset({errno.EINVAL, errno.EIO, errno.EREMOTEIO})
_LOT = 1000  # keys that are removed with one call
_PART_BYTES = 1 << 20  # asked for at once of a body that comes in parts


class TooLongError(CorruptChunkError):
    """More is stored under a key than what is looked for there could take; it was not read to its end.

    Parameters
    ----------
    key : str
        Where.
    nbytes : int or None
        Stored bytes; None where the store does not tell, and more than `most` came.
    most : int
        Bytes that are expected at most.

    Examples
    --------
    >>> print(TooLongError("c/0", 1 << 40, 1_129_000))
    c/0 has 1,099,511,627,776 bytes, and what is looked for there takes at most 1,129,000
    """

    def __init__(self, key: str, nbytes: int | None, most: int) -> None:
        super().__init__(key, nbytes, most)
        self.key, self.nbytes, self.most = key, nbytes, most

    def __str__(self) -> str:
        got = f"more than {self.most:,} bytes" if self.nbytes is None else f"{self.nbytes:,} bytes"
        return f"{self.key} has {got}, and what is looked for there takes at most {self.most:,}"


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
    """Access to the keys of one store.

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

    def get_buffer(self, key: str, most: int) -> bytes | memoryview | None:
        """Return a chunk's whole value like `get`, where possible in memory that the caller may write to.

        Raises
        ------
        TooLongError
            If it has more than `most` bytes; those are not read.
        """
        data = self.get(key)
        if data is not None and len(data) > most:
            raise TooLongError(key, len(data), most)
        return data

    def borrow(self, most: int) -> Callable[[str], bytes | memoryview | None]:
        """Return a function like `get_buffer` for one thread, whose answer may be overwritten by its next call."""
        return lambda key: self.get_buffer(key, most)

    def borrow_range(self) -> Callable[[str, int, int], bytes | memoryview | None]:
        """Return a function like `get_range` for one thread, whose answer may be overwritten by its next call."""
        return self.get_range

    def get_head(self, key: str, count: int) -> bytes | None:
        """Return the value of `key`, or its first `count` bytes where it is longer, or None; no more is read."""
        data = self.get(key)
        return data if data is None or len(data) <= count else data[:count]

    @abstractmethod
    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Return bytes ``start:stop`` of `key` (fewer where it ends before), or None."""

    @abstractmethod
    def get_suffix(self, key: str, count: int) -> bytes | None:
        """Return the last `count` bytes of `key` (all of a shorter one), or None."""

    @abstractmethod
    def list_prefix(self, prefix: str) -> Iterator[str]:
        """Walk all keys below the folder `prefix` ("" for all), in no particular order."""

    def list_names(self, prefix: str) -> Iterator[str]:
        """Walk all keys below `prefix`, and with them whatever would be in the way of one: reading it must fail."""
        return self.list_prefix(prefix)

    @abstractmethod
    def list_dir(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the keys directly below the folder `prefix`."""

    def exists(self, key: str) -> bool:
        """Whether `key` is there."""
        return self.get(key) is not None

    def version(self, key: str) -> Any:  # noqa: ARG002  # for those that have versions
        """Return something that changes when the value of `key` does, or None where that is not cheap."""
        return None

    def put(self, key: str, data: Any, *, aside: str = "") -> None:  # noqa: ARG002  # for those that can be written to
        """Store the bytes `data` under `key`, whole or not at all.

        `aside` is a folder for what is not whole yet, made by `prepare`, where the store needs one.

        Raises
        ------
        UsageError
            If this kind of store can't be written to.
        """
        raise UsageError(f"{self.url} can't be written to; write to a folder or to an object store such as s3://")

    def remove(self, keys: Iterable[str]) -> None:  # noqa: ARG002  # as above
        """Remove keys; one that is not there is no error."""
        raise UsageError(f"{self.url} can't be written to")

    def clear(self, prefix: str, last: Iterable[str] = ()) -> None:
        """Remove all keys below the folder `prefix`, those named in `last` after all others."""
        lead = f"{prefix}/" if prefix else ""
        late = {lead + name for name in last}
        self.remove(key for key in self.list_prefix(prefix) if key not in late)
        self.remove(late)

    def prepare(self, folder: str) -> None:  # noqa: B027  # most stores need no such folder
        """Make a folder for what `put` has aside."""

    def is_prepared(self, folder: str) -> bool:  # noqa: ARG002  # as above
        """Whether the folder that `prepare` has made is seen here, too."""
        return True

    def discard(self, folder: str) -> None:  # noqa: B027  # as above
        """Remove such a folder and what is in it, if it is there."""

    def size(self, key: str) -> int | None:
        """Return the length of the value of `key`, bytes, or None."""
        data = self.get(key)
        return None if data is None else len(data)

    def flush(self) -> None:  # noqa: B027  # most stores have nothing to wait for
        """Return when what was stored survives a loss of power; at once where `put` has seen to that."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


class RemoteBytes(ByteStore):
    """A store behind coroutines; the synchronous calls run them on its loop and wait.

    Subclasses give `_read` and `_list`/`_dir`, those that can be written to `_write`, `_size` and `_delete`
    as well, and raise what their client raises: it is turned into a builtin OSError here.
    """

    is_local = False

    def __init__(self, url: str, secrets: tuple[str, ...] = ()) -> None:
        super().__init__(url)
        self._secrets = secrets

    @property
    def tells_digests(self) -> bool:
        """Whether the service answers a write with the MD5 of what it has stored."""
        return False

    @property
    @abstractmethod
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop, in a thread of its own, on which `fetch` must be awaited."""

    @abstractmethod
    async def _read(self, key: str, start: int | None, stop: int | None, most: int | None) -> bytes | None:
        """Read ``start:stop`` of `key`; a negative start with no stop means the last bytes.

        Of a whole value of more than `most` bytes, no more is read than it takes to find that out; then `TooLongError`
        is raised, or more than `most` bytes are returned.
        """

    @abstractmethod
    async def _list(self, prefix: str) -> list[str]: ...

    @abstractmethod
    async def _dir(self, prefix: str) -> tuple[list[str], list[str]]: ...

    async def fetch(
        self, key: str, start: int | None = None, stop: int | None = None, most: int | None = None
    ) -> bytes | None:
        """Read `key`, or ``start:stop`` of it, or with a negative `start` and no `stop` its last bytes.

        Raises
        ------
        OSError
            For whatever is not "this key is not there".
        TooLongError
            If a whole value has more than `most` bytes; it is not read to its end.
        """
        check_key(key)
        if start is not None and stop is not None and stop <= start:
            return b""  # what can't be asked for in the words of HTTP
        problem: OSError
        try:
            data = await self._read(key, start, stop, most)
        except StoreError:
            raise
        except Exception as error:  # noqa: BLE001  # client libraries raise anything; none may be lost
            if not isinstance(error, KeyError) and _is_absent(error):
                return None
            problem = builtin_error(error, f"reading {key} of {self.url}", self._secrets)
        else:
            if data is None or start is not None:
                return data if data is None or start is None else _trim(data, start, stop)
            if most is not None and len(data) > most:
                raise TooLongError(key, None, most)
            return data
        # Outside the handler: no context, which could hold a request with credentials in it.
        raise problem

    async def _write(self, key: str, data: bytes) -> str | None:  # noqa: ARG002  # for those that can be written to
        """Store a value with one request; return the tag that the service gives it, if any."""
        raise UsageError(f"{self.url} can't be written to")

    async def _size(self, key: str) -> int | None:
        """Return the length of a value; may raise where it is not there."""
        data = await self._read(key, None, None, None)
        return None if data is None else len(data)

    async def _delete(self, keys: list[str]) -> None:  # noqa: ARG002  # for those that can be written to
        raise UsageError(f"{self.url} can't be written to")

    async def send(
        self, key: str, data: bytes, *, verify: bool = False, digest: str = "", compare: bool = False
    ) -> None:
        """Store `data` under `key`.

        Parameters
        ----------
        verify : bool
            Ask for the length afterwards, where the service has not answered with `digest` as the value's tag.
        digest : str
            MD5 of the data, in hexadecimal: what S3 calls a plain object of its own making.
        compare : bool
            Read the value back and compare it.

        Raises
        ------
        OSError
            For whatever went wrong; EIO where something else is stored than was sent.
        """
        check_key(key)
        problem: OSError
        try:
            tag = await self._write(key, data)
            if compare:
                wrong = "" if await self._read(key, None, None, None) == data else "other bytes are read than were sent"
            elif not verify or (digest and tag is not None and tag.strip('"') == digest):
                wrong = ""
            else:
                stored = await self._stored_size(key)
                wrong = "" if stored == len(data) else f"{len(data)} bytes were sent, and {stored or 0} are stored"
        except (StoreError, UsageError):
            raise
        except Exception as error:  # noqa: BLE001  # as in fetch
            problem = builtin_error(error, f"writing {key} of {self.url}", self._secrets)
        else:
            if not wrong:
                return
            problem = OSError(errno.EIO, f"writing {key} of {self.url}: {wrong}")
        raise problem  # outside the handler, as in fetch

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Have a coroutine run on the loop, without waiting for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def _stored_size(self, key: str) -> int | None:
        try:
            return await self._size(key)
        except Exception as error:
            if _is_absent(error):
                return None
            raise

    def put(self, key: str, data: Any, *, aside: str = "") -> None:  # noqa: ARG002  # objects are stored whole
        """Store a value; tried again where that may help."""
        value = bytes(data)
        self._patiently(lambda: self.send(key, value), f"writing {key} of {self.url}")

    def remove(self, keys: Iterable[str]) -> None:
        """Remove keys, in lots."""
        names = [check_key(key) for key in keys]
        for at in range(0, len(names), _LOT):
            self.call(self._delete(names[at : at + _LOT]), f"removing keys of {self.url}")

    def size(self, key: str) -> int | None:
        """Return the length of the value of `key`."""
        return self.call(self._stored_size(check_key(key)), f"asking for {key} of {self.url}")

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

    def get_head(self, key: str, count: int) -> bytes | None:
        """Return the value of `key`, or its beginning; a server that knows no ranges sends all of it."""
        try:
            return self._fetch_now(key, 0, count)
        except OSError as error:
            # Of an empty value there is no first byte, and it is an error to ask for it. A store that is in trouble, or
            # refuses whatever is asked, is not asked any further.
            if error.errno not in _OUT_OF_RANGE or not self._is_empty(key):
                raise
            return b""

    def _is_empty(self, key: str) -> bool:
        try:
            return self.size(key) == 0
        except (OSError, StoreError):
            return False

    def get_range(self, key: str, start: int, stop: int) -> bytes | None:
        """Return bytes ``start:stop`` of `key`."""
        return self._fetch_now(key, start, stop)

    def get_suffix(self, key: str, count: int) -> bytes | None:
        """Return the last `count` bytes of `key`."""
        return self._fetch_now(key, -count)

    def _fetch_now(self, key: str, start: int | None = None, stop: int | None = None) -> bytes | None:
        return self._patiently(lambda: self.fetch(key, start, stop), f"reading {key} of {self.url}")

    def _patiently(self, work: Callable[[], Coroutine[Any, Any, T]], what: str) -> T:
        """Try again where that may help: for what is no chunk nobody above does."""
        deadline = monotonic() + CALL_TIMEOUT_S
        attempt = 0
        while True:
            attempt += 1
            try:
                return self._once(work(), what, deadline - monotonic())
            except OSError as error:
                # Half of the wait is drawn: many processes may have been refused at the same moment.
                pause_s = _WAIT_S * 2 ** (attempt - 1) * (0.5 + random() / 2)  # noqa: S311  # no secret is made of it
                if error.errno not in _PASSING or attempt == _TRIES or monotonic() + pause_s > deadline:
                    raise
            sleep(pause_s)

    def _once(self, work: Coroutine[Any, Any, T], what: str, seconds: float) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(seconds)
        except BaseException as error:
            late = isinstance(error, TimeoutError) and not future.done()
            future.cancel()
            if not late:
                raise
        raise TimeoutError(errno.ETIMEDOUT, f"{what} took longer than {CALL_TIMEOUT_S:g} s")

    def list_prefix(self, prefix: str) -> Iterator[str]:
        """Walk the keys below `prefix`."""
        return iter(self.call(self._list(check_key(prefix.strip("/"))), f"listing {self.url}"))

    def list_dir(self, prefix: str) -> tuple[list[str], list[str]]:
        """Return the folders and the keys directly below `prefix`."""
        return self.call(self._dir(check_key(prefix.strip("/"))), f"listing {self.url}")


async def collect(read: Callable[[int], Awaitable[bytes]], most: int | None) -> bytes:
    """Read a body in parts to its end, or until more than `most` bytes are here.

    Examples
    --------
    >>> import io
    >>> def body(nbytes):
    ...     file = io.BytesIO(bytes(nbytes))
    ...     async def read(count):
    ...         return file.read(count)
    ...     return read
    >>> len(asyncio.run(collect(body(10**7), most=None))), len(asyncio.run(collect(body(10**7), most=99)))
    (10000000, 100)
    """
    parts, length = [], 0
    while most is None or length <= most:
        part = await read(_PART_BYTES if most is None else min(_PART_BYTES, most + 1 - length))
        if not part:
            break
        parts.append(part)
        length += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


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
