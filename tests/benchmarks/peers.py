"""How people do the same work today: each peer in its best setting, on the cluster the stream runs on.

A peer takes an array and returns the sum of the sums of its chunks, so that one that does other work is found out.
"""

import itertools
import tempfile
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


def from_zarr_bands(stored: Stored, client: Client, options: Options = None) -> float:
    """The same with Dask chunks as large as a whole row of stored chunks, cut apart by the function."""
    band = stored.chunk[0] * stored.shard[0], stored.shape[1]
    array = dask.array.from_zarr(stored.url, chunks=band, storage_options=options)

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


#: Pipelines of zarr-python, by the name of who made them.
PIPELINES = {
    "zarr-python": "zarr.core.codec_pipeline.BatchedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}


@lru_cache(maxsize=8)
def _opened(url: str, pipeline: str = "zarr-python") -> zarr.Array[Any]:
    with zarr.config.set({"codec_pipeline.path": PIPELINES[pipeline]}):
        array = zarr.open(url, mode="r")
    assert isinstance(array, zarr.Array)
    return array


def _bands(stored: Stored) -> range:
    return range(0, stored.shape[0], stored.chunk[0] * stored.shard[0])


def _sum_band(stored: Stored, start: int, pipeline: str = "zarr-python") -> Block:
    band = _opened(stored.url, pipeline)[start : start + stored.chunk[0] * stored.shard[0]]
    sums: Block = stored.split(np.asarray(band)).sum(axis=(2, 3))
    return sums


def client_map(stored: Stored, client: Client, pipeline: str = "zarr-python") -> float:
    """`Client.map` by hand: a task reads a row of chunks with zarr-python in one go and sums each."""
    bands = list(_bands(stored))
    futures = client.map(_sum_band, [stored] * len(bands), bands, pipeline=pipeline, pure=False)
    return float(sum(sums.sum(dtype="f8") for sums in client.gather(futures)))


def thread_pool(stored: Stored, pool: Executor, pipeline: str = "zarr-python") -> float:
    """zarr-python in threads of one process, a row of chunks at a time."""
    sums = pool.map(_sum_band, itertools.repeat(stored), _bands(stored), itertools.repeat(pipeline))
    return float(sum(part.sum(dtype="f8") for part in sums))


def zarr_whole(stored: Stored) -> float:
    """zarr-python's own full read of an array."""
    array = zarr.open(stored.url, mode="r")
    assert isinstance(array, zarr.Array)
    return float(np.asarray(array[...]).sum(dtype="f8"))


def cubed_blocks(stored: Stored, cores: int) -> float:
    """cubed in threads of this process (its fastest executor): a task for each chunk, the sums written to Zarr."""
    import cubed  # noqa: PLC0415  # an optional peer

    with tempfile.TemporaryDirectory(prefix="zds-bench-cubed-") as folder:
        spec = cubed.Spec(
            work_dir=folder,
            allowed_mem="2GB",
            executor_name="threads",
            executor_options={"max_workers": cores},
        )
        array = cubed.from_zarr(stored.url, spec=spec)
        sums = cubed.map_blocks(_sum_block, array, dtype="f4", chunks=((1,) * stored.grid[0], (1,) * stored.grid[1]))
        return float(np.asarray(sums.compute()).sum(dtype="f8"))


def tensorstore_open(stored: Stored) -> Any:
    """Open an array on local disk with tensorstore."""
    driver = "zarr" if stored.layout == "blosc2" else "zarr3"
    store = {"driver": driver, "kvstore": {"driver": "file", "path": stored.url}}
    return tensorstore.open(store, open=True).result()


#: The same, once in a process.
tensorstore_of = lru_cache(maxsize=8)(tensorstore_open)


@lru_cache(maxsize=8)
def tensorstore_on_s3(url: str, endpoint: str, in_flight: int) -> Any:
    """Open an array on S3 with tensorstore, credentials from the environment."""
    bucket, _, path = url.removeprefix("s3://").partition("/")
    place = {"driver": "s3", "bucket": bucket, "path": path, "endpoint": endpoint, "aws_region": "us-east-1"}
    store = {
        "driver": "zarr3",
        "kvstore": {**place, "aws_credentials": {"type": "environment"}},
        "context": {"s3_request_concurrency": {"limit": in_flight}},
    }
    return tensorstore.open(store, read=True, open=True).result()


def tensorstore_bands(stored: Stored, most: int = 4, array: Any = None) -> float:
    """tensorstore in one process: rows of chunks as futures, some of them ahead of the sums."""
    array = tensorstore_of(stored) if array is None else array
    height = stored.chunk[0] * stored.shard[0]
    reads = (array[start : start + height].read() for start in _bands(stored))
    return float(sum(stored.split(read.result()).sum(axis=(2, 3)).sum(dtype="f8") for read in ahead(reads, most)))


def ahead(reads: Iterable[Any], count: int) -> Iterator[Any]:
    """Start some more than the one that is waited for."""
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


def tensorstore_chunks(stored: Stored, most: int) -> float:
    """tensorstore in this process: whole chunks as futures, some of them ahead of the loop."""
    array = tensorstore_of(stored)
    reads = (array[_region(stored, number)].read() for number in range(stored.chunks))
    return float(sum(float(read.result()[0, 0]) for read in ahead(reads, most)))


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


def bare_threads(stored: Stored, pool: ThreadPoolExecutor, read: Callable[[Stored, int], Block], most: int) -> float:
    """Read whole chunks in the threads of this process, some of them ahead of the loop."""
    reads = (pool.submit(read, stored, number) for number in range(stored.chunks))
    return float(sum(float(future.result()[0, 0]) for future in ahead(reads, most)))
