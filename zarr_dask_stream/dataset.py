"""Aligned chunks of several arrays: groups of a Zarr store, and what xarray has opened from one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from zarr_dask_stream.chunks import stream_chunks
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.opened import of_dataset, of_group
from zarr_dask_stream.source.group import open_group
from zarr_dask_stream.source.selection import ChunkPlan, RegionLike
from zarr_dask_stream.source.store import store_errors
from zarr_dask_stream.source.traced import kind_of
from zarr_dask_stream.stream import ChunkStream

__all__ = ["stream_dataset"]


def stream_dataset(
    source: Any,
    variables: str | Sequence[str] | None = None,
    *,
    group: str = "",
    path: str = "",
    storage_options: Mapping[str, Any] | None = None,
    consolidated: bool | None = None,
    chunks: Any = None,
    region: Mapping[str, slice | int] | RegionLike = None,
    coords: bool | Sequence[str] = True,
    **options: Any,
) -> ChunkStream:
    """Stream several arrays of a group side by side: each item holds the same box of all of them.

    The boxes lie on the common grid of the arrays, by the names of their dimensions (``dimension_names``, or
    ``_ARRAY_DIMENSIONS`` in version 2). Along each dimension a box is as long as the least common multiple of
    the arrays' chunks, so that every chunk is read once. An array that has not all dimensions comes whole along
    the others with every item: it is read once for each task, not for each item.

    Parameters
    ----------
    source : str, path, zarr.Group, zarr store, mapping, xarray.Dataset or xarray.DataArray
        What ``xarray.open_zarr`` takes, or what it returned: then slices and positions taken with ``isel`` or
        ``sel`` become the region, and items hold the values that xarray shows.
    variables : str or sequence of str, optional
        Names of arrays, or paths below the group. By default all that are not coordinates.
    group, path : str
        Path of the group inside `source`; two words for one thing.
    storage_options : mapping, optional
        Options for the file system of a URL.
    consolidated : bool, optional
        False: do not use consolidated metadata. True: insist on them. By default they are used where they are.
    chunks : int, or mapping of str to int, optional
        Elements of a box along dimensions: -1 for all, None for the common multiple. Boxes that cut chunks read
        them again for each task.
    region : mapping of str to slice or int, optional
        By dimension name; or, as for `stream_chunks`, in the order of ``stream.dims``. A number keeps its
        dimension, with length one.
    coords : bool or sequence of str
        Which coordinates go along for ``item.to_xarray()``. True: all that lie along the dimensions of the
        variables, by xarray's rules. Those with one dimension and up to 16 MiB are read at once; others are read
        with the items.
    **options
        All other options of `stream_chunks`. ``where`` is asked with the index in the common grid. An item is
        missing where none of its variables' chunks is stored, and for ``missing="raise"`` where one is not.

    Returns
    -------
    ChunkStream
        Of each item, ``.data`` is a dict of arrays by name, and ``.index`` and ``.region`` have one entry for each
        of ``stream.dims``. ``.to_xarray()`` makes a Dataset of it. Values are as stored; ``to_xarray`` decodes
        them. ``.reduce(mean())`` reduces each array, ``.reduce({"t2m": mean()})`` those named.

    Raises
    ------
    UsageError
        If a variable is not there, arrays don't go together, boxes would be too large, or an object of xarray
        can't be traced back to stored arrays.
    StoreError
        If there is no such group, or it can't be read.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> from zarr_dask_stream import reducers
    >>> root = zarr.create_group({})
    >>> t2m = root.create_array("t2m", shape=(4, 3), chunks=(1, 3), dtype="f4", dimension_names=["time", "lat"])
    >>> t2m[:] = np.arange(12).reshape(4, 3)
    >>> lat = root.create_array("lat", shape=(3,), dtype="f4", dimension_names=["lat"])
    >>> lat[:] = [50, 60, 70]
    >>> stream = stream_dataset(root, chunks={"time": 2}, region={"lat": slice(1, None)})
    >>> stream
    ChunkStream(t2m: float32[4, 3] along time, lat, in 2 chunks of [2, 3], ordered, 2 of them planned)
    >>> next(iter(stream)).to_xarray()
    <xarray.Dataset> Size: 24B
    Dimensions:  (time: 2, lat: 2)
    Coordinates:
      * lat      (lat) float32 8B 60.0 70.0
    Dimensions without coordinates: time
    Data variables:
        t2m      (time, lat) float32 16B 1.0 2.0 4.0 5.0
    >>> stream.map(lambda item: item.data["t2m"].sum()).reduce(reducers.max()).compute()
    np.float32(36.0)
    """
    if kind_of(source):
        given = {"group": group, "path": path, "storage_options": storage_options, "consolidated": consolidated}
        for name, value in {**given, "region": region}.items():
            if value not in (None, ""):
                instead = "slice the object itself, with .isel(...)" if name == "region" else "it is open already"
                raise UsageError(f"{name}= does not go with an xarray object: {instead}")
        dataset = source if kind_of(source) == "Dataset" else source.to_dataset(name=source.name or "values")
        found = of_dataset(dataset, variables, coords, chunks)
    else:
        if group and path and group.strip("/") != path.strip("/"):
            raise UsageError(f"group={group!r} and path={path!r} are two words for one thing: give one of them")
        with store_errors():
            opened = open_group(
                source, path=group or path, storage_options=storage_options, use_consolidated=consolidated
            )
            found = of_group(opened, variables, coords, chunks, region)
    o = stream_chunks(found.spec, **options)._options  # noqa: SLF001  # the façade's other half
    assert found.blocks is not None
    plan = ChunkPlan(found.blocks.grid, found.box, o.plan.where, labels=found.labels)
    stages = () if found.decode is None else (found.decode,)
    return ChunkStream(dataclasses.replace(o, plan=plan, blocks=found.blocks, labels=found.labels, stages=stages))
