"""Stores in which chosen reads go wrong, or take their time."""

from __future__ import annotations

import asyncio
import fnmatch
import random
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest, Store
from zarr.storage import MemoryStore, WrapperStore

from zarr_dask_stream.errors import UsageError

__all__ = ["Fault", "FaultyStore", "LatencyStore"]


class _Wrapped(WrapperStore[Store]):
    """A store of this process, in which each read passes by `_pass`.

    It can't be pickled, so that faults and delays are shared by all who read from it.
    """

    def __init__(self, store: Store | MutableMapping[str, Any]) -> None:
        super().__init__(store if isinstance(store, Store) else MemoryStore(store))

    async def _pass(self, key: str, value: Buffer | None, prototype: BufferPrototype) -> Buffer | None:
        raise NotImplementedError

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Read a key, or a range of it."""
        return await self._pass(key, await self._store.get(key, prototype, byte_range), prototype)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Read ranges of keys, each as if by `get`."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError(f"{type(self).__name__} lives in this process and can't be pickled")

    def __str__(self) -> str:
        return f"{type(self).__name__}({self._store})"

    __repr__ = __str__


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """What goes wrong when a key is read.

    Parameters
    ----------
    error : Exception, optional
        Raised instead of an answer.
    keep : int, optional
        Only the first so many bytes arrive.
    flip : int, optional
        The bits of the byte at this place are turned over (counted from the end where negative).
    absent : bool
        The key reads as not stored.
    delay_s : float
        Seconds to wait first.
    times : int or None
        How many reads it lasts; None: for ever.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4", fill_value=7)
    >>> array[:] = 1
    >>> store = FaultyStore(array.store, {"c/1": Fault(absent=True)})
    >>> [chunk.missing for chunk in zds.stream_chunks(store, concurrency=1)]
    [False, True, False]
    """

    error: Exception | None = None
    keep: int | None = None
    flip: int | None = None
    absent: bool = False
    delay_s: float = 0.0
    times: int | None = 1

    def spoil(self, data: bytes) -> bytes:
        r"""Return `data` cut off and damaged.

        Examples
        --------
        >>> Fault(keep=3, flip=0).spoil(b"abcdef")
        b'\x9ebc'
        """
        kept = bytearray(data[: self.keep])
        if self.flip is not None and kept:
            kept[self.flip % len(kept)] ^= 0xFF
        return bytes(kept)


class FaultyStore(_Wrapped):
    """A store in which chosen reads go wrong, a chosen number of times.

    Parameters
    ----------
    store : zarr store or dict
        Where the data are. Writing is never disturbed.
    faults : mapping of str to Fault, Exception or a sequence of these
        By key, or by a pattern such as ``"c/*/0"``. Several are met one after the other; an
        exception alone is raised once.

    Attributes
    ----------
    reads : Counter of str
        How often each key was read.

    Notes
    -----
    Workers in the same process share its faults; in another process it can't be opened.

    Examples
    --------
    >>> import zarr
    >>> store = FaultyStore({})
    >>> array = zarr.create_array(store, shape=(4,), chunks=(2,), dtype="i2")
    >>> array[:] = 7
    >>> store.break_reads({"c/1": [ConnectionError("reset"), Fault(keep=1)]})
    >>> from zarr_dask_stream import RetryPolicy, stream_chunks
    >>> stream = stream_chunks(store, concurrency=1, retry=RetryPolicy(wait_initial=0))
    >>> [chunk.data.tolist() for chunk in stream], stream.report.retries, store.met
    ([[7, 7], [7, 7]], 2, 2)
    """

    def __init__(
        self,
        store: Store | MutableMapping[str, Any],
        faults: Mapping[str, Fault | Exception | Sequence[Fault | Exception]] | None = None,
    ) -> None:
        super().__init__(store)
        self.reads: Counter[str] = Counter()
        self._met: Counter[str] = Counter()
        self._faults: dict[str, deque[Fault]] = {}
        self._left: dict[str, int | None] = {}
        self._lock = threading.Lock()
        self.break_reads(faults or {})

    def _with_store(self, store: Store) -> FaultyStore:
        view = FaultyStore(store)
        view.reads, view._met, view._lock = self.reads, self._met, self._lock
        view._faults, view._left = self._faults, self._left
        return view

    @property
    def met(self) -> int:
        """How many reads met a fault."""
        return self._met.total()

    def break_reads(self, faults: Mapping[str, Fault | Exception | Sequence[Fault | Exception]]) -> None:
        """Set the faults of more keys; those of a key that has some already are replaced."""
        with self._lock:
            for pattern, given in faults.items():
                several = given if isinstance(given, Sequence) else [given]
                self._faults[pattern] = deque(f if isinstance(f, Fault) else Fault(error=f) for f in several)
                self._left.pop(pattern, None)

    def heal(self) -> None:
        """Forget all faults."""
        with self._lock:
            self._faults.clear()
            self._left.clear()

    def _next(self, key: str) -> Fault | None:
        with self._lock:
            self.reads[key] += 1
            for pattern, faults in self._faults.items():
                if faults and fnmatch.fnmatchcase(key, pattern):
                    self._met[pattern] += 1
                    return self._use(pattern, faults)
        return None

    def _use(self, pattern: str, faults: deque[Fault]) -> Fault:
        fault = faults[0]
        if fault.times is not None:
            left = self._left.get(pattern)
            self._left[pattern] = left = (fault.times if left is None else left) - 1
            if left <= 0:
                faults.popleft()
                self._left[pattern] = None
        return fault

    async def _pass(self, key: str, value: Buffer | None, prototype: BufferPrototype) -> Buffer | None:
        fault = self._next(key)
        if fault is None:
            return value
        if fault.delay_s:
            await asyncio.sleep(fault.delay_s)
        if fault.error is not None:
            raise fault.error.with_traceback(None)
        if fault.absent or value is None:
            return None
        return prototype.buffer.from_bytes(fault.spoil(value.to_bytes()))


class LatencyStore(_Wrapped):
    """A store in which each read takes its time.

    Parameters
    ----------
    store : zarr store or dict
        Where the data are.
    delay_s : float or callable
        Seconds added to each read, or ``delay_s(rng)`` for a distribution of your own.
    spread : float
        Share by which a fixed delay varies, from 0 to 1.
    seed : int
        The delay of the n-th read of a key follows from this, whatever is read in between.

    Examples
    --------
    >>> store = LatencyStore({}, delay_s=0.03, spread=0.5, seed=1)
    >>> [round(store.delay("c/0", nth), 4) for nth in (0, 1)] == [round(store.delay("c/0", nth), 4) for nth in (0, 1)]
    True
    """

    def __init__(
        self,
        store: Store | MutableMapping[str, Any],
        *,
        delay_s: float | Callable[[random.Random], float] = 0.03,
        spread: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(store)
        if not 0 <= spread <= 1:
            raise UsageError(f"spread is a share from 0 to 1, got {spread!r}")
        self._delay_s, self._spread, self._seed = delay_s, spread, seed
        self.reads: Counter[str] = Counter()
        self._lock = threading.Lock()

    def _with_store(self, store: Store) -> LatencyStore:
        view = LatencyStore(store, delay_s=self._delay_s, spread=self._spread, seed=self._seed)
        view.reads, view._lock = self.reads, self._lock
        return view

    def delay(self, key: str, nth: int) -> float:
        """Return the seconds that the `nth` read of `key` (from 0) takes."""
        rng = random.Random(f"{self._seed}/{key}/{nth}")  # noqa: S311  # a script, not a secret
        if callable(self._delay_s):
            return self._delay_s(rng)
        return self._delay_s * rng.uniform(1 - self._spread, 1 + self._spread)

    async def _pass(self, key: str, value: Buffer | None, prototype: BufferPrototype) -> Buffer | None:  # noqa: ARG002  # the other store needs it
        with self._lock:
            nth = self.reads[key]
            self.reads[key] += 1
        await asyncio.sleep(self.delay(key, nth))
        return value
