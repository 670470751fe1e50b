"""Rows of reductions: several statistics in one pass."""

from typing import Any

import dask.array
import numpy as np
import numpy.typing as npt
import zstandard
from distributed import Client

import zarr_dask_stream as zds
from benchmarks import data
from benchmarks.contest import Contender, Outcome, Row, is_installed, share, times
from benchmarks.data import Stored
from benchmarks.limit import read_file
from benchmarks.local_rows import peer
from benchmarks.places import Bench
from benchmarks.streams import figures_of

_BINS, _RANGE = 64, (0.0, 32.0)


def _reducers() -> list[zds.Reducer]:
    return [zds.reducers.mean(), zds.reducers.var(), zds.reducers.histogram(_BINS, _RANGE)]


def _total(mean: Any, var: Any, counts: npt.NDArray[Any]) -> float:
    """Make one number of the three answers."""
    return float(mean) + float(var) + float((counts * np.arange(counts.size)).sum() / counts.sum())


def reduce(bench: Bench) -> Row:
    """Mean, variance and histogram in one pass."""
    layout = Stored("", (bench.sized(512), 4), (1024, 1024), "zstd")
    stored = data.make_linked(bench.folder, "reduce", layout, bench.seed)
    gib = stored.chunks * stored.chunk_nbytes / 2**30
    once = "dask.array, the three together"
    large = "dask.array, 8 chunks to a task"
    others = [
        peer(once, stored, _dask, bench.client, 1),
        peer(large, stored, _dask, bench.client, 8),
    ]
    absent = {}
    if is_installed("cubed"):
        absent["cubed"] = "has no histogram"
    else:
        absent["cubed"] = "not installed"
    return Row(
        f"{gib:.1f} GiB logical in {stored.chunks:,} chunks of 4 MiB, zstd, v3, local files; mean, variance and a "
        f"histogram of {_BINS} bins in one pass; the limit folds with the same reducers",
        [
            Contender("limit", lambda: _limit(bench, stored), "limit", work=stored.url),
            Contender("stream", lambda: _stream(bench, stored), "stream", work=stored.url),
            *others,
            Contender("bare loop, NumPy's functions", lambda: _numpy(bench, stored), "peer", work=stored.url),
        ],
        [share("stream", "limit", 0.80), times("stream", once, 3.0, "dask.array")],
        absent=absent,
    )


def _stream(bench: Bench, stored: Stored) -> Outcome:
    stream = zds.stream_chunks(stored.url, client=bench.client, ordered=False).reduce(_reducers())
    answer = stream.compute()
    return Outcome(
        stored.chunks, _total(answer["mean"], answer["var"], answer["histogram"].counts), figures_of(stream.report)
    )


def _limit(bench: Bench, stored: Stored) -> Outcome:
    reducers = _reducers()
    partials = bench.bare.run_parts(_fold, stored)
    answers = []
    for place, reducer in enumerate(reducers):
        joined = reducer.create()
        for part in partials:
            joined = reducer.merge(joined, part[place])
        answers.append(reducer.finish(joined))
    mean, var, histogram = answers
    return Outcome(stored.chunks, _total(mean, var, histogram.counts))


def _fold(stored: Stored, start: int, stop: int) -> list[Any]:
    """Fold a range of chunks with the stream's own reducers."""
    decode = zstandard.ZstdDecompressor().decompress
    reducers = _reducers()
    partials = [reducer.create() for reducer in reducers]
    region = tuple(slice(0, length) for length in stored.chunk)
    for number in range(start, stop):
        block = np.frombuffer(decode(read_file(f"{stored.url}/{stored.key(number)}")), "f4").reshape(stored.chunk)
        chunk = zds.Chunk((0, 0), region, block)
        partials = [reducer.add(partial, chunk) for reducer, partial in zip(reducers, partials, strict=True)]
    return partials


def _numpy(bench: Bench, stored: Stored) -> Outcome:
    parts = bench.bare.run_parts(_by_hand, stored)
    count, total, squares, counts = (sum(part[place] for part in parts) for place in range(4))
    mean = total / count
    return Outcome(stored.chunks, _total(mean, squares / count - mean**2, np.asarray(counts)))


def _by_hand(stored: Stored, start: int, stop: int) -> tuple[int, float, float, npt.NDArray[Any]]:
    """Fold a range of chunks with what NumPy has, without care for NaN or for cancellation."""
    decode = zstandard.ZstdDecompressor().decompress
    total = squares = 0.0
    counts = np.zeros(_BINS, np.int64)
    for number in range(start, stop):
        block = np.frombuffer(decode(read_file(f"{stored.url}/{stored.key(number)}")), "f4")
        total += float(block.sum(dtype="f8"))
        squares += float((block.astype("f8") ** 2).sum())
        counts += np.histogram(block, _BINS, _RANGE)[0]
    return (stop - start) * stored.chunk[0] * stored.chunk[1], total, squares, counts


def _dask(stored: Stored, client: Client, rows: int) -> float:
    """Compute the three of `dask.array` in one graph, so that each chunk is read once."""
    array = dask.array.from_zarr(stored.url, chunks=(stored.chunk[0] * rows, stored.chunk[1]), inline_array=False)
    counts, _ = dask.array.histogram(array, _BINS, _RANGE)
    mean, var, counts = client.gather(client.compute([array.mean(), array.var(), counts]))
    return _total(mean, var, counts)
