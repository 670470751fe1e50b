"""The ledger: what is saved comes back, a restart goes on, and nothing is counted twice."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import zarr_dask_stream as zds
from zarr_dask_stream.engine.checkpoint import Ledger

N = 12


@pytest.fixture
def url(tmp_path: Path) -> str:
    array = zarr.create_array(str(tmp_path / "array"), shape=(N * 2,), chunks=(2,), dtype="i8")
    array[:] = np.arange(N * 2)
    return str(tmp_path / "array")


class Total(zds.Reducer):
    def create(self) -> int:
        return 0

    def add(self, partial: int, chunk: zds.Chunk) -> int:
        return partial + int(chunk.data.sum())

    def merge(self, left: int, right: int) -> int:
        return left + right


@pytest.mark.parametrize("steps", range(N + 1))
def test_restart_after_every_step_gives_the_rest(url: str, tmp_path: Path, steps: int) -> None:
    ledger = tmp_path / "ledger.json"
    stream = zds.stream_chunks(url, concurrency=1, checkpoint=ledger)
    seen: list[tuple[int, ...]] = []
    for chunk in stream:
        if len(seen) == steps:
            break  # killed while it works on this one: not done
        seen.append(chunk.index)
    rest = [chunk.index for chunk in zds.stream_chunks(url, concurrency=1, checkpoint=ledger)]
    assert seen + rest == [(i,) for i in range(N)]


def test_restart_on_a_cluster(url: str, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    stream = zds.stream_chunks(url, ordered=False, checkpoint=ledger)
    first = [chunk.index for chunk, _ in zip(stream, range(5), strict=False)]
    again = zds.stream_chunks(url, ordered=False, checkpoint=ledger)
    second = [chunk.index for chunk in again]
    assert set(first) | set(second) == {(i,) for i in range(N)}
    assert len(set(first) & set(second)) <= 1
    assert again.report.resumed + again.report.emitted == N
    assert again.report.total == again.report.emitted
    assert list(zds.stream_chunks(url, ordered=False, checkpoint=ledger)) == []


@pytest.mark.parametrize("stop_at", [0, 1, 5, 11])
def test_reduction_counts_each_chunk_once_over_restarts(url: str, tmp_path: Path, stop_at: int) -> None:
    ledger = tmp_path / "ledger.json"
    broken = {"at": stop_at}

    class Fragile(Total):
        pass

    def stumble(chunk: zds.Chunk) -> Any:
        if chunk.index[0] == broken["at"]:
            raise RuntimeError("power cut")
        return chunk.data

    stream = zds.stream_chunks(url, concurrency=1, checkpoint=ledger, on_error="skip").map(stumble).reduce(Fragile())
    partial = stream.compute()
    assert partial == sum(range(2 * N)) - (4 * stop_at + 1)
    document = json.loads(ledger.read_text())
    assert document["finished"] == N - 1
    assert document["owner"] is None
    # The dead letter is tried again by the next run, and only it.
    again = zds.stream_chunks(url, concurrency=1, checkpoint=ledger, on_error="skip").map(stumble).reduce(Fragile())
    assert again.compute() == partial
    assert again.report.total == 1


def test_filtered_and_skipped_chunks_are_done_too(url: str, tmp_path: Path) -> None:
    (Path(url) / "c" / "3").unlink()
    ledger = tmp_path / "ledger.json"

    def make() -> zds.ChunkStream:
        stream = zds.stream_chunks(url, concurrency=1, missing="skip", checkpoint=ledger)
        return stream.filter(lambda chunk: chunk.index[0] % 2)

    assert [c.index[0] for c in make()] == [1, 5, 7, 9, 11]
    again = make()
    assert list(again) == []
    assert again.report.resumed == N - 1
    assert again.report.skipped_missing == 1, "what was absent is looked for again: it may have been written since"
    assert again.report.total == 1


@pytest.mark.parametrize(
    "other",
    [
        {"region": slice(0, 4)},
        {"missing": "skip"},
        {"where": lambda _: True},
    ],
)
def test_ledger_of_another_stream_is_refused(url: str, tmp_path: Path, other: dict[str, Any]) -> None:
    ledger = tmp_path / "ledger.json"
    zds.stream_chunks(url, concurrency=1, checkpoint=ledger).run()
    with pytest.raises(zds.UsageError, match="belongs to another stream"):
        zds.stream_chunks(url, concurrency=1, checkpoint=ledger, **other).run()


def test_ledger_of_other_functions_is_refused(url: str, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    zds.stream_chunks(url, concurrency=1, checkpoint=ledger).map(lambda c: c.data + 1).run()
    with pytest.raises(zds.UsageError, match="functions"):
        zds.stream_chunks(url, concurrency=1, checkpoint=ledger).map(lambda c: c.data + 2).run()


def test_two_runs_on_one_ledger(url: str, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.json"
    stream = zds.stream_chunks(url, concurrency=1, checkpoint=ledger)
    for _ in stream:
        with pytest.raises(zds.UsageError, match="another run is using"):
            list(zds.stream_chunks(url, concurrency=1, checkpoint=ledger))
        break
    assert len(list(zds.stream_chunks(url, concurrency=1, checkpoint=ledger))) >= N - 1


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[1]", b'{"format": "zarr_dask_stream ledger", "version": 99}', b"\xff"]
)
def test_what_is_no_ledger_is_refused_and_left_alone(url: str, tmp_path: Path, content: bytes) -> None:
    ledger = tmp_path / "notes.json"
    ledger.write_bytes(content)
    with pytest.raises(zds.StoreError, match="ledger"):
        zds.stream_chunks(url, concurrency=1, checkpoint=ledger).run()
    assert ledger.read_bytes() == content


def test_partials_that_are_not_plain_are_refused_before_the_work(url: str, tmp_path: Path) -> None:
    class Odd(Total):
        def create(self) -> Any:
            return object()

    with pytest.raises(zds.UsageError, match="partials as JSON"):
        zds.stream_chunks(url, concurrency=1, checkpoint=tmp_path / "l.json").reduce(Odd()).compute()


def test_a_failed_save_leaves_the_ledger_before_it(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = tmp_path / "ledger.json"
    for _ in zds.stream_chunks(url, concurrency=1, checkpoint=ledger).take(3):
        pass
    before = ledger.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(zds.StoreError, match=r"can't be written.*intact"):
        zds.stream_chunks(url, concurrency=1, checkpoint=ledger).run()
    assert ledger.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []
    monkeypatch.undo()
    assert len(list(zds.stream_chunks(url, concurrency=1, checkpoint=ledger))) >= N - 3


def test_remote_ledger(url: str) -> None:
    place = "memory://ledgers/one.json"
    assert len(list(zds.stream_chunks(url, concurrency=1, checkpoint=place).take(4))) == 4
    again = zds.stream_chunks(url, concurrency=1, checkpoint=place)
    for _ in again:
        with pytest.raises(zds.UsageError, match="another run"):
            list(zds.stream_chunks(url, concurrency=1, checkpoint=place))
        break
    assert again.report.resumed in {3, 4}


def test_killed_for_real_and_finished(url: str, tmp_path: Path) -> None:
    """SIGKILL at once after some chunk; the lock dies with the process and the rest is delivered."""
    ledger, out = tmp_path / "ledger.json", tmp_path / "out"
    script = textwrap.dedent(
        f"""
        import os, signal, sys
        import zarr_dask_stream as zds
        keep = zds.Checkpoint(url={str(ledger)!r}, every_chunks=1)
        done = 0
        for chunk in zds.stream_chunks({url!r}, concurrency=1, checkpoint=keep):
            with open({str(out)!r}, "a") as file:
                file.write(f"{{chunk.index[0]}}\\n")
            done += 1
            if done == int(sys.argv[1]):
                os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    for kill_after in (3, 1, 4, 999):
        subprocess.run([sys.executable, "-c", script, str(kill_after)], check=False, timeout=60)
    numbers = [int(line) for line in out.read_text().split()]
    assert sorted(set(numbers)) == list(range(N))
    assert len(numbers) <= N + 3  # at least once: each kill may repeat the one chunk it interrupted


def test_checkpoint_options_are_checked(url: str, tmp_path: Path) -> None:
    with pytest.raises(zds.UsageError, match="checkpoint"):
        zds.stream_chunks(url, checkpoint=3)  # type: ignore[arg-type]  # callers need not be typed
    with pytest.raises(zds.UsageError, match="every"):
        zds.Checkpoint(url="x", every_chunks=0)
    assert Ledger.__doc__
