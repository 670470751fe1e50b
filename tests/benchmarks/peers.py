"""How people do the same work today: each peer in its best setting, on the cluster the stream runs on.

A peer takes an array and returns the sum of the sums of its chunks, so that one that does other work is found out.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import dask.array
import numpy as np
import numpy.typing as npt
import tensorstore
import xarray
import zarr
from dask.delayed import delayed
from distributed import Client, as_completed

from benchmarks.data import Stored

Block = npt.NDArray[Any]
Options = dict[str, Any] | None


def _sum_block(block: Block) -> Block:
    total: Block = block.sum(keepdims=True)
    return total


def from_zarr(stored: Stored, client: Client, options: Options = None) -> float:
    """`dask.array.from_zarr` and `map_blocks`: one task for each chunk."""
    array = dask.array.from_zarr(stored.url, storage_options=options, inline_array=True)
    sums = array.map_blocks(_sum_block, chunks=(1, 1), dtype="f4", meta=np.empty((0, 0), "f4"))
    return float(client.compute(sums, sync=True).sum(dtype="f8"))


def from_zarr_bands(stored: Stored, client: Client) -> float:
    """The same with Dask chunks as large as a whole row of stored chunks, cut apart by the function."""
    array = dask.array.from_zarr(stored.url, chunks=(stored.chunk[0] * stored.shard[0], stored.shape[1]))

    def sum_each(block: Block) -> Block:
        sums: Block = stored.split(block).sum(axis=(2, 3))
        return sums

    chunks = (stored.shard[0], stored.grid[1])
    sums = array.map_blocks(sum_each, chunks=chunks, dtype="f4", meta=np.empty((0, 0), "f4"))
    return float(client.compute(sums, sync=True).sum(dtype="f8"))


def xarray_coarsen(stored: Stored, client: Client) -> float:
    """xarray over Dask: the chunks as windows of `coarsen`."""
    group, _, name = stored.url.rpartition("/")
    with xarray.open_zarr(group, chunks={}, consolidated=False) as dataset:
        sums = dataset[name].coarsen(y=stored.chunk[0], x=stored.chunk[1]).reduce(np.sum)
        return float(client.compute(sums.data, sync=True).sum(dtype="f8"))


@lru_cache(maxsize=8)
def _opened(url: str) -> zarr.Array[Any]:
    array = zarr.open(url, mode="r")
    assert isinstance(array, zarr.Array)
    return array


def _bands(stored: Stored) -> range:
    return range(0, stored.shape[0], stored.chunk[0] * stored.shard[0])


def _sum_band(stored: Stored, start: int) -> Block:
    band = _opened(stored.url)[start : start + stored.chunk[0] * stored.shard[0]]
    sums: Block = stored.split(np.asarray(band)).sum(axis=(2, 3))
    return sums


def client_map(stored: Stored, client: Client) -> float:
    """`Client.map` by hand: a task reads a row of chunks with zarr-python in one go and sums each."""
    bands = list(_bands(stored))
    futures = client.map(_sum_band, [stored] * len(bands), bands, pure=False)
    return float(sum(sums.sum(dtype="f8") for sums in client.gather(futures)))


def thread_pool(stored: Stored, pool: Executor) -> float:
    """zarr-python in threads of one process, a row of chunks at a time."""
    sums = pool.map(_sum_band, itertools.repeat(stored), _bands(stored))
    return float(sum(part.sum(dtype="f8") for part in sums))


def zarr_whole(stored: Stored) -> float:
    """zarr-python's own full read of an array."""
    array = zarr.open(stored.url, mode="r")
    assert isinstance(array, zarr.Array)
    return float(np.asarray(array[...]).sum(dtype="f8"))


@lru_cache(maxsize=8)
def _tensorstore(url: str, driver: str) -> Any:
    store = {"driver": driver, "kvstore": {"driver": "file", "path": url}}
    return tensorstore.open(store, read=True, open=True).result()


def tensorstore_of(stored: Stored) -> Any:
    """Open an array with tensorstore, once in a process."""
    return _tensorstore(stored.url, "zarr" if stored.layout == "blosc2" else "zarr3")


def tensorstore_bands(stored: Stored, ahead: int = 4) -> float:
    """tensorstore in one process: rows of chunks as futures, some of them ahead of the sums."""
    array = tensorstore_of(stored)
    height = stored.chunk[0] * stored.shard[0]
    reads = (array[start : start + height].read() for start in _bands(stored))
    return float(sum(stored.split(read.result()).sum(axis=(2, 3)).sum(dtype="f8") for read in _ahead(reads, ahead)))


def _ahead(reads: Iterable[Any], count: int) -> Iterator[Any]:
    reads = iter(reads)
    window = list(itertools.islice(reads, count))
    while window:
        yield window.pop(0)
        window += itertools.islice(reads, 1)


# -- whole chunks to the client -----------------------------------------------------------------------


def _region(stored: Stored, number: int) -> tuple[slice, slice]:
    (i, j), (height, width) = divmod(number, stored.grid[1]), stored.chunk
    return slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)


def read_zarr(stored: Stored, number: int) -> Block:
    """Read one chunk with zarr-python; runs on a worker."""
    return np.asarray(_opened(stored.url)[_region(stored, number)])


def read_tensorstore(stored: Stored, number: int) -> Block:
    """Read one chunk with tensorstore; runs on a worker."""
    data: Block = tensorstore_of(stored)[_region(stored, number)].read().result()
    return data


def by_hand(stored: Stored, client: Client, read: Callable[[Stored, int], Block], window: int = 16) -> float:
    """Hand-written streaming: `dask.delayed`, `as_completed`, direct `gather`, a window that is kept full."""
    numbers = iter(range(stored.chunks))
    task = delayed(read, pure=False)

    def submit(count: int) -> list[Any]:
        tasks = [task(stored, number) for number in itertools.islice(numbers, count)]
        return list(client.compute(tasks, optimize_graph=False)) if tasks else []

    completed = as_completed(submit(window), loop=client.loop)
    total = 0.0
    for batch in completed.batches():
        for future in submit(len(batch)):
            completed.add(future)
        total += sum(float(data[0, 0]) for data in client.gather(batch, direct=True))
    return total


def bare_threads(stored: Stored, pool: ThreadPoolExecutor, read: Callable[[Stored, int], Block], ahead: int) -> float:
    """Read whole chunks in the threads of this process, some of them ahead of the loop."""
    reads = (pool.submit(read, stored, number) for number in range(stored.chunks))
    return float(sum(float(future.result()[0, 0]) for future in _ahead(reads, ahead)))
