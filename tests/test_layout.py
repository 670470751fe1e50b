"""How items have to lie: boxes that hold whole objects of a target, whatever the shapes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.selection import ChunkPlan, parse_region
from zarr_dask_stream.stages.layout import Items, as_dtype, as_lengths, choose_boxes, lay_out

LENGTHS = st.integers(1, 2000)


@given(st.lists(st.tuples(LENGTHS, LENGTHS, st.integers(1, 10**6)), min_size=1, max_size=3), st.sampled_from([1, 8]))
def test_boxes_hold_whole_objects_and_stay_small(axes: Any, item_nbytes: int) -> None:
    objects, chunks, shape = zip(*axes, strict=True)
    boxes = choose_boxes(objects, chunks, shape, item_nbytes)
    assert all(box % size == 0 for box, size in zip(boxes, objects, strict=True))
    least = math.prod(objects) * item_nbytes
    assert math.prod(boxes) * item_nbytes <= max(least, 2**26)
    for box, size, chunk, n in zip(boxes, objects, chunks, shape, strict=True):
        assert box <= max(math.lcm(size, chunk), size)
        assert box <= -(-n // size) * size


def test_a_large_array_is_cut_into_whole_chunks_of_both() -> None:
    assert choose_boxes((300, 100), (200, 500), (10**5, 10**5), 4) == (600, 500)


def _items(region: Any = None) -> Items:
    array = zarr.create_array({}, shape=(100, 90), chunks=(10, 15), dtype="f4")
    spec = open_array(array)
    return Items(spec, ChunkPlan(spec.grid, parse_region(region, spec.shape)))


@pytest.mark.parametrize(
    ("chunks", "shards", "recut"),
    [((10, 15), None, False), ((5, 5), None, False), ((7, 11), None, True), ((5, 5), (20, 15), True)],
)
def test_items_are_cut_anew_only_where_they_have_to_be(chunks: Any, shards: Any, recut: bool) -> None:
    layout = lay_out(_items(), {}, {"chunks": chunks, "shards": shards})
    assert (layout.blocks is not None) is recut
    if layout.blocks is not None:
        objects = shards or chunks
        assert all(box % size == 0 for box, size in zip(layout.blocks.grid.chunks, objects, strict=True))


@given(st.data())
def test_every_object_lies_in_one_item(data: Any) -> None:
    n = data.draw(st.integers(1, 60))
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    spec = open_array(zarr.create_array({}, shape=(n,), chunks=(data.draw(st.integers(1, 12)),), dtype="i2"))
    plan = ChunkPlan(spec.grid, (slice(start, stop),))
    size = data.draw(st.integers(1, 12))
    layout = lay_out(Items(spec, plan), {}, {"chunks": (size,)})
    if layout.blocks is not None:
        plan = ChunkPlan(layout.blocks.grid, plan.box)
    owners = np.zeros(-(-(stop - start) // size), int)
    for number in plan:
        (part,) = layout.sink.placement.region(plan.region(number))
        owners[part.start // size : -(-part.stop // size)] += 1
    assert owners.tolist() == [1] * len(owners)


@pytest.mark.parametrize("chunks", [0, -1, (1, "a"), True, 2.5])
def test_shapes_that_are_none(chunks: Any) -> None:
    with pytest.raises(UsageError, match="chunks is the shape that a function makes"):
        as_lengths(chunks)


def test_words_for_dtypes_and_shapes() -> None:
    assert (as_dtype(None), as_dtype("f4")) == (None, np.dtype("f4"))
    assert (as_lengths(None), as_lengths(3), as_lengths([None, 2])) == (None, 3, (None, 2))
    with pytest.raises(UsageError, match="what NumPy takes for one"):
        as_dtype(object())
