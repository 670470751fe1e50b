"""An item of a stream: lazy about its place, honest about its data."""

from __future__ import annotations

import pickle
from typing import Any

import cloudpickle
import numpy as np
import pytest

from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan, parse_region

GRID = ChunkGrid((5, 7), (2, 3))
PLAN = ChunkPlan(GRID, parse_region((slice(1, None), ...), GRID.shape))
DATA = np.arange(3.0).reshape(1, 3)


def test_a_planned_chunk_works_its_place_out() -> None:
    chunk = Chunk.planned(PLAN, 1, DATA)
    assert (chunk.index, chunk.region, chunk.number, chunk.shape) == ((0, 1), (slice(1, 2), slice(3, 6)), 1, (1, 3))
    assert chunk.index is chunk.index, "worked out once"
    assert not chunk.missing


def test_an_item_of_a_reduction_has_a_key_instead() -> None:
    item = Chunk("2020-01", (), 7.5)
    assert (item.index, item.region, item.number, item.shape) == ("2020-01", (), None, ())
    assert repr(item) == "Chunk(index=2020-01, region=[], data=7.5)"


def test_an_item_whose_key_is_none_keeps_it() -> None:
    assert Chunk(None, (), 7.5).index is None


def test_with_data_keeps_the_place_and_leaves_the_first_alone() -> None:
    chunk = Chunk.planned(PLAN, 1, DATA, missing=True)
    other = chunk.with_data("value")
    assert (other.index, other.region, other.number, other.missing) == ((0, 1), chunk.region, 1, True)
    assert chunk.data is DATA


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_a_chunk_travels(module: Any) -> None:
    chunk = Chunk.planned(PLAN, 1, DATA, missing=True)
    back = module.loads(module.dumps(chunk))
    assert (back.index, back.region, back.missing, back.shape) == (chunk.index, chunk.region, True, (1, 3))
    np.testing.assert_array_equal(back.data, DATA)


def test_a_chunk_travels_without_its_plan() -> None:
    """A predicate may be large, or refuse to be pickled."""
    with_where = ChunkPlan(GRID, PLAN.box, where=lambda index: index != (9, 9))
    assert len(pickle.dumps(Chunk.planned(with_where, 1, None))) < 300


def test_numpy_takes_a_chunk_for_its_data() -> None:
    chunk = Chunk.planned(PLAN, 1, DATA)
    assert np.asarray(chunk) is DATA
    assert np.asarray(chunk, dtype="f4").dtype == np.float32
    copy = np.array(chunk, copy=True)
    copy[:] = -1
    assert DATA.min() == 0
    with pytest.raises(ValueError, match="copy"):
        np.array(chunk, dtype="f4", copy=False)
    np.testing.assert_array_equal(np.add(chunk, 1), DATA + 1)


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (DATA, "float64[1, 3]"),
        (np.array(5, "i2"), "int16[]"),
        ("two\nlines", r"'two\nlines'"),
        (list(range(100)), "..."),
        (None, "None"),
    ],
)
def test_a_repr_is_one_short_line(data: Any, shown: str) -> None:
    text = repr(Chunk((0, 1), (slice(1, 2), slice(3, 6)), data, missing=True))
    assert text.startswith("Chunk(index=(0, 1), region=[1:2, 3:6], data=")
    assert text.endswith(", missing)")
    assert shown in text
    assert "\n" not in text
    assert len(text) < 130
