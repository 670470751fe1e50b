"""Buffers that are used again: never while anybody can see them, and without asking the system for each chunk."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import Blosc

import zarr_dask_stream as zds
from zarr_dask_stream.source import memory
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.memory import KEPT_BYTES, lend, lend_array
from zarr_dask_stream.source.reader import read_chunks


@pytest.fixture(autouse=True)
def _empty_shelves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_shelves", {})


@given(st.lists(st.tuples(st.sampled_from([2**14, 2**16, 2**20]), st.integers(0, 6)), max_size=60))
def test_no_two_that_are_held_share_memory(steps: list[tuple[int, int]]) -> None:
    held: dict[int, tuple[Any, int]] = {}
    for mark, (nbytes, slot) in enumerate(steps):
        buffer = lend(nbytes)
        buffer[:] = mark % 251
        # Not the buffer itself is kept: a view of a view, as users get it.
        held[slot] = (buffer[16:].view("u4").reshape(-1, 1)[1:], mark % 251)
        del buffer
        for view, number in held.values():
            assert (view.view("u1") == number).all()


@pytest.mark.parametrize("nbytes", [2**14, 2**20])
def test_what_nobody_holds_is_lent_again(nbytes: int) -> None:
    address = lend(nbytes).ctypes.data
    assert {lend(nbytes).ctypes.data for _ in range(5)} == {address}
    kept = memoryview(lend(nbytes))[5:7]  # type: ignore[arg-type]  # it is a buffer
    assert lend(nbytes).ctypes.data != address
    del kept
    assert address in {lend(nbytes).ctypes.data for _ in range(3)}


def test_threads_never_get_the_same_memory() -> None:
    wrong = []

    def work(mark: int) -> None:
        for _ in range(2000):
            buffer = lend(2**14)
            buffer[:: 2**10] = mark
            if (buffer[:: 2**10] != mark).any():
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(6)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_no_more_is_kept_than_is_said() -> None:
    held = [lend(2**20) for _ in range(2 * KEPT_BYTES // 2**20)]
    assert sum(size * len(shelf) for size, shelf in memory._shelves.items()) == KEPT_BYTES
    del held
    lend(2**14)  # of another size: those make room
    assert sum(size * len(shelf) for size, shelf in memory._shelves.items()) <= 2**14


def test_more_is_kept_while_somebody_asks_for_it() -> None:
    keepers = [memory.Keeper(), memory.Keeper()]
    for keeper in keepers:
        keeper.open()
    for _ in range(2):
        held = [lend(2**20) for _ in range(2 * KEPT_BYTES // 2**20)]
        addresses = {one.ctypes.data for one in held}
        del held
        assert {lend(2**20).ctypes.data for _ in range(3)} <= addresses
    keepers[0].close()
    assert len(memory._shelves[2**20]) == 2 * KEPT_BYTES // 2**20
    for keeper in keepers:
        keeper.close()
    assert not memory._shelves


def test_no_more_than_usual_is_kept_for_a_stream_that_has_ended(stored: Path) -> None:
    with (
        LocalCluster(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        for chunk in zds.stream_chunks(stored, client=client):
            assert memory._keepers
            del chunk
            break
    assert not memory._keepers
    assert sum(size * len(shelf) for size, shelf in memory._shelves.items()) <= KEPT_BYTES


def test_arrays_of_any_kind() -> None:
    assert lend_array((), np.dtype("f8")).shape == ()
    assert lend_array((0, 3), np.dtype("f8")).shape == (0, 3)
    assert lend_array((2,), np.dtype(object)).tolist() == [None, None]


@pytest.mark.parametrize("layout", ["plain", "raw", "shards", "v2"])
def test_chunks_that_are_kept_stay_as_they_are(tmp_path: Path, layout: str) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "plain": {},
        "raw": {"compressors": None},
        "shards": {"shards": (256, 128)},
        "v2": {"zarr_format": 2},
    }
    options = layouts[layout]
    data = np.random.default_rng(3).integers(0, 9, (512, 256), "i4")
    array = zarr.create_array(tmp_path / "a", shape=data.shape, chunks=(128, 64), dtype="i4", **options)
    array[:] = data
    spec = open_array(tmp_path / "a")
    for _ in range(2):
        reads = list(read_chunks(spec, range(len(spec.grid))))
        for read in reads:
            assert read.data is not None
            np.testing.assert_array_equal(read.data, data[spec.grid.region(read.number)])
            read.data[...] = -1


_FAULTS = """
import resource, sys, threading, json
import numpy as np
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.memory import settle_allocator
from zarr_dask_stream.source.reader import read_chunks

settled = settle_allocator()
spec = open_array(sys.argv[1])
faults = []

def work():  # as a batch, not in the main thread
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for read in read_chunks(spec, range(len(spec.grid))):
            assert read.data is not None
        faults.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / len(spec.grid))

thread = threading.Thread(target=work)
thread.start()
thread.join()
print(json.dumps([settled, faults[-1]]))
"""


@pytest.fixture(scope="module", params=["blosc", "zstd"])
def stored(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("memory") / "a"
    options: dict[str, Any] = {"zarr_format": 2} if request.param == "blosc" else {}
    if request.param == "blosc":
        options["compressors"] = Blosc("lz4")
    array = zarr.create_array(path, shape=(1024, 1024), chunks=(128, 256), dtype="f4", **options)
    array[:] = np.random.default_rng(1).normal(size=array.shape).round(1)
    return path


def _faults(path: Path, **environment: str) -> tuple[bool, float]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS, path], env=clean | environment, capture_output=True, text=True, check=True
    )
    settled, faults = json.loads(done.stdout)
    return settled, faults


def test_chunks_are_read_without_new_pages_where_dask_trims(stored: Path) -> None:
    settled, faults = _faults(stored, MALLOC_TRIM_THRESHOLD_="65536")
    assert settled
    assert faults < 4  # a chunk has 32 pages


def test_other_settings_are_respected(stored: Path) -> None:
    assert not _faults(stored)[0]
    assert not _faults(stored, MALLOC_TRIM_THRESHOLD_="131072")[0]
    assert not _faults(stored, MALLOC_TRIM_THRESHOLD_="65536", MALLOC_MMAP_THRESHOLD_="131072")[0]


def _pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@pytest.mark.cluster
def test_worker_processes_as_dask_starts_them(stored: Path) -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        stream = zds.stream_chunks(stored, client=client).map(lambda chunk: chunk.data.max())
        counts = []
        for _ in range(12):
            stream.run()
            counts.append(sum(client.run(_pages).values()))
        fewest = min(np.diff(counts))
        assert fewest < 8 * len(stream)  # each chunk has 32 pages, each decoder's room more
