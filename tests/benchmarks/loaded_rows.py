"""Rows of loading: shuffled batches of samples for training, aligned chunks of several arrays."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray
import zarr
import zstandard
from distributed import Client
from zarr.codecs import ZstdCodec

import zarr_dask_stream as zds
from benchmarks import data, limit
from benchmarks.contest import Contender, Outcome, Ratio, Row, is_installed, times
from benchmarks.data import Stored
from benchmarks.local_rows import bare, peer
from benchmarks.places import CORES, Bench
from benchmarks.streams import figures_of

_BATCH, _BUFFER = 256, 1024


def loader(bench: Bench) -> Row:
    """Shuffled batches of samples."""
    layout = Stored("", (4 * bench.sized(64), 1), (64, 4096), "zstd")
    stored = data.make(bench.folder, "loader", layout, bench.seed)
    few = data.part(bench.folder, "loader", layout, bench.seed, (4, 1))
    chunkwise, windows = "DataLoader, chunks through a buffer", "xbatcher, DataLoader"
    others = {
        chunkwise: ("torch", stored, lambda t: t.chunkwise(stored.url, stored.chunk[0], _BATCH, _BUFFER, CORES)),
        windows: ("xbatcher", stored, lambda t: t.windows(stored.url, _BATCH, CORES)),
        "DataLoader, sample by sample": ("torch", few, lambda t: t.samplewise(few.url, few.shape[0], _BATCH, CORES)),
    }
    contenders = [
        Contender("stream", lambda: _load(bench, stored, as_tensors=False), "stream", work=stored.url),
    ]
    absent = {}
    if is_installed("torch"):
        contenders.append(
            Contender("stream, tensors", lambda: _load(bench, stored, as_tensors=True), "stream", work=stored.url)
        )
    else:
        absent["stream, tensors"] = "torch is not installed"
    goals = []
    for name, (package, what, make) in others.items():
        if not (is_installed("torch") and is_installed(package)):
            absent[name] = f"{'torch' if package == 'torch' or not is_installed('torch') else package} is not installed"
            continue
        contenders.append(_other(bench, name, what, make))
        if what is stored:
            goals.append(times("stream", name, 1.0, name))
    return Row(
        f"{stored.shape[0]:,} samples of 16 KiB in {stored.chunks:,} chunks of 1 MiB, zstd; shuffled batches of "
        f"{_BATCH} in this process, out of a buffer of {_BUFFER:,} samples (xbatcher has no buffer: neighbouring "
        f"samples in shuffled batches); {CORES} worker processes each; throughput counts chunks",
        contenders,
        list(goals),
        absent=absent,
    )


def _load(bench: Bench, stored: Stored, *, as_tensors: bool) -> Outcome:
    stream = zds.stream_chunks(stored.url, client=bench.client)
    batches = zds.Loader(stream, _BATCH, _BUFFER, seed=bench.seed)
    total = sum(float(batch[:, 0].sum()) for batch in (batches.torch() if as_tensors else batches))
    return Outcome(stored.chunks, total, figures_of(batches.report))


def _other(bench: Bench, name: str, stored: Stored, make: Callable[[Any], Any]) -> Contender:
    from benchmarks import training  # noqa: PLC0415  # needs PyTorch and xbatcher

    @cache
    def loading() -> Any:
        made = make(training)
        bench.stack.callback(loading.cache_clear)  # which ends its processes
        return made

    return peer(name, stored, lambda _: training.total(loading()), few=stored.chunks <= 4)


# -- several arrays -----------------------------------------------------------------------------------

_NAMES = ("u", "v", "w")


def dataset(bench: Bench) -> Row:
    """The length of a vector out of three arrays, chunk by chunk."""
    layout = Stored("", (bench.sized(40), 100), (128, 128), "zstd")
    stored, few = (_make_group(bench, layout, rows) for rows in (layout.grid[0], 4))
    coarse = "xarray.coarsen"
    return Row(
        f"{stored.chunks:,} boxes of 3 aligned arrays, chunks of 64 KiB, zstd, v3, local files; mean length of the "
        "vector in each box; a box counts as a chunk",
        [
            bare(bench, stored, _lengths),
            Contender("stream", lambda: _stream_lengths(bench, stored), "stream", work=stored.url),
            peer(coarse, few, _xarray_lengths, bench.client, few=True),
        ],
        [
            Ratio("of the limit", "stream", "limit", None, share=True),
            times("stream", f"{coarse} ({few.chunks:,} chunks)", 1.0, coarse),
        ],
    )


def _make_group(bench: Bench, layout: Stored, rows: int) -> Stored:
    """Write three arrays of the same kind and different values into one group; `url` is the group's."""
    target = bench.folder / f"dataset-{rows}x{layout.grid[1]}-{bench.seed}"
    stored = Stored(str(target), (rows, layout.grid[1]), layout.chunk, layout.layout)
    finished = target / "finished"
    if not finished.exists():
        group = zarr.create_group(str(target), overwrite=True)
        for place, name in enumerate(_NAMES):
            array = group.create_array(
                name,
                shape=stored.shape,
                chunks=stored.chunk,
                dtype="f4",
                compressors=ZstdCodec(level=1),
                dimension_names=("y", "x"),
            )
            field = data.Field(stored, bench.seed + place)
            for start in range(0, stored.shape[0], stored.chunk[0]):
                array[start : start + stored.chunk[0]] = field.band()
        finished.touch()
    return stored


def _length(u: Any, v: Any, w: Any) -> Any:
    return np.sqrt(u * u + v * v + w * w)


def _mean_length(chunk: zds.Chunk) -> float:
    return float(_length(*(chunk.data[name] for name in _NAMES)).mean())


def _stream_lengths(bench: Bench, stored: Stored) -> Outcome:
    stream = zds.stream_dataset(stored.url, list(_NAMES), client=bench.client, ordered=False).map(_mean_length)
    total = sum(item.data for item in stream)
    return Outcome(stored.chunks, total, figures_of(stream.report))


def _lengths(stored: Stored, start: int, stop: int) -> limit.Sums:
    """Do the same for a range of boxes, in a bare loop."""
    decode = zstandard.ZstdDecompressor().decompress

    def blocks(number: int) -> Iterator[Any]:
        for name in _NAMES:
            yield np.frombuffer(decode(limit.read_file(str(Path(stored.url, name, stored.key(number))))), "f4")

    return np.array([_length(*blocks(number)).mean() for number in range(start, stop)], "f4")


def _xarray_lengths(stored: Stored, client: Client) -> float:
    """xarray over Dask: the boxes as windows of `coarsen`."""
    with xarray.open_zarr(stored.url, chunks={}, consolidated=False) as opened, dask.config.set(scheduler=client):
        length = _length(*(opened[name] for name in _NAMES))
        means = length.coarsen(y=stored.chunk[0], x=stored.chunk[1]).reduce(np.mean)
        return float(means.to_numpy().sum(dtype="f8"))
