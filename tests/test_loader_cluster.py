"""Loaders on real worker processes: the same batches as in one thread, however the workers dawdle."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client

import zarr_dask_stream as zds
from realparts.leaks import LeakCheck
from zarr_dask_stream.source.chunk import Chunk

COUNT = 600


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Images chunked along two axes in shards, and labels in chunks of another length."""
    images = zarr.create_array(
        str(tmp_path / "x.zarr"), shape=(COUNT, 8, 8), chunks=(10, 4, 8), shards=(50, 8, 8), dtype="i4"
    )
    images[:] = np.arange(COUNT)[:, None, None] + np.zeros((1, 8, 8), "i4")
    labels = zarr.create_array(str(tmp_path / "y.zarr"), shape=(COUNT,), chunks=(35,), dtype="i8")
    labels[:] = np.arange(COUNT)
    return str(tmp_path / "x.zarr"), str(tmp_path / "y.zarr")


def streams(pair: tuple[str, str], **options: Any) -> tuple[zds.ChunkStream, zds.ChunkStream]:
    x, y = pair
    return zds.stream_chunks(x, **options), zds.stream_chunks(y, **options)


@pytest.fixture
def expected(pair: tuple[str, str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the batches as one thread makes them; asked for before `client`, so that there is no cluster yet."""
    return list(zds.Loader(streams(pair, concurrency=1), 32, 100, seed=7, epochs=2))


def test_batches_are_the_same_on_a_cluster_and_from_any_place_on(
    pair: tuple[str, str], expected: list[tuple[np.ndarray, np.ndarray]], client: Client, leak_check: LeakCheck
) -> None:
    loader = zds.Loader(streams(pair, client=client), 32, 100, seed=7, epochs=2)
    first = list(itertools.islice(loader, 13))
    again = zds.Loader(streams(pair, client=client), 32, 100, seed=0)
    again.load_state_dict(loader.state_dict())
    got = first + list(again)
    assert len(got) == len(expected) == 2 * len(loader)
    for (x, y), (a, b) in zip(got, expected, strict=True):
        np.testing.assert_array_equal(x, a)
        np.testing.assert_array_equal(y, b)
        np.testing.assert_array_equal(x[:, 3, 3], y)


def dawdle(chunk: Chunk) -> np.ndarray:
    """Take an unforeseeable time."""
    time.sleep((time.perf_counter_ns() // 1000 + sum(chunk.index)) % 7 / 1000)
    return np.asarray(chunk.data)


def test_dawdling_workers_change_nothing(pair: tuple[str, str], client: Client) -> None:
    def orders(ranks: int) -> list[int]:
        stream = zds.stream_chunks(pair[1], client=client, concurrency=6).map(dawdle)
        loaders = [zds.Loader(stream, 16, 50, seed=2, rank=rank, world_size=ranks) for rank in range(ranks)]
        return [int(label) for loader in loaders for batch in loader for label in batch]

    once = orders(1)
    assert sorted(once) == list(range(COUNT))
    assert orders(1) == once
    thrice = orders(3)
    assert sorted(thrice) == list(range(COUNT))
    assert orders(3) == thrice
