"""What comes of one chunk's bytes: decoded, cropped, filled, or an error that names the chunk."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy.typing as npt

from zarr_dask_stream.errors import CorruptChunkError, StoreError, StoreNotVisibleError
from zarr_dask_stream.source.array import ArraySpec
from zarr_dask_stream.source.backend import ByteStore, TooLongError
from zarr_dask_stream.source.codec import compile_chain
from zarr_dask_stream.source.grid import Index, Region
from zarr_dask_stream.source.memory import lend_array
from zarr_dask_stream.source.store import here

__all__ = ["ChunkRead", "Finisher"]


@dataclass(slots=True)
class ChunkRead:
    """What came of reading one chunk.

    Attributes
    ----------
    number : int
        Linear number of the chunk in the grid.
    data : numpy.ndarray or None
        The chunk cropped to the array and to the box, in native byte order, writable, the caller's own.
        None after an error, and for a missing chunk that was not to be filled.
    missing : bool
        True where the chunk is not stored.
    error : Exception or None
        Why there is no data.
    stored_bytes : int
        Encoded length.
    fetch_s, decode_s : float
        Seconds until the bytes were here, and for decoding and cropping them.
    hedged : bool
        Whether a second request was sent, because the first took unusually long.
    """

    number: int
    data: npt.NDArray[Any] | None
    missing: bool
    error: Exception | None
    stored_bytes: int
    fetch_s: float
    decode_s: float
    hedged: bool = False


class Finisher:
    """Makes a `ChunkRead` of what was fetched: decode, crop, fill, and name the chunk in errors."""

    def __init__(self, spec: ArraySpec, store: ByteStore, box: Region | None, fill: bool) -> None:
        self.spec, self.grid = spec, spec.grid
        self._store, self._fill = store, fill
        self._decode = compile_chain(spec)
        self._box = box if box is not None else tuple(slice(0, n) for n in spec.shape)
        # Chunks of these index ranges lie wholly inside array and box, and need no cropping.
        self._inside = tuple(
            range(-(-max(b.start, 0) // c), min(b.stop, n) // c)
            for b, c, n in zip(self._box, spec.chunks, spec.shape, strict=True)
        )
        self._present: Exception | bool = False

    def read(self, number: int, index: Index, raw: Any, fetch_s: float) -> ChunkRead:
        """Finish a chunk of which `raw` was fetched; None means that it is not stored."""
        begin = perf_counter()
        if raw is None:
            return self._missing(number, index, fetch_s, begin)
        try:
            data = self._decode(raw)
            for i, inside in zip(index, self._inside, strict=True):
                if i not in inside:
                    data = self._crop(index, data)
                    break
        except CorruptChunkError as error:
            return self.failed(number, self.corrupt(index, error), fetch_s, len(raw))
        except MemoryError as error:
            return self.failed(number, error, fetch_s, len(raw))
        return ChunkRead(number, data, False, None, len(raw), fetch_s, perf_counter() - begin)

    def failed(self, number: int, error: Exception, fetch_s: float, stored_bytes: int = 0) -> ChunkRead:
        """Finish a chunk that could not be read."""
        return ChunkRead(number, None, False, error, stored_bytes, fetch_s, 0.0)

    def corrupt(self, index: Index, error: CorruptChunkError) -> CorruptChunkError:
        """Name the chunk in an error of its decoder, or of the store that has too much for it."""
        if isinstance(error, TooLongError):
            return CorruptChunkError(
                f"chunk {index} of {self.spec.url} is not read: {error}. Something else is stored in its place; remove "
                'it, or write the chunk again, or leave it out with on_error="skip"'
            )
        problem = CorruptChunkError(
            f"chunk {index} of {self.spec.url} can't be decoded: {error}. Read it again (a transfer may have been "
            "cut off); if it fails again, the stored chunk is damaged"
        )
        problem.__cause__ = error.__cause__ or error
        return problem

    def _missing(self, number: int, index: Index, fetch_s: float, begin: float) -> ChunkRead:
        problem = self._store_problem()
        if problem is not None:
            return self.failed(number, problem, fetch_s)
        try:
            data = self._filled(index) if self._fill else None
        except MemoryError as error:
            return self.failed(number, error, fetch_s)
        return ChunkRead(number, data, True, None, 0, fetch_s, perf_counter() - begin)

    def _store_problem(self) -> Exception | None:
        """Before the first chunk counts as missing, see that the array is still there: once per batch.

        A store that vanished (an unmounted disk, a deleted bucket) would read as fill values.
        """
        if self._present is False:
            self._present = self._look()
        return None if self._present is True else self._present  # type: ignore[return-value]  # True or an error

    def _look(self) -> Exception | bool:
        try:
            if self._store.exists(self.spec.metadata_key):
                return True
        except (StoreError, OSError) as error:
            return error
        return StoreNotVisibleError(
            f"{self.spec.url} has no {self.spec.metadata_key} any more on {here()}: the array was removed or its "
            "disk is no longer mounted; no chunk of it can be taken for missing"
        )

    def _bounds(self, index: Index) -> list[tuple[int, int]]:
        return [
            (max(i * c, b.start), max(min((i + 1) * c, n, b.stop), i * c, b.start))
            for i, c, n, b in zip(index, self.spec.chunks, self.spec.shape, self._box, strict=True)
        ]

    def _crop(self, index: Index, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        # A copy: a view would keep the whole chunk alive and be sent whole.
        return data[
            tuple(
                slice(a - i * c, b - i * c)
                for (a, b), i, c in zip(self._bounds(index), index, self.spec.chunks, strict=True)
            )
        ].copy()

    def _filled(self, index: Index) -> npt.NDArray[Any]:
        out = lend_array(tuple(b - a for a, b in self._bounds(index)), self.spec.dtype)
        out[...] = self.spec.fill
        return out
