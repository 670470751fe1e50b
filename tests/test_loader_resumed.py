"""Loaders that are gone on with: at any batch, in the next epoch, in another process."""

from __future__ import annotations

import itertools
import json
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from loading import labels, numbered, stored, stream_of


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_from_every_batch_on_the_rest_is_the_same(data: st.DataObject) -> None:
    count, chunk = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 12))
    array = stored(numbered((count, 2), 0), (chunk, 1))
    options: dict[str, Any] = {
        "batch_size": data.draw(st.integers(1, 12)),
        "shuffle_buffer": data.draw(st.sampled_from([0, 1, 3, 10, 70])),
        "drop_last": data.draw(st.booleans()),
        "epochs": data.draw(st.integers(1, 2)),
        "rank": data.draw(st.integers(0, 1)),
        "world_size": 2,
    }
    if options["drop_last"] and count // 2 < options["batch_size"]:
        options["drop_last"] = False

    def loader(seed: int) -> zds.Loader:
        return zds.Loader(zds.stream_chunks(array, concurrency=1), seed=seed, **options)

    saved, batches = [], []
    first = loader(data.draw(st.integers(0, 99)))
    saved.append(first.state_dict())
    for batch in first:
        batches.append(batch)
        saved.append(first.state_dict())
    for at, state in enumerate(saved):
        again = loader(0)
        again.load_state_dict(json.loads(json.dumps(state)))
        rest = list(again)
        assert len(rest) == len(batches) - at
        for batch, same in zip(rest, batches[at:], strict=True):
            np.testing.assert_array_equal(batch, same)


@pytest.mark.parametrize(("buffer", "again"), [(0, 0), (1, 1), (100, 60)])
def test_only_items_of_which_samples_are_still_to_come_are_read(buffer: int, again: int) -> None:
    array = stored(numbered((3000, 1), 0), (10, 1))

    def loader() -> zds.Loader:
        return zds.Loader(zds.stream_chunks(array, concurrency=1), 52, buffer, seed=8)

    first = loader()
    batches = iter(first)
    gone = labels(list(itertools.islice(batches, 30)))
    state = first.state_dict()
    rest = labels(list(batches))
    restored = loader()
    restored.load_state_dict(state)
    assert labels(list(restored)) == rest
    assert restored.report.emitted == len({label // 10 for label in rest})
    assert restored.report.emitted - (3000 - len(gone) - buffer) / 10 <= again + 1


def test_the_length_of_an_array_costs_nothing() -> None:
    """A billion items: no list of them is made, and a place deep inside is found without the way to it."""
    array = zarr.create_array({}, shape=(10**12, 2), chunks=(1000, 2), dtype="i1")
    tracemalloc.start()
    loader = zds.Loader(zds.stream_chunks(array, concurrency=1), 256, 5000, seed=5)
    state = {**loader.state_dict(), "batch": 3 * 10**9}
    loader.load_state_dict(state)
    batches = iter(loader)
    assert next(batches).shape == (256, 2)
    assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    tracemalloc.stop()
    assert loader.report.emitted < 5000 * 10 / 1000 + 5
    assert len(loader) == 10**12 // 256


def test_an_iteration_goes_on_with_the_next_epoch() -> None:
    stream = stream_of(numbered((20, 1), 0), (4, 1))
    together = labels(list(zds.Loader(stream, 5, 8, 1, epochs=3)))
    loader = zds.Loader(stream, 5, 8, 1)
    apart = []
    for epoch in range(3):
        assert loader.epoch == epoch
        for batch in loader:
            assert loader.epoch == epoch
            apart += labels([batch])
    assert apart == together
    assert loader.epoch == 3
    assert loader.state_dict()["batch"] == 0


def test_an_epoch_that_is_left_early_counts_as_begun() -> None:
    loader = zds.Loader(stream_of(numbered((20, 1), 0), (4, 1)), 5, 8, 1)
    for _ in loader:
        break
    state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (0, 1)
    assert len(list(loader)) == 4
    assert loader.epoch == 2
    loader.load_state_dict(state)
    assert len(list(loader)) == 3
    assert loader.epoch == 1
    assert len(list(loader)) == 4


def test_a_loader_without_end_goes_on_and_on() -> None:
    loader = zds.Loader(stream_of(numbered((6, 1), 0), (4, 1)), 4, epochs=None)
    batches = [batch[:, 0].tolist() for batch in itertools.islice(loader, 5)]
    assert batches == [[0, 1, 2, 3], [4, 5]] * 2 + [[0, 1, 2, 3]]
    assert loader.epoch == 2


def test_a_loader_travels_with_its_place() -> None:
    data = numbered((40, 1), 0)
    array = stored(data, (4, 1))
    loader = zds.Loader(zds.stream_chunks(array, concurrency=1), 5, 8, 1)
    batches = iter(loader)
    next(batches)
    again = zds.Loader(zds.stream_chunks(array, concurrency=1), 5, 8, 1)
    again.load_state_dict(pickle.loads(pickle.dumps(loader.state_dict())))
    assert labels(list(again)) == labels(list(batches))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 6}, "batch_size was 5 and is 6"),
        ({"shuffle_buffer": 9}, "shuffle_buffer was 8 and is 9"),
        ({"rank": 1, "world_size": 2}, "rank was 0 and is 1; world_size was 1 and is 2"),
        ({"stream": stream_of(numbered((21, 1), 0), (4, 1))}, "samples was 20 and is 21; items was 5 and is 6"),
        ({"stream": stream_of(numbered((20, 1), 0), (3, 1))}, "items was 5 and is 7; item_samples was 4 and is 3"),
    ],
)
def test_the_state_of_another_loader_is_refused(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"batch_size": 5, "shuffle_buffer": 8, "seed": 1}
    options["stream"] = stream_of(numbered((20, 1), 0), (4, 1))
    state = zds.Loader(**options).state_dict()
    with pytest.raises(zds.UsageError, match=message):
        zds.Loader(**{**options, **change}).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "expected what state_dict"),
        ({"epoch": -1}, "state\\['epoch'\\] must be at least 0"),
        ({"batch": 5}, "must be from 0 to 4"),
        ({"batch": "x"}, "is a whole number"),
        ({"seed": None}, "the state has no seed"),
        ({"loader": None}, "that of another loader"),
    ],
)
def test_a_damaged_state_is_refused(change: dict[str, Any], message: str) -> None:
    loader = zds.Loader(stream_of(numbered((20, 1), 0), (4, 1)), 5, 8, 1)
    with pytest.raises(zds.UsageError, match=message):
        loader.load_state_dict({**loader.state_dict(), **change})
    with pytest.raises(zds.UsageError, match="expected what state_dict"):
        loader.load_state_dict(change.get("version", []))
