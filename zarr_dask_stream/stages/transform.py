"""Stages that look at one chunk at a time: map and filter. They run on the workers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk

__all__ = ["Filter", "Map", "Stage", "check_function", "compile_stages"]


@dataclass(frozen=True, slots=True)
class Map:
    """``fn(chunk) -> value``: the item keeps its place, its data become the value."""

    fn: Callable[[Chunk], Any]

    def apply(self, chunk: Chunk) -> Chunk | None:
        """Return the chunk with what `fn` made of it."""
        return chunk.with_data(self.fn(chunk))


@dataclass(frozen=True, slots=True)
class Filter:
    """``pred(chunk) -> bool``: what it refuses is dropped, after it was read."""

    pred: Callable[[Chunk], Any]

    def apply(self, chunk: Chunk) -> Chunk | None:
        """Return the chunk, or None where `pred` refuses it."""
        return chunk if self.pred(chunk) else None


Stage = Map | Filter


def compile_stages(stages: Sequence[Stage]) -> Callable[[Chunk], Chunk | None]:
    """Chain stages into one function; it returns None for a chunk that a filter refused.

    Examples
    --------
    >>> run = compile_stages([Map(lambda c: c.data * 2), Filter(lambda c: c.data > 2)])
    >>> run(Chunk((0,), (), 3)).data, run(Chunk((0,), (), 1))
    (6, None)
    """
    if len(stages) == 1:
        return stages[0].apply
    steps = [stage.apply for stage in stages]

    def run(chunk: Chunk) -> Chunk | None:
        current: Chunk | None = chunk
        for step in steps:
            if current is None:
                return None
            current = step(current)
        return current

    return run


def check_function(fn: Any, what: str, takes: str, *, arguments: int = 1) -> None:
    """Raise UsageError unless `fn` can be called with so many positional arguments.

    Parameters
    ----------
    fn : Any
        What the user gave.
    what, takes : str
        Its role and its argument, for the message: "map" and "the chunk".
    """
    if not callable(fn):
        raise UsageError(f"{what} needs a function of {takes}, got {type(fn).__name__}: {fn!r}")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):
        return  # builtins and ufuncs don't tell
    try:
        signature.bind(*[None] * arguments)
    except TypeError as error:
        name = getattr(fn, "__name__", repr(fn))
        count = "one argument" if arguments == 1 else f"{arguments} arguments"
        raise UsageError(f"{what} calls {name}{signature} with {count}, {takes}: {error}") from None
