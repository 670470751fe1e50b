"""What this process has done for all streams together, for whoever watches over the process."""

from __future__ import annotations

import threading

from zarr_dask_stream.engine.events import BatchResult

__all__ = ["PROCESS", "Tally"]


class Tally:
    """Sums over batches, whichever stream they were of; any thread may add and look.

    Attributes
    ----------
    counts : dict of str to dict of str to float
        ``chunks`` by what became of them here (done, filtered, skipped_missing, failed, unattempted), ``batches``,
        ``failures`` by category, ``bytes`` (stored, decoded, written), ``seconds`` by phase, and ``latency``: chunks
        by the power of two of seconds within which they were read.

    Examples
    --------
    >>> tally = Tally()
    >>> tally.add(BatchResult(numbers=[0, 1], filtered=[2]))
    >>> tally.copy()["chunks"]
    {'done': 2, 'filtered': 1, 'skipped_missing': 0, 'failed': 0, 'unattempted': 0}
    """

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()

    def add(self, result: BatchResult) -> None:
        """Add what became of one batch."""
        stats = result.stats
        given: dict[str, dict[str, float]] = {
            "batches": {"": 1},
            "chunks": {
                "done": len(result.numbers),
                "filtered": len(result.filtered),
                "skipped_missing": len(result.skipped),
                "failed": len(result.failures),
                "unattempted": len(result.unattempted) + len(result.apart),
            },
            "bytes": {"stored": stats.bytes_stored, "decoded": stats.bytes_decoded, "written": stats.bytes_written},
            "seconds": {"fetch": stats.fetch_s, "decode": stats.decode_s, "compute": stats.compute_s},
        }
        with self._lock:
            for what, kinds in given.items():
                for kind, count in kinds.items():
                    self._add(what, kind, count)
            for failure in result.failures:
                self._add("failures", failure.category.value, 1)
            for bucket, count in stats.latency.items():
                self._add("latency", str(bucket // 8 + 1), count)

    def _add(self, what: str, kind: str, count: float) -> None:
        kinds = self.counts.setdefault(what, {})
        kinds[kind] = kinds.get(kind, 0) + count

    def copy(self) -> dict[str, dict[str, float]]:
        """Return the counts as they are now."""
        with self._lock:
            return {what: dict(kinds) for what, kinds in self.counts.items()}


#: What this process has done since it started.
PROCESS = Tally()
