"""A client that is killed at any moment, and a disk that is full, while progress is being written down."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import zarr_dask_stream as zds
from chaos.scene import NOTHING, assemble_rows, write_rows
from realparts.leaks import LeakCheck

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COUNT = 240
#: Writes one line for each item when it is done with it; the argument "cluster" uses Dask inside the process.
DELIVER = """
import os, sys, time, zlib
import zarr_dask_stream as zds

url, ledger, log, where = sys.argv[1:]

def work(chunk):
    time.sleep(0.004)
    return chunk.data

checkpoint = zds.Checkpoint(url=ledger, every_chunks=1)
stream = zds.stream_chunks(url, checkpoint=checkpoint, concurrency=1 if where == "here" else 16).map(work)
out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for chunk in stream:
    os.write(out, b"%d %d\\n" % (chunk.index[0], zlib.crc32(chunk.data.tobytes())))
"""

#: Prints the answers of a reduction; an interrupted run prints nothing.
REDUCE = """
import sys, time
import zarr_dask_stream as zds

url, ledger, log, where = sys.argv[1:]

def work(chunk):
    time.sleep(0.004)
    return chunk.data

checkpoint = zds.Checkpoint(url=ledger, every_chunks=1)
stream = zds.stream_chunks(url, checkpoint=checkpoint, concurrency=1 if where == "here" else 16).map(work)
answer = stream.reduce({"sum": zds.reducers.sum(), "mean": zds.reducers.mean()}).compute()
with open(log, "w") as out:
    out.write(f"{int(answer['sum'])} {float(answer['mean']).hex()}")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    url = str(tmp_path_factory.mktemp("killed") / "rows.zarr")
    return url, write_rows(url, COUNT)


class Run:
    """A client in a process of its own, killed once it has made some progress."""

    def __init__(self, script: str, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kill_after(self, progress: Callable[[], int], more: int, seconds: float) -> None:
        """Kill it when `progress` has grown by `more` and `seconds` have gone by since."""
        begin, deadline = progress(), time.monotonic() + 60
        while progress() < begin + more and self._process.poll() is None:
            assert time.monotonic() < deadline, "the client makes no progress"
            time.sleep(0.001)
        time.sleep(seconds)
        self._process.send_signal(signal.SIGKILL)
        output, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == -signal.SIGKILL, f"it ended by itself: {output}"

    def to_the_end(self) -> None:
        """Let it finish, and require that it does so in good order."""
        output, _ = self._process.communicate(timeout=120)
        assert self._process.returncode == 0, output


def lines_of(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def finished(ledger: Path) -> int:
    """Return how many chunks the ledger says are done; it is never found half written."""
    return int(json.loads(ledger.read_text())["finished"]) if ledger.exists() else 0


@pytest.mark.parametrize(
    ("kills", "seed", "where"),
    [pytest.param(5, 1, "here", marks=pytest.mark.sample), (20, 2, "here"), (20, 3, "cluster")],
)
def test_a_client_killed_again_and_again_repeats_only_what_it_was_at(
    *, leak_check: LeakCheck, place: tuple[str, np.ndarray], tmp_path: Path, kills: int, seed: int, where: str
) -> None:
    url, data = place
    ledger, log, rng = tmp_path / "ledger.json", tmp_path / "log.txt", random.Random(seed)
    arguments = (url, str(ledger), str(log), where)
    last_words: set[str] = set()
    most = COUNT // (kills + 1)
    for _ in range(kills):
        run = Run(DELIVER, *arguments)
        run.kill_after(lambda: len(lines_of(log)), rng.randint(1, most // 2), rng.uniform(0, 0.02))
        last_words.add(lines_of(log)[-1])
    assert finished(ledger) < COUNT
    Run(DELIVER, *arguments).to_the_end()
    lines = lines_of(log)
    assert set(lines) == {f"{row} {zlib.crc32(data[row].tobytes())}" for row in range(COUNT)}
    repeated = {line for line in lines if lines.count(line) > 1}
    assert repeated <= last_words
    assert len(lines) <= COUNT + kills
    assert finished(ledger) == COUNT
    assert not list(tmp_path.glob(".*.tmp")), "half a ledger was left behind"


@pytest.mark.parametrize(
    ("kills", "seed", "where"), [pytest.param(5, 4, "cluster", marks=pytest.mark.sample), (20, 5, "cluster")]
)
def test_a_reduction_killed_again_and_again_counts_each_chunk_once(
    *, leak_check: LeakCheck, place: tuple[str, np.ndarray], tmp_path: Path, kills: int, seed: int, where: str
) -> None:
    url, data = place
    ledger, log, rng = tmp_path / "ledger.json", tmp_path / "answer.txt", random.Random(seed)
    arguments = (url, str(ledger), str(log), where)
    for _ in range(kills):
        run = Run(REDUCE, *arguments)
        run.kill_after(lambda: finished(ledger), rng.randint(1, 4), rng.uniform(0, 0.02))
        assert not log.exists()
    assert 0 < finished(ledger) < COUNT
    Run(REDUCE, *arguments).to_the_end()
    total, mean = log.read_text().split()
    assert int(total) == int(data.sum(dtype="i8"))
    assert float.fromhex(mean) == float(data.mean())
    assert finished(ledger) == COUNT


# -- no room on the disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 64 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not let us mount a file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(ballast: Path) -> None:
    """Write until nothing more fits."""
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(512))


@pytest.mark.root
@pytest.mark.sample
@pytest.mark.parametrize("concurrency", [1, 16])
def test_a_full_disk_leaves_the_ledger_as_it_was_and_the_rest_follows_when_there_is_room(
    *, leak_check: LeakCheck, place: tuple[str, np.ndarray], small_disk: Path, concurrency: int
) -> None:
    url, data = place
    ledger, ballast = small_disk / "ledger.json", small_disk / "ballast"
    checkpoint = zds.Checkpoint(url=ledger, every_chunks=1)
    stream = zds.stream_chunks(url, checkpoint=checkpoint, concurrency=concurrency)
    before: list[bytes] = []
    taken = np.full_like(data, NOTHING)

    def consume() -> None:
        for count, chunk in enumerate(stream, 1):
            taken[chunk.region] = chunk.data
            if count == 50:
                before.append(ledger.read_bytes())
                fill(ballast)

    with pytest.raises(zds.StoreError, match=r"No space left on device.*What was saved before is intact"):
        consume()
    assert stream.report.outcome == "failed"
    assert "No space left" in stream.report.error
    assert ledger.read_bytes() == before[0]
    assert {path.name for path in small_disk.iterdir()} <= {"ballast", "ledger.json", "ledger.json.lock"}
    saved = finished(ledger)
    assert saved == 49
    ballast.unlink()
    rest = assemble_rows(stream, data)
    assert (stream.report.resumed, stream.report.emitted) == (saved, COUNT - saved)
    np.testing.assert_array_equal(np.maximum(rest, taken), data)
    assert finished(ledger) == COUNT
