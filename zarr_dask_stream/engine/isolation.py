"""Which suspect is alone on which worker, and what a worker's death says about it. Pure.

A suspect is a batch that was on a worker when it died. It is bound to a worker that has no other suspect, and says
when it begins there. If that worker dies, the suspect is

- not to blame, if it had not begun, or was through;
- perhaps to blame, if something else of ours was at work on another thread of that worker;
- to blame otherwise.

On workers with several threads other batches are kept away from suspects, and half of the workers are left to them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping

from zarr_dask_stream.engine.events import Batch, Blame

__all__ = ["NOWHERE", "Isolation"]

_REMEMBERED = 64  # workers that are gone
NOWHERE = ""  # what a suspect is bound to while there is no worker


class Isolation:
    """Keeps suspects apart from each other, and from what else could kill their worker.

    Attributes
    ----------
    workers : dict of str to int
        Threads of each worker, as far as known.
    outside : tuple of str, or None
        Workers that other batches have to go to; None: wherever they like.

    Examples
    --------
    >>> isolation = Isolation()
    >>> isolation.update({"a": 1, "b": 1})
    []
    >>> isolation.add([Batch(n, (range(n, n + 1),), 1, 8, suspect=True) for n in (1, 2, 3)])
    >>> [(worker, batch.id) for worker, batch in isolation.bind()]
    [('a', 1), ('b', 2)]
    >>> isolation.begun(1, "a")
    >>> isolation.remove("a"), isolation.blame(1, "a", others=True), isolation.blame(2, "b", others=False)
    (1, <Blame.SOLE: 'sole'>, <Blame.NONE: 'none'>)
    """

    def __init__(self) -> None:
        self.workers: dict[str, int] = {}
        self.outside: tuple[str, ...] | None = None
        self._waiting: deque[Batch] = deque()
        self._bound: dict[str, int] = {}
        self._begun: dict[int, str] = {}
        self._placed: dict[int, frozenset[str]] = {}
        self._threads: dict[str, int] = {}

    # -- binding ------------------------------------------------------------------------------------

    def add(self, suspects: Iterable[Batch]) -> None:
        """Take suspects in; they wait for a worker."""
        self._waiting.extend(suspects)

    def put_back(self, suspect: Batch) -> None:
        """Let a suspect that was not sent yet wait again, before all others."""
        self._waiting.appendleft(suspect)

    def bind(self, *, anywhere: bool = False) -> Iterator[tuple[str, Batch]]:
        """Bind waiting suspects to workers that have none.

        `anywhere`: where there is no worker at all, let one suspect out unbound. An adaptive cluster starts
        workers for tasks it can see. Until that one is back, any worker may get it, and no other is bound.
        """
        for worker in list(self.workers) or ([NOWHERE] if anywhere else []):
            if not self._waiting or NOWHERE in self._bound or len(self._bound) >= self._most:
                return
            if worker not in self._bound:
                suspect = self._waiting.popleft()
                self._bound[worker] = suspect.id
                self._look_outside()
                yield worker, suspect

    @property
    def unbound(self) -> bool:
        """Whether a suspect is out that any worker may get."""
        return NOWHERE in self._bound

    @property
    def _most(self) -> int:
        return max(len(self.workers) // 2 if self._shared else len(self.workers), 1)

    @property
    def _shared(self) -> bool:
        return any(threads > 1 for threads in self.workers.values())

    def _look_outside(self) -> None:
        free = tuple(worker for worker in self.workers if worker not in self._bound)
        self.outside = free if free and self._shared and len(free) < len(self.workers) else None

    def place(self, batches: Iterable[int], workers: tuple[str, ...]) -> None:
        """Note that batches can run on these workers only."""
        allowed = frozenset(workers)
        self._placed.update((batch, allowed) for batch in batches)

    def release(self, batches: Iterable[int]) -> None:
        """Forget batches that are not out any more."""
        gone = set(batches)
        if not gone:
            return
        if any(batch.id in gone for batch in self._waiting):
            self._waiting = deque(batch for batch in self._waiting if batch.id not in gone)
        for batch in gone:
            self._begun.pop(batch, None)
            self._placed.pop(batch, None)
        if not gone.isdisjoint(self._bound.values()):
            self._bound = {worker: batch for worker, batch in self._bound.items() if batch not in gone}
            self._look_outside()

    # -- workers that come and go ---------------------------------------------------------------------

    def update(self, workers: Mapping[str, int]) -> list[int]:
        """Take note of all workers there are; return batches that can't run anywhere any more."""
        self.workers = dict(workers)
        self._look_outside()
        stranded = [batch for worker, batch in self._bound.items() if worker not in workers and worker != NOWHERE]
        stranded += [batch for batch, allowed in self._placed.items() if allowed.isdisjoint(workers)]
        return stranded

    def remove(self, worker: str) -> int | None:
        """Take note that a worker is gone; return the suspect that was bound to it."""
        self._threads[worker] = self.workers.pop(worker, 1)
        while len(self._threads) > _REMEMBERED:
            del self._threads[next(iter(self._threads))]
        bound = self._bound.pop(worker, None)
        self._look_outside()
        return bound

    # -- blame --------------------------------------------------------------------------------------

    def begun(self, batch: int, worker: str) -> None:
        """Take note that a suspect is at work."""
        self._begun[batch] = worker

    def is_suspect(self, batch: int) -> bool:
        """Whether a batch has said that it began, which suspects do."""
        return batch in self._begun

    def blame(self, batch: int, worker: str, *, others: bool) -> Blame:
        """Say how far a batch is to blame for a worker that died.

        Parameters
        ----------
        batch : int
            A batch that was not through.
        worker : str
            The worker that died.
        others : bool
            Whether the worker had other tasks of ours, which may have been at work on its other threads.
        """
        if self._begun.get(batch) != worker:
            return Blame.NONE
        threads = self.workers.get(worker) or self._threads.get(worker, 1)
        return Blame.SHARED if others and threads > 1 else Blame.SOLE
