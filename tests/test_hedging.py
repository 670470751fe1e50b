"""When a second copy is worth starting, and that the first answer of two wins."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import zarr
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem

import zarr_dask_stream as zds
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.hedging import Hedge, Stragglers
from zarr_dask_stream.source.reader import read_chunks


class SlowOnce(AsyncFileSystem):  # type: ignore[misc]  # fsspec has no annotations
    """Local files, some of which hang for long when they are read for the first time."""

    protocol = "slowonce"
    hangs: tuple[str, ...] = ()
    asked: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("slowonce://").rstrip("/")

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        name = Path(path).name
        self.asked.append(name)
        if name in self.hangs and self.asked.count(name) == 1:
            await asyncio.sleep(30)
        return Path(path.removeprefix("slowonce://")).read_bytes()[slice(start, end)]  # noqa: ASYNC240  # a tiny local file

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        return LocalFileSystem().info(self._strip_protocol(path))  # type: ignore[no-any-return]  # fsspec has no types

    async def _ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        return LocalFileSystem().ls(self._strip_protocol(path), detail=detail)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[str]:
    fsspec.register_implementation("slowonce", SlowOnce, clobber=True)
    array = zarr.create_array(str(tmp_path / "a"), shape=(60,), chunks=(1,), dtype="i4")
    array[:] = np.arange(1, 61)
    SlowOnce.asked.clear()
    SlowOnce.hangs = ("41", "55")
    yield f"slowonce://{tmp_path}/a"
    SlowOnce.hangs = ()


@pytest.mark.parametrize("hangs", [("41", "55"), ("1",)], ids=["later", "before anything is usual"])
def test_hung_requests_are_sent_again_and_the_first_answer_wins(slow: str, hangs: tuple[str, ...]) -> None:
    SlowOnce.hangs = hangs
    hedge = Hedge(quantile=0.9, factor=3.0, min_s=0.05, budget=0.2)
    stream = zds.stream_chunks(slow, hedge=hedge, timeout=20)
    assert [int(chunk.data[0]) for chunk in stream] == list(range(1, 61))
    assert stream.report.hedges >= len(hangs)
    assert stream.report.retries == 0
    assert stream.report.wall_s < 15
    assert [SlowOnce.asked.count(name) for name in hangs] == [2] * len(hangs)


def test_requests_sent_before_anything_is_usual_are_hedged_too(slow: str) -> None:
    """All sixty are on their way before the first answer tells what is usual; one hangs for half a minute."""
    reads = list(read_chunks(open_array(slow), range(60), concurrency=60, hedge=Hedge(min_s=0.05), timeout=25))
    assert sorted(int(read.data[0]) for read in reads if read.data is not None) == list(range(1, 61))
    assert {41, 55} <= {read.number for read in reads if read.hedged}


def test_without_a_hedge_nothing_is_asked_twice(slow: str) -> None:
    SlowOnce.hangs = ()
    stream = zds.stream_chunks(slow)
    assert len(list(stream)) == 60
    assert max(SlowOnce.asked.count(str(n)) for n in range(60)) == 1
    assert stream.report.hedges == 0


def test_patience_follows_the_quantile_and_the_size() -> None:
    stragglers = Stragglers(Hedge(quantile=0.5, factor=2.0, min_s=0.0, budget=1.0))
    assert math.isinf(stragglers.patience(chunks=1)), "nothing is unusual before anything is usual"
    for _ in range(20):
        stragglers.observe(elapsed_s=0.5, chunks=5)
    assert stragglers.patience(chunks=1) == pytest.approx(0.2)
    assert stragglers.patience(chunks=10) == pytest.approx(2.0)
    for _ in range(200):
        stragglers.observe(elapsed_s=5.0, chunks=5)
    assert stragglers.patience(chunks=1) == pytest.approx(2.0), "a store that became slow for good is not unusual"


def test_budget_is_a_share_of_what_was_started() -> None:
    stragglers = Stragglers(Hedge(budget=0.1))
    assert stragglers.afford(1), "the first one always"
    assert not stragglers.afford(1)
    stragglers.started(1000)
    assert sum(stragglers.afford(1) for _ in range(500)) == 99


@pytest.mark.parametrize(
    "options", [{"quantile": 0}, {"quantile": 1}, {"factor": 0.5}, {"min_s": -1}, {"budget": 0}, {"budget": 2}]
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(zds.UsageError, match="Hedge"):
        Hedge(**options)


def test_an_abandoned_read_ends_by_itself(slow: str, leak_check: Any) -> None:
    """Leaving a stream whose store hangs leaves no thread waiting for the answer."""
    SlowOnce.hangs = tuple(str(n) for n in range(60))
    stream = zds.stream_chunks(slow, timeout=25)
    timer = threading.Timer(1.0, stream.close)
    timer.start()
    assert list(stream) == []
    timer.join()
    assert stream.report.cancelled == 60
