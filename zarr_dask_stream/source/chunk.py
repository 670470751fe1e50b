"""One item of a stream: a chunk's place in the array, and what the stages made of its data."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.source.grid import Index, Region
from zarr_dask_stream.source.selection import ChunkPlan

__all__ = ["Chunk"]


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
        the item; after ``.map(fn)`` what `fn` returned.
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

    __slots__ = ("_index", "_place", "_region", "data", "missing")

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

    def with_data(self, data: Any) -> Chunk:
        """Return the same place with other data."""
        return Chunk(self._index, self._region, data, self.missing, place=self._place)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is None:
            return np.asarray(self.data, dtype=dtype)
        return np.array(self.data, dtype=dtype, copy=copy)

    def __reduce__(self) -> tuple[Any, ...]:
        return Chunk, (self.index, self.region, self.data, self.missing)

    def __repr__(self) -> str:
        region = ", ".join(f"{s.start}:{s.stop}" for s in self.region)
        missing = ", missing" if self.missing else ""
        return f"Chunk(index={self.index}, region=[{region}], data={_brief(self.data)}{missing})"


def _brief(data: Any) -> str:
    if isinstance(data, np.ndarray):
        return f"{data.dtype}[{', '.join(map(str, data.shape))}]"
    text = repr(data).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
