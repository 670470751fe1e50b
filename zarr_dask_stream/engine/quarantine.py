"""Who is to blame when a worker dies, and what becomes of a batch of which nothing came back. Pure.

When a worker dies, each batch that was on it is a suspect, and most are innocent. A suspect is run again
as it is, bound to a worker that has no other suspect. If that worker dies too, the batch comes back in
pieces, and so on until the chunk that kills is alone; then the blame has an address. What this may cost
the cluster is bounded by ``RetryPolicy.worker_budget``.

Invariants: each number of a lost batch is in exactly one sentence, and a chunk is buried only after it was
alone in its batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from zarr_dask_stream.engine.events import Batch, BatchLost, Blame, Category, Failure
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.waiting import Again
from zarr_dask_stream.errors import ClusterError
from zarr_dask_stream.source.selection import decode_numbers

__all__ = ["Bury", "Quarantine", "Retry", "Sentence", "Stop"]

_SPLIT = 16  # a suspect batch that lost its worker again comes back in so many pieces
_DEATHS = 2  # so many times a chunk may lose its worker while alone in a batch
_DOUBTS = 3  # so many times something else may be to blame
_RETURNS = 5  # so many times a chunk may come back untried, or its result be lost on the way


@dataclass(frozen=True, slots=True)
class Retry:
    """Count this as a failed attempt of a chunk: an `Again` follows."""

    failure: Failure
    attempt: int


@dataclass(frozen=True, slots=True)
class Bury:
    """Give this chunk up."""

    failure: Failure
    why: str


@dataclass(frozen=True, slots=True)
class Stop:
    """End the run: it has cost the cluster too much."""

    error: ClusterError


Sentence = Again | Retry | Bury | Stop


@dataclass(slots=True)
class _Record:
    """What is known of a chunk that has failed at least once."""

    attempts: int = 0
    first_at: float = 0.0
    deaths: int = 0
    returns: int = 0
    doubts: int = 0


class Quarantine:
    """Keeps the record of each chunk in trouble, and judges batches that did not come back.

    Parameters
    ----------
    policy : RetryPolicy
        For the budget of workers, and for backoff.
    rng : random.Random
        Source of the jitter.
    name : callable
        ``name(number)``: grid index of a chunk, for messages.

    Examples
    --------
    >>> quarantine = Quarantine(RetryPolicy(), random.Random(0), lambda number: (number,))
    >>> died = BatchLost(1, "worker tcp://a died")
    >>> quarantine.lost(Batch(1, (range(2),), 2, 16), died, 0.0)
    [Again(numbers=(0, 1), due=0.0, alone=True, suspect=True)]
    >>> quarantine.lost(Batch(2, (range(2),), 2, 16, suspect=True), died, 1.0)
    [Again(numbers=(0,), due=1.0, alone=True, suspect=True), Again(numbers=(1,), due=1.0, alone=True, suspect=True)]
    """

    def __init__(self, policy: RetryPolicy, rng: random.Random, name: Callable[[int], tuple[int, ...]]) -> None:
        self._policy = policy
        self._rng = rng
        self._name = name
        self._records: dict[int, _Record] = {}
        self._workers_spent = 0

    # -- records ------------------------------------------------------------------------------------

    def __bool__(self) -> bool:
        """Whether any chunk is in trouble."""
        return bool(self._records)

    def attempts(self, number: int) -> int:
        """Failed attempts of a chunk so far."""
        record = self._records.get(number)
        return 0 if record is None else record.attempts

    def failed(self, number: int, now: float) -> tuple[int, float]:
        """Note a failed attempt; return how many there are, and the seconds since the first."""
        record = self._record(number, now)
        record.attempts += 1
        return record.attempts, now - record.first_at

    def forget(self, number: int) -> int:
        """Close the record of a chunk that has reached its end; return how often it was tried."""
        record = self._records.pop(number, None)
        return 0 if record is None else record.attempts + record.deaths or record.returns

    def _record(self, number: int, now: float) -> _Record:
        return self._records.setdefault(number, _Record(first_at=now))

    # -- batches that did not come back ---------------------------------------------------------------

    def lost(self, batch: Batch, event: BatchLost, now: float) -> list[Sentence]:
        """Judge a batch whose worker died, or whose task vanished without a death."""
        if event.deaths == 0:
            return self.returned(batch, event.reason, event.error, now)
        if not batch.suspect:
            # Workers die for many reasons, and every batch on them is lost: once is no proof.
            return [Again(_numbers(batch), now, alone=True, suspect=True)]
        self._workers_spent += event.deaths
        if self._workers_spent > self._policy.worker_budget:
            return [Stop(self._too_many(batch, event)), Again(_numbers(batch), now, alone=True, suspect=True)]
        if event.blame is Blame.NONE or (event.blame is Blame.SHARED and self._in_doubt(batch, now)):
            return [Again(_numbers(batch), now, alone=True, suspect=True)]
        if batch.count > 1:
            return _in_pieces(_numbers(batch), now, suspect=True)
        return self._lost_alone(batch.ranges[0][0], event, now)

    def _in_doubt(self, batch: Batch, now: float) -> bool:
        """Count a death for which something else may be to blame; return whether there are few of them so far."""
        doubts = 0
        for number in _numbers(batch):
            record = self._record(number, now)
            record.doubts += 1
            doubts = max(doubts, record.doubts)
        return doubts <= _DOUBTS

    def _lost_alone(self, number: int, event: BatchLost, now: float) -> list[Sentence]:
        """Judge a chunk that was alone when its worker died: now the blame has an address."""
        record = self._record(number, now)
        record.deaths += 1
        failure = Failure(
            number,
            Category.CLUSTER,
            type(event.error).__name__ if event.error else "WorkerLost",
            event.reason,
            error=event.error,
            worker=event.worker,
        )
        if record.deaths >= _DEATHS:
            return [Bury(failure, f"{record.deaths} times a worker died with no other suspect in hand")]
        return [Retry(failure, record.attempts + record.deaths), Again((number,), now, alone=True, suspect=True)]

    def returned(self, batch: Batch, reason: str, error: BaseException | None, now: float) -> list[Sentence]:
        """Judge a batch of which nothing came, though no worker died of it.

        Mostly nobody is to blame (somebody called the task back), so the first time costs nothing. But a
        result that can't travel comes back for ever: hence smaller and smaller pieces, and an end.
        """
        numbers = _numbers(batch)
        returns = 0
        for number in numbers:
            record = self._record(number, now)
            record.returns += 1
            returns = max(returns, record.returns)
        if returns == 1:
            return [Again(numbers, now, alone=batch.suspect, suspect=batch.suspect)]
        due = now + self._policy.backoff(returns - 1, self._rng)
        if batch.count > 1:
            return _in_pieces(numbers, due, suspect=batch.suspect)
        if returns <= _RETURNS:
            return [Again(numbers, due, alone=True, suspect=batch.suspect)]
        kind = type(error).__name__ if error else "ResultLost"
        failure = Failure(numbers[0], Category.CLUSTER, kind, reason, error=error)
        return [Bury(failure, f"nothing came back {returns} times")]

    def _too_many(self, batch: Batch, event: BatchLost) -> ClusterError:
        return ClusterError(
            f"chunks of this stream have cost the cluster {self._workers_spent} workers; the last batch began with "
            f"chunk {self._name(batch.ranges[0][0])}: {event.reason}. Look at the workers' logs "
            "(out of memory? a crashing library?); RetryPolicy(worker_budget=...) allows more"
        )


def _numbers(batch: Batch) -> tuple[int, ...]:
    return tuple(decode_numbers(batch.ranges))


def _in_pieces(numbers: tuple[int, ...], due: float, *, suspect: bool) -> list[Sentence]:
    piece = -(-len(numbers) // _SPLIT)
    return [Again(numbers[at : at + piece], due, alone=True, suspect=suspect) for at in range(0, len(numbers), piece)]
