"""Reducers for items that hold several arrays: one for each array, or the same for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.group import guess
from zarr_dask_stream.stages.combine import Reducer, Together, as_reducer, check_data

__all__ = ["Each", "Kind", "each"]


@dataclass(frozen=True)
class Kind:
    """What is known of an array that is to be reduced.

    Parameters
    ----------
    dtype : numpy.dtype
        Of its values.
    ndim : int
        Its axes.
    absent : tuple of str
        Dimensions along which there are several items, and which the array has not.
    """

    dtype: np.dtype[Any]
    ndim: int
    absent: tuple[str, ...] = ()


class Each(Together):
    """A reducer for each array of an item; the answer is a dict by the arrays' names.

    Examples
    --------
    >>> from zarr_dask_stream import reducers
    >>> from zarr_dask_stream.source.chunk import Variables
    >>> reducer = Each({"t2m": reducers.max()})
    >>> item = Chunk((0,), (slice(0, 2),), Variables({"t2m": np.array([3, 4])}, axes={"t2m": (0,)}))
    >>> reducer.finish(reducer.add(reducer.create(), item))
    {'t2m': np.int64(4)}
    """

    def add(self, partial: dict[str, Any], chunk: Chunk) -> dict[str, Any]:
        """Fold each array into its partial."""
        for name, reducer in self.reducers.items():
            partial[name] = reducer.add(partial[name], chunk.part(name))
        return partial

    def check(self, dtype: npt.DTypeLike, ndim: int | None = None) -> None:
        """Nothing to say about one dtype: `each` has asked for each array."""

    def __repr__(self) -> str:
        return f"Each({', '.join(f'{name}: {reducer!r}' for name, reducer in self.reducers.items())})"


def each(reducer: Any, kinds: Mapping[str, Kind]) -> Each:
    """Turn what a caller writes into a reducer for each array.

    Parameters
    ----------
    reducer : Reducer, sequence of these, or mapping
        A mapping whose keys are names of arrays gives each its own reducer (or several), and leaves the other
        arrays out. Everything else, a mapping to other names included, is done with each array.
    kinds : mapping of str to Kind
        The arrays.

    Raises
    ------
    UsageError
        If a mapping names arrays and other things, an array would be counted several times, or a reducer
        does not suit the data.

    Examples
    --------
    >>> from zarr_dask_stream import reducers
    >>> kinds = {"t2m": Kind(np.dtype("f4"), 3), "tp": Kind(np.dtype("f4"), 3)}
    >>> each(reducers.mean(), kinds)
    Each(t2m: mean(), tp: mean())
    >>> each({"tp": reducers.sum()}, kinds)
    Each(tp: sum())
    >>> each({"low": reducers.min(), "high": reducers.max()}, kinds)
    Each(t2m: Together(low, high), tp: Together(low, high))
    """
    named = [key for key in reducer if key in kinds] if isinstance(reducer, Mapping) else []
    if named:
        other = [key for key in reducer if key not in kinds]
        if other:
            raise UsageError(
                f"reduce: {', '.join(map(repr, named))} are arrays of the items and {', '.join(map(repr, other))} not"
                f"{guess(other[0], kinds)} Give a dict by array, or one of reducers for all arrays"
            )
        chosen = {name: as_reducer(reducer[name]) for name in named}
    else:
        chosen = {name: as_reducer(reducer) for name in kinds}
    for name, one in chosen.items():
        _check(name, one, kinds[name], kinds)
    return Each(chosen)


def _check(name: str, reducer: Reducer, kind: Kind, kinds: Mapping[str, Kind]) -> None:
    if kind.absent:
        full: Sequence[str] = [other for other, k in kinds.items() if not k.absent]
        raise UsageError(
            f"reduce: {name!r} has not the dimension {', '.join(map(repr, kind.absent))}, along which it comes with "
            f"several items, so it would be counted several times. Reduce the others by name "
            f"({', '.join(map(repr, full))}), or give it a stream of its own"
        )
    try:
        check_data(reducer, kind.dtype, kind.ndim)
    except UsageError as error:
        raise UsageError(f"{name!r}: {error}") from None
