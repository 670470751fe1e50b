from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, ShardingCodec, ZstdCodec
from zarr.storage import LocalStore, LoggingStore

from conformance.oracle import assemble, expected, same_bits, sample, smooth
from realparts.fault_proxy import FaultProxy
from realparts.http_files import HttpStore
from realparts.leaks import LeakCheck
from zarr_dask_stream.errors import CorruptChunkError, StoreError, StoreNotFoundError, StoreNotVisibleError
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.backend import RemoteBytes
from zarr_dask_stream.source.fetch import Fetcher, Limit, Request, coalesce
from zarr_dask_stream.source.files import LocalFiles
from zarr_dask_stream.source.reader import ChunkRead, read_chunks, stored_numbers
from zarr_dask_stream.source.shard import Entries, IndexCache

SHAPE, CHUNKS = (20, 30), (4, 5)


class SlowStore(LoggingStore[LocalStore]):
    """A foreign zarr store: read through coroutines, with a delay, counting what is in flight."""

    delay_s = 0.0
    in_flight = 0
    peak = 0
    cancelled = 0
    calls: list[tuple[str, Any]] = []  # noqa: RUF012  # one for all, as the store is rebuilt from its pickle

    @classmethod
    def reset(cls, delay_s: float = 0.0) -> None:
        cls.delay_s, cls.in_flight, cls.peak, cls.cancelled = delay_s, 0, 0, 0
        cls.calls.clear()

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        cls = type(self)
        cls.calls.append((key, byte_range))
        cls.in_flight += 1
        cls.peak = max(cls.peak, cls.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
            return await self._store.get(key, prototype, byte_range)
        except asyncio.CancelledError:
            cls.cancelled += 1
            raise
        finally:
            cls.in_flight -= 1


@pytest.fixture
def plain(tmp_path: Path) -> ArraySpec:
    array = zarr.create_array(tmp_path / "plain", shape=SHAPE, chunks=CHUNKS, dtype="f4", fill_value=-1)
    array[:16] = sample("f4", (16, 30))
    return open_array(tmp_path / "plain")


def _slow(spec: ArraySpec, delay_s: float = 0.0) -> ArraySpec:
    """Describe the same array, read through a slow foreign store."""
    SlowStore.reset()
    slow = open_array(SlowStore(LocalStore(spec.store.url)), path=spec.path)
    assert isinstance(slow.store.open(), RemoteBytes)
    SlowStore.reset(delay_s)
    return slow


def _by_number(reads: Iterator[ChunkRead]) -> dict[int, ChunkRead]:
    return {read.number: read for read in reads}


# -- local ----------------------------------------------------------------------------------------


def test_order_and_accounts(plain: ArraySpec) -> None:
    numbers = [5, 0, 29, 3]
    reads = list(read_chunks(plain, iter(numbers)))
    assert [read.number for read in reads] == numbers
    assert [read.missing for read in reads] == [False, False, True, False]
    for read in reads:
        assert (read.stored_bytes == 0) == read.missing
        assert read.fetch_s > 0
        assert read.decode_s > 0
        assert read.error is None


def test_cropped_chunks_own_their_memory(plain: ArraySpec) -> None:
    box = (slice(2, 9), slice(7, 11))
    for read in read_chunks(plain, [1, 2, 7, 8, 13, 14], box=box):
        assert read.data is not None
        assert read.data.base is None or read.data.base.nbytes <= read.data.nbytes
        read.data[...] = 0


def test_number_outside_the_grid(plain: ArraySpec) -> None:
    for number in (-1, len(plain.grid)):
        with pytest.raises(IndexError):
            list(read_chunks(plain, [number]))
        with pytest.raises(IndexError):
            list(read_chunks(_slow(plain), [number]))


def test_lazily(plain: ArraySpec) -> None:
    reads = read_chunks(plain, itertools.count())
    assert [next(reads).number for _ in range(3)] == [0, 1, 2]


def test_failures_stay_with_their_chunks(plain: ArraySpec) -> None:
    folder = Path(plain.store.url)
    (folder / "c/0/1").write_bytes((folder / "c/0/1").read_bytes()[:-3])
    (folder / "c/0/2").write_bytes(b"")
    (folder / "c/0/3").unlink()
    (folder / "c/0/3").mkdir()
    reads = _by_number(read_chunks(plain, range(len(plain.grid))))
    failed = {number for number, read in reads.items() if read.error is not None}
    assert failed == {1, 2, 3}
    for number in (1, 2):
        error = reads[number].error
        assert isinstance(error, CorruptChunkError)
        assert f"chunk (0, {number}) of" in str(error)
        assert "damaged" in str(error)
        assert pickle.loads(pickle.dumps(error)).args == error.args
    assert isinstance(reads[3].error, IsADirectoryError)
    assert all(reads[number].data is None and not reads[number].missing for number in failed)


def test_not_filled(plain: ArraySpec) -> None:
    reads = list(read_chunks(plain, [24, 25], fill=False))
    assert [(read.missing, read.data) for read in reads] == [(True, None)] * 2


def test_an_array_that_vanishes_is_not_missing_chunks(plain: ArraySpec) -> None:
    folder = Path(plain.store.url)
    (folder / "zarr.json").unlink()
    (read,) = read_chunks(plain, [29])
    assert isinstance(read.error, StoreNotVisibleError)
    assert "removed or its disk" in str(read.error)
    folder.rename(folder.with_name("gone"))
    for read in read_chunks(plain, [0, 29]):
        assert isinstance(read.error, StoreNotFoundError)


def test_a_store_of_another_process_fails_as_a_whole() -> None:
    spec = pickle.loads(pickle.dumps(open_array(zarr.create_array({}, shape=(2,), dtype="i2"))))
    with pytest.raises(StoreNotVisibleError):
        list(read_chunks(spec, [0]))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_any_region_of_any_array(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunks = tuple(data.draw(st.integers(1, 5)) for _ in shape)
    shards = tuple(c * data.draw(st.integers(1, 3)) for c in chunks) if data.draw(st.booleans()) else None
    array = zarr.create_array({}, shape=shape, chunks=chunks, shards=shards, dtype="i4", fill_value=-5)
    half = tuple(slice(0, data.draw(st.integers(0, n))) for n in shape)
    if all(s.stop for s in half):
        array[half] = np.arange(np.prod([s.stop for s in half])).reshape([s.stop for s in half])
    box = tuple(slice(*sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in shape)
    spec = open_array(array)
    same_bits(assemble(spec), expected(array))
    out = np.full(shape, 77, "i4")
    for read in read_chunks(spec, range(len(spec.grid)), box=box):
        region = tuple(
            slice(max(r.start, b.start), min(r.stop, b.stop))
            for r, b in zip(spec.grid.region(read.number), box, strict=True)
        )
        if all(s.start < s.stop for s in region):
            out[region] = read.data
    same_bits(out[box], expected(array)[box])
    want = {n for n in range(len(spec.grid)) if _touches(spec.grid.region(n), box)}
    stored = set(stored_numbers(spec, box))
    present = {read.number for read in read_chunks(spec, want) if not read.missing}
    assert present <= stored <= want


def _touches(region: tuple[slice, ...], box: tuple[slice, ...]) -> bool:
    return all(max(r.start, b.start) < min(r.stop, b.stop) for r, b in zip(region, box, strict=True))


# -- shards ---------------------------------------------------------------------------------------


@pytest.fixture(params=["start", "end"])
def sharded(tmp_path: Path, request: pytest.FixtureRequest) -> ArraySpec:
    codec = ShardingCodec(chunk_shape=(2, 5), codecs=[BytesCodec(), ZstdCodec()], index_location=request.param)
    array = zarr.create(
        store=LocalStore(tmp_path / "sharded"), shape=SHAPE, chunks=(10, 15), dtype="f4", codecs=[codec], fill_value=-1
    )
    array[:, :15] = sample("f4", (20, 15))
    array[0:2, 15:20] = 3
    return open_array(tmp_path / "sharded")


def _shard(spec: ArraySpec, key: str = "c/0/0") -> Path:
    return Path(spec.store.url) / key


def test_index_is_read_once_for_each_shard(sharded: ArraySpec, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[str, Any]] = []

    def spied(true: Any) -> Any:
        def spy(*args: Any) -> Any:
            ranges.append(args[-2:])
            return true(*args)

        return spy

    for name in ("get_range", "get_suffix"):
        monkeypatch.setattr(LocalFiles, name, spied(getattr(LocalFiles, name)))
    borrow = LocalFiles.borrow_range
    monkeypatch.setattr(LocalFiles, "borrow_range", lambda self: spied(borrow(self)))
    numbers = [n for n in range(len(sharded.grid)) if sharded.grid.shard_of(n)[0] == 0]
    assert all(not read.missing for read in read_chunks(sharded, numbers))
    assert len(ranges) == len(numbers) + 1
    ranges.clear()
    assert len(list(read_chunks(sharded, numbers))) == len(numbers)
    assert len(ranges) == len(numbers)  # the index is still known
    same_bits(assemble(sharded), expected(zarr.open_array(sharded.store.url, mode="r")))


def test_a_shard_is_opened_once_for_the_chunks_that_are_read_from_it(
    sharded: ArraySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    true = LocalFiles._open

    def spy(self: LocalFiles, key: str) -> int | None:
        fd = true(self, key)
        if fd is not None:
            opened.append(fd)
        return fd

    monkeypatch.setattr(LocalFiles, "_open", spy)
    numbers = sorted(range(len(sharded.grid)), key=lambda number: sharded.grid.shard_of(number)[0])
    list(read_chunks(sharded, numbers))
    opened.clear()
    list(read_chunks(sharded, numbers))  # the indexes are known by now
    assert len(opened) == sum(path.is_file() for path in Path(sharded.store.url, "c").rglob("*")) == 3
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_rewritten_shard_is_read_anew(sharded: ArraySpec) -> None:
    before = assemble(sharded)
    array = zarr.open_array(sharded.store.url, mode="r+")
    array[0:10, 0:15] = smooth("f4", (10, 15))
    after = assemble(sharded)
    same_bits(after, expected(array))
    assert before.tobytes() != after.tobytes()


@pytest.mark.parametrize("remote", [False, True])
def test_damaged_index(sharded: ArraySpec, remote: bool) -> None:
    path = _shard(sharded)
    spec = _slow(sharded) if remote else sharded
    raw = bytearray(path.read_bytes())
    at_start = sharded.codecs[0]["configuration"]["index_location"] == "start"
    raw[3 if at_start else -8] ^= 1
    path.write_bytes(bytes(raw))
    reads = _by_number(read_chunks(spec, range(len(spec.grid))))
    bad = {n for n in reads if spec.grid.shard_of(n)[0] == 0}
    assert {n for n, read in reads.items() if read.error is not None} == bad
    for number in bad:
        assert isinstance(reads[number].error, CorruptChunkError)
        assert "index" in str(reads[number].error)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("wanted", ["one", "all"])
def test_truncated_shard(sharded: ArraySpec, remote: bool, wanted: str) -> None:
    path = _shard(sharded)
    spec = _slow(sharded) if remote else sharded
    path.write_bytes(path.read_bytes()[:20])
    numbers = [n for n in range(len(spec.grid)) if spec.grid.shard_of(n)[0] == 0]
    for read in read_chunks(spec, numbers[:1] if wanted == "one" else numbers):
        assert isinstance(read.error, CorruptChunkError)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(0, 2**40), (2**62, 10), (2**64 - 1, 5), (10**6, 50)])
def test_index_that_points_nowhere(sharded: ArraySpec, remote: bool, offset: int, length: int) -> None:
    path = _shard(sharded)
    raw = bytearray(path.read_bytes())
    index = np.full((5, 3, 2), 2**64 - 1, "<u8")
    index[0, 0] = offset, length
    encoded = index.tobytes()
    encoded += google_crc32c.value(encoded).to_bytes(4, "little")
    if sharded.codecs[0]["configuration"]["index_location"] == "start":
        raw[: len(encoded)] = encoded
    else:
        raw[-len(encoded) :] = encoded
    path.write_bytes(bytes(raw))
    spec = _slow(sharded) if remote else sharded
    for numbers in ([0], [0, 1, 2]):
        reads = _by_number(read_chunks(spec, numbers))
        assert isinstance(reads[0].error, CorruptChunkError)
        assert all(reads[n].missing for n in numbers[1:])


def test_remote_shard_is_fetched_whole_when_most_of_it_is_wanted(sharded: ArraySpec) -> None:
    spec = _slow(sharded)
    numbers = [n for n in range(len(spec.grid)) if spec.grid.shard_of(n)[0] == 0]
    want = _by_number(read_chunks(sharded, numbers))
    got = _by_number(read_chunks(spec, reversed(numbers)))
    assert [key for key, _ in SlowStore.calls] == ["c/0/0"]
    assert SlowStore.calls[0][1] is None
    for number in numbers:
        assert got[number].data is not None
        same_bits(got[number].data, want[number].data)  # type: ignore[arg-type]  # present


def test_remote_shard_by_ranges(sharded: ArraySpec) -> None:
    spec = _slow(sharded)
    numbers = [n for n in range(len(spec.grid)) if spec.grid.shard_of(n)[0] == 0][:6]
    want = _by_number(read_chunks(sharded, numbers))
    got = _by_number(read_chunks(spec, numbers))
    assert len(SlowStore.calls) == 2  # the index, and one range for six chunks beside one another
    assert all(byte_range is not None for _, byte_range in SlowStore.calls)
    for number in numbers:
        same_bits(got[number].data, want[number].data)  # type: ignore[arg-type]  # present
    SlowStore.calls.clear()
    list(read_chunks(spec, numbers))
    assert len(SlowStore.calls) == 1  # the index is still known


def test_remote_shards_missing_and_partly_filled(sharded: ArraySpec) -> None:
    spec = _slow(sharded)
    same_bits(assemble(spec), assemble(sharded))
    SlowStore.calls.clear()
    last = len(spec.grid) - 1
    (read,) = read_chunks(spec, [last])
    assert read.missing
    for number in range(len(spec.grid)):  # one by one: by index and ranges
        (one,) = read_chunks(spec, [number])
        (local,) = read_chunks(sharded, [number])
        assert one.missing == local.missing
        same_bits(one.data, local.data)  # type: ignore[arg-type]  # filled


def test_coalesce_covers_every_range_once() -> None:
    @given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 60)), max_size=20), st.integers(0, 40),
           st.integers(1, 200))  # fmt: skip
    def check(pairs: list[tuple[int, int]], max_gap: int, max_bytes: int) -> None:
        spans = [(start, start + length, tag) for tag, (start, length) in enumerate(pairs)]
        joined = coalesce(spans, max_gap=max_gap, max_bytes=max_bytes)
        assert sorted(tag for _, _, members in joined for _, _, tag in members) == list(range(len(spans)))
        for start, stop, members in joined:
            assert start == min(s for s, _, _ in members)
            assert stop == max(e for _, e, _ in members)
            assert stop - start <= max_bytes or len(members) == 1

    check()


def test_index_cache_is_bounded() -> None:
    cache = IndexCache(max_bytes=1000)
    for number in range(50):
        cache.put(("store", str(number)), Entries(np.zeros((10, 2), "u8")), version=1)
    kept = [number for number in range(50) if cache.get(("store", str(number)), 1)]
    assert kept == list(range(44, 50))
    cache.drop(("store", "49"))
    assert cache.get(("store", "49"), 1) is None


# -- remote ---------------------------------------------------------------------------------------


def test_remote_reads_as_local(plain: ArraySpec) -> None:
    same_bits(assemble(_slow(plain)), assemble(plain))


@pytest.mark.parametrize("concurrency", [1, 7, None])
def test_many_requests_in_flight(plain: ArraySpec, concurrency: int | None) -> None:
    spec = _slow(plain, 0.01)
    assert len(list(read_chunks(spec, range(24), concurrency=concurrency))) == 24
    assert SlowStore.peak == (concurrency or SlowStore.peak)
    assert SlowStore.peak <= 32
    if concurrency is None:
        assert SlowStore.peak > 7


def test_a_slow_consumer_stops_the_fetching(plain: ArraySpec) -> None:
    spec = _slow(plain)
    reads = read_chunks(spec, itertools.cycle(range(24)), concurrency=3)
    next(reads)
    time.sleep(0.2)
    assert len(SlowStore.calls) <= 2 * 3 + 1
    reads.close()


def test_close_cancels_what_is_in_flight(plain: ArraySpec, leak_check: LeakCheck) -> None:
    spec = _slow(plain)
    reads = read_chunks(spec, range(24), concurrency=8)
    next(reads)
    SlowStore.delay_s = 30
    next(reads)
    begin = time.monotonic()
    reads.close()
    assert time.monotonic() - begin < 5
    assert SlowStore.in_flight == 0


def test_timeout_is_the_chunk_s_own_error(plain: ArraySpec) -> None:
    spec = _slow(plain, 5)
    begin = time.monotonic()
    reads = list(read_chunks(spec, range(6), timeout=0.1, concurrency=6))
    assert time.monotonic() - begin < 4
    for read in reads:
        assert isinstance(read.error, TimeoutError)
        assert "longer than 0.1 s" in str(read.error)


def test_remote_failures_stay_with_their_chunks(plain: ArraySpec) -> None:
    folder = Path(plain.store.url)
    (folder / "c/0/1").write_bytes(b"noise")
    reads = _by_number(read_chunks(_slow(plain), range(len(plain.grid))))
    assert {n for n, read in reads.items() if read.error is not None} == {1}
    assert {n for n, read in reads.items() if read.missing} == set(range(24, 30))


def test_remote_array_that_vanishes(plain: ArraySpec) -> None:
    spec = _slow(plain)
    (Path(plain.store.url) / "zarr.json").unlink()
    for read in read_chunks(spec, [28, 29]):
        assert isinstance(read.error, StoreNotVisibleError)


def test_two_readers_at_once(plain: ArraySpec) -> None:
    spec = _slow(plain, 0.002)
    want = assemble(plain)
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(assemble(spec))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for data in got:
        same_bits(data, want)


def test_limit_backs_off_and_grows() -> None:
    limit = Limit(16, least=2, most=64)
    for _ in range(500):
        limit.observe(0.01)
    grown = limit.current
    assert grown > 32
    for _ in range(200):
        limit.observe(0.2)  # queueing
    assert limit.current < grown
    limit.observe(0.01, refused=True)
    for _ in range(50):
        limit.observe(0.01, refused=True)
    assert limit.current == 2


def test_fetcher_bounds_bytes(plain: ArraySpec) -> None:
    store = _slow(plain).store.open()
    assert isinstance(store, RemoteBytes)
    with Fetcher(store, Limit(8, least=8, most=8), timeout=5) as fetcher:
        assert fetcher.room == 16
        fetcher.submit([Request(0, "c/0/0", cost_bytes=1 << 40)])
        assert fetcher.room == 0
        answer = fetcher.next()
        assert answer is not None
        assert answer.data
        assert fetcher.room == 16


# -- HTTP, and faults on the way ------------------------------------------------------------------


@pytest.fixture
def served(http_store: HttpStore) -> ArraySpec:
    array = zarr.create_array(http_store.directory / "a", shape=SHAPE, chunks=CHUNKS, dtype="f4", fill_value=-1)
    array[:16] = sample("f4", (16, 30))
    return open_array(f"{http_store.url}/a")


def test_http(served: ArraySpec, http_store: HttpStore) -> None:
    same_bits(assemble(served), expected(zarr.open_array(http_store.directory / "a", mode="r")))
    chunks = [path for method, path, _ in http_store.requests if "/c/" in path]
    assert len(chunks) == len(served.grid)
    with pytest.raises(StoreError, match="can't be listed"):
        list(stored_numbers(served))


def test_http_shards(http_store: HttpStore) -> None:
    array = zarr.create_array(http_store.directory / "s", shape=SHAPE, chunks=(2, 5), shards=(10, 15), dtype="f4")
    array[:10] = sample("f4", (10, 30))
    spec = open_array(f"{http_store.url}/s")
    same_bits(assemble(spec), expected(array))
    for number in (0, 7, len(spec.grid) - 1):
        (read,) = read_chunks(spec, [number])
        assert read.error is None


def test_faults_are_errors_never_fill_values(
    served: ArraySpec, http_store: HttpStore, fault_proxy: Callable[..., FaultProxy]
) -> None:
    proxy = fault_proxy(http_store.url)
    spec = open_array(f"{proxy.url}/a")
    want = _by_number(read_chunks(served, range(24)))
    for kind in ("slow_down", "reset", "truncate", "hang"):
        proxy.inject(kind, times=2)
        reads = _by_number(read_chunks(spec, range(24), timeout=1.0, concurrency=4))
        failed = {n for n, read in reads.items() if read.error is not None}
        assert len(failed) <= 2  # the client itself may have tried again
        assert not any(read.missing for read in reads.values())
        for number in failed:
            assert isinstance(reads[number].error, OSError)
        for number in set(reads) - failed:
            same_bits(reads[number].data, want[number].data)  # type: ignore[arg-type]  # present


# -- listing --------------------------------------------------------------------------------------


def test_stored_numbers_asks_for_no_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(1000, 1000), chunks=(10, 10), dtype="i2")
    array[500:520, 700:730] = 1
    spec = open_array(tmp_path / "a")
    for name in ("get", "exists", "get_range"):
        monkeypatch.setattr(LocalFiles, name, lambda *_: pytest.fail("a chunk was asked for"))
    assert list(stored_numbers(spec)) == [5070, 5071, 5072, 5170, 5171, 5172]
    assert list(stored_numbers(spec, (slice(510, 511), slice(0, 715)))) == [5170, 5171]
    assert list(stored_numbers(spec, (slice(0, 0), slice(0, 0)))) == []


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("separator", [".", "/"])
def test_keys_that_are_no_chunk_keys(tmp_path: Path, zarr_format: Any, separator: Any) -> None:
    name = "v2" if zarr_format == 2 else "default"
    encoding: Any = {"name": name, "separator": separator}
    array = zarr.create_array(
        tmp_path,
        name="a",
        shape=(9, 9),
        chunks=(3, 3),
        dtype="i2",
        zarr_format=zarr_format,
        chunk_key_encoding=encoding,
    )
    array[3:6, 3:6] = 1
    spec = open_array(tmp_path, path="a")
    for odd in (
        "9/9",
        "01/1",
        "-1/0",
        "1/1/1",
        "1",
        "x/y",
        "1.5/2",
        "c",
        "٣/1",
        "1/2.tmp",
        ".DS_Store",
        "c/x",
        "c/0/9",
    ):
        path = tmp_path / "a" / odd
        with suppress(OSError):  # some are in one another's way
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    assert list(stored_numbers(spec)) == [4]


def test_a_small_region_is_not_found_by_listing_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(100, 100), chunks=(10, 10), dtype="i2")
    array[...] = 1
    listed: list[str] = []
    true = LocalFiles.list_names

    def spy(self: LocalFiles, prefix: str) -> Iterator[str]:
        listed.append(prefix)
        return true(self, prefix)

    monkeypatch.setattr(LocalFiles, "list_names", spy)
    assert list(stored_numbers(open_array(tmp_path / "a"), (slice(15, 35), slice(0, 10)))) == [10, 20, 30]
    assert listed == ["c/1", "c/2", "c/3"]


def test_linked_folders_are_listed_once(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a", shape=(4, 4), chunks=(2, 2), dtype="i2")
    array[...] = 1
    (tmp_path / "a" / "c").rename(tmp_path / "other disk")
    (tmp_path / "a" / "c").symlink_to(tmp_path / "other disk")
    (tmp_path / "other disk" / "0" / "ring").symlink_to(tmp_path / "other disk")
    assert list(stored_numbers(open_array(tmp_path / "a"))) == [0, 1, 2, 3]
    same_bits(assemble(open_array(tmp_path / "a")), np.ones((4, 4), "i2"))


def test_stored_numbers_of_shards(sharded: ArraySpec) -> None:
    assert list(stored_numbers(sharded)) == [
        n for n in range(len(sharded.grid)) if sharded.grid.shard_of(n)[0] in {0, 1, 2}
    ]
    assert list(stored_numbers(_slow(sharded))) == list(stored_numbers(sharded))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_folder_in_place_of_a_chunk_is_an_error_whether_or_not_chunks_are_listed(
    tmp_path: Path, zarr_format: Any
) -> None:
    array = zarr.create_array(str(tmp_path / "a"), shape=(4, 4), chunks=(2, 2), dtype="i2", zarr_format=zarr_format)
    array[:] = 7
    spec = open_array(tmp_path / "a")
    key = tmp_path / "a" / spec.chunk_key((1, 0))
    key.unlink()
    key.mkdir()
    assert list(stored_numbers(spec)) == [0, 1, 2, 3]
    assert [type(read.error) for read in read_chunks(spec, range(4))] == [
        *[type(None)] * 2,
        IsADirectoryError,
        type(None),
    ]
