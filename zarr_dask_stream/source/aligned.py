"""The common grid of several arrays, by the names of their dimensions.

Along each dimension a box is as long as the least common multiple of the arrays' chunks, so that each chunk
lies in one box. An array that has not all dimensions of the grid is read again for each task that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.blocks import Blocks, Member, common_chunks
from zarr_dask_stream.source.grid import ChunkGrid, Region
from zarr_dask_stream.source.group import guess
from zarr_dask_stream.source.selection import ChunkPlan, parse_region

__all__ = ["Named", "align", "check_spanned", "parse_named_region", "recut"]


@dataclass(frozen=True)
class Named:
    """An array and what its axes are called.

    Parameters
    ----------
    spec : ArraySpec
        The array.
    dims : tuple of str or None
        Names of its axes; None where they have none.
    coord : bool
        Whether it only labels the others: it does not make boxes larger.
    """

    spec: ArraySpec
    dims: tuple[str, ...] | None
    coord: bool = False


def align(arrays: Mapping[str, Named], chunks: Any = None) -> Blocks:
    """Lay boxes over several arrays.

    Parameters
    ----------
    arrays : mapping of str to Named
        The arrays.
    chunks : int, or mapping of str to int, optional
        Elements of a box along dimensions, in Dask's words: -1 for all, None for the common multiple.

    Returns
    -------
    Blocks
        Its dimensions are those of the arrays, in the order in which they first appear. Where no array has
        names and all have one shape, they are called "dim_0", "dim_1" and so on.

    Raises
    ------
    UsageError
        If names are missing, lengths of a dimension differ, or boxes would be too large.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> wide = open_array(zarr.create_array({}, shape=(9, 8), chunks=(3, 4), dtype="i2"))
    >>> high = open_array(zarr.create_array({}, shape=(9,), chunks=(2,), dtype="i2"))
    >>> blocks = align({"wide": Named(wide, ("y", "x")), "high": Named(high, ("y",))})
    >>> blocks.dims, blocks.grid.shape, blocks.grid.chunks
    (('y', 'x'), (9, 8), (6, 4))
    """
    dims_of = _named(arrays)
    lengths = _lengths(arrays, dims_of)
    multiples = {
        dim: sorted({
            c
            for name, one in arrays.items()
            for d, c in zip(dims_of[name], one.spec.chunks, strict=True)
            if d == dim and not one.coord
        })
        for dim in lengths
    }  # fmt: skip
    whole = [name for name, dims in dims_of.items() if len(dims) == len(lengths)] or list(arrays)
    asked = _asked(chunks, lengths)
    shape = tuple(lengths.values())
    item_nbytes = sum(arrays[name].spec.item_nbytes for name in whole)
    if all(dim in asked for dim in lengths):
        size = tuple(asked[dim] for dim in lengths)
    else:
        size = common_chunks([[asked[dim]] if dim in asked else multiples[dim] for dim in lengths], shape, item_nbytes)
    grid = ChunkGrid(shape, size)
    order = {dim: axis for axis, dim in enumerate(lengths)}
    members = tuple(
        (name, Member(one.spec, tuple(order[dim] for dim in dims_of[name]), one.coord)) for name, one in arrays.items()
    )
    return Blocks(grid, members, named=True, dims=tuple(lengths))


def recut(blocks: Blocks, chunks: Any) -> Blocks:
    """Lay boxes of another shape over the same arrays.

    Parameters
    ----------
    blocks : Blocks
        As `align` made them.
    chunks : int, sequence, or mapping of str to int
        Elements of a box along dimensions: -1 for all, None to keep what there is.

    Raises
    ------
    UsageError
        If there is no such dimension, or a length makes no sense.
    """
    dims = blocks.dims or ()
    asked = _asked(chunks, dict(zip(dims, blocks.grid.shape, strict=True)))
    size = tuple(asked.get(dim, length) for dim, length in zip(dims, blocks.grid.chunks, strict=True))
    return replace(blocks, grid=ChunkGrid(blocks.grid.shape, size))


def _named(arrays: Mapping[str, Named]) -> dict[str, tuple[str, ...]]:
    """Return the names of the axes of each array, made up where that is safe."""
    nameless = [name for name, one in arrays.items() if one.dims is None]
    if nameless:
        shapes = {one.spec.shape for one in arrays.values()}
        if len(nameless) < len(arrays) or len(shapes) > 1:
            shown = ", ".join(f"{name!r} {list(one.spec.shape)}" for name, one in arrays.items())
            raise UsageError(
                f"arrays go together by their dimension names, and {', '.join(map(repr, nameless))} "
                f"{'have' if len(nameless) > 1 else 'has'} none; without names all must have one shape, got {shown}. "
                "Give the arrays dimension_names (version 3) or an attribute _ARRAY_DIMENSIONS (version 2)"
            )
        return {name: tuple(f"dim_{axis}" for axis in range(len(one.spec.shape))) for name, one in arrays.items()}
    for name, one in arrays.items():
        if one.dims is not None and len(set(one.dims)) < len(one.dims):
            raise UsageError(f"{name!r} has a dimension twice, {one.dims}: stream it alone with stream_chunks")
    return {name: one.dims or () for name, one in arrays.items()}


def _lengths(arrays: Mapping[str, Named], dims_of: Mapping[str, tuple[str, ...]]) -> dict[str, int]:
    found: dict[str, tuple[int, str]] = {}
    for name, one in arrays.items():
        for dim, length in zip(dims_of[name], one.spec.shape, strict=True):
            known, first = found.setdefault(dim, (length, name))
            if known != length:
                raise UsageError(
                    f"dimension {dim!r} has {known:,} elements in {first!r} and {length:,} in {name!r}: only arrays "
                    "that agree about the lengths of their dimensions go together"
                )
    return {dim: length for dim, (length, _) in found.items()}


def _asked(chunks: Any, lengths: Mapping[str, int]) -> dict[str, int]:
    if chunks is None:
        return {}
    if isinstance(chunks, (tuple, list)):
        if len(chunks) != len(lengths):
            raise UsageError(f"chunks has {len(chunks)} lengths for the dimensions {tuple(lengths)}: {chunks!r}")
        chunks = dict(zip(lengths, chunks, strict=True))
    given = chunks if isinstance(chunks, Mapping) else dict.fromkeys(lengths, chunks)
    for dim in given:
        if dim not in lengths:
            raise UsageError(f"chunks names dimension {dim!r}, which none of the arrays has{guess(dim, lengths)}")
    return {dim: _length(dim, length, lengths[dim]) for dim, length in given.items() if length is not None}


def _length(dim: str, length: Any, n: int) -> int:
    number = as_whole(length)
    if number is None or not (number >= 1 or number == -1):
        raise UsageError(
            f"chunks along {dim!r} is a number of elements, -1 for all or None for the common multiple of the "
            f"arrays' chunks, got {length!r}"
        )
    return max(n, 1) if number == -1 else min(number, max(n, 1))


def check_spanned(blocks: Blocks, box: Region) -> None:
    """Refuse arrays that have little to do with one another: each would be read for each box of the others.

    Raises
    ------
    UsageError
        If no array has all the dimensions along which there is more than one box.
    """
    plan = ChunkPlan(blocks.grid, box)
    divided = {axis for axis, (a, b) in enumerate(zip(plan.start, plan.stop, strict=True)) if b - a > 1}
    if any(divided <= set(axes) for axes in blocks.axes.values()):
        return
    dims = blocks.dims or ()
    shown = "; ".join(f"{name!r} ({', '.join(dims[a] for a in axes)})" for name, axes in blocks.axes.items())
    raise UsageError(
        f"no array has all of the dimensions {[dims[axis] for axis in sorted(divided)]} along which there are several "
        f"boxes, so chunks would be read again and again: {shown}. Name variables that belong together, or give "
        "chunks={dimension: -1}"
    )


def parse_named_region(region: Any, dims: Sequence[str], shape: tuple[int, ...]) -> Region:
    """Turn what a caller writes for a region into slices.

    Parameters
    ----------
    region : mapping of str to slice or int, or what `parse_region` takes
        By dimension name; dimensions that are not named are taken whole.
    dims : sequence of str
        Names of the axes.
    shape : tuple of int
        Their lengths.

    Raises
    ------
    UsageError
        If there is no such dimension, or a slice is out of range.

    Examples
    --------
    >>> parse_named_region({"x": slice(2, None)}, ("y", "x"), (3, 4))
    (slice(0, 3, None), slice(2, 4, None))
    """
    if not isinstance(region, Mapping):
        return parse_region(region, shape)
    for dim in region:
        if dim not in dims:
            raise UsageError(f"region names dimension {dim!r}, which none of the arrays has{guess(dim, dims)}")
    return parse_region(tuple(region.get(dim, slice(None)) for dim in dims), shape)
