"""How long batches waited for a free thread while others of the same run had them all.

A run submits more than its threads can take at once, so that none of them runs dry. What waits for that reason costs
nothing, and is told apart here from what Dask and the network take.

Rules
-----
1. A thread takes the batch that was submitted first. A batch waits as long as all threads have one.
2. Where one comes back that should have waited still, threads have taken another order: of those that should have
   begun, the last one has its place in the queue again.
"""

from __future__ import annotations

__all__ = ["Queue"]


class Queue:
    """The batches of a run that are out, in the order in which threads take them.

    Parameters
    ----------
    threads : int
        Of the cluster, to begin with.

    Examples
    --------
    One thread, and three batches that are submitted at once: each of the later ones waits for those before it.

    >>> queue = Queue(1)
    >>> for batch in (1, 2, 3): queue.submitted(batch, 0.0)
    >>> [queue.ended(batch, at) for batch, at in ((1, 2.0), (2, 3.0), (3, 5.0))]
    [0.0, 2.0, 3.0]
    """

    __slots__ = ("_begun", "_threads", "_waiting")

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._waiting: dict[int, float] = {}  # since when
        self._begun: dict[int, tuple[float, float]] = {}  # since when, and how long it waited

    def submitted(self, batch: int, now: float) -> None:
        """Take a batch in."""
        if len(self._begun) < self._threads:
            self._begun[batch] = now, 0.0
        else:
            self._waiting[batch] = now

    def resized(self, threads: int, now: float) -> None:
        """Go on with so many threads."""
        self._threads = threads
        self._begin(now)

    def ended(self, batch: int, now: float) -> float:
        """Let a batch go, and return for how many seconds it waited for a thread."""
        since, queued_s = self._begun.pop(batch, (now, 0.0))
        if batch in self._waiting:
            queued_s = now - self._waiting.pop(batch)  # but for its work, which the caller knows
            if self._begun:
                other, (since, _) = self._begun.popitem()
                self._waiting = {other: since, **self._waiting}
        self._begin(now)
        return queued_s

    def _begin(self, now: float) -> None:
        while self._waiting and len(self._begun) < self._threads:
            batch = next(iter(self._waiting))
            since = self._waiting.pop(batch)
            self._begun[batch] = since, now - since
