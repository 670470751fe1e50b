"""Loaders against NumPy: what is in the batches, in which order, on which rank, and after which restart."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from loading import labels, numbered, stored, stream_of
from zarr_dask_stream.source.chunk import Chunk

DTYPES = ["u1", "i2", "f4", "f8", "c8", "M8[s]"]


# -- what is in the batches ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_batches_are_slices_of_the_array(data: st.DataObject) -> None:
    """In order: every shape, chunk shape, axis, region, dtype and batch size, against NumPy."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    batch_size = data.draw(st.integers(1, 10))
    drop_last = data.draw(st.booleans())
    array = np.arange(np.prod(shape)).reshape(shape).astype(data.draw(st.sampled_from(DTYPES)))
    region = tuple(
        slice(a, data.draw(st.integers(a + 1, n))) for n in shape for a in [data.draw(st.integers(0, n - 1))]
    )
    expected = np.moveaxis(array[region], axis, 0)
    stream = stream_of(array, chunks, region=region)
    if drop_last and len(expected) < batch_size:
        with pytest.raises(zds.UsageError, match="there would be no batch"):
            zds.Loader(stream, batch_size, drop_last=True, axis=axis)
        return
    loader = zds.Loader(stream, batch_size, drop_last=drop_last, axis=axis)
    batches = list(loader)
    kept = len(expected) // batch_size * batch_size if drop_last else len(expected)
    pieces = [expected[at : min(at + batch_size, kept)] for at in range(0, kept, batch_size)]
    assert len(loader) == len(batches) == len(pieces)
    for batch, piece in zip(batches, pieces, strict=True):
        assert batch.dtype == array.dtype
        assert batch.flags.c_contiguous
        assert batch.flags.writeable
        np.testing.assert_array_equal(np.moveaxis(batch, axis, 0), piece)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_shuffled_every_sample_comes_once_and_whole(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 60))
    shape = (count, data.draw(st.integers(1, 5)))
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    start = data.draw(st.integers(0, count - 1))
    array = np.arange(shape[0] * shape[1]).reshape(shape)
    batch_size = data.draw(st.integers(1, 20))
    loader = zds.Loader(
        stream_of(array, chunks, region=slice(start, None)),
        batch_size,
        shuffle_buffer=data.draw(st.integers(1, 80)),
        seed=data.draw(st.integers(0, 2**64 - 1)),
        epochs=2,
    )
    batches = list(loader)
    assert len(batches) == 2 * len(loader)
    for epoch in (batches[: len(loader)], batches[len(loader) :]):
        rows = np.concatenate(epoch)
        np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], array[start:])
        assert [len(batch) for batch in epoch[:-1]] == [batch_size] * (len(loader) - 1)


def test_where_leaves_chunks_out_before_they_are_read() -> None:
    stream = stream_of(numbered((23, 2), 0), (5, 2), where=lambda index: index[0] != 1)
    assert labels(list(zds.Loader(stream, 4))) == [*range(5), *range(10, 23)]
    shuffled = zds.Loader(stream, 4, 10, seed=3)
    assert (shuffled.samples, len(shuffled)) == (18, 5)
    assert sorted(labels(list(shuffled))) == [*range(5), *range(10, 23)]


def test_a_map_may_return_arrays_that_hang_together() -> None:
    def split(chunk: Chunk) -> dict[str, np.ndarray]:
        return {"x": chunk.data * 0.5, "y": chunk.data[:, 0]}

    stream = stream_of(numbered((23, 3), 0), (5, 3))
    seen = []
    for batch in zds.Loader(stream.map(split), 4, 7, seed=1):
        np.testing.assert_array_equal(batch["x"][:, 0] * 2, batch["y"])
        seen += batch["y"].tolist()
    assert sorted(seen) == list(range(23))
    for batch in zds.Loader(stream.map(lambda chunk: (chunk.data, chunk.data[:, 0])), 4):
        assert isinstance(batch, tuple)
        np.testing.assert_array_equal(batch[0][:, 0], batch[1])


@pytest.mark.parametrize("shuffle_buffer", [0, 9])
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_arrays_are_loaded_side_by_side(shuffle_buffer: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 40))
    region = slice(data.draw(st.integers(0, count - 1)), None)
    shapes: list[tuple[int, ...]] = [(count, 3, 2), (count,), (count, 4)]
    arrays = [numbered(shape, 0) for shape in shapes]
    chunks = [tuple(data.draw(st.integers(1, n)) for n in shape) for shape in shapes]
    streams = [stream_of(a, c, region=region) for a, c in zip(arrays, chunks, strict=True)]
    x, y, z = map(np.concatenate, zip(*zds.Loader(streams, 7, shuffle_buffer, seed=2), strict=True))
    assert (x.shape[1:], y.shape[1:], z.shape[1:]) == ((3, 2), (), (4,))
    assert sorted(y.tolist()) == list(range(region.start, count))
    np.testing.assert_array_equal(x, y[:, None, None] * np.ones((1, 3, 2)))
    np.testing.assert_array_equal(z, y[:, None] * np.ones((1, 4)))
    batch = next(iter(zds.Loader({"image": streams[0], "label": streams[1]}, 7, shuffle_buffer, seed=2)))
    assert list(batch) == ["image", "label"]
    np.testing.assert_array_equal(batch["image"][:, 0, 0], batch["label"])


def test_side_by_side_along_another_axis() -> None:
    x, y = numbered((3, 20), 1), numbered((20,), 0)
    streams = stream_of(x, (2, 6)), stream_of(y, (7,))
    for a, b in zds.Loader(streams, 6, 5, seed=2, axis=-1):
        assert a.shape == (3, len(b))
        np.testing.assert_array_equal(a, b * np.ones((3, 1)))


def test_a_small_array_beside_a_large_one_is_not_read_for_every_item() -> None:
    """Labels in one chunk beside images in many: items grow until no more is read than is used."""
    images, names = np.zeros((4000, 64), "u1"), np.arange(4000)
    arrays = stored(images, (10, 64), compressors=None), stored(names, (4000,), compressors=None)
    loader = zds.Loader([zds.stream_chunks(array, concurrency=1) for array in arrays], 100, 500, seed=1)
    assert sorted(np.concatenate([y for _, y in loader]).tolist()) == list(range(4000))
    assert images.nbytes + names.nbytes <= loader.report.bytes_stored <= 2 * (images.nbytes + names.nbytes)


def test_a_dimension_name_is_an_axis() -> None:
    array = stored(numbered((4, 9), 1), (4, 2), dimension_names=("place", "time"))
    loader = zds.Loader(zds.stream_chunks(array, concurrency=1), 4, axis="time")
    assert [batch[0].tolist() for batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def group() -> Any:
    """Return images and labels along a dimension of time, and a place that does not lie along it."""
    root = zarr.create_group({})
    for name, dims, chunks in [("x", ("y", "time"), (2, 6)), ("label", ("time",), (5,)), ("height", ("y",), (2,))]:
        shape = tuple({"y": 3, "time": 20}[dim] for dim in dims)
        array = root.create_array(name, shape=shape, chunks=chunks, dtype="i4", dimension_names=dims)
        array[...] = numbered(shape, len(shape) - 1)
    root["x"].attrs.update(scale_factor=0.5)
    return root


@pytest.mark.parametrize(("axis", "shuffle_buffer"), [("time", 0), ("time", 7), (1, 7), (-1, 7)])
def test_variables_of_a_dataset_are_loaded_side_by_side(axis: int | str, shuffle_buffer: int) -> None:
    stream = zds.stream_dataset(group(), ["x", "label"], concurrency=1, region={"time": slice(3, None)})
    loader = zds.Loader(stream, 4, shuffle_buffer, seed=1, axis=axis)
    seen = []
    for batch in loader:
        assert type(batch) is dict
        np.testing.assert_array_equal(batch["x"], batch["label"] * np.ones((3, 1)))
        seen += batch["label"].tolist()
    assert sorted(seen) == list(range(3, 20))
    assert shuffle_buffer or seen == list(range(3, 20))


def test_a_dataset_is_checked_too() -> None:
    with pytest.raises(zds.UsageError, match="variable 'height' does not lie along axis 'time' of the samples"):
        zds.Loader(zds.stream_dataset(group(), concurrency=1), 4, axis="time")
    with pytest.raises(
        zds.UsageError, match="axis names axis 'depth', and the items have axes 0 to 1 called 'y', 'time'"
    ):
        zds.Loader(zds.stream_dataset(group(), ["x", "label"], concurrency=1), 4, axis="depth")


def test_what_xarray_has_opened_is_loaded_as_xarray_shows_it(tmp_path: Path) -> None:
    root = zarr.create_group(str(tmp_path / "g.zarr"))
    array = root.create_array("x", shape=(20, 3), chunks=(6, 2), dtype="i4", dimension_names=("time", "y"))
    array[...] = numbered((20, 3), 0)
    array.attrs.update(scale_factor=0.5, add_offset=1.0)
    with xr.open_zarr(str(tmp_path / "g.zarr"), consolidated=False) as opened:
        loader = zds.Loader(zds.stream_chunks(opened["x"].isel(time=slice(2, 15)), concurrency=1), 4, 6, 1, axis="time")
        rows = np.concatenate(list(loader))
        assert rows.dtype == opened["x"].dtype
        np.testing.assert_array_equal(rows[np.argsort(rows[:, 0])], opened["x"][2:15])


def test_missing_chunks_are_fill_values_or_an_error() -> None:
    array = zarr.create_array({}, shape=(10,), chunks=(3,), dtype="i4", fill_value=-1)
    array[:6] = np.arange(6)
    stream = zds.stream_chunks(array, concurrency=1)
    assert sorted(labels(list(zds.Loader(stream, 4, 4, seed=0)))) == [-1] * 4 + list(range(6))
    with pytest.raises(zds.ChunkError):
        list(zds.Loader(zds.stream_chunks(array, concurrency=1, missing="raise"), 4))


def test_small_chunks_of_shards_are_read_together_when_shuffled() -> None:
    array = zarr.create_array({}, shape=(100, 2), chunks=(1, 2), shards=(20, 2), dtype="i4")
    array[:] = numbered((100, 2), 0)
    loader = zds.Loader(zds.stream_chunks(array, concurrency=1), 8, 30, seed=4)
    assert sorted(labels(list(loader))) == list(range(100))
    assert loader.report.total == 5
    by_chunk = zds.Loader(zds.stream_chunks(array, concurrency=1).rechunk((1, -1)), 8, 30, seed=4)
    assert sorted(labels(list(by_chunk))) == list(range(100))
    assert by_chunk.report.total == 100


# -- how it is shuffled -------------------------------------------------------------------------------


def test_the_seed_decides_and_each_epoch_has_an_order_of_its_own() -> None:
    stream = stream_of(numbered((200, 1), 0), (10, 1))

    def orders(seed: int | None, epochs: int) -> list[list[int]]:
        batches = labels(list(zds.Loader(stream, 7, 50, seed, epochs=epochs)))
        return [batches[at : at + 200] for at in range(0, len(batches), 200)]

    first, second = orders(5, 2)
    assert [first, second] == orders(5, 2)
    assert first != second
    assert orders(6, 1) != [first]
    drawn = [zds.Loader(stream, 7, 50) for _ in range(2)]
    assert drawn[0].seed != drawn[1].seed
    assert orders(drawn[0].seed, 1) == [labels(list(drawn[0]))]


def test_batch_size_and_chunks_in_flight_do_not_change_the_order() -> None:
    data = numbered((200, 1), 0)
    array = stored(data, (10, 1))
    orders = [
        labels(list(zds.Loader(zds.stream_chunks(array, concurrency=concurrency), size, 50, seed=5)))
        for size, concurrency in [(1, 1), (7, 1), (64, 3), (200, None)]
    ]
    assert orders[1:] == orders[:-1]


def test_samples_end_up_far_from_their_places_and_neighbours() -> None:
    """What a chunk-wise shuffle with a buffer must do, with bounds that only a broken one misses."""
    count = 2000
    stream = stream_of(numbered((count, 1), 0), (20, 1))
    order = np.array(labels(list(zds.Loader(stream, 50, 400, seed=11))))
    assert sorted(order) == list(range(count))
    assert (np.abs(np.diff(order)) == 1).sum() < 60  # two of a chunk side by side
    assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.3
    assert np.abs(order - np.arange(count)).mean() > count / 5
    # A batch is drawn from many chunks, not from one or two.
    assert np.mean([len(set(batch // 20)) for batch in order.reshape(-1, 50)]) > 15


def test_a_buffer_of_one_still_mixes_chunks_and_the_samples_in_each() -> None:
    """The order of the chunks, and that of the samples in each, are others in each epoch and for each seed."""
    stream = stream_of(numbered((60, 1), 0), (10, 1))
    chunks, insides = set(), set()
    for seed in range(2):
        order = np.array(labels(list(zds.Loader(stream, 10, 1, seed, epochs=2)))).reshape(2, 6, 10)
        for epoch in order:
            assert all(len(set(chunk // 10)) == 1 for chunk in epoch)
            chunks.add(tuple(epoch[:, 0] // 10))
            insides |= {(chunk[0] // 10, *(chunk % 10)) for chunk in epoch}
    assert len(chunks - {tuple(range(6))}) == 4
    assert len({inside[1:] for inside in insides} - {tuple(range(10))}) == 24


def test_a_buffer_that_holds_everything_shuffles_everything() -> None:
    places = np.zeros((12, 12), int)
    stream = stream_of(numbered((12, 1), 0), (4, 1))
    for seed in range(200):
        places[np.arange(12), labels(list(zds.Loader(stream, 12, 100, seed)))] += 1
    assert places.min() > 2  # 17 are expected


# -- ranks --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_ranks_are_disjoint_cover_and_have_equal_numbers_of_batches(data: st.DataObject) -> None:
    count, world_size = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 7))
    batch_size, buffer = data.draw(st.integers(1, 9)), data.draw(st.sampled_from([0, 1, 5, 60]))
    drop_last = data.draw(st.booleans())
    stream = stream_of(numbered((count, 1), 0), (data.draw(st.integers(1, count)), 1))

    def loader(rank: int) -> zds.Loader:
        return zds.Loader(stream, batch_size, buffer, 3, drop_last, rank=rank, world_size=world_size)

    if drop_last and count // world_size < batch_size:
        with pytest.raises(zds.UsageError, match="there would be no batch"):
            loader(0)
        return
    parts = [list(loader(rank)) for rank in range(world_size)]
    assert {tuple(len(batch) for batch in part) for part in parts} == {tuple(len(batch) for batch in parts[0])}
    assert len(parts[0]) == len(loader(0))
    got = [label for part in parts for label in labels(part)]
    if drop_last:
        assert len(got) == len(set(got)) == len(loader(0)) * batch_size * world_size
        assert count - len(got) < batch_size * world_size
    else:
        assert set(got) == set(range(count))
        assert len(got) == -(-count // world_size) * world_size  # as many as DistributedSampler would hand out
        for part in parts:
            assert len(set(labels(part))) == len(labels(part))


def test_ranks_share_at_most_the_items_at_their_borders() -> None:
    array = stored(numbered((1000, 1), 0), (10, 1))
    read = []
    for rank in range(4):
        loader = zds.Loader(zds.stream_chunks(array, concurrency=1), 16, 100, 1, rank=rank, world_size=4)
        list(loader)
        read.append(loader.report.emitted)
    assert sum(read) <= 100 + 3


# -- what is refused before anything is read ----------------------------------------------------------

GRID = stored(numbered((20, 6), 0), (4, 3))


def plain(**options: Any) -> zds.ChunkStream:
    return zds.stream_chunks(GRID, concurrency=1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size is a whole number, got 2.5"),
        ({"batch_size": True}, "batch_size is a whole number, got True"),
        ({"shuffle_buffer": -1}, "shuffle_buffer must be from 0"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**64}, "seed must be from 0"),
        ({"drop_last": 1}, "drop_last must be True or False"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"axis": 2}, "axis names axis 2, and the array has axes 0 to 1"),
        ({"axis": "time"}, "axis names axis 'time'"),
        ({"rank": 1}, "rank must be from 0 to 0, got 1"),
        ({"rank": 0, "world_size": 0}, "world_size must be at least 1"),
        ({"shuffle_buffer": 2, "seed": None, "world_size": 2}, "give each of them the same seed"),
        ({"batch_size": 21, "drop_last": True}, "there would be no batch: 20 samples for 1 ranks"),
        ({"stream": GRID}, "a loader needs a stream of zds.stream_chunks"),
        ({"stream": []}, "at least one stream"),
        ({"stream": plain().filter(lambda _: True)}, r"\.filter\(...\) decides later"),
        ({"stream": plain().take(2)}, "region= instead of .take"),
        ({"stream": plain().reduce(zds.reducers.sum())}, r"before .reduce\(...\)"),
        ({"stream": plain(missing="skip")}, 'missing="fill" hands out fill values'),
        ({"stream": plain(on_error="skip")}, 'leave on_error="raise"'),
        ({"stream": plain(ordered=False)}, "leave ordered=True"),
        ({"stream": plain(checkpoint="x.ledger")}, r"use loader.state_dict\(\) instead"),
        ({"stream": plain(region=slice(3, 3))}, "there are no samples"),
        ({"stream": plain(where=lambda _: False)}, "hold parts of samples, and where= speaks of chunks"),
        ({"stream": plain(region=(..., slice(0, 2)), where=lambda _: False)}, "there are no samples"),
        ({"stream": plain().map(lambda chunk: chunk.data)}, r"put .rechunk\(\(None, -1\)\) before .map"),
        ({"stream": plain().batch(size=2)}, r"before .batch\(...\)"),
        ({"stream": plain().halo(1)}, "items with a halo overlap"),
        ({"stream": zds.stream_slices(GRID, 0)}, "a loader cuts slices itself"),
        ({"stream": zds.stream_chunks(zarr.create_array({}, shape=(), dtype="i4"))}, "this one has none"),
        ({"stream": (plain(), plain(region=slice(0, 19)))}, "need the same samples: .* has 0:20, .* has 0:19"),
        ({"stream": (plain(), plain().map(lambda chunk: chunk.data))}, "loaded side by side are plain"),
        ({"stream": (plain(), GRID)}, "a loader needs a stream"),
    ],
)
def test_what_can_not_work_is_refused_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(zds.UsageError, match=message):
        zds.Loader(**{"stream": plain(), "batch_size": 4, "seed": 1, **options})


def test_a_buffer_beyond_the_memory_of_the_host_is_refused() -> None:
    array = zarr.create_array({}, shape=(2**32, 2**20), chunks=(1, 2**20), dtype="f8")
    with pytest.raises(zds.UsageError, match="more than the memory of this host"):
        zds.Loader(zds.stream_chunks(array), 4, 2**31)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda chunk: chunk.data[:3], r"chunk \(0, 0\) has 4 samples, and after .map\(...\) there are 3"),
        (lambda chunk: chunk.data.sum(), r"chunk \(0, 0\) can't be cut into samples: samples lie along axis 0"),
        (lambda chunk: (chunk.data, chunk.data[:2]), r"its arrays have 4, 2 samples"),
        (lambda chunk: chunk.data[:, : 1 + chunk.index[0]], r"chunk \(1, 0\) can't be cut .* those before them"),
        (lambda chunk: chunk.data.astype("f4" if chunk.index[0] else "f8"), r"its samples are float32\[6\]"),
        (lambda _: {}, "there is no array in it"),
    ],
)
def test_what_a_map_returns_is_checked(fn: Callable[[Chunk], Any], message: str) -> None:
    stream = plain().rechunk((None, -1)).map(fn)
    with pytest.raises(zds.UsageError, match=message):
        list(zds.Loader(stream, 3))


def test_failures_come_through_as_they_are() -> None:
    def broken(chunk: Chunk) -> np.ndarray:
        if chunk.index == (2, 0):
            raise ZeroDivisionError("three")
        return np.asarray(chunk.data)

    loader = zds.Loader(plain().rechunk((None, -1)).map(broken), 3)
    got: list[np.ndarray] = []
    with pytest.raises(zds.ChunkError, match=r"chunk \(2, 0\)") as caught:
        got.extend(loader)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert loader.report.outcome == "failed"


# -- where it runs ------------------------------------------------------------------------------------


def test_a_loop_that_is_left_leaves_nothing_behind(tmp_path: Path, leak_check: object) -> None:
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(1000, 10), chunks=(10, 10), dtype="f4")
    loader = zds.Loader(zds.stream_chunks(array, max_bytes=8000), 16, 100, 1, epochs=None)
    for _ in itertools.islice(loader, 150):
        pass
    assert loader.epoch == 2
    assert loader.report.peak_bytes_in_flight <= 8000
    loader.close()
    loader.close()


def test_a_loader_that_is_closed_ends_its_loop() -> None:
    with zds.Loader(stream_of(numbered((100, 1), 0), (5, 1)), 10) as loader:
        seen = 0
        for _ in loader:
            seen += 1
            loader.close()
    assert 1 <= seen < 10
    assert loader.epoch == 0


def test_it_says_what_it_is() -> None:
    loader = zds.Loader(plain(), 3, 9, 7, rank=1, world_size=2)
    assert repr(loader) == "Loader(20 samples in 4 batches of 3, rank 1 of 2, shuffled by seed 7 through 9)"
    assert loader.report.outcome == "not started"
    assert (zds.Loader(plain(), 3).seed, zds.Loader(plain(), 3, seed=5).seed) == (None, 5)


@pytest.mark.asyncio
async def test_batches_come_asynchronously_too(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(100, 4), chunks=(7, 2), dtype="i4")
    array[:] = numbered((100, 4), 0)
    expected = list(zds.Loader(zds.stream_chunks(array, concurrency=1), 9, 20, seed=3, epochs=2))
    async with (
        LocalCluster(processes=False, asynchronous=True, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster, asynchronous=True) as client,
    ):
        loader = zds.Loader(zds.stream_chunks(array, client=client), 9, 20, seed=3, epochs=2)
        got = []
        async for batch in loader:
            got.append(batch)
            await asyncio.sleep(0)
            if len(got) == 5:
                break
        again = zds.Loader(zds.stream_chunks(array, client=client), 9, 20, seed=3)
        again.load_state_dict(loader.state_dict())
        got += [batch async for batch in again]
    for batch, same in zip(got, expected, strict=True):
        np.testing.assert_array_equal(batch, same)
