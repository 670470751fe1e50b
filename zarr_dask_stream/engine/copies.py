"""Second copies of straggling batches: which batches are late, and of which there are two. Pure: times come in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from zarr_dask_stream.engine.events import Batch
from zarr_dask_stream.source.hedging import Hedge, Stragglers

__all__ = ["Copies", "Running"]

_LOOK_S = 0.02  # stragglers are looked for at most so often


@dataclass(slots=True)
class Running:
    """A batch that is out, and since when."""

    batch: Batch
    since: float


class Copies:
    """Knows when a batch is late, and which batches are two copies of the same.

    Parameters
    ----------
    hedge : Hedge or None
        When a copy is worth it; None: never.

    Attributes
    ----------
    look_at : float
        When to look for stragglers again.

    Examples
    --------
    >>> copies = Copies(Hedge(quantile=0.5, factor=2.0, min_s=0.0, budget=1.0))
    >>> for _ in range(8): copies.observe(elapsed_s=1.0, chunks=1)
    >>> out = [Running(Batch(1, (range(1),), 1, 8), since=0.0)]
    >>> copies.late(out, 1.0), [batch.id for batch in copies.late(out, 3.0)]
    ([], [1])
    >>> copies.pair(1, 2)
    >>> copies.late(out, 9.0), copies.part(2), copies.part(1)
    ([], 1, None)
    """

    def __init__(self, hedge: Hedge | None) -> None:
        self._stragglers = Stragglers(hedge)
        self._look_every_s = max(_LOOK_S, 0.0 if hedge is None else hedge.min_s)
        self._twins: dict[int, int] = {}
        self._refused: set[int] = set()
        self.look_at = -math.inf

    @property
    def on(self) -> bool:
        """Whether copies may be started at all."""
        return self._stragglers.on

    @property
    def out(self) -> int:
        """Pairs that are out."""
        return len(self._twins) // 2

    def started(self, chunks: int) -> None:
        """Count chunks that were submitted: the budget is a share of them."""
        self._stragglers.started(chunks)

    def observe(self, *, elapsed_s: float, chunks: int) -> None:
        """Learn from a batch that came back."""
        self._stragglers.observe(elapsed_s=elapsed_s, chunks=chunks)

    def late(self, running: Iterable[Running], now: float) -> list[Batch]:
        """Look through what is out, now and then: with thousands of batches, each look has its price."""
        if not self.on or now < self.look_at:
            return []
        late: list[Batch] = []
        first = math.inf
        for one in running:
            due = one.since + self._patience(one.batch)
            if due <= now:
                late.append(one.batch)
            else:
                first = min(first, due)
        pause = self._look_every_s
        self.look_at = min(now + pause, max(first, now + pause / 4))
        return late

    def _patience(self, batch: Batch) -> float:
        if batch.suspect or batch.id in self._twins or batch.id in self._refused:
            return math.inf
        return self._stragglers.patience(chunks=batch.count)

    def afford(self, batch: Batch) -> bool:
        """Take a copy out of the budget, if it is in there; a batch is asked for once."""
        if self._stragglers.afford(batch.count):
            return True
        self._refused.add(batch.id)
        return False

    def pair(self, batch: int, copy: int) -> None:
        """Note that `copy` is out beside `batch`."""
        self._twins[batch], self._twins[copy] = copy, batch

    def part(self, batch: int) -> int | None:
        """Note that a batch is not out any more; return the other one of its pair, if there is one."""
        self._refused.discard(batch)
        twin = self._twins.pop(batch, None)
        if twin is not None:
            del self._twins[twin]
        return twin
