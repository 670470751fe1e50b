"""Targets while workers and clients are killed, disks fill up and stores refuse: equal to the bit in the end."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zarr_dask_stream as zds
from chaos.scene import Reaper, StartCluster, connect, within, write_rows
from chaos.test_chaos_client import Run, fill, finished, small_disk  # noqa: F401  # a fixture is among them
from copying import read
from counted import balanced
from realparts.leaks import LeakCheck

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COUNT = 240
#: Copies into shards that hold parts of several chunks each; "cluster" uses Dask inside the process.
COPY = """
import sys, time
import zarr_dask_stream as zds

url, target, ledger, where = sys.argv[1:]

def work(chunk):
    time.sleep(0.004)
    return chunk.data

checkpoint = zds.Checkpoint(url=ledger, every_chunks=1)
stream = zds.stream_chunks(url, checkpoint=checkpoint, concurrency=1 if where == "here" else 16, ordered=False)
stream.rechunk((2, 32)).map(work).to_zarr(target, chunks=(1, 16), shards=(2, 32)).run()
"""
#: Writes rows that it makes itself.
WRITE = """
import sys, time
import numpy as np
import zarr_dask_stream as zds

target, ledger, where = sys.argv[1:]

def rows():
    for row in range(240):
        time.sleep(0.002)
        yield np.arange(row * 64, (row + 1) * 64, dtype="i4").reshape(1, 64)

zds.write_chunks(target, rows(), shape=(240, 64), chunks=(1, 64), dtype="i4", fill_value=-1,
                 checkpoint=zds.Checkpoint(url=ledger, every_chunks=1), concurrency=1 if where == "here" else 16)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    url = str(tmp_path_factory.mktemp("targets") / "rows.zarr")
    return url, write_rows(url, COUNT)


def whole_so_far(target: Path, data: np.ndarray) -> int:
    """Require that each object that is there is whole and right; return how many elements are there."""
    if not (target / "zarr.json").exists():
        return 0
    found = read(target)
    there = found != -1
    np.testing.assert_array_equal(found[there], data[there])
    return int(there.sum())


@pytest.mark.parametrize(
    ("script", "kills", "seed", "where"),
    [
        pytest.param(COPY, 5, 1, "cluster", marks=pytest.mark.sample),
        pytest.param(WRITE, 5, 2, "here", marks=pytest.mark.sample),
        (COPY, 20, 3, "here"),
        (COPY, 20, 4, "cluster"),
        (WRITE, 20, 5, "cluster"),
    ],
    ids=["copy-5-cluster", "write-5-here", "copy-20-here", "copy-20-cluster", "write-20-cluster"],
)
def test_a_client_killed_again_and_again_goes_on_into_the_same_target(
    *,
    leak_check: LeakCheck,
    place: tuple[str, np.ndarray],
    tmp_path: Path,
    script: str,
    kills: int,
    seed: int,
    where: str,
) -> None:
    url, data = place
    target, ledger, rng = tmp_path / "target", tmp_path / "ledger.json", random.Random(seed)
    arguments = (*([url] if script is COPY else []), str(target), str(ledger), where)
    saved = 0
    for _ in range(kills):
        run = Run(script, *arguments)
        run.kill_after(lambda: finished(ledger), rng.randint(1, max(COUNT // (2 * kills), 1)), rng.uniform(0, 0.02))
        there = whole_so_far(target, data)
        # What the ledger has as done is there: 64 elements to an item of either script.
        assert finished(ledger) >= saved
        saved = finished(ledger)
        assert there >= 64 * saved
    Run(script, *arguments).to_the_end()
    np.testing.assert_array_equal(read(target), data)
    assert finished(ledger) == COUNT
    assert sorted(path.name for path in target.iterdir()) == ["c", "zarr.json"]


@pytest.mark.cluster
@pytest.mark.parametrize("seed", [pytest.param(1, marks=pytest.mark.sample), 2])
def test_workers_killed_again_and_again_cost_no_chunk(
    leak_check: LeakCheck, start_tcp_cluster: StartCluster, place: tuple[str, np.ndarray], tmp_path: Path, seed: int
) -> None:
    url, data = place
    cluster = start_tcp_cluster(workers=3)

    def slowly(chunk: zds.Chunk) -> Any:
        import time  # noqa: PLC0415  # travels by value

        time.sleep(0.05)
        return chunk.data

    with connect(cluster) as client, within(120):
        stream = zds.stream_chunks(url, client=client, ordered=False).rechunk((3, 16)).map(slowly)
        stream = stream.to_zarr(tmp_path / "target", chunks=(1, 8), shards=(3, 16))
        with Reaper(cluster, client, seed=seed) as reaper:
            report = stream.run()
        assert reaper.kills >= 3
        assert report.batches_lost > 0
    np.testing.assert_array_equal(read(tmp_path / "target"), data)
    assert report.emitted == report.total == 320
    assert balanced(report)


# -- no room on the disk ----------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.sample
@pytest.mark.parametrize("concurrency", [1, 16])
def test_a_full_disk_is_named_and_the_rest_follows_when_there_is_room(
    *,
    leak_check: LeakCheck,
    place: tuple[str, np.ndarray],
    small_disk: Path,  # noqa: F811  # the fixture
    tmp_path: Path,
    concurrency: int,
) -> None:
    url, data = place
    ballast, target = small_disk / "ballast", small_disk / "target"

    def stream(**options: Any) -> zds.ChunkStream:
        chunks = zds.stream_chunks(
            url, region=slice(0, 96), checkpoint=tmp_path / "ledger", concurrency=concurrency, **options
        )
        return chunks.to_zarr(target, chunks=(12, 64))

    target.mkdir()
    fill(ballast)
    os.truncate(ballast, ballast.stat().st_size - 20 * 1024)
    with pytest.raises(zds.ChunkError, match=r"writing c/\d+/0 of .*target: No space left on device"):
        stream().run()
    report = stream(on_error="skip").run()
    assert report.dead_lettered > 0
    assert {letter.category for letter in report.dead_letters} == {"permanent"}
    whole_so_far(target, data[:96])
    assert not list(target.rglob(".zds-*"))
    ballast.unlink()
    report = stream().run()
    assert report.resumed + report.emitted == 8
    np.testing.assert_array_equal(read(target), data[:96])


@pytest.mark.root
@pytest.mark.sample
def test_no_room_for_the_target_at_all(small_disk: Path, place: tuple[str, np.ndarray]) -> None:  # noqa: F811  # the fixture, imported
    fill(small_disk / "ballast")
    stream = zds.stream_chunks(place[0], concurrency=1).to_zarr(small_disk / "target")
    with pytest.raises(zds.StoreError, match=r"the target .* can't be made: .*No space left on device"):
        stream.run()
