"""Dead letters in files: written as they come, read back as the chunks to try again.

A line is the JSON of one letter and names its array, so that a list is never applied to another one. What
is read was perhaps edited by hand: each line is checked, and none is evaluated.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from zarr_dask_stream.cli.present import plain
from zarr_dask_stream.engine.events import Callback, ChunkDeadLettered
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.metadata import brief

__all__ = ["FailedChunks", "LetterFile", "Listed", "letter_file"]


# -- writing --------------------------------------------------------------------------------------


class LetterFile(Callback):
    """Writes dead letters down as they come, so that an interrupted run leaves those it had."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._about: dict[str, Any] = {}

    def begin(self, spec: ArraySpec) -> None:
        """Drop what an earlier run left in the file: this one is about to start, on this array."""
        self._about = _about(spec)
        with contextlib.suppress(OSError):  # a pipe has nothing to drop
            self._file.truncate(0)

    def on_chunk_dead_lettered(self, notice: ChunkDeadLettered) -> None:
        """Write one line."""
        letter = {**notice.letter.to_dict(), **self._about}
        self._file.write(json.dumps(plain(letter), ensure_ascii=False) + "\n")
        self._file.flush()


def _about(spec: ArraySpec) -> dict[str, Any]:
    return {"array": spec.url, "shape": list(spec.shape), "chunks": list(spec.chunks)}


@contextlib.contextmanager
def letter_file(path: str | None) -> Iterator[LetterFile | None]:
    """Open the file that dead letters go to; what is in there stays until `LetterFile.begin`.

    Raises
    ------
    UsageError
        If it can't be written to.
    """
    if path is None:
        yield None
        return
    try:
        file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115  # closed below; only opening is wrong usage
    except OSError as error:
        raise UsageError(f"--dead-letters: {path} can't be written: {error.strerror or error}") from error
    with file:
        yield LetterFile(file)


# -- reading --------------------------------------------------------------------------------------


class Listed:
    """A condition on the grid index: chunks that are on a list, and fulfil another condition where there is one."""

    def __init__(self, indices: frozenset[tuple[int, ...]], also: Any = None) -> None:
        self.indices = indices
        self.also = also

    def __call__(self, index: tuple[int, ...]) -> bool:
        """Whether the chunk at `index` is wanted."""
        return index in self.indices and (self.also is None or bool(self.also(index)))


@dataclass(frozen=True)
class FailedChunks:
    """The lines of a file of dead letters, each with its number; not yet compared with an array."""

    path: str
    lines: tuple[tuple[int, Mapping[str, Any]], ...]

    @classmethod
    def read(cls, path: str) -> FailedChunks:
        """Read a file.

        Raises
        ------
        UsageError
            If it can't be read, or a line is not a dead letter; the message names the line.
        """
        try:
            with Path(os.path.expanduser(path)).open(encoding="utf-8") as file:  # noqa: PTH111  # no home is no error
                lines = [(n, _parse(path, n, line)) for n, line in enumerate(file, 1) if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"{path} can't be read: {reason}") from error
        return cls(path, tuple(lines))

    def condition(self, spec: ArraySpec, also: Any = None) -> Listed:
        """Return the condition that these chunks of this array fulfil, and no others.

        Raises
        ------
        UsageError
            If a line is about another array, or about a chunk that this one does not have.
        """
        return Listed(frozenset(self._index(spec, number, letter) for number, letter in self.lines), also)

    def _index(self, spec: ArraySpec, number: int, letter: Mapping[str, Any]) -> tuple[int, ...]:
        for name, here in _about(spec).items():
            there = letter.get(name, here)
            if there != here:
                raise self._refuse(
                    number, f"it is about another array: {name} is {brief(there)} there and {here!r} here"
                )
        index = tuple(letter["index"])
        try:
            whole = spec.grid.region(spec.grid.number(index))
        except IndexError:
            grid = " x ".join(map(str, spec.grid.grid_shape)) or "()"
            raise self._refuse(
                number, f"chunk {brief(index)} is outside the grid of {spec.url}, which is {grid}"
            ) from None
        region = letter.get("region")
        if region is not None and not _inside(region, whole):
            expected = [[s.start, s.stop] for s in whole]
            raise self._refuse(
                number, f"chunk {index} covers {expected} here and {brief(region)} there: another array?"
            )
        return index

    def _refuse(self, number: int, why: str) -> UsageError:
        return UsageError(f"--only-failed: {self.path}, line {number}: {why}")


def _parse(path: str, number: int, line: str) -> Mapping[str, Any]:
    try:
        letter = json.loads(line)
    except (ValueError, RecursionError):
        letter = None
    index = letter.get("index") if isinstance(letter, dict) else None
    if not isinstance(index, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in index):
        raise UsageError(
            f"{path}, line {number} is not a dead letter: expected JSON such as "
            f'{{"index": [0, 1]}}, as --dead-letters writes it, got {brief(line.strip())}'
        )
    assert isinstance(letter, dict)
    return letter


def _inside(region: Any, whole: tuple[slice, ...]) -> bool:
    """Whether a region as JSON lies inside that of a chunk: a run on a part of an array crops its chunks."""
    if not isinstance(region, list) or len(region) != len(whole):
        return False
    for pair, axis in zip(region, whole, strict=True):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(end, int) for end in pair):
            return False
        if not axis.start <= pair[0] <= pair[1] <= axis.stop:
            return False
    return True
