"""From a variable of xarray back to the stored array that it shows.

xarray keeps what it has not loaded yet as a nest of small objects: a stored array inside, around it what was
selected from it and the functions that decode it, and a Dask graph around that where it was opened in chunks.
The nest is walked by the names of its classes, and whatever is not known here for certain is refused: a
guess would stream other numbers than those the caller sees.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import ArraySpec, open_array

__all__ = ["Traced", "is_loaded", "kind_of", "trace"]

Values = npt.NDArray[Any]
Place = slice | int

# Classes that hand through what is inside them.
_PLAIN = {"MemoryCachedArray", "CopyOnWriteArray", "ImplicitToExplicitIndexingAdapter", "NativeEndiannessArray"}
_LOADED = {"ndarray", "NumpyIndexingAdapter", "PandasIndexingAdapter", "NdArrayLikeIndexingAdapter"}
# What tasks of a Dask graph may call: the first makes blocks of an array, the second takes slices of blocks.
_GETTERS = {("dask.array.core", name) for name in ("getter", "getter_nofancy", "getter_inline")}
_GETITEMS = {("_operator", "getitem"), ("dask.array.chunk", "getitem")}
_ALIAS = ("", "alias")
_IN_MEMORY = "its values are in memory"


@dataclass(frozen=True)
class Traced:
    """A stored array, what of it is shown, and how its values become those that are shown.

    Attributes
    ----------
    spec : ArraySpec
        The stored array.
    place : tuple of slice or int
        What was selected, for each axis of the stored array.
    steps : tuple of callable
        To be applied to stored values one after the other.
    dtype : numpy.dtype
        Of the values that are shown.
    """

    spec: ArraySpec
    place: tuple[Place, ...]
    steps: tuple[Callable[[Values], Values], ...]
    dtype: np.dtype[Any]

    @property
    def pinned(self) -> tuple[int, ...]:
        """Axes that a number was selected along."""
        return tuple(axis for axis, part in enumerate(self.place) if isinstance(part, int))

    @property
    def region(self) -> tuple[slice, ...]:
        """What was selected, as slices."""
        return tuple(slice(part, part + 1) if isinstance(part, int) else part for part in self.place)


class _Unknown(Exception):  # noqa: N818  # never leaves this module
    """What was found instead of something known."""


def kind_of(source: Any) -> str:
    """Return "Dataset" or "DataArray" for objects of xarray, else nothing; never imports it."""
    xarray = sys.modules.get("xarray")
    for kind in ("Dataset", "DataArray"):
        known = getattr(xarray, kind, None)
        if known is not None and isinstance(source, known):
            return kind
    return ""


def is_loaded(variable: Any) -> bool:
    """Whether the values of a variable are in memory."""
    data = _data(variable)
    while type(data).__name__ in _PLAIN:
        data = data.array
    return type(data).__name__ in _LOADED


def _data(variable: Any) -> Any:
    # What ``.data`` shows may have been computed first.
    return getattr(getattr(variable, "variable", variable), "_data", None)


def trace(variable: Any, name: Any) -> Traced:
    """Find the stored array behind a variable.

    Parameters
    ----------
    variable : xarray.Variable or xarray.DataArray
        What was opened, perhaps sliced.
    name : str
        Its name, for messages.

    Raises
    ------
    UsageError
        If it can't be traced to one box of one stored array.

    Examples
    --------
    >>> import xarray, zarr
    >>> store = zarr.storage.MemoryStore()
    >>> _ = zarr.create_group(store).create_array("t", shape=(9, 4), dtype="i2", dimension_names=["y", "x"])
    >>> dataset = xarray.open_zarr(store, consolidated=False)
    >>> traced = trace(dataset.t.isel(y=slice(2, 8)).isel(y=slice(1, 3), x=-1), "t")
    >>> traced.spec.path, traced.place
    ('t', (slice(3, 5, None), 3))
    """
    if is_loaded(variable):
        raise UsageError(
            f"{name!r} is in memory, so there is nothing stored to stream: it was loaded or computed. Open it again, "
            f"with xarray.open_zarr(..., chunks=None){_of_text(variable)}"
        )
    try:
        return _trace(variable)
    except _Unknown as problem:
        raise UsageError(
            f"{name!r} can't be traced back to a stored array: {problem}. Slices of step 1 and single positions of "
            "what open_zarr or open_dataset(engine='zarr') has opened can; do everything else in "
            f".map(...){_of_text(variable) if problem.args[0] == _IN_MEMORY else ''}"
        ) from None


def _of_text(variable: Any) -> str:
    # Releases up to 2026.7, which our lower bound allows, turn text into objects as they open a store.
    if variable.dtype.kind not in "OT":
        return ""
    return (
        ". Older releases of xarray load all text as they open a store: take a newer one, leave the text out, or pass "
        "the URL instead of what was opened"
    )


def _trace(variable: Any) -> Traced:
    data, keys, steps = _data(variable), [], []
    if hasattr(data, "dask") and type(data).__module__.startswith("dask.array"):
        data, key = _through_dask(data)
        keys.append(key)
    while (kind := type(data).__name__) != "ZarrArrayWrapper":
        if kind == "LazilyIndexedArray":
            keys.append(tuple(data.key.tuple))
        elif kind == "_ElementwiseFunctionArray":
            steps.append(data.func)
        elif kind == "BoolTypeArray":
            steps.append(_as_bool)
        elif kind not in _PLAIN:
            raise _Unknown(_explain(kind))
        data = data.array
    spec = open_array(data.get_array())
    if spec.shape != tuple(data.shape):
        raise _Unknown(f"it was opened with shape {tuple(data.shape)}, and has {spec.shape} now: open it again")
    place: tuple[Place, ...] = tuple(slice(0, n) for n in spec.shape)
    for key in reversed(keys):
        place = _select(place, key)
    if np.dtype(data.dtype).kind == "O" and spec.dtype.kind == "T":
        steps.append(_as_objects)
    return Traced(spec, place, tuple(reversed(steps)), variable.dtype)


def _explain(kind: str) -> str:
    if "Vectorized" in kind:
        return "its axes were reordered, or points of it picked"
    if kind in _LOADED:
        return _IN_MEMORY
    if kind == "StackedBytesArray":
        return "its characters were joined to strings (open it with concat_characters=False)"
    return f"there is a {kind} where a Zarr array was expected"


def _as_bool(values: Values) -> Values:
    return values.astype(bool)


def _as_objects(values: Values) -> Values:
    return values.astype(object)


def _select(place: tuple[Place, ...], key: Sequence[Any]) -> tuple[Place, ...]:
    """Select from what was selected before."""
    left = [axis for axis, part in enumerate(place) if isinstance(part, slice)]
    if len(key) != len(left):
        raise _Unknown(f"a selection names {len(key)} axes where {len(left)} were expected")
    found = list(place)
    for axis, entry in zip(left, key, strict=True):
        part = place[axis]
        assert isinstance(part, slice)
        found[axis] = _cut(entry, part.start, part.stop)
    return tuple(found)


def _cut(entry: Any, start: int, stop: int) -> Place:
    """Return what `entry` selects from ``start:stop``, in the coordinates of those."""
    if isinstance(entry, slice):
        first, last, step = entry.indices(stop - start)
        if step != 1:
            raise _Unknown(f"it was sliced with step {step}")
        return slice(start + first, start + max(first, last))
    if isinstance(entry, (int, np.integer)) and not isinstance(entry, bool):
        at = int(entry) + (stop - start if entry < 0 else 0)
        if 0 <= at < stop - start:
            return start + at
    raise _Unknown("single elements of it were picked by a list of positions or a mask")


# -- through a Dask graph -------------------------------------------------------------------------


@dataclass
class _Blocks:
    """A Dask array as blocks of what it was made from.

    `spans` has, for each axis of the source, the ``(start, stop)`` of each block, or a number where one
    position was taken; `axes` says which axis of the source each axis of the array is.
    """

    source: Any
    spans: list[dict[int, tuple[int, int]] | int]
    axes: list[int]


def _through_dask(array: Any) -> tuple[Any, tuple[Place, ...]]:
    blocks = _blocks(array.dask.layers, array.name)
    if len(blocks.axes) != array.ndim or sorted(blocks.axes) != blocks.axes:
        raise _Unknown("its axes were reordered")
    return blocks.source, tuple(_joined(spans) for spans in blocks.spans)


def _joined(spans: dict[int, tuple[int, int]] | int) -> Place:
    """Join blocks that follow one another to one slice."""
    if isinstance(spans, int):
        return spans
    parts = [spans[at] for at in sorted(spans)]
    if sorted(spans) != list(range(len(spans))) or any(a[1] != b[0] for a, b in itertools.pairwise(parts)):
        raise _Unknown("its Dask graph takes several pieces, or pieces in another order")
    return slice(parts[0][0], parts[-1][1]) if parts else slice(0, 0)


def _blocks(layers: Mapping[str, Any], name: str) -> _Blocks:
    layer = layers.get(name)
    tasks = {} if layer is None else dict(layer)
    tasks = {key: task for key, task in tasks.items() if isinstance(key, tuple) and key[0] == name}
    functions = {_function(task) for task in tasks.values()}
    if functions and functions <= _GETTERS:
        return _from_array(layers, tasks)
    if functions and functions <= {*_GETITEMS, _ALIAS}:
        return _sliced(layers, tasks)
    shown = ", ".join(sorted({function or module or "unknown" for module, function in functions}))
    raise _Unknown(f"its Dask graph does more than slice ({shown or 'nothing known'})")


def _function(task: Any) -> tuple[str, str]:
    if type(task).__name__ == "Alias":
        return _ALIAS
    function = getattr(task, "func", None)
    return getattr(function, "__module__", None) or "", getattr(function, "__name__", None) or ""


def _taken(task: Any, layers: Mapping[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Return which block a task takes, and what of it; None for all."""
    if _function(task) == _ALIAS:
        target = getattr(task.target, "key", task.target)
        if not isinstance(target, tuple):
            raise _Unknown("its Dask graph selects in an unknown way")
        return target, None
    return _reference(task.args[0]), _value(task.args[1], layers)


def _from_array(layers: Mapping[str, Any], tasks: dict[Any, Any]) -> _Blocks:
    """Blocks as ``dask.array.from_array`` makes them: each takes slices of one object."""
    sources: dict[int, Any] = {}
    spans: list[dict[int, tuple[int, int]]] = []
    for key, task in tasks.items():
        source, slices = _value(task.args[0], layers), _value(task.args[1], layers)
        sources[id(source)] = source
        spans = spans or [{} for _ in slices]
        if len(slices) != len(spans) or len(key) != len(slices) + 1:
            raise _Unknown("its Dask graph has blocks of different shapes")
        for axis, (at, part) in enumerate(zip(key[1:], slices, strict=True)):
            if not isinstance(part, slice) or part.step not in (None, 1):
                raise _Unknown("its Dask graph has blocks with gaps")
            _note(spans[axis], at, (part.start, part.stop))
    if len(sources) != 1:
        raise _Unknown("its Dask graph begins with several arrays")
    (source,) = sources.values()
    return _Blocks(source, list(spans), list(range(len(spans))))


def _sliced(layers: Mapping[str, Any], tasks: dict[Any, Any]) -> _Blocks:
    """Blocks of which slices or single positions were taken."""
    taken = {key: _taken(task, layers) for key, task in tasks.items()}
    names = {block[0] for block, _ in taken.values()}
    if len(names) != 1:
        raise _Unknown("its Dask graph takes pieces of several arrays")
    inner = _blocks(layers, names.pop())
    spans: list[dict[int, tuple[int, int]] | int] = list(inner.spans)
    axes: list[int] | None = None
    for axis in inner.axes:
        spans[axis] = {}
    for key, ((_, *places), selection) in taken.items():
        entries = (slice(None),) * len(inner.axes) if selection is None else selection
        if not isinstance(entries, tuple) or len(entries) != len(inner.axes) or len(places) != len(inner.axes):
            raise _Unknown("its Dask graph selects in an unknown way")
        kept = []
        for axis, at, entry in zip(inner.axes, places, entries, strict=True):
            known = inner.spans[axis]
            assert isinstance(known, dict)
            if at not in known:
                raise _Unknown("its Dask graph takes blocks that are not there")
            cut = _cut(entry, *known[at])
            if isinstance(cut, int):
                if spans[axis] not in ({}, cut):
                    raise _Unknown("its Dask graph takes several positions")
                spans[axis] = cut
            else:
                kept.append((axis, (cut.start, cut.stop)))
        if axes not in (None, [axis for axis, _ in kept]) or len(key) != len(kept) + 1:
            raise _Unknown("its Dask graph has blocks of different shapes")
        axes = [axis for axis, _ in kept]
        for at, (axis, span) in zip(key[1:], kept, strict=True):
            found = spans[axis]
            assert isinstance(found, dict)
            _note(found, at, span)
    return _Blocks(inner.source, spans, axes or [])


def _note(spans: dict[int, tuple[int, int]], at: int, span: tuple[int, int]) -> None:
    if spans.setdefault(at, span) != span:
        raise _Unknown("its Dask graph takes different pieces of the same array")


def _reference(argument: Any) -> tuple[Any, ...]:
    """Return the key of a block that a task takes."""
    key = getattr(argument, "key", None)
    if type(argument).__name__ != "TaskRef" or not isinstance(key, tuple):
        raise _Unknown("its Dask graph selects in an unknown way")
    return key


def _value(argument: Any, layers: Mapping[str, Any]) -> Any:
    """Return what an argument of a task stands for."""
    kind = type(argument).__name__
    if kind == "DataNode":
        return argument.value
    if kind == "TaskRef":
        layer = layers.get(argument.key)
        if layer is None:
            raise _Unknown("its Dask graph begins in an unknown way")
        return _value(layer[argument.key], layers)
    if kind in {"Task", "Alias"}:
        raise _Unknown("its Dask graph computes something")
    return argument
