"""Batches cut from arrays, against NumPy: every length, every batch size, every place to go on from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.shuffle import Reservoir, shuffled
from zarr_dask_stream.stages.samples import Layout, Mixer, aligned_empty

DTYPES = ["i4", "f8", "?", "u1", "c16", "M8[s]", "S3", "U2", [("a", "i2"), ("b", "f4")], "O", np.dtypes.StringDType()]


def cut(lengths: list[int]) -> Iterator[slice]:
    ends = list(itertools.accumulate(lengths))
    return (slice(end - n, end) for end, n in zip(ends, lengths, strict=True))


def whole(batches: list[Any], axis: int = 0) -> Any:
    return np.concatenate(batches, axis=axis)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 15), st.integers(0, 2))
def test_batches_are_cut_whatever_the_lengths(lengths: list[int], batch_size: int, axis: int) -> None:
    count = sum(lengths)
    array = np.arange(count * 6).reshape(*[2, 3][:axis], count, *[2, 3][axis:])
    mixer = Mixer(count=count, batch_size=batch_size, axis=axis - 3 if axis else 0)
    place = (slice(None),) * axis
    batches = [batch for piece in cut(lengths) for batch in mixer.add(mixer.rows(array[(*place, piece)]))]
    assert [batch.shape[axis] for batch in batches] == [min(batch_size, count - n) for n in range(0, count, batch_size)]
    assert all(batch.flags.c_contiguous and batch.flags.writeable for batch in batches)
    np.testing.assert_array_equal(whole(batches, axis), array)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [0, 4])
def test_any_dtype_passes(dtype: Any, slots: int) -> None:
    array = np.arange(20).astype("i4").reshape(10, 2).astype(dtype) if dtype != DTYPES[8] else np.zeros((10, 2), dtype)
    if array.dtype.names:
        array["a"] = np.arange(20).reshape(10, 2)
    mixer = Mixer(count=10, batch_size=3, axis=0, slots=slots, key=1)
    got = whole([batch for piece in cut([4, 6]) for batch in mixer.add(mixer.rows(array[piece]))])
    assert got.dtype == array.dtype
    assert sorted(map(str, got.tolist())) == sorted(map(str, array.tolist()))
    assert slots or got.tolist() == array.tolist()


def slow_shuffle(count: int, slots: int, key: int) -> list[int]:
    """Sample by sample, with a list for a buffer."""
    drawn = Reservoir(slots, count, key).leaving(0, count).tolist()
    buffer, out = list(range(slots)), []
    for time, slot in enumerate(drawn):
        out.append(buffer[slot])
        buffer[slot] = slots + time
    return out


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_buffer_does_what_a_list_would_do_and_can_be_made_again(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    count, batch_size = sum(lengths), data.draw(st.integers(1, 15))
    slots, key = data.draw(st.integers(1, 60)), data.draw(st.integers(0, 2**64 - 1))
    orders = [shuffled(n, size) if data.draw(st.booleans()) else None for n, size in enumerate(lengths)]
    array = np.arange(3 * count).reshape(count, 3)
    pieces = [array[piece] for piece in cut(lengths)]
    came = np.concatenate([p if o is None else p[o] for p, o in zip(pieces, orders, strict=True)])

    mixer = Mixer(count=count, batch_size=batch_size, axis=0, slots=slots, key=key)
    batches = [
        batch
        for piece, order in zip(pieces, orders, strict=True)
        for batch in mixer.add(mixer.rows(piece), order=order)
    ]
    np.testing.assert_array_equal(whole(batches), came[slow_shuffle(count, min(slots, count), key)])

    for done in range(len(batches) + 1):
        again = Mixer(count=count, batch_size=batch_size, axis=0, slots=slots, key=key, done=done)
        rest: list[Any] = []
        firsts = [piece.start for piece in cut(lengths)]
        wanted = set(again.held[again.held >= 0].tolist())
        for first, piece, order in zip(firsts, pieces, orders, strict=True):
            inside = range(first, first + len(piece))
            if wanted.isdisjoint(inside) and inside.stop <= again.came:
                continue
            rest += again.add(again.rows(piece), first, order)
        assert len(rest) == len(batches) - done
        for batch, same in zip(rest, batches[done:], strict=True):
            np.testing.assert_array_equal(batch, same)


def test_a_slot_that_is_drawn_again_and_again_within_a_batch() -> None:
    mixer = Mixer(count=100, batch_size=50, axis=0, slots=2, key=9)
    got = whole(list(mixer.add(mixer.rows(np.arange(100)))))
    assert sorted(got.tolist()) == list(range(100))
    assert got.tolist() == slow_shuffle(100, 2, 9)


def test_arrays_that_hang_together_stay_together() -> None:
    x, y = np.arange(60).reshape(10, 2, 3), np.arange(10)
    named = Mixer(count=10, batch_size=4, axis=0, slots=3, key=2)
    for batch in [batch for at in cut([7, 3]) for batch in named.add(named.rows({"x": x[at], "y": y[at]}))]:
        np.testing.assert_array_equal(batch["x"], x[batch["y"]])
    paired = Mixer(count=10, batch_size=4, axis=0, slots=3, key=2)
    for a, b in [batch for at in cut([7, 3]) for batch in paired.add(paired.rows([x[at], y[at]]))]:
        np.testing.assert_array_equal(a, x[b])


def test_each_array_may_have_its_own_axis() -> None:
    x, y = np.arange(30).reshape(3, 10), np.arange(10)
    mixer = Mixer(count=10, batch_size=4, axis={"x": 1, "y": 0})
    for batch in list(mixer.add(mixer.rows({"x": x, "y": y}))):
        np.testing.assert_array_equal(batch["x"], x[:, batch["y"]])


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([np.zeros(2), np.zeros((2, 1))], r"samples are float64\[1\], and those before them were float64\[\]"),
        ([np.zeros(2), np.zeros(2, "f4")], "samples are float32"),
        ([np.zeros(2), (np.zeros(2),)], "the item is a tuple of 1, and the ones before it were one array"),
        ([{"x": np.zeros(2)}, {"y": np.zeros(2)}], "a dict of 'y', and the ones before it were a dict of 'x'"),
        ([3.0], r"samples lie along axis 0, and there is an array of shape \(\)"),
        ([(np.zeros(2), np.zeros(3))], "its arrays have 2, 3 samples"),
        ([{}], "there is no array in it"),
    ],
)
def test_items_that_do_not_fit_are_refused(items: list[Any], message: str) -> None:
    mixer = Mixer(count=9, batch_size=2, axis=0)
    with pytest.raises(UsageError, match=message):
        _ = [batch for item in items for batch in mixer.add(mixer.rows(item))]


@pytest.mark.parametrize("shape", [(), (0,), (5, 3), (3, 0, 2)])
def test_new_arrays_begin_where_others_can_take_them_over(shape: tuple[int, ...]) -> None:
    for dtype in ("f4", "?", "c16", [("a", "i2"), ("b", "f4")]):
        array = aligned_empty(shape, np.dtype(dtype))
        assert array.shape == shape
        assert not array.size or array.ctypes.data % 64 == 0
        assert array.flags.c_contiguous
    assert Layout.of(np.zeros(3), 0).empty(4, [np.zeros(3)])[0].shape == (4,)
