"""Counts of runs as flat plain data: what is exported to systems that watch over many programs.

A `Figures` follows one run. `Totals` adds up runs under the names of their streams, so that what is counted
never falls, however many runs come and go, and never has more names than a system of metrics can bear.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

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
    RunFinished,
    RunStarted,
    SlowedDown,
)

__all__ = ["OTHER", "Counts", "Figures", "Totals", "stream_name"]

#: Counts by what they count and by kind, all of them sums since the beginning of a run.
Counts = dict[str, dict[str, float]]

OTHER = "other"  # the name of all streams beyond the most that have names of their own
_NAMES = 200
_NAME_LENGTH = 80


def stream_name(url: str) -> str:
    """Return a short name of a stream: the last two parts of where its array is, without query.

    Examples
    --------
    >>> stream_name("s3://bucket/era5/hourly.zarr/t2m"), stream_name("/data/a.zarr/"), stream_name("")
    ('hourly.zarr/t2m', 'data/a.zarr', 'stream')
    """
    parts = urlsplit(url.rpartition("::")[2])
    place = parts.path if parts.scheme in ("", "file") else f"{parts.netloc.rpartition('@')[2]}{parts.path}"
    return "/".join([part for part in place.split("/") if part][-2:])[-_NAME_LENGTH:] or "stream"


class Figures(Callback):
    """What a run has counted so far, as plain data.

    Attributes
    ----------
    counts : dict of str to dict of str to float
        ``chunks`` by how they ended, ``runs`` by outcome, ``again`` (retries, hedges), ``batches`` (done, lost),
        ``bytes`` (stored, decoded, written), ``seconds`` by phase, ``slowdowns`` of the store, and ``latency``:
        chunks by the power of two of seconds within which they were read, "-3" for an eighth of a second.
    name : str
        Of the stream: given, or made from its URL.
    planned : int
        Chunks planned for this run, 0 while that is not known.
    in_flight, in_flight_bytes : int
        Chunks, and at most how many decoded bytes, submitted and not yet taken.

    Examples
    --------
    >>> figures = Figures()
    >>> figures.handle(RunStarted(0.0, 4, 64, (4,), "/data/a.zarr"))
    >>> figures.handle(ChunksEmitted(0.1, (0, 1)))
    >>> figures.name, figures.planned, figures.counts["chunks"]
    ('data/a.zarr', 4, {'emitted': 2})
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.counts: Counts = {}
        self.planned = 0
        self.in_flight = 0
        self._chunk_nbytes = 0
        self._bytes_submitted = 0
        self._ended_since = 0

    @property
    def in_flight_bytes(self) -> int:
        """Decoded bytes in flight, at most."""
        return max(self._bytes_submitted - self._ended_since * self._chunk_nbytes, 0) if self.in_flight else 0

    def _add(self, what: str, kind: str, count: float) -> None:
        kinds = self.counts.setdefault(what, {})
        kinds[kind] = kinds.get(kind, 0) + count

    def copy(self) -> Counts:
        """Return the counts as they are now; safe from any thread."""
        return {what: dict(kinds) for what, kinds in list(self.counts.items())}

    def _end(self, kind: str, count: int, *, in_flight: bool = True) -> None:
        self._add("chunks", kind, count)
        if in_flight:
            self._ended_since += count
            self.in_flight = max(self.in_flight - count, 0)

    def on_run_started(self, notice: RunStarted) -> None:
        """Take the name and the plan."""
        self.name = self.name or stream_name(notice.url)
        self.planned = notice.total or 0
        self._chunk_nbytes = notice.chunk_nbytes

    def on_batch_submitted(self, notice: BatchSubmitted) -> None:
        """Take what is in flight from now on."""
        self.in_flight, self._bytes_submitted = notice.in_flight, notice.in_flight_bytes
        self._ended_since = 0

    def on_batch_finished(self, notice: BatchFinished) -> None:
        """Add up what a task did."""
        stats = notice.stats
        if stats is None:
            self._add("batches", "lost", 1)
            return
        self._add("batches", "done", 1)
        self._add("again", "retries", stats.again)
        self._add("again", "hedges", stats.hedges)
        for kind, nbytes in (
            ("stored", stats.bytes_stored),
            ("decoded", stats.bytes_decoded),
            ("written", stats.bytes_written),
        ):
            self._add("bytes", kind, nbytes)
        for phase, seconds in (
            ("fetch", stats.fetch_s),
            ("decode", stats.decode_s),
            ("compute", stats.compute_s),
            ("transfer", notice.transfer_s),
            ("queue", notice.queued_s),
            ("schedule", notice.schedule_s),
        ):
            self._add("seconds", phase, seconds)
        for bucket, count in stats.latency.items():
            self._add("latency", str(bucket // 8 + 1), count)

    def on_batch_hedged(self, notice: BatchHedged) -> None:
        """Count chunks that were started twice."""
        self._add("again", "hedges", notice.batch.count)

    def on_chunk_retried(self, notice: ChunkRetried) -> None:  # noqa: ARG002  # all retries count alike
        """Count."""
        self._add("again", "retries", 1)

    def on_slowed_down(self, notice: SlowedDown) -> None:  # noqa: ARG002  # that it happened is what counts
        """Count."""
        self._add("slowdowns", "", 1)

    def on_chunks_emitted(self, notice: ChunksEmitted) -> None:
        """Count."""
        self._end("emitted", len(notice.numbers))

    def on_chunks_filtered(self, notice: ChunksFiltered) -> None:
        """Count."""
        self._end("filtered", len(notice.numbers))

    def on_chunks_skipped(self, notice: ChunksSkipped) -> None:
        """Count."""
        self._end("skipped_missing", notice.count, in_flight=bool(notice.numbers))  # else a listing told

    def on_chunk_dead_lettered(self, notice: ChunkDeadLettered) -> None:  # noqa: ARG002  # one letter, one chunk
        """Count."""
        self._end("dead_lettered", 1)

    def on_chunks_cancelled(self, notice: ChunksCancelled) -> None:
        """Count."""
        self._end("cancelled", notice.count)

    def on_run_finished(self, notice: RunFinished) -> None:
        """Close the account."""
        self._add("seconds", "consumer", notice.consumer_s)
        self._add("runs", notice.outcome.replace(" ", "_"), 1)
        self.in_flight = 0


class Totals:
    """Sums of the counts of many runs, by the names of their streams.

    The first streams have names of their own; those beyond are added up under `OTHER`.

    Parameters
    ----------
    names : int
        The most names.

    Examples
    --------
    >>> totals = Totals()
    >>> totals.add("a.zarr", {"chunks": {"emitted": 2}})
    >>> totals.add("a.zarr", {"chunks": {"emitted": 5}}, {"chunks": {"emitted": 2}})
    >>> list(totals)
    [('a.zarr', {'chunks': {'emitted': 5}})]
    """

    def __init__(self, names: int = _NAMES) -> None:
        self._names = names
        self._sums: dict[str, Counts] = {}

    def known_as(self, name: str) -> str:
        """Return the name under which a stream is counted."""
        return name if name in self._sums or len(self._sums) < self._names else OTHER

    def add(self, name: str, counts: Mapping[str, Mapping[str, float]], before: Counts | None = None) -> None:
        """Add what a run has counted, less what was added of it before."""
        sums = self._sums.setdefault(self.known_as(name), {})
        for what, kinds in counts.items():
            of_what = sums.setdefault(what, {})
            old = (before or {}).get(what, {})
            for kind, count in kinds.items():
                of_what[kind] = of_what.get(kind, 0) + max(count - old.get(kind, 0), 0)

    def __iter__(self) -> Iterator[tuple[str, Counts]]:
        """Walk over names and sums."""
        return iter(list(self._sums.items()))
