"""What a stream of named arrays consists of: opened from a group, or found in objects of xarray.

Metadata are read here, and with them the small coordinates, so that labels are plain data from then on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.engine.events import Category
from zarr_dask_stream.engine.retry import classify
from zarr_dask_stream.errors import StoreError, UsageError
from zarr_dask_stream.source.aligned import Named, align, check_spanned, parse_named_region
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.blocks import Blocks
from zarr_dask_stream.source.chunk import Chunk, Variables
from zarr_dask_stream.source.grid import Region
from zarr_dask_stream.source.group import Group, guess
from zarr_dask_stream.source.labels import Label, Labels, hidden, label_of
from zarr_dask_stream.source.reader import read_chunks
from zarr_dask_stream.source.selection import ChunkPlan
from zarr_dask_stream.source.traced import Traced, is_loaded, trace
from zarr_dask_stream.stages.transform import Decode

__all__ = ["Decoder", "Opened", "of_dataarray", "of_dataset", "of_group"]

Values = npt.NDArray[Any]
Step = Callable[[Values], Values]
Shipped = dict[str, tuple[Label, Values]]

# A coordinate up to this size goes along with the stream; a larger one is read with the items.
_SMALL_BYTES = 1 << 24
# How often a chunk of one is tried, by what went wrong; nothing else is tried again.
_TRIES = {
    Category.TRANSIENT: 8,
    Category.THROTTLED: 8,
    Category.TIMEOUT: 3,
    Category.CREDENTIALS: 2,
    Category.CORRUPT: 2,
}
_WAIT_S = 0.02  # before the second try, twice as long before each further one
# What an encoding says about the way of storing, not about the values.
_STORAGE = {"chunks", "preferred_chunks", "shards", "compressors", "filters", "serializer", "source", "original_shape"}


@dataclass(frozen=True)
class Opened:
    """What is to be streamed.

    Attributes
    ----------
    spec : ArraySpec
        The array, or the first of those with all dimensions.
    blocks : Blocks or None
        How several arrays are cut.
    labels : Labels or None
        What labels their items; None where dimensions have no names.
    box : tuple of slice
        Which part of the grid.
    decode : Decode or None
        How stored values become those that xarray shows.
    """

    spec: ArraySpec
    blocks: Blocks | None
    labels: Labels | None
    box: Region
    decode: Decode | None = None


@dataclass(frozen=True)
class Decoder:
    """Applies to the arrays of an item what xarray would apply to them.

    Attributes
    ----------
    steps : mapping of str to tuple of callable
        By array.
    dtypes : mapping of str to numpy.dtype
        What comes out.
    """

    steps: Mapping[str, tuple[Step, ...]]
    dtypes: Mapping[str, np.dtype[Any]] = field(default_factory=dict)

    def __call__(self, chunk: Chunk) -> Any:
        """Return the decoded data."""
        data = chunk.data
        if not isinstance(data, Variables):
            (steps,) = self.steps.values()
            return _apply(steps, data)
        arrays, coords = (
            {name: _apply(self.steps.get(name, ()), values) for name, values in some.items()}
            for some in (data, data.coords)
        )
        return Variables(arrays, axes=data.axes, coords=coords)


def _apply(steps: Sequence[Step], values: Values) -> Values:
    for step in steps:
        values = np.asarray(step(values))
    return values


def _decode(steps: Mapping[str, tuple[Step, ...]], dtypes: Mapping[str, np.dtype[Any]]) -> Decode | None:
    return Decode(Decoder(dict(steps), dict(dtypes))) if any(steps.values()) else None


# -- from a group ---------------------------------------------------------------------------------


def of_group(group: Group, variables: Any, coords: Any, chunks: Any, region: Any) -> Opened:
    """Open arrays of a group, and their coordinates.

    Raises
    ------
    UsageError
        If a variable is not there, or the arrays don't go together.
    StoreError
        If a coordinate can't be read.
    """
    names = _chosen(variables, group.variables, f"arrays in {group.url}")
    if not names:
        there = guess("", group.coordinates) if group.listed else "; the store can't be listed"
        raise UsageError(f"{group.url} has no variables to stream{there}: name some")
    arrays = {name: Named(group.array(name), group.entry(name).dims) for name in names}
    main = _main(arrays)
    labelled = all(one.dims is not None for one in arrays.values())
    dims = {dim for one in arrays.values() for dim in one.dims or ()}
    wanted = _coordinates(group, dims, coords) if labelled else []
    shipped: Shipped = {}
    for name in wanted:
        spec, own = group.array(name), group.entry(name).dims or ()
        if name in arrays:
            continue
        if len(own) <= 1 and spec.nbytes <= _SMALL_BYTES:
            shipped[name] = label_of(spec, own), read_box(spec, tuple(slice(0, n) for n in spec.shape))
        else:
            arrays[name] = Named(spec, own, coord=True)
    if labelled and (chunks is None or isinstance(chunks, Mapping)):
        chunks = dict.fromkeys(_letters(group, arrays), -1) | dict(chunks or {})
    blocks = align(arrays, chunks)
    assert blocks.dims is not None
    labels = None
    if labelled:
        known = {name: label_of(one.spec, one.dims or ()) for name, one in arrays.items()}
        attrs = hidden(group.attributes, 2)  # as xarray does in either version
        coordinates = tuple(name for name in (*known, *shipped) if name in group.coordinates)
        labels = Labels(blocks.dims, known, shipped, coordinates, tuple(names), attrs)
    box = parse_named_region(region, blocks.dims, blocks.grid.shape)
    check_spanned(blocks, box)
    return Opened(main, blocks, labels, box)


def _chosen(variables: Any, default: Sequence[str], what: str) -> list[str]:
    if variables is None:
        return list(default)
    names = [variables] if isinstance(variables, str) else variables
    try:
        names = list(names)
    except TypeError:
        names = [None]
    if not all(isinstance(name, str) for name in names) or isinstance(variables, Mapping):
        raise UsageError(f"variables is a name or a list of names of {what}, got {variables!r}")
    if len(set(names)) < len(names):
        raise UsageError(f"variables names something twice: {variables!r}")
    return names


def _letters(group: Group, arrays: Mapping[str, Named]) -> set[str]:
    """Return the dimensions along which xarray joins single characters to words: no box may cut those."""
    letters = [one.dims[-1] for one in arrays.values() if one.dims and one.spec.dtype == np.dtype("S1")]
    return {dim for dim in letters if dim not in group.entries}


def _main(arrays: Mapping[str, Named]) -> ArraySpec:
    return max((one.spec for one in arrays.values()), key=lambda spec: len(spec.shape))


def _coordinates(group: Group, dims: set[str], coords: Any) -> list[str]:
    if not isinstance(coords, bool):
        names = _chosen(coords, (), f"coordinates in {group.url}")
        for name in names:
            own = group.entry(name).dims
            if own is None or not set(own) <= dims:
                raise UsageError(f"coords: {name!r} does not lie along dimensions of the variables, {sorted(dims)}")
        return names
    if not coords:
        return []
    if not group.listed:
        for name in (*dims, *(word for entry in list(group.entries.values()) for word in entry.coordinates)):
            group.find(name)
    found = ((name, group.entries[name].dims) for name in sorted(group.coordinates))
    return [name for name, own in found if own is not None and set(own) <= dims]


def read_box(spec: ArraySpec, region: Region) -> Values:
    """Read a part of an array that fits into memory, in this thread; what may heal is tried again.

    Raises
    ------
    StoreError
        If it can't be read.
    """
    plan = ChunkPlan(spec.grid, region)
    out = np.empty(tuple(part.stop - part.start for part in region), spec.dtype)
    out[...] = spec.fill
    left, attempt = list(plan), 0
    while left:
        if attempt:
            time.sleep(_WAIT_S * 2**attempt)
        attempt += 1
        failed = []
        for read in read_chunks(spec, left, box=region, fill=False):
            if read.error is not None:
                failed.append(read.number)
                if attempt >= _TRIES.get(classify(read.error), 1):
                    raise StoreError(f"coordinate {spec.url} can't be read: {read.error}") from read.error
            elif read.data is not None:
                places = zip(plan.region(read.number), region, strict=True)
                out[tuple(slice(p.start - r.start, p.stop - r.start) for p, r in places)] = read.data
        left = failed
    return out


# -- from xarray ----------------------------------------------------------------------------------


def of_dataset(dataset: Any, variables: Any, coords: Any, chunks: Any) -> Opened:
    """Find the stored arrays behind a Dataset.

    Raises
    ------
    UsageError
        If a variable is not there, can't be traced to a stored array, or they don't go together.
    StoreError
        If a coordinate can't be read.
    """
    names = _chosen(variables, [str(name) for name in dataset.data_vars], "variables of the Dataset")
    if not names:
        raise UsageError(f"the Dataset has no variables to stream{guess('', map(str, dataset.coords))}: name some")
    for name in names:
        if name not in dataset.variables:
            raise UsageError(f"there is no variable {name!r} in the Dataset{guess(name, map(str, dataset.variables))}")
    finds = {name: _Found(name, dataset.variables[name]) for name in names}
    of_these = dataset[names].coords
    wanted = _coords_of(of_these, coords)
    places = _places(finds.values())
    shipped: Shipped = {}
    left_out = []
    for name in wanted:
        if name in finds:
            continue
        label, values = _shipped(name, of_these[name].variable, most_axes=1)
        if values is not None:
            shipped[name] = label, values
        elif is_loaded(of_these[name]):
            left_out.append(name)
        else:
            finds[name] = _Found(name, of_these[name].variable, coord=True)
    blocks = align({name: Named(found.traced.spec, found.dims, found.coord) for name, found in finds.items()}, chunks)
    assert blocks.dims is not None
    places = _places(finds.values())
    box = tuple(places[dim][0] for dim in blocks.dims)
    check_spanned(blocks, box)
    labels = Labels(
        blocks.dims,
        {name: found.label for name, found in finds.items()},
        shipped,
        tuple(name for name in (*finds, *shipped) if name in dataset.coords),
        tuple(names),
        dict(dataset.attrs),
        origin={dim: part.start for dim, part in zip(blocks.dims, box, strict=True)},
        shown=True,
        left_out=tuple(left_out),
    )
    main = max((found.traced.spec for found in finds.values() if not found.coord), key=lambda spec: len(spec.shape))
    steps = {name: found.traced.steps for name, found in finds.items()}
    dtypes = {name: found.traced.dtype for name, found in finds.items()}
    return Opened(main, blocks, labels, box, _decode(steps, dtypes))


def of_dataarray(array: Any) -> Opened:
    """Find the stored array behind a DataArray.

    Raises
    ------
    UsageError
        If it can't be traced to a stored array.
    StoreError
        If a coordinate can't be read.
    """
    title = None if array.name is None else str(array.name)
    name = title or "_".join((*map(str, array.dims), "values"))
    found = _Found(name, array.variable)
    shipped: Shipped = {}
    left_out = []
    for coord in map(str, array.coords):
        if coord != name:
            label, values = _shipped(coord, array.coords[coord].variable, most_axes=None)
            if values is None:
                left_out.append(coord)
            else:
                shipped[coord] = label, values
    box = found.traced.region
    labels = Labels(
        found.dims,
        {name: found.label},
        shipped,
        tuple(map(str, array.coords)),
        single=name,
        title=title,
        origin={dim: part.start for dim, part in zip(found.dims, box, strict=True)},
        shown=True,
        left_out=tuple(left_out),
    )
    decode = _decode({name: found.traced.steps}, {name: found.traced.dtype})
    return Opened(found.traced.spec, None, labels, box, decode)


class _Found:
    """A variable of xarray, traced to a stored array."""

    def __init__(self, name: str, variable: Any, *, coord: bool = False) -> None:
        self.traced = trace(variable, name)
        self.coord = coord
        own = tuple(map(str, variable.dims))
        encoding = {key: value for key, value in variable.encoding.items() if key not in _STORAGE}
        self.label = Label(own, dict(variable.attrs), encoding=encoding, pinned=self.traced.pinned)
        self.dims = _dims(self.traced, own)


def _dims(traced: Traced, shown: tuple[str, ...]) -> tuple[str, ...]:
    """Name all axes of a stored array: one along which a position was taken is named after the position."""
    rest = iter(shown)
    stored = traced.spec.dimension_names or (None,) * len(traced.place)
    return tuple(
        f"{name or f'axis_{axis}'}[{part}]" if isinstance(part, int) else next(rest)
        for axis, (part, name) in enumerate(zip(traced.place, stored, strict=True))
    )


def _places(finds: Any) -> dict[str, tuple[slice, str]]:
    """Return what part of each dimension is shown; all variables have to show the same."""
    places: dict[str, tuple[slice, str]] = {}
    for found in finds:
        for dim, part in zip(found.dims, found.traced.region, strict=True):
            name = found.traced.spec.path
            known, first = places.setdefault(dim, (part, name))
            if (known.start, known.stop) != (part.start, part.stop):
                raise UsageError(
                    f"along dimension {dim!r}, {known.start}:{known.stop} of {first!r} is shown beside "
                    f"{part.start}:{part.stop} of {name!r}: only what lies at the same place in store goes together"
                )
    return places


def _coords_of(coords: Any, wanted: Any) -> list[str]:
    there = [str(name) for name in coords]
    if isinstance(wanted, bool):
        return there if wanted else []
    names = _chosen(wanted, (), "coordinates of the Dataset")
    for name in names:
        if name not in there:
            raise UsageError(f"coords: there is no coordinate {name!r} of these variables{guess(name, there)}")
    return names


def _shipped(name: str, variable: Any, *, most_axes: int | None) -> tuple[Label, Values | None]:
    """Return a coordinate with its values, or with None where it is too large to go along."""
    if "MultiIndex" in type(variable._data).__name__:  # noqa: SLF001  # as in traced
        raise UsageError(f"coordinate {name!r} is one of several levels: .reset_index(...) or drop it first")
    encoding = {key: value for key, value in variable.encoding.items() if key not in _STORAGE}
    label = Label(tuple(map(str, variable.dims)), dict(variable.attrs), encoding=encoding)
    small = math.prod(variable.shape) * max(variable.dtype.itemsize, 1) <= _SMALL_BYTES
    if is_loaded(variable):
        return label, np.asarray(variable.values) if small else None
    if not small or (most_axes is not None and variable.ndim > most_axes):
        return label, None
    try:
        traced = trace(variable, name)
    except UsageError as error:
        raise UsageError(f"coordinate {error}; or leave it out: .drop_vars({name!r})") from None
    values = _apply(traced.steps, read_box(traced.spec, traced.region))
    return label, np.squeeze(values, traced.pinned)
