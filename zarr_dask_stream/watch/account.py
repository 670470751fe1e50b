"""The sums of a run: a pure fold of its notices into one account.

Always true, during a run and after it::

    total == emitted + filtered + skipped_missing + dead_lettered + cancelled + still to come
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from zarr_dask_stream.engine.events import (
    BatchFinished,
    BatchHedged,
    BatchSubmitted,
    Callback,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksCancelled,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    ClusterChanged,
    DeadLetter,
    Notice,
    RunFinished,
    RunStarted,
)

_PHASES = ("queue", "schedule", "fetch", "decode", "compute", "transfer", "consumer")

__all__ = ["Account", "WorkerShare", "human_bytes", "human_seconds"]


@dataclass(slots=True)
class WorkerShare:
    """What one worker did: chunks, batches, seconds at work."""

    chunks: int = 0
    batches: int = 0
    wall_s: float = 0.0


@dataclass
class Account(Callback):
    """The sums of one run, filled in while it goes on: what a `Report` shows, which describes each of them."""

    url: str = ""
    total: int | None = None
    emitted: int = 0
    filtered: int = 0
    skipped_missing: int = 0
    dead_lettered: int = 0
    cancelled: int = 0
    resumed: int = 0
    filled_missing: int = 0
    retries: int = 0
    hedges: int = 0
    batches: int = 0
    batches_lost: int = 0
    bytes_stored: int = 0
    bytes_decoded: int = 0
    bytes_written: int = 0
    peak_chunks_in_flight: int = 0
    peak_bytes_in_flight: int = 0
    wall_s: float = 0.0
    time: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PHASES, 0.0))
    dead_letters: list[DeadLetter] = field(default_factory=list)
    workers: dict[str, WorkerShare] = field(default_factory=dict)
    outcome: str = "running"
    error: str = ""
    _latency: dict[int, int] = field(default_factory=dict, repr=False)

    # -- the fold -----------------------------------------------------------------------------------

    def on_notice(self, notice: Notice) -> None:
        """Keep the clock."""
        self.wall_s = max(self.wall_s, notice.at)

    def on_run_started(self, notice: RunStarted) -> None:
        """Begin."""
        self.url = notice.url
        self.total = notice.total
        self.resumed = notice.resumed

    def on_batch_submitted(self, notice: BatchSubmitted) -> None:
        """Keep the peaks."""
        self.peak_chunks_in_flight = max(self.peak_chunks_in_flight, notice.in_flight)
        self.peak_bytes_in_flight = max(self.peak_bytes_in_flight, notice.in_flight_bytes)

    def on_batch_finished(self, notice: BatchFinished) -> None:
        """Add up where the time went."""
        stats = notice.stats
        if stats is None:
            self.batches_lost += 1
            return
        self.batches += 1
        self.hedges += stats.hedges
        self.retries += stats.again
        self.filled_missing += stats.filled
        self.bytes_stored += stats.bytes_stored
        self.bytes_decoded += stats.bytes_decoded
        self.bytes_written += stats.bytes_written
        spent = self.time
        spent["fetch"] += stats.waited_s
        spent["decode"] += stats.decode_s
        spent["compute"] += stats.compute_s
        spent["transfer"] += notice.transfer_s
        spent["queue"] += notice.queued_s
        spent["schedule"] += notice.schedule_s
        share = self.workers.setdefault(stats.worker, WorkerShare())
        share.batches += 1
        share.chunks += notice.batch.count
        share.wall_s += stats.wall_s
        for bucket, count in stats.latency.items():
            self._latency[bucket] = self._latency.get(bucket, 0) + count

    def on_batch_hedged(self, notice: BatchHedged) -> None:
        """Count chunks that were started twice."""
        self.hedges += notice.batch.count

    def on_chunks_emitted(self, notice: ChunksEmitted) -> None:
        """Count."""
        self.emitted += len(notice.numbers)

    def on_chunks_filtered(self, notice: ChunksFiltered) -> None:
        """Count."""
        self.filtered += len(notice.numbers)

    def on_chunks_skipped(self, notice: ChunksSkipped) -> None:
        """Count."""
        self.skipped_missing += notice.count

    def on_chunk_dead_lettered(self, notice: ChunkDeadLettered) -> None:
        """Keep the letter."""
        self.dead_lettered += 1
        self.dead_letters.append(notice.letter)

    def on_chunks_cancelled(self, notice: ChunksCancelled) -> None:
        """Count."""
        self.cancelled += notice.count

    def on_chunk_retried(self, notice: ChunkRetried) -> None:  # noqa: ARG002  # all retries count alike
        """Count."""
        self.retries += 1

    def on_cluster_changed(self, notice: ClusterChanged) -> None:
        """Nothing to add up."""

    def on_run_finished(self, notice: RunFinished) -> None:
        """Close the account."""
        self.total = notice.total
        self.outcome = notice.outcome
        self.error = notice.error
        self.time["consumer"] = notice.consumer_s
        self.peak_chunks_in_flight = notice.peak_chunks
        self.peak_bytes_in_flight = notice.peak_bytes

    # -- what follows from it -------------------------------------------------------------------------

    @property
    def settled(self) -> int:
        """Chunks that have reached their end."""
        return self.emitted + self.filtered + self.skipped_missing + self.dead_lettered + self.cancelled

    @property
    def chunks_per_s(self) -> float:
        """Chunks that reached an end other than cancellation, per second of the run."""
        done = self.settled - self.cancelled
        return done / self.wall_s if self.wall_s else 0.0

    def quantile(self, q: float) -> float:
        """Seconds within which a share `q` of the chunks was fetched and decoded.

        Read from a histogram with eight buckets to a factor of two: exact to about 9 %. NaN where
        nothing was read.
        """
        count = sum(self._latency.values())
        seen = 0
        for bucket in sorted(self._latency):
            seen += self._latency[bucket]
            if seen >= q * count:
                return float(2.0 ** ((bucket + 1) / 8))
        return float("nan")

    @property
    def spent(self) -> dict[str, float]:
        """Seconds by phase without the queue: more tasks in it make it longer, and nothing slower."""
        return {name: seconds for name, seconds in self.time.items() if name != "queue"}

    def to_dict(self) -> dict[str, Any]:
        """Return the account as plain data for JSON."""
        names = (
            "url", "outcome", "error", "total", "emitted", "filtered", "skipped_missing", "dead_lettered",
            "cancelled", "resumed", "filled_missing", "retries", "hedges", "batches", "batches_lost",
            "bytes_stored", "bytes_decoded", "bytes_written",
            "peak_chunks_in_flight", "peak_bytes_in_flight", "wall_s",
        )  # fmt: skip
        report = {name: getattr(self, name) for name in names}
        report["chunks_per_s"] = _number(self.chunks_per_s)
        report["time"] = dict(self.time)
        report["latency_s"] = {f"p{round(q * 100)}": _number(self.quantile(q)) for q in (0.5, 0.9, 0.99)}
        report["workers"] = {
            name: {"chunks": w.chunks, "batches": w.batches, "wall_s": w.wall_s} for name, w in self.workers.items()
        }
        report["dead_letters"] = [letter.to_dict() for letter in self.dead_letters]
        return report

    def rows(self) -> list[tuple[str, str]]:
        """Return the account as labelled lines, for a person."""
        ends = [
            (self.emitted, "emitted"), (self.filtered, "filtered"), (self.skipped_missing, "missing, skipped"),
            (self.dead_lettered, "dead letters"),
            (self.cancelled, "not asked for" if self.outcome == "done" else "cancelled"),
            (self.resumed, "done by earlier runs"),
        ]  # fmt: skip
        total = "?" if self.total is None else f"{self.total:,}"
        rows = [
            ("array", self.url),
            ("outcome", self.outcome + (f": {self.error}" if self.error else "")),
            ("chunks", f"{total} planned: " + ", ".join(f"{n:,} {what}" for n, what in ends if n or what == "emitted")),
            ("time", f"{human_seconds(self.wall_s)} ({self.chunks_per_s:,.0f} chunks/s)"),
            (
                "data",
                f"{human_bytes(self.bytes_stored)} stored, {human_bytes(self.bytes_decoded)} decoded"
                + (f", {human_bytes(self.bytes_written)} written" if self.bytes_written else ""),
            ),
            (
                "in flight",
                f"at most {self.peak_chunks_in_flight:,} chunks, {human_bytes(self.peak_bytes_in_flight)}",
            ),
            ("tasks", f"{self.batches:,} on {len(self.workers)} worker(s), {self.batches_lost} lost"),
        ]
        if self.filled_missing:
            rows.append(("not stored", f"{self.filled_missing:,} chunks came as fill values"))
        if self.retries or self.hedges:
            rows.append(("again", f"{self.retries:,} retries, {self.hedges:,} hedges"))
        spent = self.spent
        where = sum(spent.values())
        if where:
            rows.append(("spent on", ", ".join(f"{name} {share / where:.0%}" for name, share in spent.items())))
        return rows


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no word for NaN and infinity


def human_bytes(count: float) -> str:
    """Format bytes in binary units.

    Examples
    --------
    >>> human_bytes(999), human_bytes(3 * 2**20)
    ('999 B', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """Format a duration.

    Examples
    --------
    >>> human_seconds(0.0123), human_seconds(75), human_seconds(7265)
    ('12 ms', '1 min 15 s', '2 h 01 min')
    """
    if seconds < 0.9995:  # not "1000 ms", nor "60.0 s" below
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"
