"""Stages that put chunks together: a reducer folds them on the worker, its partials merge anywhere.

A reducer is a monoid with an end: ``create`` gives the empty partial, ``add`` folds one chunk into
a partial, ``merge`` joins two partials, ``finish`` turns the last one into the answer. Only partials
travel, one for each batch and key.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.stages.windows import Along, Every

__all__ = ["Fold", "Reducer", "Together", "Ungrouped", "as_reducer", "check_data", "merge_partials"]

Partials = dict[Hashable, Any]


class Reducer:
    """What to override to fold chunks into one answer.

    `merge` has to be associative and commutative, and ``merge(create(), x)`` has to equal x: batches
    come back in any order. Partials travel by pickle; keep them small.

    Examples
    --------
    >>> import numpy as np
    >>> class Total(Reducer):
    ...     def create(self):
    ...         return 0
    ...     def add(self, partial, chunk):
    ...         return partial + int(chunk.data.sum())
    ...     def merge(self, left, right):
    ...         return left + right
    >>> total = Total()
    >>> total.finish(total.add(total.create(), Chunk((0,), (slice(0, 3),), np.arange(3))))
    3
    """

    def check(self, dtype: npt.DTypeLike, ndim: int | None = None) -> None:
        """Raise `UsageError` if data of `dtype` (with `ndim` axes) can't be reduced so; by default all can.

        Asked before anything is read, where no map comes between the array and the reduction.
        """

    def create(self) -> Any:
        """Return an empty partial."""
        raise NotImplementedError(f"{type(self).__name__} must define create()")

    def add(self, partial: Any, chunk: Chunk) -> Any:
        """Fold `chunk` into `partial` (which may be changed in place) and return it."""
        raise NotImplementedError(f"{type(self).__name__} must define add(partial, chunk)")

    def merge(self, left: Any, right: Any) -> Any:
        """Join two partials (`left` may be changed in place)."""
        raise NotImplementedError(f"{type(self).__name__} must define merge(left, right)")

    def finish(self, partial: Any) -> Any:
        """Turn the last partial into the answer; itself by default."""
        return partial


class Ungrouped(Reducer):
    """Holds the place between ``group_by`` and ``reduce``."""


class Together(Reducer):
    """Several reducers in one pass; the answer is a dict by name."""

    def __init__(self, reducers: Mapping[str, Reducer]) -> None:
        self.reducers = dict(reducers)

    def check(self, dtype: npt.DTypeLike, ndim: int | None = None) -> None:
        """Check the data for each reducer."""
        for reducer in self.reducers.values():
            check_data(reducer, dtype, ndim)

    def create(self) -> dict[str, Any]:
        """Return the empty partials by name."""
        return {name: reducer.create() for name, reducer in self.reducers.items()}

    def add(self, partial: dict[str, Any], chunk: Chunk) -> dict[str, Any]:
        """Fold the chunk into each partial."""
        for name, reducer in self.reducers.items():
            partial[name] = reducer.add(partial[name], chunk)
        return partial

    def merge(self, left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
        """Join partials name by name."""
        for name, reducer in self.reducers.items():
            left[name] = reducer.merge(left[name], right[name])
        return left

    def finish(self, partial: dict[str, Any]) -> dict[str, Any]:
        """Return the answers by name."""
        return {name: reducer.finish(partial[name]) for name, reducer in self.reducers.items()}

    def __repr__(self) -> str:
        return f"Together({', '.join(self.reducers)})"


def as_reducer(reducer: Any) -> Reducer:
    """Accept one reducer, a mapping of names to reducers, or a sequence of them.

    Raises
    ------
    UsageError
        If it is something else, if there are none, or if two have one name.
    """
    if isinstance(reducer, type) and issubclass(reducer, Reducer):
        raise UsageError(f"reduce needs a reducer, got the class {reducer.__name__}: call it, {reducer.__name__}()")
    if isinstance(reducer, Mapping):
        return _together([(str(name), one) for name, one in reducer.items()])
    if isinstance(reducer, Sequence) and not isinstance(reducer, str):
        return _together([(getattr(one, "name", type(one).__name__.lower()), one) for one in reducer])
    missing = [name for name in ("create", "add", "merge", "finish") if not callable(getattr(reducer, name, None))]
    if missing:
        raise UsageError(
            f"reduce needs a Reducer (create, add, merge, finish), got {type(reducer).__name__} "
            f"without {', '.join(missing)}"
        )
    return reducer  # type: ignore[no-any-return]  # anything with the four methods will do


def _together(named: Sequence[tuple[str, Any]]) -> Together:
    if not named:
        raise UsageError("reduce needs at least one reducer, got none")
    reducers = {name: as_reducer(one) for name, one in named}
    if len(reducers) < len(named):
        raise UsageError("two reducers have the same name: give them as a dict, {'low': ..., 'high': ...}")
    return Together(reducers)


def check_data(reducer: Reducer, dtype: npt.DTypeLike, ndim: int | None = None) -> None:
    """Ask a reducer whether it suits the data; what merely looks like a `Reducer` need not know the question."""
    if isinstance(reducer, Reducer):
        reducer.check(dtype, ndim)


@dataclass(frozen=True, slots=True)
class Fold:
    """The reducing end of a stream: one partial for each key.

    `key` is called with the grid index; None is one key, ``()``, for the whole stream. In windows along
    axes, the key of a partial is ``(pane, key)``.
    """

    reducer: Reducer
    key: Callable[[tuple[int, ...]], Hashable] | None = None
    window: Along | Every | None = None

    def add(self, partials: Partials, chunk: Chunk) -> None:
        """Fold `chunk` into the partial of its key."""
        key: Hashable = () if self.key is None else _same_as_itself(self.key(chunk.index), chunk.index)
        if isinstance(self.window, Along):
            for pane, part in self.window.cut(chunk):
                self._add(partials, (pane, key), part)
        else:
            self._add(partials, key, chunk)

    def _add(self, partials: Partials, key: Hashable, chunk: Chunk) -> None:
        partial = partials[key] if key in partials else self.reducer.create()
        partials[key] = self.reducer.add(partial, chunk)


def _same_as_itself(key: Hashable, index: tuple[int, ...]) -> Hashable:
    """Return the key of a group if two chunks can have it."""
    for part in key if isinstance(key, tuple) else (key,):
        if not (part is None or bool(part == part)):  # noqa: PLR0124  # NaN is known by it
            raise UsageError(
                f"group_by: the key of chunk {index} is {key!r}, and {part!r} is not equal to itself, so each such "
                "chunk would be a group of its own: return None, or a word, where there is no value"
            )
    return key


def merge_partials(reducer: Reducer, into: Partials, partials: Partials) -> None:
    """Merge what one batch brought into what there is, key by key."""
    for key, partial in partials.items():
        into[key] = reducer.merge(into[key], partial) if key in into else partial
