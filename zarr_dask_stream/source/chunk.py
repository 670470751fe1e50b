"""One item of a stream: a chunk's place in the array, and what the stages made of its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.grid import Index, Region
from zarr_dask_stream.source.selection import ChunkPlan

__all__ = ["Chunk", "Variables", "numbers_of"]


class Variables(dict[str, npt.NDArray[Any]]):
    """Arrays that belong to one box, by name: the data of an item of `stream_dataset`.

    Attributes
    ----------
    axes : mapping of str to tuple of int
        For each array, the axes of the item along which its own axes lie.
    coords : dict of str to ndarray
        Coordinates that were read with them, for ``to_xarray``.

    Examples
    --------
    >>> Variables({"t2m": np.ones((2, 3)), "lat": np.arange(2)}, axes={"t2m": (0, 1), "lat": (0,)})
    Variables(t2m=float64[2, 3], lat=int64[2])
    """

    def __init__(
        self,
        arrays: Mapping[str, npt.NDArray[Any]],
        *,
        axes: Mapping[str, tuple[int, ...]],
        coords: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        super().__init__(arrays)
        self.axes = axes
        self.coords = dict(coords or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return _variables, (dict(self), self.axes, self.coords)

    def __repr__(self) -> str:
        return f"Variables({', '.join(f'{name}={_brief(array)}' for name, array in self.items())})"


def _variables(arrays: dict[str, Any], axes: Mapping[str, tuple[int, ...]], coords: dict[str, Any]) -> Variables:
    return Variables(arrays, axes=axes, coords=coords)


class Chunk:
    """A chunk of an array, as it comes out of a stream.

    Attributes
    ----------
    index : tuple of int
        Grid index. For an item of a grouped reduction: the group's key.
    region : tuple of slice
        Place in array coordinates, cropped to the array and to the stream's region.
    data : numpy.ndarray or Any
        The decoded chunk, of the region's shape and in native byte order, owned by whoever holds
        the item; from `stream_dataset` a dict of such arrays by name; after ``.map(fn)`` what `fn` returned.
    missing : bool
        True where the chunk is not stored and `data` came from the fill value.

    Examples
    --------
    >>> chunk = Chunk((0, 1), (slice(0, 2), slice(2, 4)), np.ones((2, 2)))
    >>> chunk
    Chunk(index=(0, 1), region=[0:2, 2:4], data=float64[2, 2])
    >>> np.asarray(chunk).sum()
    np.float64(4.0)
    """

    __slots__ = ("_as_read", "_index", "_place", "_region", "data", "missing")

    def __init__(
        self,
        index: Any,
        region: Region | None,
        data: Any,
        missing: bool = False,
        *,
        place: tuple[ChunkPlan, int] | None = None,
    ) -> None:
        self._index = index
        self._region = region
        self._place = place
        self._as_read = True
        self.data = data
        self.missing = missing

    @classmethod
    def planned(cls, plan: ChunkPlan, number: int, data: Any, missing: bool = False) -> Chunk:
        """Make chunk `number` of a plan; index and region are worked out when somebody asks."""
        return cls(None, None, data, missing, place=(plan, number))

    @property
    def index(self) -> Any:
        """Grid index, or the key of a grouped reduction."""
        if self._index is None and self._place is not None:
            plan, number = self._place
            self._index = plan.grid.index(number)
        return self._index

    @property
    def region(self) -> Region:
        """Place in array coordinates."""
        if self._region is None:
            assert self._place is not None
            plan, number = self._place
            self._region = plan.region(number)
        return self._region

    @property
    def core(self) -> Region:
        """Where the chunk itself lies in `data`: all of it, or without what ``.halo(...)`` put around it."""
        halo = None if self._place is None else self._place[0].halo
        if halo is None or self._place is None:
            return tuple(slice(0, n) for n in self.shape)
        return halo.core(self.region, self._place[0].grid.shape)

    @property
    def number(self) -> int | None:
        """Linear chunk number in the grid (C order); None for an item of a reduction."""
        return None if self._place is None else self._place[1]

    @property
    def shape(self) -> Index:
        """Shape of the region, elements."""
        return tuple(s.stop - s.start for s in self.region)

    def with_data(self, data: Any, *, as_read: bool = False) -> Chunk:
        """Return the same place with other data, or with the same in another form (`as_read`)."""
        chunk = Chunk(self._index, self._region, data, self.missing, place=self._place)
        chunk._as_read = as_read and self._as_read
        return chunk

    def part(self, name: str) -> Chunk:
        """Return one array of an item that holds several, with its own place.

        Examples
        --------
        >>> item = Chunk(
        ...     (1, 0), (slice(2, 4), slice(0, 3)), Variables({"lat": np.arange(3)}, axes={"lat": (1,)})
        ... )
        >>> item.part("lat")
        Chunk(index=(0,), region=[0:3], data=int64[3])
        """
        if not isinstance(self.data, Variables) or name not in self.data:
            raise KeyError(name)
        axes = self.data.axes[name]
        index, region = self.index, self.region
        return Chunk(tuple(index[a] for a in axes), tuple(region[a] for a in axes), self.data[name], self.missing)

    def to_xarray(self, **decoding: Any) -> Any:
        """Return the item with the names of its axes, coordinates and attributes.

        Values are decoded by the CF conventions (scale, offset, missing values, times) by xarray itself, so
        that the result is what ``xarray.open_zarr(...).isel(...)`` gives for the item's region.

        Parameters
        ----------
        **decoding
            As ``xarray.open_zarr`` takes them: ``decode_cf``, ``mask_and_scale``, ``decode_times``,
            ``decode_timedelta``, ``decode_coords``, ``concat_characters``, ``use_cftime``.

        Returns
        -------
        xarray.Dataset or xarray.DataArray
            A Dataset from `stream_dataset`, else a DataArray. The item of a plain array has no coordinates:
            those are arrays of their own, and ``stream_dataset(group, [name])`` reads them too.

        Raises
        ------
        UsageError
            If xarray is not installed, the array has no dimension names, or a map has replaced the data.

        Examples
        --------
        >>> import zarr
        >>> from zarr_dask_stream import stream_chunks
        >>> array = zarr.create_array({}, shape=(2,), dtype="i2", dimension_names=["x"], fill_value=25)
        >>> array.attrs.update(scale_factor=0.5, units="m")
        >>> [chunk.to_xarray() for chunk in stream_chunks(array)]
        [<xarray.DataArray (x: 2)>...
        array([12.5, 12.5])
        Dimensions without coordinates: x
        Attributes:
            units:    m]
        """
        if not self._as_read:
            raise UsageError("a map has replaced the data of this item: call to_xarray() in the map, on what it gets")
        labels = None if self._place is None else self._place[0].labels
        if labels is None:
            raise UsageError(
                "this item can't be labelled: its array has no dimension names, or a map has replaced its data (then "
                "call to_xarray() in the map, on what it gets)"
            )
        if isinstance(self.data, Variables):
            return labels.to_xarray(self._around(), {**self.data, **self.data.coords}, decoding)
        return labels.to_xarray(self._around(), dict.fromkeys(labels.arrays, self.data), decoding)

    def _around(self) -> Region:
        """Return the region with what ``.halo(...)`` has put around it."""
        assert self._place is not None
        plan, _ = self._place
        if plan.halo is None:
            return self.region
        pairs = zip(self.region, plan.halo.depth, plan.halo.boundary, plan.grid.shape, strict=True)
        around = []
        for part, (before, after), boundary, length in pairs:
            start, stop = part.start - before, part.stop + after
            if boundary is not None and (start < 0 or stop > length):
                raise UsageError(
                    f"chunk {self.index} reaches beyond the edge of the array with its halo, where there are no "
                    "coordinates: label .data[chunk.core] yourself, or use boundary=None"
                )
            around.append(slice(max(start, 0), min(stop, length)))
        return tuple(around)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if isinstance(self.data, Variables):
            raise TypeError("the item holds several arrays: take one, chunk.data[name]")
        if copy is None:
            return np.asarray(self.data, dtype=dtype)
        return np.array(self.data, dtype=dtype, copy=copy)

    def __reduce__(self) -> tuple[Any, ...]:
        return Chunk, (self.index, self.region, self.data, self.missing)

    def __repr__(self) -> str:
        region = ", ".join(f"{s.start}:{s.stop}" for s in self.region)
        missing = ", missing" if self.missing else ""
        return f"Chunk(index={self.index}, region=[{region}], data={_brief(self.data)}{missing})"


def numbers_of(chunks: Iterable[Chunk]) -> list[int]:
    """Return the numbers of chunks that have one: answers of reductions have none."""
    return [chunk.number for chunk in chunks if chunk.number is not None]


def _brief(data: Any) -> str:
    if isinstance(data, np.ndarray):
        return f"{data.dtype}[{', '.join(map(str, data.shape))}]"
    text = repr(data).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
