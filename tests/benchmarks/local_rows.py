"""Rows of local files: the sum of each chunk, small ones and large ones, alone and in shards."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from distributed import Client

from benchmarks import data, limit, peers
from benchmarks.contest import Contender, Figure, Outcome, Row, is_installed, share, times
from benchmarks.data import Stored
from benchmarks.places import CORES, Bench
from benchmarks.streams import late_chunk_sum, stream_sums, stream_whole, streaming


def peer(name: str, stored: Stored, run: Callable[..., float], *arguments: Any, few: bool = False) -> Contender:
    """Return a contender that is another tool; `few`: it does fewer chunks than others, and its name says so."""
    shown = f"{name} ({stored.chunks:,} chunks)" if few else name
    return Contender(
        shown, lambda: Outcome(stored.chunks, run(stored, *arguments)), "peer", work=stored.url, family=name
    )


def bare(bench: Bench, stored: Stored, loop: Callable[..., limit.Sums], *arguments: Any) -> Contender:
    """Return the limit: bare loops in processes."""

    def run() -> Outcome:
        return Outcome(stored.chunks, float(bench.bare.run(loop, stored, *arguments).sum(dtype="f8")))

    return Contender("limit", run, "limit", work=stored.url)


FROM_ZARR = "from_zarr.map_blocks"
BANDS = "from_zarr, a row of chunks a task"
CLIENT_MAP = "Client.map, a row of chunks a task"
CLIENT_MAP_ZARRS = "Client.map, zarrs pipeline"
THREADS = "zarr-python in threads"
ZARRS = "zarrs pipeline in threads"
TENSORSTORE = "tensorstore"
XARRAY = "xarray.coarsen"
CUBED = "cubed.map_blocks"


def _peers(bench: Bench, stored: Stored, few: Stored, some: Stored) -> tuple[list[Contender], dict[str, str]]:
    """Return the peers on local files: slow ones do smaller arrays of the same kind; and who is not here."""
    found = [
        peer(FROM_ZARR, few, peers.from_zarr, bench.client, few=True),
        peer(BANDS, some, peers.from_zarr_bands, bench.client, few=True),
        peer(CLIENT_MAP, some, peers.client_map, bench.client, few=True),
        peer(THREADS, some, peers.thread_pool, bench.threads, few=True),
        peer(TENSORSTORE, stored, peers.tensorstore_bands),
    ]
    absent: dict[str, str] = {}
    if is_installed("zarrs"):
        found.append(peer(ZARRS, stored, peers.thread_pool, bench.threads, "zarrs"))
        found.append(peer(CLIENT_MAP_ZARRS, stored, peers.client_map, bench.client, "zarrs"))
    else:
        absent |= dict.fromkeys((ZARRS, CLIENT_MAP_ZARRS), "not installed")
    if stored.layout == "blosc2":
        absent[XARRAY] = "needs names of dimensions, which came with version 3"
    else:
        found.append(peer(XARRAY, few, peers.xarray_coarsen, bench.client, few=True))
    if is_installed("cubed"):
        found.append(peer(CUBED, few, peers.cubed_blocks, CORES, few=True))
    else:
        absent[CUBED] = "not installed"
    return found, absent


def _row(
    bench: Bench,
    work: str,
    name: str,
    layout: Stored,
    loop: limit.Loop,
    *,
    of_limit: float,
    least: tuple[int, int],
) -> Row:
    stored = data.make(bench.folder, name, layout, bench.seed)
    few = data.part(bench.folder, name, layout, bench.seed, least)
    some = data.part(bench.folder, name, layout, bench.seed, (max(layout.grid[0] // 10, least[0]), layout.grid[1]))
    others, absent = _peers(bench, stored, few, some)
    return Row(
        f"{work}; sum of each chunk",
        [bare(bench, stored, loop), streaming("stream", stored, bench.client), *others],
        [share("stream", "limit", of_limit)],
        expected={few.url: peers.zarr_whole(few), some.url: peers.zarr_whole(some)},
        absent=absent,
    )


def _ahead_of_from_zarr(row: Row, least: float) -> Row:
    (name,) = (contender.name for contender in row.contenders if contender.family == FROM_ZARR)
    row.goals.append(times("stream", name, least, FROM_ZARR))
    return row


def small(bench: Bench) -> Row:
    """Many small chunks."""
    layout = Stored("", (bench.sized(200), 200), (100, 100), "zstd")
    work = f"{layout.chunks:,} chunks of 100x100 float32, zstd, v3, local files"
    row = _row(bench, work, "small", layout, limit.sum_zstd, of_limit=0.70, least=(4, 200))
    return _ahead_of_from_zarr(row, 50)


def small_v2(bench: Bench) -> Row:
    """Many small chunks of the older format and codec."""
    layout = Stored("", (bench.sized(160), 200), (128, 128), "blosc2")
    work = f"{layout.chunks:,} chunks of 64 KiB, blosc-lz4-shuffle, v2, local files"
    row = _row(bench, work, "small-v2", layout, limit.sum_blosc, of_limit=0.65, least=(4, 200))
    return _ahead_of_from_zarr(row, 50)


def large(bench: Bench) -> Row:
    """Few large chunks."""
    layout = Stored("", (bench.sized(48), 4), (1024, 2048), "zstd")
    work = f"{layout.chunks:,} chunks of 8 MiB, zstd, v3, local files"
    row = _row(bench, work, "large", layout, limit.sum_zstd, of_limit=0.90, least=layout.grid)
    return _ahead_of_from_zarr(row, 1.2)


def sharded(bench: Bench) -> Row:
    """Small chunks in large objects."""
    layout = Stored("", (16 * bench.sized(6), 256), (128, 128), "shards", (16, 32))
    work = f"{layout.chunks:,} chunks of 64 KiB in {layout.chunks // 512:,} shards of 32 MiB, zstd, v3, local files"
    row = _row(bench, work, "sharded", layout, limit.sum_shards, of_limit=0.65, least=(16, 64))
    stored = data.make(bench.folder, "sharded", layout, bench.seed)
    nbytes = sum(path.stat().st_size for path in Path(stored.url, "c").rglob("*") if path.is_file())

    def counted() -> Outcome:
        before = _bytes_read(bench.client)
        outcome = stream_sums(stored, bench.client)
        reads = (_bytes_read(bench.client) - before) / nbytes
        return replace(outcome, figures={**outcome.figures, "reads": reads})

    row.contenders[1] = Contender("stream", counted, "stream", work=stored.url)
    row.goals.append(Figure("each stored byte read ≤ 1.1 times", "stream", "reads", most=1.1))
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
    held = "ordered, one chunk takes 1 s"
    return Row(
        f"{layout.chunks:,} chunks as in `small`, in grid order and as completed, at most {window:,} in flight",
        [
            streaming("as completed", stored, bench.client, concurrency=window),
            streaming("ordered", stored, bench.client, ordered=True, concurrency=window),
            streaming(held, stored, bench.client, late_chunk_sum, ordered=True, concurrency=window),
        ],
        [
            share("ordered", "as completed", 0.95, "as completed"),
            Figure(f"≤ {window:,} in flight behind a straggler", held, "peak_chunks", most=window),
        ],
    )


def client_threads(bench: Bench) -> Row:
    """Whole chunks through the cluster inside this process."""
    stored = data.make(bench.folder, "client", Stored("", (bench.sized(100), 4), (1024, 1024), "zstd"), bench.seed)
    ahead = 2 * CORES
    return Row(
        f"{stored.chunks:,} chunks of 4 MiB, zstd, whole to the client; cluster inside the process, {CORES} threads; "
        "the limit is a bare pool of as many threads",
        [
            replace(peer("limit", stored, peers.bare_threads, bench.threads, limit.decode_zstd, ahead), kind="limit"),
            Contender("stream", lambda: stream_whole(stored, bench.embedded), "stream", work=stored.url),
            peer(THREADS, stored, peers.bare_threads, bench.threads, peers.read_zarr, ahead),
            peer(TENSORSTORE, stored, peers.tensorstore_chunks, ahead),
            peer("delayed + as_completed", stored, peers.by_hand, bench.embedded, peers.read_zarr),
        ],
        [share("stream", "limit", 0.85)],
    )


def client_processes(bench: Bench) -> Row:
    """Whole chunks from worker processes to the client."""
    stored = data.make(bench.folder, "client", Stored("", (bench.sized(100), 4), (1024, 1024), "zstd"), bench.seed)
    hand, sent = "as_completed + gather, zarr-python", "as_completed + gather, tensorstore"
    return Row(
        f"{stored.chunks:,} chunks of 4 MiB, zstd, whole to the client; {CORES} worker processes",
        [
            Contender("stream", lambda: stream_whole(stored, bench.client), "stream", work=stored.url),
            peer(hand, stored, peers.by_hand, bench.client, peers.read_zarr),
            peer(sent, stored, peers.by_hand, bench.client, peers.read_tensorstore),
        ],
        [
            times("stream", hand, 1.0, hand),
            times("stream", sent, 1.0, "tensorstore read + send"),
        ],
    )
