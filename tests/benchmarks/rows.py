"""The rows of the table: which work, who does it, and what the stream has to reach."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
from distributed import Client

import zarr_dask_stream as zds
from benchmarks import data, limit, peers
from benchmarks.data import Stored
from benchmarks.places import CORES, Bench, run_local_cluster

T = TypeVar("T")
MIB = 2.0**20


@dataclass(frozen=True)
class Outcome:
    """What a contender did once: chunks, their sum, figures of its own, and the time where it knows better."""

    chunks: int
    total: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class Contender:
    """One who does the work of a row; those that name the same `work` must come to the same sum."""

    name: str
    run: Callable[[], Outcome]
    work: str = ""


@dataclass(frozen=True)
class Ratio:
    """Throughput of one contender over that of another, round by round: at least `least`."""

    what: str
    of: str
    to: str
    least: float


@dataclass(frozen=True)
class Figure:
    """A contender's own figure, round by round: at least `least`, or at most `most`."""

    what: str
    of: str
    figure: str
    least: float | None = None
    most: float | None = None


@dataclass
class Row:
    """One line of the table."""

    work: str
    contenders: list[Contender]
    goals: list[Ratio | Figure]
    #: The right sum of each work, where somebody knows it before the start.
    expected: dict[str, float] = field(default_factory=dict)
    #: Fewer rounds than asked for, where one takes minutes.
    most_rounds: int | None = None


# -- the stream ---------------------------------------------------------------------------------------


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
        **{f"{phase}_s": seconds for phase, seconds in report.time.items()},
    }


def stream_sums(stored: Stored, client: Client, function: Callable[..., Any] = chunk_sum, **options: Any) -> Outcome:
    """Run the stream, take each chunk's sum out of it and add them up."""
    stream = zds.stream_chunks(stored.url, client=client, **{"ordered": False, **options}).map(function)
    total = 0.0
    for item in stream:
        total += float(item.data)
    done = stream.report.emitted
    assert done + stream.report.skipped_missing == stored.chunks, stream.report
    return Outcome(stored.chunks, total, figures_of(stream.report))


def stream_whole(stored: Stored, client: Client) -> Outcome:
    """Run the stream without a function: whole chunks come to the client."""
    stream = zds.stream_chunks(stored.url, client=client, ordered=False)
    total = sum(float(chunk.data[0, 0]) for chunk in stream)
    return Outcome(stream.report.emitted, total, figures_of(stream.report))


# -- rows of local files ------------------------------------------------------------------------------


def _peer(name: str, stored: Stored, run: Callable[..., float], *arguments: Any) -> Contender:
    return Contender(name, lambda: Outcome(stored.chunks, run(stored, *arguments)), work=stored.url)


def _limit(bench: Bench, stored: Stored, loop: Callable[..., limit.Sums], *arguments: Any) -> Contender:
    def run() -> Outcome:
        return Outcome(stored.chunks, float(bench.bare.run(loop, stored, *arguments).sum(dtype="f8")))

    return Contender("limit", run, work=stored.url)


def _stream(name: str, stored: Stored, *arguments: Any, **options: Any) -> Contender:
    return Contender(name, lambda: stream_sums(stored, *arguments, **options), work=stored.url)


def _local_peers(bench: Bench, stored: Stored, few: Stored, some: Stored) -> list[Contender]:
    """The peers on local files: slow ones do smaller arrays of the same kind, `few` or `some` of the chunks."""
    one_by_one = f"from_zarr.map_blocks ({few.chunks:,} chunks)"
    found = [
        _peer(one_by_one, few, peers.from_zarr, bench.client),
        _peer(f"from_zarr, a row of chunks a task ({some.chunks:,})", some, peers.from_zarr_bands, bench.client),
        _peer(f"Client.map, a row of chunks a task ({some.chunks:,})", some, peers.client_map, bench.client),
        _peer(f"zarr-python in threads ({some.chunks:,})", some, peers.thread_pool, bench.threads),
        _peer("tensorstore", stored, peers.tensorstore_bands),
    ]
    if stored.layout != "blosc2":  # xarray needs the names of dimensions, which came with version 3
        found.append(_peer(f"xarray.coarsen ({few.chunks:,})", few, peers.xarray_coarsen, bench.client))
    return found


def _local_row(
    bench: Bench,
    work: str,
    name: str,
    layout: Stored,
    loop: limit.Loop,
    *,
    times: float,
    share: float,
    least: tuple[int, int],
) -> Row:
    stored = data.make(bench.folder, name, layout, bench.seed)
    few = data.part(bench.folder, name, layout, bench.seed, least)
    some = data.part(bench.folder, name, layout, bench.seed, (max(layout.grid[0] // 10, least[0]), layout.grid[1]))
    others = _local_peers(bench, stored, few, some)
    return Row(
        f"{work}; sum of each chunk",
        [_limit(bench, stored, loop), _stream("stream", stored, bench.client), *others],
        [
            Ratio(f"≥ {times:g}x from_zarr.map_blocks", "stream", others[0].name, times),
            Ratio(f"≥ {share:.2f} of the limit", "stream", "limit", share),
        ],
        expected={few.url: peers.zarr_whole(few), some.url: peers.zarr_whole(some)},
    )


def small(bench: Bench) -> Row:
    """Many small chunks."""
    layout = Stored("", (bench.sized(200), 200), (100, 100), "zstd")
    work = f"{layout.chunks:,} chunks of 100x100 float32, zstd, v3, local files"
    return _local_row(bench, work, "small", layout, limit.sum_zstd, times=50, share=0.70, least=(4, 200))


def small_v2(bench: Bench) -> Row:
    """Many small chunks of the older format and codec."""
    layout = Stored("", (bench.sized(200), 200), (128, 128), "blosc2")
    work = f"{layout.chunks:,} chunks of 64 KiB, blosc-lz4-shuffle, v2, local files"
    return _local_row(bench, work, "small-v2", layout, limit.sum_blosc, times=50, share=0.65, least=(4, 200))


def large(bench: Bench) -> Row:
    """Few large chunks."""
    layout = Stored("", (bench.sized(80), 4), (1024, 2048), "zstd")
    work = f"{layout.chunks:,} chunks of 8 MiB, zstd, v3, local files"
    return _local_row(bench, work, "large", layout, limit.sum_zstd, times=1.2, share=0.90, least=layout.grid)


def sharded(bench: Bench) -> Row:
    """Small chunks in large objects."""
    layout = Stored("", (16 * bench.sized(6), 256), (128, 128), "shards", (16, 32))
    work = f"{layout.chunks:,} chunks of 64 KiB in {layout.chunks // 512:,} shards of 32 MiB, zstd, v3, local files"
    row = _local_row(bench, work, "sharded", layout, limit.sum_shards, times=1.0, share=0.65, least=(16, 64))
    stored = data.make(bench.folder, "sharded", layout, bench.seed)
    nbytes = sum(path.stat().st_size for path in Path(stored.url, "c").rglob("*") if path.is_file())

    def counted() -> Outcome:
        before = _bytes_read(bench.client)
        outcome = stream_sums(stored, bench.client)
        reads = (_bytes_read(bench.client) - before) / nbytes
        return replace(outcome, figures={**outcome.figures, "reads": reads})

    row.contenders[1] = Contender("stream", counted, work=stored.url)
    row.goals[0] = Figure("each stored byte read ≤ 1.1 times", "stream", "reads", most=1.1)
    return row


def _bytes_read(client: Client) -> int:
    return sum(client.run(_bytes_read_here).values())


def _bytes_read_here() -> int:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def ordered(bench: Bench) -> Row:
    """What keeping the order costs, and what a straggler does to it."""
    layout = Stored("", (bench.sized(200), 200), (100, 100), "zstd")
    stored = data.make(bench.folder, "small", layout, bench.seed)
    window = 4000
    return Row(
        f"{layout.chunks:,} chunks as in `small`, in grid order and as completed, at most {window:,} in flight",
        [
            _stream("as completed", stored, bench.client, concurrency=window),
            _stream("ordered", stored, bench.client, ordered=True, concurrency=window),
            _stream(
                "ordered, one chunk takes 1 s", stored, bench.client, late_chunk_sum, ordered=True, concurrency=window
            ),
        ],
        [
            Ratio("ordered ≥ 0.95 of as completed", "ordered", "as completed", 0.95),
            Figure(
                f"≤ {window:,} in flight behind a straggler", "ordered, one chunk takes 1 s", "peak_chunks", most=window
            ),
        ],
    )


# -- whole chunks to the client -----------------------------------------------------------------------


def client_threads(bench: Bench) -> Row:
    """Whole chunks through the cluster inside this process."""
    stored = data.make(bench.folder, "client", Stored("", (bench.sized(160), 4), (1024, 1024), "zstd"), bench.seed)
    ahead = 2 * CORES
    return Row(
        f"{stored.chunks:,} chunks of 4 MiB, zstd, whole to the client; cluster inside the process, {CORES} threads",
        [
            _peer("limit", stored, peers.bare_threads, bench.threads, limit.decode_zstd, ahead),
            Contender("stream", lambda: stream_whole(stored, bench.embedded), work=stored.url),
            _peer("zarr-python in threads", stored, peers.bare_threads, bench.threads, peers.read_zarr, ahead),
            _peer("delayed + as_completed", stored, peers.by_hand, bench.embedded, peers.read_zarr),
        ],
        [Ratio("≥ 0.85 of a bare thread pool", "stream", "limit", 0.85)],
    )


def client_processes(bench: Bench) -> Row:
    """Whole chunks from worker processes to the client."""
    stored = data.make(bench.folder, "client", Stored("", (bench.sized(160), 4), (1024, 1024), "zstd"), bench.seed)
    hand, sent = "as_completed + gather, zarr-python", "as_completed + gather, tensorstore"
    return Row(
        f"{stored.chunks:,} chunks of 4 MiB, zstd, whole to the client; {CORES} worker processes",
        [
            Contender("stream", lambda: stream_whole(stored, bench.client), work=stored.url),
            _peer(hand, stored, peers.by_hand, bench.client, peers.read_zarr),
            _peer(sent, stored, peers.by_hand, bench.client, peers.read_tensorstore),
        ],
        [
            Ratio("ahead of as_completed + gather", "stream", hand, 1.0),
            Ratio("ahead of tensorstore read + send", "stream", sent, 1.0),
        ],
    )


# -- S3 -----------------------------------------------------------------------------------------------


def s3(bench: Bench) -> Row:
    """Small objects far away."""
    layout = Stored("", (bench.sized(20), 100), (128, 128), "zstd")
    local = data.make(bench.folder, "s3", layout, bench.seed)
    stored = replace(local, url=bench.upload(local, "small"))
    first = data.part(bench.folder, "s3", layout, bench.seed, (2, 100))
    few = replace(first, url=bench.upload(first, "small-part"))
    latency_s = 0.030
    road = bench.slow_road(latency_s)
    options = bench.s3.options_at(road.url)

    def counted(run: Callable[[], Outcome]) -> Callable[[], Outcome]:
        def measured() -> Outcome:
            road.take_counts()
            begin = time.perf_counter()
            outcome = run()
            seconds = time.perf_counter() - begin
            counts = road.take_counts()
            ideal = counts["in_flight"] / latency_s
            counts["of_ideal"] = outcome.chunks / seconds / ideal if ideal else 0.0
            counts["requests_per_chunk"] = counts["requests"] / outcome.chunks
            return replace(outcome, figures={**outcome.figures, **counts}, seconds=seconds)

        return measured

    contenders = [
        _limit(bench, stored, limit.sum_objects, options, 32 // CORES),
        _stream("stream", stored, bench.client, storage_options=options),
        _stream("stream, concurrency=64", stored, bench.client, storage_options=options, concurrency=64),
        _peer(f"from_zarr.map_blocks ({few.chunks:,} chunks)", few, peers.from_zarr, bench.client, options),
    ]
    return Row(
        f"{stored.chunks:,} chunks of 64 KiB, zstd, on an S3 server with 30 ms added to each request; sum of each chunk"
        "; the limit keeps 32 requests in flight",
        [replace(contender, run=counted(contender.run)) for contender in contenders],
        [
            Figure("≥ 0.85 of requests in flight / latency", "stream", "of_ideal", least=0.85),
            Ratio("≥ 0.85 of a bare loop with 32 in flight", "stream", "limit", 0.85),
            Ratio("≥ 5x from_zarr.map_blocks", "stream", contenders[-1].name, 5.0),
        ],
        expected={few.url: peers.zarr_whole(first)},
    )


def s3_large(bench: Bench) -> Row:
    """Large objects near by."""
    layout = Stored("", (bench.sized(12), 4), (1024, 2048), "zstd")
    local = data.make(bench.folder, "s3-large", layout, bench.seed)
    stored = replace(local, url=bench.upload(local, "large"))
    options = bench.s3.storage_options
    from_zarr = _peer("from_zarr.map_blocks", stored, peers.from_zarr, bench.client, options)
    return Row(
        f"{stored.chunks:,} chunks of 8 MiB, zstd, on an S3 server on this machine; sum of each chunk; the limit keeps "
        "8 requests in flight",
        [
            _limit(bench, stored, limit.sum_objects, options, 8 // CORES),
            _stream("stream", stored, bench.client, storage_options=options),
            from_zarr,
        ],
        [Ratio("≥ 0.90 of a bare loop with the same library", "stream", "limit", 0.90)],
    )


# -- plans that are larger than the data --------------------------------------------------------------


def sparse(bench: Bench) -> Row:
    """Few chunks are stored of many that are planned."""
    stored_count = bench.sized(1300)
    layout = Stored("", (bench.sized(200), 250), (64, 64), "zstd")
    wide = replace(layout, grid=(layout.grid[0] * 10, layout.grid[1]))
    near = data.make_sparse(bench.folder, "sparse", layout, bench.seed, stored_count)
    far = data.make_sparse(bench.folder, "sparse", wide, bench.seed, stored_count)

    def skipping(stored: Stored) -> Callable[[], Outcome]:
        # The cost is counted by what is stored, so that a grid ten times as large should not change it.
        return lambda: replace(stream_sums(stored, bench.client, missing="skip"), chunks=stored_count)

    def full_read() -> Outcome:
        return Outcome(stored_count, peers.zarr_whole(near))

    return Row(
        f"{layout.chunks:,} planned chunks of 16 KiB, {stored_count:,} of them stored; throughput counts these",
        [
            Contender("zarr-python, full read", full_read, work=near.url),
            Contender('stream, missing="skip"', skipping(near), work=near.url),
            Contender(f"stream, {wide.chunks:,} planned", skipping(far), work=far.url),
        ],
        [
            Ratio("≥ 20x a full read", 'stream, missing="skip"', "zarr-python, full read", 20.0),
            Ratio(
                "a grid 10x as large costs ≤ 1.25x", f"stream, {wide.chunks:,} planned", 'stream, missing="skip"', 0.8
            ),
        ],
    )


def scale(bench: Bench) -> Row:
    """From a hundred thousand to ten million planned chunks; each contender has a process and a cluster of its own."""
    sizes = [bench.sized(count) for count in (10**5, 10**6, 10**7)]
    warm = data.make(bench.folder, "scale-warm", Stored("", (100, 100), (2, 2), "empty"), bench.seed)
    contenders: list[Contender] = []
    goals: list[Ratio | Figure] = []
    for size in sizes:
        stored = data.make(bench.folder, "scale", Stored("", (size // 100, 100), (2, 2), "empty"), bench.seed)
        name = f"{stored.chunks:,} planned"
        contenders.append(Contender(name, lambda stored=stored: _alone(_scale, stored, warm)))  # type: ignore[misc]  # a default binds the loop's value
        goals += [
            Figure(f"{name}: first item ≤ 1 s", name, "first_item_s", most=1.0),
            Figure(f"{name}: client + scheduler grow ≤ 64 MiB", name, "growth_mib", most=64.0),
        ]
    goals.append(Ratio("cost per chunk flat within 1.25x", contenders[-1].name, contenders[0].name, 0.8))
    return Row(
        "chunks that are not stored and come as fill values; sum of each chunk", contenders, goals, most_rounds=1
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
        [Contender(name, lambda: _alone(_memory, stored, warm))],
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


ROWS: dict[str, Callable[[Bench], Row]] = {
    "small": small,
    "small-v2": small_v2,
    "large": large,
    "sharded": sharded,
    "client": client_threads,
    "client-processes": client_processes,
    "s3": s3,
    "s3-large": s3_large,
    "sparse": sparse,
    "scale": scale,
    "ordered": ordered,
    "memory": memory,
}
