"""The common grid of several arrays, and what keeps arrays from going together."""

from __future__ import annotations

import math
from typing import Any

import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.source.aligned import Named, align, check_spanned, parse_named_region, recut
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.selection import parse_region


def named(shape: tuple[int, ...], chunks: tuple[int, ...], dims: str | None, *, coord: bool = False) -> Named:
    array = zarr.create_array({}, shape=shape, chunks=chunks, dtype="i2")
    return Named(open_array(array), None if dims is None else tuple(dims), coord)


def test_a_box_holds_whole_chunks_of_every_array() -> None:
    blocks = align({"a": named((24, 10), (4, 5), "tx"), "b": named((10, 24), (2, 6), "xt"), "c": named((), (), "")})
    assert blocks.dims == ("t", "x")
    assert blocks.grid.shape == (24, 10)
    assert blocks.grid.chunks == (12, 10)
    assert [member.axes for _, member in blocks.members] == [(0, 1), (1, 0), ()]
    assert blocks.named
    assert blocks.whole


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=3), st.integers(1, 40))
def test_the_box_is_the_least_common_multiple(chunks: list[int], length: int) -> None:
    blocks = align({f"a{c}": named((length,), (min(c, length),), "x") for c in chunks})
    assert blocks.grid.chunks == (min(math.lcm(*(min(c, length) for c in chunks)), length),)


def test_coordinates_make_no_box_larger() -> None:
    blocks = align({"a": named((24,), (4,), "t"), "b": named((24,), (9,), "t", coord=True)})
    assert blocks.grid.chunks == (4,)
    assert blocks.axes == {"a": (0,)}


def test_boxes_of_other_lengths_on_request() -> None:
    arrays = {"a": named((24, 10), (4, 5), "tx")}
    assert align(arrays, {"t": 7}).grid.chunks == (7, 5)
    assert align(arrays, {"t": -1, "x": None}).grid.chunks == (24, 5)
    assert align(arrays, 100).grid.chunks == (24, 10)
    assert align(arrays, (3, -1)).grid.chunks == (3, 10)
    assert recut(align(arrays), {"x": 2}).grid.chunks == (4, 2)


def test_arrays_without_names_go_together_by_position() -> None:
    blocks = align({"a": named((24, 10), (4, 5), None), "b": named((24, 10), (6, 10), None)})
    assert blocks.dims == ("dim_0", "dim_1")
    assert blocks.grid.chunks == (12, 10)


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"b": named((9,), (4,), "t")}, r"dimension 't' has 24 elements in 'a' and 9 in 'b'"),
        ({"b": named((24, 10), (4, 5), None)}, r"'b' has none"),
        ({"b": named((10, 10), (4, 5), "xx")}, r"'b' has a dimension twice"),
    ],
)
def test_arrays_that_do_not_go_together(others: dict[str, Named], words: str) -> None:
    with pytest.raises(zds.UsageError, match=words):
        align({"a": named((24, 10), (4, 5), "tx"), **others})


def test_arrays_without_names_need_one_shape() -> None:
    with pytest.raises(zds.UsageError, match=r"'a', 'b' have none; without names .* 'a' \[3\], 'b' \[4\]"):
        align({"a": named((3,), (1,), None), "b": named((4,), (1,), None)})


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ({"tt": 3}, "'tt'.*did you mean 't'"),
        ({"t": 0}, "along 't' is a number of elements"),
        ({"t": 2.5}, "along 't' is a number of elements"),
        ({"t": True}, "along 't' is a number of elements"),
        ((1, 2, 3), "3 lengths for the dimensions"),
    ],
)
def test_bad_lengths(chunks: Any, words: str) -> None:
    with pytest.raises(zds.UsageError, match=words):
        align({"a": named((24, 10), (4, 5), "tx")}, chunks)


def test_boxes_that_would_be_too_large_ask_for_chunks() -> None:
    a, b = named((10**9,), (9973,), "x"), named((10**9,), (9967,), "x")
    with pytest.raises(zds.UsageError, match="give chunks="):
        align({"a": a, "b": b})
    assert align({"a": a, "b": b}, 9973).grid.chunks == (9973,)


def test_arrays_with_nothing_in_common_are_refused() -> None:
    """Else each chunk of one would be read for each box of the other."""
    blocks = align({"a": named((24,), (4,), "t"), "b": named((10,), (5,), "x")})
    with pytest.raises(zds.UsageError, match=r"no array has all of the dimensions \['t', 'x'\].*'a' \(t\); 'b' \(x\)"):
        check_spanned(blocks, parse_region(None, (24, 10)))
    check_spanned(blocks, parse_region((slice(None), slice(0, 5)), (24, 10)))  # one box along x
    check_spanned(align({"a": named((24,), (4,), "t"), "b": named((10,), (10,), "x")}), parse_region(None, (24, 10)))


def test_regions_by_name() -> None:
    assert parse_named_region({"x": -1}, ("t", "x"), (4, 6)) == (slice(0, 4), slice(5, 6))
    assert parse_named_region(slice(1, 2), ("t", "x"), (4, 6)) == (slice(1, 2), slice(0, 6))
    with pytest.raises(zds.UsageError, match="'time', which none of the arrays has"):
        parse_named_region({"time": 0}, ("t", "x"), (4, 6))
    with pytest.raises(zds.UsageError, match="step 2"):
        parse_named_region({"x": slice(None, None, 2)}, ("t", "x"), (4, 6))
