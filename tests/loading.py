"""Arrays of numbered samples, and streams of them, for the tests of loaders."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

import zarr_dask_stream as zds


def numbered(shape: tuple[int, ...], axis: int, dtype: str = "i4") -> np.ndarray:
    """Return an array in which the sample at place n along an axis is n everywhere, plus a fraction of its place."""
    along = [1] * len(shape)
    along[axis] = shape[axis]
    full = np.arange(shape[axis]).reshape(along) * np.ones(shape, "i4")
    return (full % 200 if dtype == "u1" else full).astype(dtype)


def stored(data: np.ndarray, chunks: tuple[int, ...], **options: Any) -> Any:
    array = zarr.create_array({}, shape=data.shape, chunks=chunks, dtype=data.dtype, **options)
    array[...] = data
    return array


def stream_of(data: np.ndarray, chunks: tuple[int, ...], **options: Any) -> zds.ChunkStream:
    return zds.stream_chunks(stored(data, chunks), concurrency=1, **options)


def labels(batches: list[np.ndarray]) -> list[int]:
    """Return the numbers of the samples in batches of 1-d samples along axis 0."""
    return [int(sample.reshape(-1)[0]) for batch in batches for sample in batch]
