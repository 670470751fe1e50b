"""Items that are no stored chunks: how boxes lie over chunks, and which chunks they need."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.blocks import Blocks, common_chunks, parse_chunks
from zarr_dask_stream.source.halo import Halo


def spec_of(shape: tuple[int, ...], chunks: tuple[int, ...], names: list[str] | None = None) -> ArraySpec:
    return open_array(zarr.create_array({}, shape=shape, chunks=chunks, dtype="i2", dimension_names=names))


def test_boxes_of_whole_chunks_need_each_chunk_once() -> None:
    blocks = Blocks.of(spec_of((10, 9), (2, 3)), (4, 9))
    regions = [blocks.grid.region(box) for box in range(len(blocks.grid))]
    assert blocks.whole
    assert sorted(n for region in regions for needs in blocks.needs(region) for n in needs) == list(range(15))
    assert not Blocks.of(spec_of((10, 9), (2, 3)), (3, 9)).whole


@settings(deadline=None)
@given(st.data())
def test_what_touches_a_chunk_is_what_needs_it(data: st.DataObject) -> None:
    """Listing finds at least the boxes that read a chunk, neighbours and wrapped edges included."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=2)))
    chunks, size = (tuple(data.draw(st.integers(1, n)) for n in shape) for _ in range(2))
    depth = tuple((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))) for n in shape)
    boundary = tuple(data.draw(st.sampled_from([None, 0, "periodic", "reflect", "nearest"])) for _ in shape)
    blocks = Blocks.of(spec_of(shape, chunks), size, Halo(depth, boundary))
    member = blocks.members[0][1]
    for box in range(len(blocks.grid)):
        for chunk in next(blocks.needs(blocks.grid.region(box))):
            assert box in set(blocks.touching(member, chunk))


def test_chunks_in_the_words_of_dask() -> None:
    spec = spec_of((10, 9), (2, 3), ["time", "x"])
    assert parse_chunks((-1, None), spec) == (10, 3)
    assert parse_chunks({"time": 5, -1: 4}, spec) == (5, 4)
    assert parse_chunks(100, spec) == (10, 9)


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ((2,), "1 lengths, and the array has 2 axes"),
        (0, "number of elements"),
        ((True, 1), "number of elements"),
        ((2.0, 1), "number of elements"),
        ({"y": 2}, "called 'time', 'x'"),
        ({2: 2}, "axes 0 to 1"),
    ],
)
def test_bad_chunks(chunks: object, words: str) -> None:
    with pytest.raises(zds.UsageError, match=words):
        parse_chunks(chunks, spec_of((10, 9), (2, 3), ["time", "x"]))


def test_common_boxes_hold_whole_chunks_or_are_refused() -> None:
    assert common_chunks([[4, 6], []], [100, 7], 8) == (12, 7)
    with pytest.raises(zds.UsageError, match="only meet in boxes"):
        common_chunks([[9973, 9967]], [10**9], 8)


def test_bytes_of_a_box_count_its_neighbours() -> None:
    blocks = Blocks.of(spec_of((10, 9), (2, 3)), (2, 3), Halo(((1, 1), (0, 2)), (0, 0)))
    assert blocks.nbytes == 4 * 5 * np.dtype("i2").itemsize
