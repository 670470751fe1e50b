"""Items into an array: where each belongs, and what it has to look like.

Every object of the target (a shard where there are shards, else a chunk) lies whole within one item. It is
therefore written by one task, at one stroke, and writing it again does no harm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import StoreNotVisibleError, UsageError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import Index, Region
from zarr_dask_stream.source.mosaic import Mosaic
from zarr_dask_stream.source.store import here
from zarr_dask_stream.source.writer import ArrayWriter, Verify, cast_exactly, is_castable

__all__ = ["Placement", "Sink"]


@dataclass(frozen=True)
class Placement:
    """From a place in the source to a place in the target, axis by axis.

    Parameters
    ----------
    start : tuple of int
        Where the target begins, in the source's coordinates.
    step : tuple of int
        Length of a full item in the source.
    length : tuple of int
        Length of what a full item becomes. Where it differs from `step`, what is left at the end of the array
        becomes as much as its share, rounded up.

    Examples
    --------
    >>> coarse = Placement((0, 10), (4, 5), (2, 5))
    >>> coarse.region((slice(4, 8), slice(10, 15)))
    (slice(2, 4, None), slice(0, 5, None))
    >>> coarse.region((slice(8, 9), slice(15, 17)))
    (slice(4, 5, None), slice(5, 7, None))
    >>> coarse.shape((slice(0, 9), slice(10, 17)))
    (5, 7)
    """

    start: Index
    step: Index
    length: Index

    def region(self, region: Region) -> Region:
        """Return where an item's result belongs."""
        parts = []
        for part, start, step, length in zip(region, self.start, self.step, self.length, strict=True):
            offset, count = part.start - start, part.stop - part.start
            if step != length:
                offset, count = offset // step * length, _share(count, step, length)
            parts.append(slice(offset, offset + count))
        return tuple(parts)

    def shape(self, box: Region) -> Index:
        """Return the shape of a target for all of `box`."""
        lengths = []
        for part, step, length in zip(box, self.step, self.length, strict=True):
            whole, rest = divmod(part.stop - part.start, step)
            lengths.append(whole * length + _share(rest, step, length))
        return tuple(lengths)


def _share(count: int, step: int, length: int) -> int:
    return -(-count * length // step)


@dataclass(frozen=True, kw_only=True)
class Sink:
    """An array that items are written to; travels with the work.

    Attributes
    ----------
    spec : ArraySpec
        The target.
    placement : Placement
        Where items belong.
    expected : numpy.dtype or None
        What items hold, exactly; None: whatever can be cast to the target's dtype within its kind.
    write_empty, verify, fresh, aside
        As `ArrayWriter` takes them.
    durable : bool
        Whether a batch ends only when what it wrote survives a loss of power.
    """

    spec: ArraySpec
    placement: Placement
    expected: np.dtype[Any] | None = None
    write_empty: bool = False
    verify: Verify = True
    fresh: bool = True
    aside: str = ""
    durable: bool = False

    def open(self, timeout: float | None, stopped: Callable[[], bool], mark: Callable[[], Any]) -> ArrayWriter:
        """Return a writer for one batch."""
        return ArrayWriter(
            self.spec,
            write_empty=self.write_empty,
            verify=self.verify,
            fresh=self.fresh,
            aside=self.aside,
            timeout=timeout,
            stopped=stopped,
            mark=mark,
        )

    def prepare(self) -> None:
        """Make the place for unfinished files, on the client: workers know by it that they see the same target."""
        if self.aside:
            self.spec.store.open().prepare(self.aside)

    def check(self) -> None:
        """Make sure, on a worker, that this is the target that the client has prepared.

        An array of the same kind under the same name, on a disk of the worker's own, would take it all silently.

        Raises
        ------
        StoreNotVisibleError
            If it is another one.
        """
        if self.aside and not self.spec.store.open().is_prepared(self.aside):
            raise StoreNotVisibleError(
                f"{self.spec.url} as it is seen on {here()} is not the target that the client has made ready: what is "
                "written here would not be found there. Put it where every worker reaches it under the same name (a "
                "shared disk, s3://), or run the workers on the client's host"
            )

    def tidy(self) -> None:
        """Remove what unfinished files may have been left aside."""
        if self.aside:
            self.spec.store.open().discard(self.aside)

    def fit(self, chunk: Chunk) -> tuple[Region, npt.NDArray[Any] | Mosaic]:
        """Return where an item belongs in the target, and its data as the target holds them.

        Raises
        ------
        UsageError
            If the data have another shape or dtype than was declared, or values that the target can't hold.
        """
        region = self.placement.region(chunk.region)
        shape = tuple(part.stop - part.start for part in region)
        dtype, expected = self.spec.dtype, self.expected
        if isinstance(chunk.data, Mosaic) and chunk.data.dtype == dtype:
            return region, chunk.data
        data = np.asarray(chunk.data)
        if data.shape != shape:
            raise UsageError(
                f"the result for chunk {chunk.index} has shape {data.shape}, and {shape} belongs there: where a "
                "function changes the shape, say so with .map(fn, chunks=...)"
            )
        if expected is not None and data.dtype != expected and data.dtype.newbyteorder("=") != expected:
            raise UsageError(
                f"the result for chunk {chunk.index} holds {data.dtype}, and {expected} was expected: where a function "
                f"changes the dtype, say so with .map(fn, dtype={str(data.dtype)!r})"
            )
        cast = cast_exactly(data, dtype)
        if cast is None:
            castable = is_castable(data.dtype, dtype)
            why = f"has values that {dtype} can't hold" if castable else f"holds {data.dtype}, and the target {dtype}"
            raise UsageError(
                f"the result for chunk {chunk.index} {why}: cast it in a function, or choose another dtype="
            )
        return region, cast
