"""Results as lines of JSON: made on the workers, appended to a file that a later run goes on with."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from zarr_dask_stream.cli.present import plain
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.chunk import Chunk

__all__ = ["JsonOf", "ResultFile", "result_file"]

_PLAIN = (str, int, float, complex, np.generic, np.ndarray)


class JsonOf:
    """Calls a function of a chunk and returns what it returned as the text of one line, without its end.

    Examples
    --------
    >>> JsonOf(lambda chunk: chunk.data.max())(Chunk((0, 1), (slice(0, 2), slice(4, 6)), np.array([1.5, 2.5])))
    '{"index": [0, 1], "region": [[0, 2], [4, 6]], "value": 2.5}'
    """

    def __init__(self, function: Callable[[Chunk], Any]) -> None:
        self.function = function

    def __call__(self, chunk: Chunk) -> str:
        """Return the line of this chunk."""
        value = self.function(chunk)
        _check(value)
        region = [[axis.start, axis.stop] for axis in chunk.region]
        line = {"index": list(chunk.index), "region": region, "value": plain(value)}
        return json.dumps(line, allow_nan=False, ensure_ascii=False)


def _check(value: Any) -> None:
    """Refuse what would only be a description of itself in JSON."""
    if isinstance(value, dict):
        for one in value.values():
            _check(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _check(one)
    elif value is not None and not isinstance(value, _PLAIN):
        raise TypeError(
            f"the function returned an object of class {type(value).__name__}, which has no place in JSON: "
            "return numbers, text, None, lists, dicts, NumPy scalars or arrays"
        )


class ResultFile:
    """Where lines go, and what earlier runs have written there already.

    Each line is handed to the operating system before the next chunk is asked for, which is when a ledger
    takes the one before as done: a killed process may leave a line that the ledger does not know of, so
    that it is written again, but never the other way round.
    """

    def __init__(self, file: IO[bytes], name: str, written: Any = None) -> None:
        self._file = file
        self._name = name
        self._written = written
        self.again = 0

    def check(self, resumed: int) -> None:
        """Raise UsageError where lines of chunks are missing that the ledger has as done."""
        found = resumed if self._written is None else int(np.count_nonzero(self._written))
        if found < resumed:
            raise UsageError(
                f"the checkpoint has {resumed:,} chunks as done, and {self._name} holds the lines of {found:,}: "
                "give the file that the earlier run wrote to, or begin again with a new checkpoint"
            )

    def write(self, number: int, line: str) -> None:
        """Append the line of chunk `number`."""
        if self._written is not None:
            self.again += bool(self._written[number])
        self._file.write(line.encode() + b"\n")
        self._file.flush()


@contextlib.contextmanager
def result_file(out: str, spec: ArraySpec, *, append: bool) -> Iterator[ResultFile]:
    """Open the file for results; "-" is standard output. To append, what is in there is read first.

    Raises
    ------
    UsageError
        If it can't be written to, or holds anything but results.
    """
    if out == "-":
        yield ResultFile(sys.stdout.buffer, "standard output")
        return
    try:
        file = Path(out).open("r+b" if append and Path(out).exists() else "w+b")  # noqa: SIM115  # closed below
    except OSError as error:
        raise UsageError(f"--out: {out} can't be written: {error.strerror or error}") from error
    with file:
        yield ResultFile(file, out, _written(file, out, spec) if append else None)


def _written(file: IO[bytes], name: str, spec: ArraySpec) -> Any:
    """Mark the chunks whose lines are whole, drop a line that was cut off, and stand at the end."""
    written = np.zeros(len(spec.grid), np.bool_)
    end = 0
    for place, line in enumerate(iter(file.readline, b""), 1):
        if not line.endswith(b"\n"):
            break  # its chunk was never taken as done
        written[_number(line, name, place, spec)] = True
        end += len(line)
    file.seek(end)
    file.truncate()
    return written


def _number(line: bytes, name: str, place: int, spec: ArraySpec) -> int:
    try:
        return spec.grid.number(json.loads(line)["index"])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UsageError(
            f"--out: {name}, line {place} is not a result of this array, and nothing will be appended to it: "
            "name another file"
        ) from error
