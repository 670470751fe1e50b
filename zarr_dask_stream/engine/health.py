"""What results say about the world: a store that wants less, a worker that hangs, nothing that works. Pure."""

from __future__ import annotations

from zarr_dask_stream.engine.events import BatchResult, BatchStats, Category, Failure, SlowedDown, WorkerRetired
from zarr_dask_stream.engine.instructions import Instruction, Notify, Restart
from zarr_dask_stream.engine.retry import Breaker
from zarr_dask_stream.engine.throttle import Throttle
from zarr_dask_stream.errors import StoreError

__all__ = ["Health"]

_ZOMBIES = 4  # a worker with so many hanging threads is restarted


class Health:
    """Hears of each result, and says what follows for the store and the workers.

    Parameters
    ----------
    breaker : Breaker
        Notices when nearly everything fails.
    throttle : Throttle
        Slowed down when a store complains.

    Examples
    --------
    >>> health = Health(Breaker(0.9), Throttle(None, 8))
    >>> health.hear(BatchResult(stats=BatchStats(worker="tcp://a", zombies=4)), 1.0)[0], health.diagnosis(1.0)
    (Restart(worker='tcp://a'), None)
    """

    def __init__(self, breaker: Breaker, throttle: Throttle) -> None:
        self._breaker = breaker
        self._throttle = throttle
        self._restarted: set[str] = set()
        self._last: Failure | None = None

    def hear(self, result: BatchResult, now: float) -> list[Instruction]:
        """Take note of a result."""
        good = len(result.numbers) + len(result.filtered) + len(result.skipped)
        categories = [failure.category for failure in result.failures]
        self._breaker.observe(good=good, failures=categories, now=now)
        out = self._watch(result.stats, now)
        if categories:
            self._last = result.failures[-1]
        throttled = Category.THROTTLED in categories or result.stats.throttled > 0
        if throttled and self._throttle.slow_down(now):
            out.append(Notify(SlowedDown(now, self._throttle.requests_per_s)))
        return out

    def _watch(self, stats: BatchStats, now: float) -> list[Instruction]:
        if stats.zombies < _ZOMBIES or stats.worker in self._restarted:
            return []
        self._restarted.add(stats.worker)
        return [Restart(stats.worker), Notify(WorkerRetired(now, stats.worker, stats.zombies))]

    def diagnosis(self, now: float) -> StoreError | None:
        """Return why it makes no sense to go on, if so."""
        if self._last is None or not self._breaker.is_open(now):
            return None
        return StoreError(
            f"nearly every read has failed for a while, the last with {self._last.error_type}: {self._last.message}. "
            "Is the store reachable from the workers, and are the credentials valid there? "
            "RetryPolicy(breaker=None) goes on regardless"
        )
