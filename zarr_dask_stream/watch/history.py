"""How a run went over time: a pure fold of its notices into series, histograms and tables of bounded size.

Time is cut into bins. When a run outgrows them, neighbours are joined and each bin covers twice the time, so a run of
ten hours takes no more memory than one of ten minutes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from zarr_dask_stream.engine.events import (
    BatchFinished,
    BatchStats,
    BatchSubmitted,
    Callback,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksCancelled,
    ChunksEmitted,
    ChunksFiltered,
    ChunksSkipped,
    ClusterChanged,
    Notice,
    RunFinished,
    RunStarted,
    SlowedDown,
    WorkerRetired,
)
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.watch.causes import Cause, normalised

__all__ = ["LATENCIES", "LEVELS", "PHASES", "RATES", "Cause", "History", "WorkerPast", "bucket_of"]

RATES = ("chunks", "decoded", "stored", "written", "retries", "fetch", "decode", "compute", "transfer", "queue",
         "schedule")  # fmt: skip
"""Series of what happens per second: chunks that ended, bytes, tries again, and seconds of work by phase."""

LEVELS = ("in_flight", "in_flight_bytes", "workers", "threads")
"""Series of what there is at a time; a bin shows the most of it."""

PHASES = ("queue", "schedule", "fetch", "decode", "compute", "transfer")
"""Where the time of a task goes."""

LATENCIES = ("chunk", "fetch", "decode", "compute", "transfer", "task")
"""Histograms: fetching and decoding each chunk; phases of a chunk, as means of its task; tasks."""

_BINS = 240
_FIRST_BIN_S = 0.25
_MOST_CAUSES = 64
_MOST_WORKERS = 512
_SHALLOW_S = 2.0**-30

_Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class WorkerPast:
    """What one worker did, and when.

    Attributes
    ----------
    chunks, batches, failures, retired : int
        Chunks and tasks that came back; attempts that failed there; how often it was started anew.
    wall_s, fetch_s, decode_s, compute_s : float
        Seconds of its threads at work, and by phase.
    bytes_stored : int
        Bytes it read from the store.
    first_s, last_s : float
        When its first and its last task came back, seconds since the run began.
    """

    chunks: int = 0
    batches: int = 0
    failures: int = 0
    retired: int = 0
    wall_s: float = 0.0
    fetch_s: float = 0.0
    decode_s: float = 0.0
    compute_s: float = 0.0
    bytes_stored: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def chunks_per_busy_s(self) -> float:
        """Chunks for each second that one of its threads was at work."""
        return self.chunks / self.wall_s if self.wall_s > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


class _Bins:
    """Sums and levels by bins of time; replaced as a whole when the bins grow."""

    __slots__ = ("last", "levels", "seconds", "sums")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.sums: dict[str, list[float]] = {}
        self.levels: dict[str, list[float]] = {}
        self.last: dict[str, list[float]] = {}

    def joined(self) -> _Bins:
        """Return the same in bins of twice the time."""
        wider = _Bins(self.seconds * 2)
        for name, values in self.sums.items():
            wider.sums[name] = [sum(values[at : at + 2]) for at in range(0, len(values), 2)]
        for name, values in self.levels.items():
            wider.levels[name] = [_most(values[at : at + 2]) for at in range(0, len(values), 2)]
        for name, values in self.last.items():
            pairs = [values[at : at + 2] for at in range(0, len(values), 2)]
            wider.last[name] = [pair[0] if math.isnan(pair[-1]) else pair[-1] for pair in pairs]
        return wider


def _most(values: list[float]) -> float:
    return max((value for value in values if not math.isnan(value)), default=math.nan)


class History(Callback):
    """How a run went over time.

    Parameters
    ----------
    bins : int
        Most values of a series.

    Attributes
    ----------
    causes : list of Cause
        What failed, the most frequent first.
    workers : dict of str to WorkerPast
        What each worker did.
    grid_shape : tuple of int
        Chunks along each axis.
    chunk_nbytes : int
        Decoded bytes of one item.
    threads : int
        Most task threads that the cluster had.
    workers_now : int
        Workers that it had when it was last looked at.
    max_chunks : int or None
        The bound on chunks in flight, where there is one.
    max_nbytes : int
        The bound on bytes in flight; 0 where it is not known.
    slowed : int
        How often the store asked for less.
    requests_per_s : float
        The last rate that was settled on; infinite where the store never complained.
    retired : int
        How often a worker was started anew because its threads hung.
    lost : dict of str to int
        Tasks that did not come back, by reason.

    Examples
    --------
    >>> from zarr_dask_stream.engine.events import Batch
    >>> history = History()
    >>> history.handle(BatchSubmitted(0.1, Batch(1, (range(4),), 4, 32), 4, 32))
    >>> history.handle(ChunksEmitted(0.6, (0, 1, 2)))
    >>> times, values = history.series("chunks")
    >>> times.tolist(), values.tolist()
    ([0.125, 0.375, 0.625], [0.0, 0.0, 24.0])
    >>> history.series("in_flight")[1].tolist()
    [4.0, 4.0, 4.0]
    """

    def __init__(self, *, bins: int = _BINS) -> None:
        if bins < 2:
            raise UsageError(f"a history has at least two bins, got bins={bins!r}")
        self._most_bins = bins
        self.grid_shape: tuple[int, ...] = ()
        self.chunk_nbytes = 0
        self.threads = 0
        self.workers_now = 0
        self.max_chunks: int | None = None
        self.max_nbytes = 0
        self.slowed = 0
        self.requests_per_s = math.inf
        self.retired = 0
        self.lost: dict[str, int] = {}
        self.workers: dict[str, WorkerPast] = {}
        self.ended = False
        self._at = 0.0
        self._in_flight = 0
        self._bins = _Bins(_FIRST_BIN_S)
        self._latency: dict[str, dict[int, int]] = {name: {} for name in LATENCIES}
        self._causes: dict[tuple[str, str], Cause] = {}

    # -- the fold -----------------------------------------------------------------------------------

    def on_notice(self, notice: Notice) -> None:
        """Keep the clock."""
        self._at = max(self._at, notice.at)

    def on_run_started(self, notice: RunStarted) -> None:
        """Learn the sizes."""
        self.grid_shape = tuple(notice.grid_shape)
        self.chunk_nbytes = notice.chunk_nbytes
        self.max_chunks = notice.max_chunks
        self.max_nbytes = notice.max_nbytes

    def on_cluster_changed(self, notice: ClusterChanged) -> None:
        """Keep the number of workers and threads."""
        self.threads = max(self.threads, notice.threads)
        self.workers_now = notice.workers
        self._level("workers", notice.at, notice.workers)
        self._level("threads", notice.at, notice.threads)

    def on_batch_submitted(self, notice: BatchSubmitted) -> None:
        """Keep what is in flight."""
        self._in_flight = notice.in_flight
        self._show_in_flight(notice.at)

    def on_batch_finished(self, notice: BatchFinished) -> None:
        """Add up work, by phase, by worker and by time."""
        stats = notice.stats
        if stats is None:
            reason = normalised(notice.lost) or "no reason known"
            if reason in self.lost or len(self.lost) < _MOST_CAUSES:
                self.lost[reason] = self.lost.get(reason, 0) + 1
            return
        at, chunks = notice.at, max(notice.batch.count, 1)
        place = self._place(at)
        sums = self._bins.sums
        for name, amount in (
            ("decoded", stats.bytes_decoded),
            ("stored", stats.bytes_stored),
            ("written", stats.bytes_written),
            ("retries", stats.again),
            ("fetch", stats.waited_s),
            ("decode", stats.decode_s),
            ("compute", stats.compute_s),
            ("transfer", notice.transfer_s),
            ("queue", notice.queued_s),
            ("schedule", notice.schedule_s),
        ):
            if amount:
                _add(sums, name, place, amount)
        latency = self._latency
        for name, seconds, count in (
            ("fetch", stats.fetch_s / chunks, chunks),
            ("decode", stats.decode_s / chunks, chunks),
            ("compute", stats.compute_s / chunks, chunks),
            ("transfer", notice.transfer_s / chunks, chunks),
            ("task", notice.elapsed_s, 1),
        ):
            if seconds > 0:
                bucket = bucket_of(seconds)
                latency[name][bucket] = latency[name].get(bucket, 0) + count
        by_chunk = latency["chunk"]
        for bucket, count in stats.latency.items():
            by_chunk[bucket] = by_chunk.get(bucket, 0) + count
        self._work(at, stats, notice.batch.count)

    def _work(self, at: float, stats: BatchStats, chunks: int) -> None:
        worker = self._worker(stats.worker, at)
        worker.chunks += chunks
        worker.batches += 1
        worker.wall_s += stats.wall_s
        worker.fetch_s += stats.waited_s
        worker.decode_s += stats.decode_s
        worker.compute_s += stats.compute_s
        worker.bytes_stored += stats.bytes_stored
        worker.last_s = max(worker.last_s, at)

    def on_chunks_emitted(self, notice: ChunksEmitted) -> None:
        """Count."""
        self._settled(notice.at, len(notice.numbers))

    def on_chunks_filtered(self, notice: ChunksFiltered) -> None:
        """Count."""
        self._settled(notice.at, len(notice.numbers))

    def on_chunks_skipped(self, notice: ChunksSkipped) -> None:
        """Count; stretches that a listing showed to be empty were never in flight."""
        self._settled(notice.at, notice.count, held=sum(len(run) for run in notice.numbers))

    def on_chunk_dead_lettered(self, notice: ChunkDeadLettered) -> None:
        """Count, and file under its cause."""
        letter = notice.letter
        self._settled(notice.at, 1)
        cause = self._cause(notice.at, letter.error_type, letter.message, letter.category, letter.worker)
        cause.dead += 1
        if not cause.sample:
            cause.sample = letter.index

    def on_chunk_retried(self, notice: ChunkRetried) -> None:
        """Count, and file under its cause."""
        failure = notice.failure
        _add(self._bins.sums, "retries", self._place(notice.at), 1)
        cause = self._cause(notice.at, failure.error_type, failure.message, failure.category.value, failure.worker)
        cause.tries += 1
        if not cause.sample and 0 <= failure.number < math.prod(self.grid_shape):
            cause.sample = tuple(int(i) for i in np.unravel_index(failure.number, self.grid_shape))

    def on_chunks_cancelled(self, notice: ChunksCancelled) -> None:
        """Nothing is in flight any more."""

    def on_slowed_down(self, notice: SlowedDown) -> None:
        """Count."""
        self.slowed += 1
        self.requests_per_s = notice.requests_per_s

    def on_worker_retired(self, notice: WorkerRetired) -> None:
        """Count."""
        self.retired += 1
        self._worker(notice.worker, notice.at).retired += 1

    def on_run_finished(self, notice: RunFinished) -> None:
        """Close the series."""
        self._in_flight = 0
        self._show_in_flight(notice.at)
        self.ended = True

    # -- bins -----------------------------------------------------------------------------------------

    def _place(self, at: float) -> int:
        """Return the bin of a time; join neighbours until there is one for it."""
        bins = self._bins
        place = int(at / bins.seconds) if at > 0 else 0
        while place >= self._most_bins:
            bins = bins.joined()
            place = int(at / bins.seconds)
            self._bins = bins
        return place

    def _settled(self, at: float, count: int, held: int | None = None) -> None:
        if count:
            _add(self._bins_at(at), "chunks", self._place(at), count)
            self._in_flight = max(self._in_flight - (count if held is None else held), 0)
            self._show_in_flight(at, peak=False)

    def _bins_at(self, at: float) -> dict[str, list[float]]:
        self._place(at)
        return self._bins.sums

    def _show_in_flight(self, at: float, *, peak: bool = True) -> None:
        self._level("in_flight", at, self._in_flight, peak=peak)
        self._level("in_flight_bytes", at, self._in_flight * self.chunk_nbytes, peak=peak)

    def _level(self, name: str, at: float, value: float, *, peak: bool = True) -> None:
        place = self._place(at)
        levels = self._bins.levels.setdefault(name, [])
        last = self._bins.last.setdefault(name, [])
        if place >= len(levels):
            gap = place + 1 - len(levels)
            levels.extend([math.nan] * gap)
            last.extend([math.nan] * gap)
        last[place] = value
        if peak and not levels[place] >= value:
            levels[place] = value

    # -- causes and workers -----------------------------------------------------------------------------

    def _cause(self, at: float, error_type: str, message: str, category: str, worker: str) -> Cause:
        key = (error_type, normalised(message))
        cause = self._causes.get(key)
        if cause is None:
            if len(self._causes) >= _MOST_CAUSES:
                key = ("other errors", "more kinds of errors than are told apart")
            cause = self._causes.setdefault(key, Cause.of(key, message, category, at))
        cause.last_s = max(cause.last_s, at)
        if worker:
            cause.blame(worker)
            self._worker(worker, at).failures += 1
        return cause

    def _worker(self, name: str, at: float) -> WorkerPast:
        past = self.workers.get(name)
        if past is None:
            name = name if len(self.workers) < _MOST_WORKERS else "other workers"
            past = self.workers.setdefault(name, WorkerPast(first_s=at, last_s=at))
        return past

    # -- what it shows --------------------------------------------------------------------------------

    @property
    def causes(self) -> list[Cause]:
        """What failed, the most frequent first."""
        return sorted(self._causes.values(), key=lambda cause: (-cause.count, cause.first_s))

    @property
    def duration_s(self) -> float:
        """Seconds up to the last notice."""
        return self._at

    @property
    def bin_s(self) -> float:
        """Seconds that a value of a series covers."""
        return self._bins.seconds

    def series(self, name: str) -> tuple[_Floats, _Floats]:
        """Return a series over time.

        Parameters
        ----------
        name : str
            One of `RATES` (per second; bytes, chunks, or seconds of work) or `LEVELS` (the most in each bin).

        Returns
        -------
        times, values : array of float64
            Seconds since the run began, at the middle of each bin; as many values. The last bin of a run that
            goes on counts for the part of it that has passed.

        Raises
        ------
        UsageError
            If there is no such series.
        """
        if name not in RATES and name not in LEVELS:
            raise UsageError(f"a history has the series {', '.join((*RATES, *LEVELS))}, got {name!r}")
        bins, end = self._bins, self._at
        count = min(int(end / bins.seconds) + 1, self._most_bins) if end > 0 else 1
        edges = np.arange(count + 1) * bins.seconds
        times = (edges[:-1] + edges[1:]) / 2
        if name in RATES:
            values = np.zeros(count)
            found = bins.sums.get(name, [])[:count]
            values[: len(found)] = found
            covered = np.full(count, bins.seconds)
            # A sliver of a bin would show a spike that never was: at least half of one.
            covered[-1] = max(end - edges[-2], bins.seconds / 2)
            return times, values / np.minimum(covered, bins.seconds)
        levels = np.full(count, np.nan)
        last = np.full(count, np.nan)
        for target, source in ((levels, bins.levels.get(name, [])), (last, bins.last.get(name, []))):
            target[: min(len(source), count)] = source[:count]
        carried = _carried(last)
        before = np.concatenate([[0.0], carried[:-1]])
        return times, np.fmax(levels, np.where(np.isnan(last), carried, before))

    def recent(self, name: str, seconds: float = 10.0) -> float:
        """Return a rate over the last so many seconds, to the grain of a bin.

        Parameters
        ----------
        name : str
            One of `RATES`.
        seconds : float
            How far to look back.

        Examples
        --------
        >>> history = History()
        >>> history.handle(ChunksEmitted(4.0, tuple(range(8))))
        >>> history.recent("chunks")
        2.0
        """
        bins, end = self._bins, self._at
        first = max(int((end - seconds) / bins.seconds), 0) if end > seconds else 0
        spent = end - first * bins.seconds
        return sum(bins.sums.get(name, [])[first:]) / spent if spent > 0 else 0.0

    def latency(self, name: str) -> tuple[_Floats, npt.NDArray[np.int64]]:
        """Return a histogram of durations on a logarithmic scale, eight bins to a factor of two.

        Parameters
        ----------
        name : str
            One of `LATENCIES`. "chunk" is what fetching and decoding each chunk took. "fetch", "decode",
            "compute" and "transfer" are means over the chunks of a task, each counted for all of them. "task" is
            from the submission of a task to its end.

        Returns
        -------
        edges, counts : array of float64, array of int64
            ``len(counts) + 1`` edges, seconds; both empty where nothing was measured.
        """
        if name not in LATENCIES:
            raise UsageError(f"a history has the latencies {', '.join(LATENCIES)}, got {name!r}")
        found = dict(self._latency[name])
        if not found:
            return np.zeros(0), np.zeros(0, np.int64)
        low, high = min(found), max(found)
        counts = np.array([found.get(bucket, 0) for bucket in range(low, high + 1)], np.int64)
        return 2.0 ** (np.arange(low, high + 2) / 8), counts

    def quantile(self, name: str, q: float) -> float:
        """Return the seconds within which a share `q` of what `latency` counts lies; NaN where nothing was measured."""
        edges, counts = self.latency(name)
        if not counts.size:
            return math.nan
        place = int(np.searchsorted(np.cumsum(counts), q * counts.sum() - 1e-9))
        return float(edges[min(place, len(counts) - 1) + 1])

    @property
    def steady(self) -> tuple[float, float]:
        """From when until when most of the work went on, seconds: without start and tail."""
        _, chunks = self.series("chunks")
        done = np.cumsum(chunks)
        if not done[-1]:
            return 0.0, self._at
        first, last = np.searchsorted(done, (0.05 * done[-1], 0.95 * done[-1]))
        return float(first * self.bin_s), min(float((last + 1) * self.bin_s), self._at)


def _add(sums: dict[str, list[float]], name: str, place: int, amount: float) -> None:
    values = sums.get(name)
    if values is None:
        values = sums[name] = []
    if place >= len(values):
        values.extend([0.0] * (place + 1 - len(values)))
    values[place] += amount


def _carried(values: _Floats) -> _Floats:
    """Fill each gap with the value before it, 0 where there is none."""
    known = np.where(np.isnan(values), 0, np.arange(1, len(values) + 1))
    reach = np.maximum.accumulate(known)
    padded = np.concatenate([[0.0], values])
    return np.asarray(padded[reach], np.float64)


def bucket_of(seconds: float) -> int:
    """Return the bucket of a duration, eight to a factor of two; durations below a nanosecond share the lowest.

    Examples
    --------
    >>> bucket_of(1.0), bucket_of(2.1), bucket_of(0.0)
    (0, 8, -240)
    """
    return max(math.floor(math.log2(max(seconds, _SHALLOW_S)) * 8), -240)
