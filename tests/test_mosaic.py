"""Boxes that are not put together: every cut of one is what NumPy would cut, and nothing is read twice."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from copying import array_in, read
from counted import Counting
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.assemble import read_blocks
from zarr_dask_stream.source.blocks import Blocks
from zarr_dask_stream.source.mosaic import Mosaic, read_mosaics
from zarr_dask_stream.source.selection import ChunkPlan, parse_region


@st.composite
def mosaics(draw: st.DrawFn) -> tuple[Any, Any, tuple[slice, ...]]:
    """Draw an array with chunks that are not stored, a part of it, and the same part as a mosaic."""
    shape = draw(st.lists(st.integers(1, 12), min_size=0, max_size=3).map(tuple))
    chunks = tuple(draw(st.integers(1, n + 1)) for n in shape)
    data: Any = np.arange(1, 1 + int(np.prod(shape)), dtype="i4").reshape(shape)
    spec = open_array(zarr.create_array({}, shape=shape, chunks=chunks, dtype="i4", fill_value=-1))
    region = tuple(slice(a, draw(st.integers(a + 1, n))) for n in shape for a in [draw(st.integers(0, n - 1))])
    pieces = {}
    for number in range(len(spec.grid)):
        if draw(st.booleans()):
            pieces[spec.grid.index(number)] = data[(*spec.grid.region(number), ...)].copy()
        else:
            data[(*spec.grid.region(number), ...)] = -1
    return Mosaic(spec, region, pieces), data[(*region, ...)], region


@given(mosaics(), st.data())
@settings(deadline=None)
def test_any_cut_is_that_of_numpy(case: Any, data: Any) -> None:
    mosaic, whole, _ = case
    assert (mosaic.shape, mosaic.dtype) == (whole.shape, whole.dtype)
    assert np.asarray(mosaic).tolist() == whole.tolist()
    cut = tuple(slice(a, data.draw(st.integers(a, n + 2))) for n in whole.shape for a in [data.draw(st.integers(0, n))])
    assert mosaic[cut].tolist() == whole[(*cut, ...)].tolist()
    within = mosaic.within(cut)
    assert within.shape == whole[(*cut, ...)].shape
    assert np.asarray(within).tolist() == whole[(*cut, ...)].tolist()


def test_a_cut_that_is_a_chunk_is_that_chunk() -> None:
    spec = open_array(zarr.create_array({}, shape=(6, 6), chunks=(2, 3), dtype="i4"))
    chunk = np.ones((2, 3), "i4")
    mosaic = Mosaic(spec, (slice(0, 4), slice(0, 6)), {(1, 1): chunk})
    assert np.shares_memory(mosaic[2:4, 3:6], chunk)
    assert mosaic.nbytes == chunk.nbytes
    assert np.asarray(mosaic, dtype="f8").dtype == np.dtype("f8")


@pytest.mark.parametrize("missing", ["fill", "skip", "raise"])
@pytest.mark.parametrize("region", [None, (slice(3, 11), slice(0, 7))])
def test_they_are_read_like_boxes_that_are_put_together(missing: Any, region: Any) -> None:
    store: dict[str, Any] = {}
    array_in(store, np.arange(1, 121).reshape(12, 10), chunks=(3, 5))
    del store["c/1/1"], store["c/2/0"], store["c/3/0"], store["c/3/1"], store["c/2/1"]
    store["c/0/0"] = store["c/0/0"][:-3]  # and one that can't be decoded
    spec = open_array(store)
    blocks = Blocks.of(spec, (6, 5))
    plan = ChunkPlan(blocks.grid, parse_region(region, spec.shape))
    assert blocks.whole
    for ours, theirs in zip(
        read_mosaics(blocks, plan, list(plan), missing=missing),
        read_blocks(blocks, plan, list(plan), missing=missing),
        strict=True,
    ):
        assert (ours.number, ours.missing, ours.stored_bytes) == (theirs.number, theirs.missing, theirs.stored_bytes)
        assert type(ours.error) is type(theirs.error)
        assert (ours.data is None) == (theirs.data is None)
        if theirs.data is not None:
            assert np.asarray(ours.data).tolist() == theirs.data.tolist()


def test_a_broken_chunk_fails_its_box_and_no_other() -> None:
    data = np.arange(1, 25).reshape(4, 6)
    store: dict[str, Any] = {}
    array_in(store, data, chunks=(1, 3))
    store["c/0/1"] = store["c/0/1"][:-3]
    target: dict[str, Any] = {}
    retry = zds.RetryPolicy(attempts=2, corrupt_attempts=1, wait_initial=0.01)
    stream = zds.stream_chunks(store, concurrency=1, on_error="skip", retry=retry).to_zarr(target, chunks=(2, 6))
    report = stream.run()
    assert [letter.index for letter in report.dead_letters] == [(0, 0)]
    assert "chunk (0, 1)" in report.dead_letters[0].message
    assert (read(target)[2:] == data[2:]).all()
    assert not read(target)[:2].any()


def test_each_chunk_is_read_once() -> None:
    store: dict[str, Any] = {}
    array_in(store, np.arange(1, 25).reshape(4, 6), chunks=(1, 3))
    counting = Counting(store)
    spec = open_array(counting)
    blocks = Blocks.of(spec, (2, 6))
    plan = ChunkPlan(blocks.grid, parse_region(None, spec.shape))
    assert len(list(read_mosaics(blocks, plan, list(plan)))) == 2
    assert counting.chunks == dict.fromkeys(store.keys() - {"zarr.json"}, 1)


def test_what_fails_of_a_box_is_read_again_by_itself() -> None:
    class Shaky(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            reads[key] += 1
            if key == "c/0/1" and reads[key] == 1:
                raise ConnectionResetError(104, "reset")
            return super().__getitem__(key)

    reads: collections.Counter[str] = collections.Counter()
    store: dict[str, Any] = {}
    data = np.arange(1, 25).reshape(4, 6)
    array_in(store, data, chunks=(1, 3))
    target: dict[str, Any] = {}
    retry = zds.RetryPolicy(attempts=3, wait_initial=0.01)
    stream = zds.stream_chunks(Shaky(store), concurrency=1, retry=retry).to_zarr(target, chunks=(2, 6))
    report = stream.run()
    assert (read(target) == data).all()
    chunks = {key: count for key, count in reads.items() if key.startswith("c/")}
    assert chunks == {key: 1 + (key == "c/0/1") for key in store if key.startswith("c/")}
    assert (report.emitted, report.retries) == (2, 1)
