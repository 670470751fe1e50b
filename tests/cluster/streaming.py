"""What the tests on real clusters share: arrays, functions for workers, and how to put a stream back together."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from distributed import Client

import zarr_dask_stream as zds

SHAPE, CHUNKS = (60, 50), (6, 5)
CHUNK_COUNT = 100


def pattern() -> np.ndarray:
    """Return what `write_array` stores: every element differs, so that a misplaced chunk shows."""
    return np.arange(SHAPE[0] * SHAPE[1], dtype="i4").reshape(SHAPE)


def write_array(target: Any, **options: Any) -> np.ndarray:
    """Store the pattern in 100 chunks and return it; the fill value occurs nowhere in it."""
    array = zarr.create_array(target, shape=SHAPE, chunks=CHUNKS, dtype="i4", fill_value=-1, **options)
    data = pattern()
    array[:] = data
    return data


def assemble(stream: Any) -> np.ndarray:
    """Put a stream's chunks together; a chunk that comes twice fails."""
    out = np.full(SHAPE, -7, "i4")
    seen: set[tuple[int, ...]] = set()
    for chunk in stream:
        assert chunk.index not in seen, f"{chunk.index} came twice"
        seen.add(chunk.index)
        out[chunk.region] = chunk.data
    return out


def total_of(chunk: zds.Chunk) -> int:
    """Add up a chunk; travels by name."""
    return int(chunk.data.sum())


def slowly(seconds: float) -> Any:
    """Return a function that hands chunks on after so many seconds; travels by value."""

    def wait(chunk: zds.Chunk) -> Any:
        time.sleep(seconds)
        return chunk.data

    return wait


def marking(folder: Path, seconds: float) -> Any:
    """Return a slow function that leaves a file for each call: who ran it, when and on what."""

    def mark(chunk: zds.Chunk) -> Any:
        name = "-".join(map(str, chunk.index))
        (folder / f"{name}-{os.getpid()}-{time.monotonic_ns()}").touch()
        time.sleep(seconds)
        return chunk.data

    return mark


class Total(zds.Reducer):
    """The sum of all elements."""

    def create(self) -> int:
        return 0

    def add(self, partial: int, chunk: zds.Chunk) -> int:
        return partial + int(np.asarray(chunk.data).sum())

    def merge(self, left: int, right: int) -> int:
        return left + right


def address_of(client: Client) -> str:
    """Return where the scheduler of a client listens."""
    assert client.scheduler is not None
    return str(client.scheduler.address)
