"""Rows about what is planned rather than read: sparse arrays, millions of chunks, bounded memory, the first item."""

import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, Self, TypeVar

import psutil

import zarr_dask_stream as zds
from benchmarks import data, engine_cost, limit, peers
from benchmarks.contest import Contender, Figure, Goal, Outcome, Row, share, times
from benchmarks.data import Stored
from benchmarks.places import Bench, run_local_cluster
from benchmarks.streams import MIB, chunk_sum, figures_of, stream_sums, stream_whole

T = TypeVar("T")


def sparse(bench: Bench) -> Row:
    """Few chunks are stored of many that are planned."""
    stored_count = bench.sized(1300)
    layout = Stored("", (bench.sized(200), 250), (64, 64), "zstd")
    wide = replace(layout, grid=(layout.grid[0] * 10, layout.grid[1]))
    near = data.make_sparse(bench.folder, "sparse", layout, bench.seed, stored_count)
    far = data.make_sparse(bench.folder, "sparse", wide, bench.seed, stored_count)
    whole, stream, wider = "zarr-python, full read", 'stream, missing="skip"', f"stream, {wide.chunks:,} planned"

    def skipping(stored: Stored) -> Callable[[], Outcome]:
        # The cost is counted by what is stored, so that a grid ten times as large should not change it.
        return lambda: replace(stream_sums(stored, bench.client, missing="skip"), chunks=stored_count)

    def full_read() -> Outcome:
        return Outcome(stored_count, peers.zarr_whole(near))

    return Row(
        f"{layout.chunks:,} planned chunks of 16 KiB, {stored_count:,} of them stored; throughput counts these",
        [
            Contender(stream, skipping(near), "stream", work=near.url),
            Contender(wider, skipping(far), "stream", work=far.url),
            Contender(whole, full_read, "peer", work=near.url, family="zarr-python, full read"),
        ],
        [
            times(stream, whole, 20.0, "zarr-python's full read"),
            replace(share(wider, stream, 0.8, "it"), aim="with a grid 10x as large ≥ 0.80 of the throughput"),
        ],
    )


def scale(bench: Bench) -> Row:
    """From a hundred thousand to ten million planned chunks; each contender has a process and a cluster of its own."""
    sizes = [bench.sized(count) for count in (10**5, 10**6, 10**7)]
    warm = data.make(bench.folder, "scale-warm", Stored("", (100, 100), (2, 2), "empty"), bench.seed)
    contenders: list[Contender] = []
    goals: list[Goal] = []
    for size in sizes:
        stored = data.make(bench.folder, "scale", Stored("", (max(size // 100, 1), 100), (2, 2), "empty"), bench.seed)
        name = f"{stored.chunks:,} planned"
        contenders.append(Contender(name, lambda stored=stored: _alone(_scale, stored, warm), "stream"))  # type: ignore[misc]  # a default binds the loop's value
        goals += [
            Figure(f"{name}: first item ≤ 1 s", name, "first_item_s", most=1.0),
            Figure(f"{name}: client + scheduler grow ≤ 64 MiB", name, "growth_mib", most=64.0),
        ]
    goals.append(
        replace(
            share(contenders[-1].name, contenders[0].name, 0.8), aim="the largest: ≥ 0.80 of the smallest's throughput"
        )
    )
    return Row(
        "chunks of 2x2 float32 that are not stored: each is looked for, found absent and comes as fill values, the "
        "quickest read there is, so that ten million end in minutes; sum of each chunk, one item each to the client",
        contenders,
        goals,
        most_rounds=1,
    )


def _scale(stored: Stored, warm: Stored) -> Outcome:
    with run_local_cluster(processes=True) as client:
        stream_sums(warm, client)
        with _Growth([psutil.Process()]) as growth:
            begin = time.perf_counter()
            stream = zds.stream_chunks(stored.url, client=client, ordered=False).map(chunk_sum)
            items = iter(stream)
            next(items)
            first_s = time.perf_counter() - begin
            count = 1 + sum(1 for _ in items)
            seconds = time.perf_counter() - begin
    figures = {"first_item_s": first_s, "growth_mib": growth.most / MIB, **figures_of(stream.report)}
    return Outcome(count, figures=figures, seconds=seconds)


def memory(bench: Bench) -> Row:
    """A consumer that is slower than the workers."""
    layout = Stored("", (bench.sized(256), 4), (1024, 1024), "zstd")
    stored = data.make_linked(bench.folder, "memory", layout, bench.seed)
    warm = data.make_linked(bench.folder, "memory-warm", replace(layout, grid=(4, 4)), bench.seed)
    name = "stream, slow consumer"
    return Row(
        f"{stored.chunks * stored.chunk_nbytes / 2**30:.1f} GiB logical in chunks of 4 MiB, whole to a client that "
        'takes 5 ms for each, max_bytes="128 MiB"',
        [Contender(name, lambda: _alone(_memory, stored, warm), "stream")],
        [
            Figure("peak in flight ≤ 128 MiB", name, "peak_mib", most=128.0),
            Figure("memory of client and workers grows ≤ 384 MiB", name, "growth_mib", most=384.0),
        ],
    )


def _memory(stored: Stored, warm: Stored) -> Outcome:
    with run_local_cluster(processes=True) as client:
        stream_whole(warm, client)
        me = psutil.Process()
        with _Growth([me, *me.children(recursive=True)]) as growth:
            begin = time.perf_counter()
            stream = zds.stream_chunks(stored.url, client=client, max_bytes="128 MiB")
            for _ in stream:
                time.sleep(0.005)
            seconds = time.perf_counter() - begin
    figures = {"growth_mib": growth.most / MIB, **figures_of(stream.report)}
    return Outcome(stream.report.emitted, figures=figures, seconds=seconds)


def engine(bench: Bench) -> Row:
    """What the engine itself costs, in virtual time: no store, no cluster."""
    chunks = bench.sized(10**6)
    few, many = "8 threads, 50 µs a chunk", "1,000 workers, 50 ms a chunk"
    batches: dict[str, Any] = {"threads": 8, "chunk_s": 50e-6, "window_chunks": 65_536}
    wide: dict[str, Any] = {"threads": 1000, "chunk_s": 0.05, "window_chunks": 400_000}

    def simulated(options: dict[str, Any]) -> Callable[[], Outcome]:
        return lambda: _alone(_engine, chunks, options)

    return Row(
        f"{chunks:,} chunks through the supervisor, with a scripted executor and a virtual clock",
        [Contender(few, simulated(batches), "stream"), Contender(many, simulated(wide), "stream")],
        [
            Figure("engine ≤ 5 µs a chunk", few, "engine_us_per_chunk", most=5.0),
            Figure("1,000 workers ≥ 95 % busy", many, "busy_share", least=0.95),
            Figure("cores that the engine needs for them", many, "cores", most=1.0),
        ],
    )


def _engine(chunks: int, options: dict[str, Any]) -> Outcome:
    found = engine_cost.measure(chunks, **options)
    spent_s = (found["engine_us_per_chunk"] + found["observers_us_per_chunk"]) * found["chunks"] / 1e6
    names = ("engine_us_per_chunk", "observers_us_per_chunk", "busy_share", "virtual_s", "tasks")
    figures = {**{name: float(found[name]) for name in names}, "cores": spent_s / found["virtual_s"]}
    return Outcome(found["chunks"], figures=figures, seconds=spent_s)


def latency(bench: Bench) -> Row:
    """The first item of a short stream beside a bare task, in turn."""
    stored = data.make(bench.folder, "latency", Stored("", (2, 4), (100, 100), "zstd"), bench.seed)
    turns = bench.sized(20)

    def bare_task() -> None:
        bench.client.submit(limit.sum_zstd, stored, 0, 1, pure=False).result()

    def first_item() -> None:
        with zds.stream_chunks(stored.url, client=bench.client).map(chunk_sum) as stream:
            next(iter(stream))

    def in_turn() -> Outcome:
        tasks, streams = [], []
        begin = time.perf_counter()
        for _ in range(turns):
            tasks.append(_seconds(bare_task))
            streams.append(_seconds(first_item))
        seconds = time.perf_counter() - begin
        later = [1e3 * (mine - theirs) for mine, theirs in zip(streams, tasks, strict=True)]
        figures = {
            "task_ms": 1e3 * statistics.median(tasks),
            "first_item_ms": 1e3 * statistics.median(streams),
            "later_ms": statistics.median(later),
            "latest_ms": max(later),
        }
        return Outcome(turns, figures=figures, seconds=seconds)

    name = "first item and bare task, in turn"
    return Row(
        f"the first of {stored.chunks} chunks of 40 KB on a warm cluster, metadata read anew; a bare task that reads "
        f"and sums the same chunk; {turns} turns a round",
        [Contender(name, in_turn, "stream")],
        [
            Figure("first item ≤ 50 ms after a bare task's answer", name, "later_ms", most=50.0),
            Figure("first item, ms", name, "first_item_ms"),
        ],
    )


def _seconds(function: Callable[[], None]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def _alone(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, whose memory nobody else has filled."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class _Growth:
    """By how many bytes the resident memory of some processes grew at most, looked at every 20 ms."""

    def __init__(self, processes: list[psutil.Process]) -> None:
        self._processes = processes
        self._end = threading.Event()
        self.most = 0

    def _resident(self) -> int:
        return int(sum(process.memory_info().rss for process in self._processes))

    def _look(self, begin: int) -> None:
        while not self._end.wait(0.02):
            self.most = max(self.most, self._resident() - begin)

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._look, args=(self._resident(),), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
