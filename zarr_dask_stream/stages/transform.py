"""Stages that look at one chunk at a time, map and filter, and their chains. They run on the workers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.stages.batch import Batches, MapBatch, is_ctrl_c

__all__ = ["Decode", "Filter", "Map", "Outcome", "Pipeline", "Stage", "check_function", "compile_stages"]


@dataclass(frozen=True, slots=True)
class Map:
    """``fn(chunk) -> value``: the item keeps its place, its data become the value.

    `dtype` and `chunks` say what the function makes of a full chunk, where a target has to be made for it.
    """

    fn: Callable[[Chunk], Any]
    dtype: np.dtype[Any] | None = None
    chunks: tuple[int | None, ...] | int | None = None

    def apply(self, chunk: Chunk) -> Chunk | None:
        """Return the chunk with what `fn` made of it."""
        return chunk.with_data(self.fn(chunk))


@dataclass(frozen=True, slots=True)
class Decode(Map):
    """A map that only turns stored values into those that they stand for: the item stays as it was read."""

    def apply(self, chunk: Chunk) -> Chunk | None:
        """Return the chunk with decoded data."""
        return chunk.with_data(self.fn(chunk), as_read=True)


@dataclass(frozen=True, slots=True)
class Filter:
    """``pred(chunk) -> bool``: what it refuses is dropped, after it was read."""

    pred: Callable[[Chunk], Any]

    def apply(self, chunk: Chunk) -> Chunk | None:
        """Return the chunk, or None where `pred` refuses it."""
        return chunk if self.pred(chunk) else None


Stage = Map | Filter | MapBatch


def compile_stages(stages: Sequence[Map | Filter]) -> Callable[[Chunk], Chunk | None]:
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


class Outcome(NamedTuple):
    """What became of a chunk: itself with other data, None where a filter refused it, or an error."""

    number: int | None
    chunk: Chunk | None
    error: BaseException | None = None


class _Leg(NamedTuple):
    """Stages for one chunk each, then one for many, or the end."""

    apply: Callable[[Chunk], Chunk | None]
    stage: MapBatch | None
    waiting: Batches | None


class Pipeline:
    """Chunks through stages of which some are for many at once: what goes in comes out later, or with others.

    Parameters
    ----------
    stages : sequence of Stage
        In order.
    before : callable, optional
        Told for which chunks functions are called next: those of a batch together, then one by one, then none.

    Examples
    --------
    >>> from zarr_dask_stream.stages.batch import BatchRule
    >>> pairs = Pipeline([MapBatch(lambda batch: [sum(c.data for c in batch)] * len(batch), BatchRule(size=2))])
    >>> [[out.chunk.data for out in pairs.push(Chunk((i,), (), i))] for i in (1, 2, 5)]
    [[], [3, 3], []]
    >>> [out.chunk.data for out in pairs.flush()]
    [5]
    """

    def __init__(self, stages: Sequence[Stage], before: Callable[[Sequence[Chunk]], Any] | None = None) -> None:
        self._before = before
        self._legs: list[_Leg] = []
        single: list[Map | Filter] = []
        for stage in stages:
            if isinstance(stage, MapBatch):
                self._legs.append(_Leg(compile_stages(single), stage, Batches(stage.rule)))
                single = []
            else:
                single.append(stage)
        self._legs.append(_Leg(compile_stages(single), None, None))

    def push(self, chunk: Chunk) -> Iterator[Outcome]:
        """Put a chunk in; yield what comes out."""
        yield from self._enter(0, chunk)

    def flush(self) -> Iterator[Outcome]:
        """Say that nothing more comes; yield what was waiting for it."""
        for at, leg in enumerate(self._legs):
            if leg.waiting is not None:
                leg.waiting.end()
                yield from self._drain(at)

    def _enter(self, at: int, chunk: Chunk) -> Iterator[Outcome]:
        leg = self._legs[at]
        try:
            out = leg.apply(chunk)
        except BaseException as error:  # whatever a user's function raises is this chunk's outcome
            if is_ctrl_c(error):
                raise
            yield Outcome(chunk.number, None, error)
            return
        if out is None or leg.waiting is None:
            yield Outcome(chunk.number, out)
            return
        leg.waiting.add(out, 0.0)
        yield from self._drain(at)

    def _drain(self, at: int) -> Iterator[Outcome]:
        leg = self._legs[at]
        assert leg.stage is not None
        assert leg.waiting is not None
        before = self._before or (lambda _: None)
        while (batch := leg.waiting.take(0.0)) is not None:
            for chunk, error in leg.stage.apply(batch, before):
                before((chunk,))
                if error is not None:
                    yield Outcome(chunk.number, None, error)
                else:
                    yield from self._enter(at + 1, chunk)
        before(())


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
