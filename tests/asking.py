"""What the tests of producers, shares and consumers have in common: stores that count, those who ask, ledgers."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr

import zarr_dask_stream as zds
from zarr_dask_stream.testing import FaultyStore, LatencyStore

CHUNKS = 24


def counting(store: Any = None, chunks: int = CHUNKS) -> Any:
    """Return a store that counts reads, with an array of as many chunks of two elements, each its own number."""
    store = FaultyStore({}) if store is None else store
    array = zarr.create_array(store, shape=(2 * chunks,), chunks=(2,), dtype="i4", fill_value=-1)
    array[:] = np.repeat(np.arange(chunks, dtype="i4"), 2)
    store.reads.clear()
    return store


def reads(store: Any) -> int:
    return sum(count for key, count in store.reads.items() if key.startswith("c/"))


def numbers(chunks: Any) -> list[int]:
    return [int(chunk.data[0]) for chunk in chunks]


def together(work: Callable[[Any], Any], arguments: Any) -> list[Any]:
    """Call a function in as many threads as there are arguments, all at once."""
    arguments = list(arguments)
    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(work, arguments))


def interrupt_soon() -> None:
    """Press Ctrl-C half a second from now."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()


def flat(parts: Any) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def wait_for_reads(store: Any, count: int) -> None:
    deadline = time.monotonic() + 20
    while reads(store) < count:
        assert time.monotonic() < deadline, f"{reads(store)} reads instead of {count}"
        time.sleep(0.002)


def slow_store() -> Any:
    """Return a store in which each read takes 30 ms."""
    return counting(LatencyStore({}, delay_s=0.03))


def ledger(tmp_path: Path) -> zds.Checkpoint:
    return zds.Checkpoint(url=tmp_path / "ledger")


def rest_of(stream: zds.ChunkStream) -> list[int]:
    """Return what a new run hands out."""
    return numbers(stream)


def drain(share: zds.Share) -> list[int]:
    return numbers(share)


class Collector(zds.Consumer):
    """Keeps what it is handed, and how much had been read at each time."""

    def __init__(self, store: Any = None) -> None:
        self.store = store
        self.batches: list[list[int]] = []
        self.ahead: list[int] = []

    @property
    def numbers(self) -> list[int]:
        return [number for batch in self.batches for number in batch]

    def handle_items(self, items: list[zds.Chunk]) -> None:
        if self.store is not None:
            time.sleep(0.01)  # what is read ahead is read by now
            self.ahead.append(reads(self.store) - len(self.numbers))
        self.batches.append(numbers(items))


class Awaiting(Collector):
    async def handle_items(self, items: list[zds.Chunk]) -> None:  # type: ignore[override]  # a coroutine function will do
        await asyncio.sleep(0)
        self.batches.append(numbers(items))


class Choking(Collector):
    """Raises on one chunk."""

    max_demand = 2

    def handle_items(self, items: list[zds.Chunk]) -> None:
        if 7 in numbers(items):
            raise ZeroDivisionError("seven")
        super().handle_items(items)
