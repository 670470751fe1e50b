"""``zds bench``: how far a run on a store is from what bare loops reach on it, and where the time goes."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
from rich.table import Table

from zarr_dask_stream.cli.interrupt import cluster
from zarr_dask_stream.cli.options import StreamRequest, output_options, stream_options
from zarr_dask_stream.cli.present import facts, print_json, screen, show
from zarr_dask_stream.engine.cluster import embedded_cluster
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import Region
from zarr_dask_stream.source.reader import read_chunks
from zarr_dask_stream.source.selection import ChunkPlan, parse_region
from zarr_dask_stream.stream import ChunkStream
from zarr_dask_stream.watch.report import human_bytes, human_seconds

__all__ = ["advise", "bench"]

_ROUNDS = 3
_PIECES = 4  # for each thread: so that none waits long for the last
_NEAR = 0.8  # of the limit: what is left to gain lies elsewhere
_TINY = 64 * 1024
_LEAST_S = 0.3
_PHASES = ("schedule", "fetch", "decode", "compute", "transfer", "wait")


@dataclass
class _Loop:
    """What bare loops did: chunks, seconds on the clock, seconds by phase over all threads."""

    chunks: int = 0
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("fetch", "decode", "compute"), 0.0))


@click.command(short_help="How far a run is from the limit of its store.")
@stream_options
@click.option("--chunks", type=click.IntRange(min=1), default=2000, show_default=True, metavar="N", help="At most.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=20.0,
    show_default=True,
    metavar="S",
    help="About so long, however many chunks that is.",
)
@output_options
def bench(
    request: StreamRequest,
    *,
    chunks: int,
    seconds: float,
    as_json: bool,
    debug: bool,  # noqa: ARG001  # main reads it
) -> int:
    """Compare a stream with bare loops that read and sum the same chunks without Dask, in as many processes or threads.

    The first chunks of the selection are read by both in turn, three times, after a first reading that is not counted.
    With --scheduler the loops run on this host, with as many threads as the cluster has: a fair limit only for a
    cluster that is here too. Exit code 1: some chunks could not be read.
    """
    spec = request.check()
    box = parse_region(request.region, spec.shape)
    numbers = _sample(ChunkPlan(spec.grid, box, request.where), chunks)
    with _warm(request) as client, _pool(client) as (pool, threads):
        bare = functools.partial(_bare, pool, threads, spec, box)
        numbers = _affordable(bare, numbers, threads * _PIECES, seconds / (2 * _ROUNDS + 2))
        with request.open(ordered=False, missing="fill", client=client) as stream:
            sample = stream.take(len(numbers)).map(_total)
            sample.run()  # workers import, connections open
            loops, runs = [], []
            for _ in range(_ROUNDS):
                loops.append(bare(numbers))
                runs.append(_streamed(sample))
    answer = _compare(spec, loops, runs, threads)
    if as_json:
        print_json(answer)
    else:
        _show(answer)
    return 1 if sample.report.dead_lettered else 0


def _total(chunk: Chunk) -> None:
    """Look at every element, and send nothing home."""
    _look(chunk.data)


def _look(data: Any) -> None:
    if data.dtype.kind in "biufc":
        data.sum()


# -- both sides -----------------------------------------------------------------------------------


@contextmanager
def _warm(request: StreamRequest) -> Iterator[Any]:
    """Lend a client of a cluster that lives as long as all rounds."""
    with cluster(request.scheduler, request.workers) as client:
        if client is not None:
            yield client
            return
        own: Any = embedded_cluster()
        inside = own.cluster
        try:
            yield own
        finally:
            own.close()
            inside.close()


@contextmanager
def _pool(client: Any) -> Iterator[tuple[Executor, int]]:
    """Lend as many threads as the cluster has, or as many processes where its workers are processes."""
    workers = client.nthreads()
    threads = max(sum(workers.values()), 1)
    pool: Executor
    if all(address.startswith("inproc://") for address in workers):
        pool = ThreadPoolExecutor(threads)
    else:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(threads, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool, threads
    finally:
        pool.shutdown(cancel_futures=True)


def _sample(plan: ChunkPlan, most: int) -> list[int]:
    """Return the first chunks, in the order in which a stream reads them."""
    numbers = list(itertools.islice(itertools.chain.from_iterable(plan.runs(by_shard=True)), most))
    if not numbers:
        raise UsageError("bench needs chunks to read, and the selection has none")
    return numbers


def _affordable(bare: Callable[[list[int]], _Loop], numbers: list[int], size: int, seconds: float) -> list[int]:
    """Read ever more of the sample, until that takes too long or all is read; return what was read last."""
    size = min(size, len(numbers))
    while True:
        took = bare(numbers[:size]).seconds
        if size == len(numbers) or took > seconds / 4:
            return numbers[: max(1, min(len(numbers), int(size * seconds / max(took, 1e-9))))]
        size = min(size * 2, len(numbers))


def _bare(pool: Executor, threads: int, spec: ArraySpec, box: Region, numbers: list[int]) -> _Loop:
    """Read and sum the chunks piece by piece, without Dask."""
    began = time.perf_counter()
    length = -(-len(numbers) // (threads * _PIECES))
    pieces = [numbers[at : at + length] for at in range(0, len(numbers), length)]
    parts = [pool.submit(_read_piece, spec, box, piece) for piece in pieces]
    loop = _Loop()
    for part in parts:
        done = part.result()
        loop.chunks += done.chunks
        for phase, spent in done.phases.items():
            loop.phases[phase] += spent
    loop.seconds = time.perf_counter() - began
    return loop


def _read_piece(spec: ArraySpec, box: Region, numbers: list[int]) -> _Loop:
    loop = _Loop()
    for read in read_chunks(spec, numbers, box=box):
        loop.chunks += 1
        loop.phases["fetch"] += read.fetch_s
        loop.phases["decode"] += read.decode_s
        if read.data is not None:
            began = time.perf_counter()
            _look(read.data)
            loop.phases["compute"] += time.perf_counter() - began
    return loop


def _streamed(sample: ChunkStream) -> _Loop:
    began = time.perf_counter()
    report = sample.run()
    seconds = time.perf_counter() - began
    phases = {phase: spent for phase, spent in report.time.items() if phase != "consumer"}
    return _Loop(report.settled - report.cancelled, seconds, phases)


# -- what follows ---------------------------------------------------------------------------------


def _compare(spec: ArraySpec, loops: list[_Loop], runs: list[_Loop], threads: int) -> dict[str, Any]:
    ratios = [loop.seconds / run.seconds for loop, run in zip(loops, runs, strict=True)]
    ratio = statistics.median(ratios)
    ours, limit = _phases(runs, threads), _phases(loops, threads)
    return {
        "url": spec.url,
        "chunks": loops[0].chunks,
        "chunk_nbytes": spec.chunk_nbytes,
        "threads": threads,
        "rounds": _ROUNDS,
        "ratio": {"median": ratio, "least": min(ratios), "most": max(ratios)},
        "chunks_per_s": {"stream": _rate(runs), "limit": _rate(loops)},
        "seconds": {"stream": ours, "limit": limit},
        "advice": _short(runs) or advise(ratio, spec.chunk_nbytes, ours),
    }


def _short(runs: list[_Loop]) -> str:
    """Refuse to judge by runs that were over before they were under way."""
    seconds = statistics.median(run.seconds for run in runs)
    if seconds >= _LEAST_S:
        return ""
    return f"too short to judge: a round took {human_seconds(seconds)}, most of it to begin; give it more --chunks"


def _rate(loops: list[_Loop]) -> float:
    return statistics.median(loop.chunks / loop.seconds for loop in loops)


def _phases(loops: list[_Loop], threads: int) -> dict[str, float]:
    """Return seconds of all threads by phase, of a typical round; to wait is to do none of it on a worker."""
    found = {p: statistics.median(loop.phases.get(p, 0.0) for loop in loops) for p in _PHASES}
    there = threads * statistics.median(loop.seconds for loop in loops)
    found["wait"] = max(there - found["fetch"] - found["decode"] - found["compute"], 0.0)
    return found


def advise(ratio: float, chunk_nbytes: int, seconds: Mapping[str, float]) -> str:
    """Say in a sentence what holds a run back most.

    Examples
    --------
    >>> advise(0.95, 2**20, {"fetch": 3.0, "decode": 1.0, "wait": 0.1})
    'fetch-bound: the run is near the limit, and the store is it; more workers near the store, or more chunks to a \
shard, would help'
    """
    if ratio < _NEAR:
        if chunk_nbytes < _TINY:
            return (
                f"tiny chunks: at {human_bytes(chunk_nbytes)} each, finding and handing out a chunk costs more than "
                "reading it; store larger ones, or more of them to a shard"
            )
        return (
            "scheduler-bound: workers wait for work more than bare loops do; fewer and larger workers, a scheduler "
            "nearby or a higher --concurrency and --max-bytes would help"
        )
    if seconds["fetch"] >= seconds["decode"]:
        return (
            "fetch-bound: the run is near the limit, and the store is it; more workers near the store, or more chunks "
            "to a shard, would help"
        )
    return "decode-bound: the run is near the limit, and the codec is it; more cores or a faster codec would help"


def _show(answer: dict[str, Any]) -> None:
    ratio, rate = answer["ratio"], answer["chunks_per_s"]
    console = screen()
    rows = [
        ("array", answer["url"]),
        ("sample", f"{answer['chunks']:,} chunks of {human_bytes(answer['chunk_nbytes'])}, {answer['rounds']} rounds"),
        ("limit", f"{rate['limit']:,.0f} chunks/s by bare loops, {answer['threads']} at a time"),
        ("stream", f"{rate['stream']:,.0f} chunks/s"),
        ("ratio", f"{ratio['median']:.2f} of the limit ({ratio['least']:.2f} to {ratio['most']:.2f})"),
    ]
    show(console, facts(rows))
    show(console, "")
    table = Table(box=None, pad_edge=False)
    table.add_column("seconds, all threads")
    table.add_column("stream", justify="right")
    table.add_column("limit", justify="right")
    for phase in _PHASES:
        table.add_row(phase, *(f"{answer['seconds'][side][phase]:.3f}" for side in ("stream", "limit")))
    show(console, table)
    show(console, f"\n{answer['advice']}")
