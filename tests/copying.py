"""What the tests of targets share: arrays stored with zarr-python, and read back with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")


def array_in(store: Any, data: Any, **options: Any) -> Any:
    """Store data."""
    array = zarr.create_array(store, shape=data.shape, dtype=data.dtype, **options)
    array[...] = data
    return array


def read(store: Any, path: str = "") -> Any:
    """Read an array whole, in native byte order."""
    data = np.asarray(zarr.open_array(store, path=path, mode="r")[...])
    return data if data.dtype.kind == "T" else data.astype(data.dtype.newbyteorder("="))


def keys(store: dict[str, Any]) -> set[str]:
    """Return the keys of chunks in a mapping."""
    return {key for key in store if not key.endswith(METADATA)}
