"""The limit of a machine: bare loops on all cores, without a framework.

Each loop opens, reads, decodes with the fastest call there is and applies the same function as everybody else. The
processes live as long as the benchmark, as a cluster's workers do.
"""

import asyncio
import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import struct
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeVar

import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import s3fs
import zstandard
from obstore.store import S3Store

from benchmarks.data import Stored

T = TypeVar("T")
Sums = npt.NDArray[np.float32]
Loop = Callable[[Stored, int, int], Sums]


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_MOST_KEPT = 2**25  # what glibc takes at most as the second


def keep_memory() -> None:
    """Have glibc keep what is freed for the next chunk; elsewhere nothing changes.

    Otherwise memory goes back to the system after each chunk and is asked for again, page by page: bare loops of half
    the throughput would be no limit.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
        libc.mallopt(_M_MMAP_THRESHOLD, _MOST_KEPT)


class BareProcesses:
    """Processes that wait for loops to run, and keep the memory of one chunk for the next."""

    def __init__(self, count: int) -> None:
        self._count = count
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=keep_memory)

    def run(self, loop: Callable[..., Sums], stored: Stored, *arguments: Any) -> Sums:
        """Cut the chunk numbers into one range for each process, run the loop over each, and join what comes back."""
        return np.concatenate(self.run_parts(loop, stored, *arguments))

    def run_one(self, loop: Callable[..., Sums], stored: Stored, *arguments: Any) -> Sums:
        """Run the loop over all chunks in one of the processes."""
        return self._pool.submit(loop, stored, 0, stored.chunks, *arguments).result()

    def run_parts(self, loop: Callable[..., T], stored: Stored, *arguments: Any) -> list[T]:
        """Run the loop over equal ranges of the chunk numbers and return what each comes to."""
        # A shard is nobody's to share.
        unit = stored.shard[0] * stored.grid[1]
        edges = [stored.chunks * part // self._count // unit * unit for part in range(self._count)] + [stored.chunks]
        parts = itertools.pairwise(edges)
        futures = [self._pool.submit(loop, stored, start, stop, *arguments) for start, stop in parts]
        return [future.result() for future in futures]

    def close(self) -> None:
        """End the processes."""
        self._pool.shutdown()


def read_file(path: str) -> bytes:
    """Read a file with as few calls as possible."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, os.fstat(file).st_size)
    finally:
        os.close(file)


def sum_zstd(stored: Stored, start: int, stop: int) -> Sums:
    """Sum zstd chunks that are files."""
    decode = zstandard.ZstdDecompressor().decompress
    sums = np.empty(stop - start, "f4")
    for number in range(start, stop):
        sums[number - start] = np.frombuffer(decode(read_file(f"{stored.url}/{stored.key(number)}")), "f4").sum()
    return sums


def sum_blosc(stored: Stored, start: int, stop: int) -> Sums:
    """Sum blosc chunks that are files."""
    numcodecs.blosc.set_nthreads(1)
    decode = numcodecs.blosc.decompress
    block = np.empty(stored.chunk, "f4")
    sums = np.empty(stop - start, "f4")
    for number in range(start, stop):
        decode(read_file(f"{stored.url}/{stored.key(number)}"), block)
        sums[number - start] = block.sum()
    return sums


def sum_shards(stored: Stored, start: int, stop: int) -> Sums:
    """Sum zstd chunks in shards: each shard is read at once, its index taken from its end."""
    decode = zstandard.ZstdDecompressor().decompress
    rows, columns = stored.shard
    entries = rows * columns
    sums = np.empty((stored.grid[0], stored.grid[1]), "f4")
    first, last = start // stored.grid[1], stop // stored.grid[1]
    for i in range(first // rows, last // rows):
        for j in range(stored.grid[1] // columns):
            raw = memoryview(read_file(f"{stored.url}/c/{i}/{j}"))
            index = struct.unpack(f"<{2 * entries}Q", raw[-16 * entries - 4 : -4])
            for entry in range(entries):
                offset, nbytes = index[2 * entry], index[2 * entry + 1]
                data = np.frombuffer(decode(raw[offset : offset + nbytes]), "f4")
                sums[i * rows + entry // columns, j * columns + entry % columns] = data.sum()
    return sums[first:last].ravel()


def decode_zstd(stored: Stored, number: int) -> npt.NDArray[np.float32]:
    """Read and decode one zstd chunk that is a file, for those who want it whole."""
    raw = read_file(f"{stored.url}/{stored.key(number)}")
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(raw), "f4").reshape(stored.chunk)


#: Reads a whole object, given its key.
Get = Callable[[str], Awaitable[Any]]


@dataclass(frozen=True)
class Client:
    """How a bare loop reads from S3: which library, its options as JSON, how many requests at once."""

    library: Literal["obstore", "s3fs"]
    options: str
    in_flight: int


def sum_objects(stored: Stored, start: int, stop: int, client: Client) -> Sums:
    """Sum zstd chunks on S3, with so many requests in flight in this process."""
    bucket = _bucket(stored.url, client)
    return bucket.loop.run_until_complete(_sum_objects(stored, range(start, stop), bucket.get, client.in_flight))


class _Bucket(NamedTuple):
    loop: asyncio.AbstractEventLoop
    get: Get


@lru_cache(maxsize=8)
def _bucket(url: str, client: Client) -> _Bucket:
    """Connect once in a process."""
    loop = asyncio.new_event_loop()
    # Its idle connections go with the process, and need no mention.
    loop.set_exception_handler(lambda *_: None)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    options = json.loads(client.options)
    if client.library == "obstore":
        return _Bucket(loop, _obstore_get(bucket, prefix, options))
    return _Bucket(loop, _s3fs_get(f"{bucket}/{prefix}", options, loop, client.in_flight))


def _s3fs_get(root: str, options: dict[str, Any], loop: asyncio.AbstractEventLoop, in_flight: int) -> Get:
    # One GET for an object, and no connection waits for another: what s3fs can do with the right settings.
    fs = s3fs.S3FileSystem(
        asynchronous=True,
        loop=loop,
        skip_instance_cache=True,
        max_concurrency=1,
        config_kwargs={"max_pool_connections": in_flight},
        **options,
    )

    async def get(key: str) -> Any:
        return await fs._cat_file(f"{root}/{key}")

    return get


def _obstore_get(bucket: str, prefix: str, options: dict[str, Any]) -> Get:
    store = S3Store(bucket, prefix=prefix, **options)

    async def get(key: str) -> Any:
        return await (await store.get_async(key)).bytes_async()

    return get


async def _sum_objects(stored: Stored, numbers: range, get: Get, in_flight: int) -> Sums:
    decode = zstandard.ZstdDecompressor().decompress
    sums = np.empty(len(numbers), "f4")
    todo = iter(numbers)

    async def one_by_one() -> None:
        for number in todo:
            raw = await get(stored.key(number))
            sums[number - numbers.start] = np.frombuffer(decode(raw), "f4").sum()

    await asyncio.gather(*(one_by_one() for _ in range(in_flight)))
    return sums
