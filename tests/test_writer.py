"""Boxes encoded and stored: many requests in flight, and each failure kept to its own box."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
import zarr
from fsspec.asyn import get_loop
from hypothesis import given
from hypothesis import strategies as st

from conformance.oracle import same_bits
from copying import array_in, keys, read
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.backend import RemoteBytes
from zarr_dask_stream.source.store import StoreSpec
from zarr_dask_stream.source.writer import ArrayWriter, cast_exactly


class Slow(RemoteBytes):
    """A remote store in memory: writes take a while, may hang or fail, and are counted."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__("slow://store")
        self.values: dict[str, bytes] = {}
        self.seconds, self.now, self.peak = seconds, 0, 0
        self.fail: set[str] = set()
        self.hang: set[str] = set()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        loop: asyncio.AbstractEventLoop = get_loop()
        return loop

    async def _read(self, key: str, start: int | None, stop: int | None, most: int | None) -> bytes | None:
        return self.values.get(key)

    async def _write(self, key: str, data: bytes) -> str | None:
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            await asyncio.sleep(60 if key in self.hang else self.seconds)
        finally:
            self.now -= 1
        if key in self.fail:
            raise ConnectionResetError(104, "reset")
        self.values[key] = data
        return None

    async def _list(self, prefix: str) -> list[str]:
        return list(self.values)

    async def _dir(self, prefix: str) -> tuple[list[str], list[str]]:
        return [], list(self.values)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> Slow:
    store = Slow(0.02)
    monkeypatch.setattr(StoreSpec, "open", lambda _: store)
    return store


def _spec(shape: Any = (80,), chunks: Any = (2,), **options: Any) -> ArraySpec:
    return open_array(zarr.create_array({}, shape=shape, chunks=chunks, dtype="i4", **options))


@pytest.fixture
def spec() -> ArraySpec:
    return _spec()


def _boxes(writer: ArrayWriter, count: int = 10) -> None:
    for box in range(count):
        writer.write(box, (slice(8 * box, 8 * box + 8),), np.arange(1, 9, dtype="i4") + box)


def test_many_requests_are_in_flight(spec: ArraySpec, remote: Slow) -> None:
    writer = ArrayWriter(spec, fresh=True)
    _boxes(writer)
    settled = list(writer.settled(wait=True))
    assert [one.tag for one in settled] == list(range(10))
    assert {(one.written.objects, one.error) for one in settled} == {(4, None)}
    assert remote.peak > 8
    assert len(remote.values) == 40


def test_a_failure_is_that_of_its_box(spec: ArraySpec, remote: Slow) -> None:
    remote.fail = {"c/5", "c/6"}
    remote.hang = {"c/21"}
    writer = ArrayWriter(spec, fresh=True, timeout=0.5)
    _boxes(writer)
    errors = {one.tag: one.error for one in writer.settled(wait=True) if one.error is not None}
    assert {tag: type(error) for tag, error in errors.items()} == {1: ConnectionResetError, 5: TimeoutError}
    assert "writing c/21 of slow://store took longer than the timeout of 0.5 s" in str(errors[5])
    assert len(remote.values) == 40 - 3


def test_nobody_waits_for_what_nobody_wants(spec: ArraySpec, remote: Slow) -> None:
    remote.hang = {"c/0"}
    stop = threading.Event()
    writer = ArrayWriter(spec, fresh=True, timeout=None, stopped=stop.is_set)
    _boxes(writer, 1)
    threading.Timer(0.1, stop.set).start()
    (one,) = writer.settled(wait=True)
    assert isinstance(one.error, TimeoutError)


def test_what_is_closed_is_given_up(spec: ArraySpec, remote: Slow) -> None:
    remote.hang = {f"c/{n}" for n in range(40)}
    writer = ArrayWriter(spec, fresh=True)
    _boxes(writer, 2)
    writer.close()
    deadline = time.monotonic() + 10
    while remote.now and time.monotonic() < deadline:
        time.sleep(0.01)
    assert remote.now == 0


@given(st.data())
def test_what_is_written_box_by_box_is_what_zarr_writes(data: Any) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple))
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    values = np.arange(int(np.prod(shape)), dtype="i4").reshape(shape) % 5
    ours, theirs = {}, {}  # type: ignore[var-annotated]  # stores
    zarr.create_array(ours, shape=shape, chunks=chunks, dtype="i4")
    array_in(theirs, values, chunks=chunks)
    writer = ArrayWriter(open_array(ours))
    cut = min(chunks[0] * data.draw(st.integers(0, 3)), shape[0])
    for part in (slice(0, cut), slice(cut, shape[0])):
        if part.stop > part.start:
            region = (part, *(slice(0, n) for n in shape[1:]))
            writer.write(part.start, region, values[region])
    assert all(one.error is None for one in writer.settled(wait=True))
    assert keys(ours) == keys(theirs)
    same_bits(read(ours), values)


@pytest.mark.parametrize(
    ("values", "dtype", "fits"),
    [
        ([1, 2], "i1", True), ([1, 128], "i1", False), ([-1], "u2", False), ([1.5], "f4", True), ([1e39], "f4", False),
        ([np.inf, np.nan], "f4", True), ([1.5], "i4", False), (["abc"], "U2", False), (["ab"], "U2", True),
        (["ab"], "i4", False), ([1], "U3", False), ([True], "i1", True),
        (np.array(["2020-01-01T12", "NaT"], "M8[h]"), "M8[s]", True),
        (np.array(["2020-01-01T12"], "M8[h]"), "M8[D]", False),
    ],
)  # fmt: skip
def test_numbers_are_cast_or_refused(values: Any, dtype: str, fits: bool) -> None:
    out = cast_exactly(np.asarray(values), np.dtype(dtype))
    assert (out is not None) is fits
    if out is not None:
        assert out.dtype == np.dtype(dtype)
