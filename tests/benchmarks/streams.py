"""The stream as a contender: functions that run on the workers, and what a run says about itself."""

import time
from collections.abc import Callable, Iterable
from typing import Any

from distributed import Client

import zarr_dask_stream as zds
from benchmarks.contest import Contender, Outcome
from benchmarks.data import Stored

MIB = 2.0**20


def chunk_sum(chunk: zds.Chunk) -> Any:
    """Sum one chunk, as everybody else does; runs on the workers."""
    return chunk.data.sum()


def late_chunk_sum(chunk: zds.Chunk) -> Any:
    """Sum one chunk; an early one takes a second."""
    if chunk.index == (0, 50):
        time.sleep(1.0)
    return chunk.data.sum()


def figures_of(report: zds.Report) -> dict[str, float]:
    """Return what a stream says about itself."""
    return {
        "tasks": report.batches,
        "peak_chunks": report.peak_chunks_in_flight,
        "peak_mib": report.peak_bytes_in_flight / MIB,
        "hedges": report.hedges,
        **{f"{phase}_s": seconds for phase, seconds in report.time.items()},
    }


def stream_sums(
    stored: Stored, client: Client, function: Callable[..., Any] = chunk_sum, source: Any = None, **options: Any
) -> Outcome:
    """Run the stream, take each chunk's sum out of it and add them up."""
    array = stored.url if source is None else source
    stream = zds.stream_chunks(array, client=client, **{"ordered": False, **options}).map(function)
    total = 0.0
    for item in stream:
        total += float(item.data)
    done = stream.report.emitted
    assert done + stream.report.skipped_missing == stored.chunks, stream.report
    return Outcome(stored.chunks, total, figures_of(stream.report))


def stream_whole(stored: Stored, client: Client) -> Outcome:
    """Run the stream without a function: whole chunks come to the client."""
    stream = zds.stream_chunks(stored.url, client=client, ordered=False)
    total = sum_of_corners(stream)
    return Outcome(stream.report.emitted, total, figures_of(stream.report))


def sum_of_corners(chunks: Iterable[Any]) -> float:
    """Look at one element of each chunk, and let the chunk go."""
    return sum(float(chunk.data[0, 0]) for chunk in chunks)


def streaming(name: str, stored: Stored, *arguments: Any, **options: Any) -> Contender:
    """Return a contender that sums each chunk."""
    return Contender(name, lambda: stream_sums(stored, *arguments, **options), "stream", work=stored.url)
