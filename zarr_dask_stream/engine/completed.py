"""Which of the planned chunks are done, one bit each."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import StoreError
from zarr_dask_stream.source.selection import ChunkPlan, encode_numbers

__all__ = ["Completed"]

_PIECE = 65536


class Completed:
    """A set of planned chunks, one bit each.

    Examples
    --------
    >>> from zarr_dask_stream.source.grid import ChunkGrid
    >>> plan = ChunkPlan(ChunkGrid((9,), (1,)), (slice(2, 8),))
    >>> done = Completed(plan)
    >>> done.add([3, 4, 6]); len(done), 4 in done, 5 in done
    (3, True, False)
    >>> list(done.missing_from(plan.runs())), [piece.tolist() for piece in done.numbers()]
    ([range(2, 3), range(5, 8, 2)], [[3, 4, 6]])
    """

    def __init__(self, plan: ChunkPlan, bits: npt.NDArray[np.bool_] | None = None) -> None:
        self._plan = plan
        self._box = tuple(b - a for a, b in zip(plan.start, plan.stop, strict=True))
        self._bits = np.zeros(plan.box_size, np.bool_) if bits is None else bits
        self._count = int(np.count_nonzero(self._bits))

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        return bool(self._bits[self._positions(np.array([number]))[0]])

    def add(self, numbers: Iterable[int]) -> None:
        """Mark chunks as done."""
        array = np.fromiter(numbers, np.int64)
        if not array.size:
            return
        positions = np.unique(self._positions(array))
        self._count += int(np.count_nonzero(~self._bits[positions]))
        self._bits[positions] = True

    def missing_from(self, runs: Iterable[range]) -> Iterator[range]:
        """Walk runs of planned numbers and leave out what is done."""
        for run in runs:
            if not run:
                yield run
            for at in range(0, len(run), _PIECE):
                piece = run[at : at + _PIECE]
                numbers = np.arange(piece.start, piece.stop, piece.step, dtype=np.int64)
                left = numbers[~self._bits[self._positions(numbers)]]
                if len(left) == len(piece):
                    yield piece
                else:
                    yield from encode_numbers(left.tolist())

    def _positions(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._plan.whole or not self._box:
            return numbers
        index = np.unravel_index(numbers, self._plan.grid.grid_shape)
        inside = tuple(i - a for i, a in zip(index, self._plan.start, strict=True))
        return np.asarray(np.ravel_multi_index(inside, self._box), dtype=np.int64)

    def numbers(self) -> Iterator[npt.NDArray[np.int64]]:
        """Walk the numbers of the chunks in ascending order, some at a time."""
        for at in range(0, len(self._bits), _PIECE):
            positions = np.flatnonzero(self._bits[at : at + _PIECE]) + at
            if positions.size:
                yield self._numbers_at(positions)

    def _numbers_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._plan.whole or not self._box:
            return positions
        inside = np.unravel_index(positions, self._box)
        index = tuple(i + a for i, a in zip(inside, self._plan.start, strict=True))
        return np.asarray(np.ravel_multi_index(index, self._plan.grid.grid_shape), dtype=np.int64)

    def pack(self) -> str:
        """Return the bits as text: packed eight to a byte, deflated, base64."""
        return base64.b64encode(zlib.compress(np.packbits(self._bits).tobytes(), 6)).decode("ascii")

    @classmethod
    def unpack(cls, plan: ChunkPlan, text: str) -> Completed:
        """Rebuild the set; raises StoreError where the text does not fit the plan."""
        expected = -(-plan.box_size // 8)
        try:
            inflate = zlib.decompressobj()
            raw = inflate.decompress(base64.b64decode(text, validate=True), expected + 1)
        except (binascii.Error, zlib.error, ValueError, TypeError) as error:
            raise StoreError(f"the ledger's list of finished chunks can't be read: {error}") from error
        if len(raw) != expected:
            raise StoreError(f"the ledger lists {len(raw)} bytes of finished chunks, the plan has {expected}")
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=plan.box_size).astype(np.bool_)
        return cls(plan, bits)
