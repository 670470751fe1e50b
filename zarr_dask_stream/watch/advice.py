"""What would make a run faster or more reliable, each with the figures that say so: a pure function of its account.

Nothing is said where the evidence is thin: of a run that was over in a second, of a handful of chunks. The rules look
at shares and ratios within one run, so they hold on slow machines as on fast ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from zarr_dask_stream.watch.account import Account, human_bytes, human_seconds
from zarr_dask_stream.watch.history import History

__all__ = ["Advice", "advise"]

_LEAST_S = 1.0
_LEAST_CHUNKS = 20
_LEAST_FAILURES = 10
_TINY = 64 * 1024


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to change.

    Attributes
    ----------
    kind : str
        A short name that stays the same, such as "fetch-bound".
    title : str
        What it is, in a few words.
    text : str
        The figures, and what to do.
    """

    kind: str
    title: str
    text: str

    def to_dict(self) -> dict[str, str]:
        """Return plain data for JSON."""
        return {"kind": self.kind, "title": self.title, "text": self.text}


@dataclass(frozen=True, slots=True)
class _Evidence:
    """The figures that rules go by."""

    account: Account
    history: History
    busy_s: float  # of all threads, at work in tasks
    there_s: float  # that all threads were there

    @property
    def done(self) -> int:
        return self.account.settled - self.account.cancelled

    @property
    def used(self) -> float:
        """Share of the threads' time that they were at work."""
        return self.busy_s / self.there_s if self.there_s > 0 else 0.0

    def share(self, phase: str) -> float:
        """Share of the work that went into a phase."""
        return self.account.time.get(phase, 0.0) / self.busy_s if self.busy_s > 0 else 0.0

    def each(self, phase: str) -> str:
        """Time of a phase for a chunk."""
        return human_seconds(self.account.time.get(phase, 0.0) / max(self.done, 1))


def advise(account: Account, history: History) -> list[Advice]:
    """Say what would help a run, the most urgent first.

    Parameters
    ----------
    account : Account
        Its sums, as a `Report` holds them.
    history : History
        How it went.

    Returns
    -------
    list of Advice
        Empty where nothing stands out, or too little has been seen.

    Examples
    --------
    >>> advise(Account(), History())
    []
    """
    times, threads = history.series("threads")
    there_s = float(threads.sum()) * history.bin_s if len(times) else 0.0
    if len(times) and history.duration_s:  # the last bin is not over
        there_s -= float(threads[-1]) * max(len(times) * history.bin_s - history.duration_s, 0.0)
    evidence = _Evidence(account, history, sum(past.wall_s for past in list(history.workers.values())), there_s)
    found = [advice for rule in _ALWAYS for advice in rule(evidence)]
    if account.wall_s >= _LEAST_S and evidence.done >= _LEAST_CHUNKS:
        found += [advice for rule in _WITH_EVIDENCE for advice in rule(evidence)]
    return found


# -- what went wrong --------------------------------------------------------------------------------


def _no_workers(e: _Evidence) -> Iterator[Advice]:
    if e.account.outcome == "running" and e.history.threads and not e.history.workers_now:
        yield Advice(
            "no-workers",
            "No worker is left",
            "The cluster has no worker at the moment. The stream goes on as soon as one joins.",
        )


def _one_cause(e: _Evidence) -> Iterator[Advice]:
    causes = e.history.causes
    failures = sum(cause.count for cause in causes)
    if failures < _LEAST_FAILURES or causes[0].count < 0.9 * failures:
        return
    first = causes[0]
    where = ""
    if len(e.history.workers) > 1 and len(first.workers) == 1:
        where = f" All of them were on the worker {next(iter(first.workers))}."
    given_up = "1 chunk was given up" if first.dead == 1 else f"{first.dead:,} chunks were given up"
    fate = given_up if first.dead else "all of them healed when they were tried again"
    example = f" An example is chunk {first.sample}." if first.sample else ""
    yield Advice(
        "one-cause",
        "Nearly all errors have one cause",
        f"{first.count:,} of {failures:,} failures are {first.error_type}: {first.message}; {fate}.{where}{example} "
        + _REMEDY.get(first.category, "Mend this one first."),
    )


_REMEDY = {
    "function": "It is raised by a function of yours: run it on that chunk alone to see why.",
    "corrupt": "The stored bytes don't fit the metadata: write these chunks again from their source, or leave them "
    'out with on_error="skip".',
    "credentials": "The store refuses the credentials: look at storage_options, and at how long they hold.",
    "timeout": "A longer timeout, or hedge=zds.Hedge(), lets stragglers pass.",
    "throttled": "A rate_limit below what the store allows costs less than being refused.",
    "transient": "It heals when it is tried again, and costs time: look at the network between workers and store.",
    "cluster": "Tasks lost their workers: look at the memory of the workers.",
}


def _lost(e: _Evidence) -> Iterator[Advice]:
    lost = e.account.batches_lost
    if lost < 3 or lost < 0.05 * (e.account.batches + lost):
        return
    reason = max(e.history.lost, key=lambda text: e.history.lost[text], default="no reason known")
    yield Advice(
        "workers-die",
        "Workers die under their tasks",
        f"{lost:,} of {e.account.batches + lost:,} tasks lost their worker, most often: {reason}. Where memory is the "
        f"reason, fewer threads for each worker or a smaller max_bytes helps (an item is "
        f"{human_bytes(e.history.chunk_nbytes)} decoded).",
    )


def _throttled(e: _Evidence) -> Iterator[Advice]:
    if not e.history.slowed:
        return
    times = "once" if e.history.slowed == 1 else f"{e.history.slowed:,} times"
    rate = e.history.requests_per_s
    yield Advice(
        "store-throttles",
        "The store asks for less",
        f"It refused requests as too many {times}; in the end {rate:,.0f} requests a second passed. "
        f"rate_limit=zds.RateLimit(requests={max(int(rate), 1)}) stays below that from the start; shards, or larger "
        "chunks, need fewer requests.",
    )


# -- what holds it back -----------------------------------------------------------------------------


def _consumer_bound(e: _Evidence) -> Iterator[Advice]:
    waited, wall = e.account.time.get("consumer", 0.0), e.account.wall_s
    if waited > 0.5 * wall:
        yield Advice(
            "consumer-bound",
            "The loop that takes the chunks sets the pace",
            f"For {human_seconds(waited)} of {human_seconds(wall)} the stream waited for whoever iterates it, and "
            f"workers were busy {e.used:.0%} of the time. Move work into .map(...), which runs on the workers, or "
            "share the stream among several loops with .share(...).",
        )


def _too_little_room(e: _Evidence) -> Iterator[Advice]:
    history, threads = e.history, e.history.threads
    if not threads or not history.chunk_nbytes or not history.max_nbytes or e.used > 0.7:
        return
    by_bytes = max(history.max_nbytes // history.chunk_nbytes, 1)
    if by_bytes < threads and (history.max_chunks is None or by_bytes <= history.max_chunks):
        yield Advice(
            "memory-bound",
            "The memory limit holds it back",
            f"max_bytes={human_bytes(history.max_nbytes)} leaves room for {by_bytes:,} of the items of "
            f"{human_bytes(history.chunk_nbytes)}, and the cluster has {threads:,} threads: they were at work "
            f"{e.used:.0%} of the time. max_bytes of {human_bytes(2 * threads * history.chunk_nbytes)} would keep all "
            "of them busy.",
        )
    elif history.max_chunks is not None and history.max_chunks < threads:
        yield Advice(
            "concurrency-bound",
            "Fewer chunks are allowed in flight than there are threads",
            f"concurrency={history.max_chunks} on {threads:,} threads: they were at work {e.used:.0%} of the time. "
            f"concurrency={2 * threads} would keep all of them busy.",
        )


def _phase_bound(e: _Evidence) -> Iterator[Advice]:
    if e.account.time.get("consumer", 0.0) > 0.5 * e.account.wall_s or e.busy_s <= 0:
        return
    if e.share("fetch") >= 0.6:
        capped = e.history.max_chunks is not None and e.account.peak_chunks_in_flight >= e.history.max_chunks
        todo = (
            f"Raise concurrency: {e.account.peak_chunks_in_flight:,} chunks in flight were all that "
            f"concurrency={e.history.max_chunks} allows."
            if capped
            else "More requests at a time (requests=), more workers, or workers nearer to the store."
        )
        per_s = human_bytes(e.account.bytes_stored / max(e.account.wall_s, 1e-9))
        yield Advice(
            "fetch-bound",
            "Fetch-bound: the workers wait for the store",
            f"{e.share('fetch'):.0%} of their work is waiting for bytes, {e.each('fetch')} a chunk, at {per_s}/s in "
            f"all. {todo}",
        )
    elif e.share("decode") >= 0.5:
        yield Advice(
            "decode-bound",
            "Decode-bound: the codec sets the pace",
            f"{e.share('decode'):.0%} of the workers' time is decompression, {e.each('decode')} a chunk. More cores "
            "help, or a copy with a faster codec: `zds copy --codec blosc`, or zstd at a low level.",
        )
    elif e.share("compute") >= 0.6:
        yield Advice(
            "compute-bound",
            "Compute-bound: your functions set the pace",
            f"{e.share('compute'):.0%} of the workers' time is spent in functions and sinks, {e.each('compute')} a "
            "chunk. More workers help; .map_batch(...) calls a vectorised function once for many chunks.",
        )


def _scheduler_bound(e: _Evidence) -> Iterator[Advice]:
    tasks, wall = e.account.batches, e.account.wall_s
    if tasks < 50 or e.used > 0.5 or e.account.time.get("consumer", 0.0) > 0.3 * wall:
        return
    task_s = e.busy_s / tasks
    if task_s >= 0.1:
        return
    small = e.history.chunk_nbytes <= _TINY
    todo = (
        f"Chunks of {human_bytes(e.history.chunk_nbytes)} are small: store larger ones, or many to a shard."
        if small
        else "A larger concurrency and max_bytes let more chunks travel in one task; so do fewer, larger workers."
    )
    yield Advice(
        "scheduler-bound",
        "Scheduler-bound: tasks are over before the next ones arrive",
        f"{tasks:,} tasks of {human_seconds(task_s)} each kept the threads at work {e.used:.0%} of the time. {todo}",
    )


def _tiny_chunks(e: _Evidence) -> Iterator[Advice]:
    chunks, nbytes = e.done, e.history.chunk_nbytes
    if chunks < 1000 or not 0 < nbytes <= 16 * 1024 or e.share("compute") > 0.5:
        return
    yield Advice(
        "tiny-chunks",
        f"Chunks of {human_bytes(nbytes)}: finding them costs more than reading them",
        f"{chunks:,} chunks gave {human_bytes(e.account.bytes_decoded)} at "
        f"{human_bytes(e.account.bytes_decoded / max(e.account.wall_s, 1e-9))}/s. Store larger chunks, or put them "
        "into shards (`zds copy --shards ...`): a shard is one object, and its chunks are read in few requests.",
    )


def _transfer_bound(e: _Evidence) -> Iterator[Advice]:
    transfer = e.account.time.get("transfer", 0.0)
    if transfer > 0.4 * e.account.wall_s and transfer > 0.25 * e.busy_s:
        yield Advice(
            "transfer-bound",
            "The way from the workers to this process sets the pace",
            f"Results were {human_seconds(transfer)} on their way, beside {human_seconds(e.busy_s)} of work. "
            "Let less travel: .map(...) what is needed of a chunk, .reduce(...) on the workers, or write with "
            ".to_zarr(...) there.",
        )


def _slow_worker(e: _Evidence) -> Iterator[Advice]:
    pasts = {name: past for name, past in list(e.history.workers.items()) if past.batches >= 3 and past.chunks >= 10}
    if len(pasts) < 3:
        return
    rates = {name: past.chunks_per_busy_s for name, past in pasts.items()}
    usual = statistics.median(rates.values())
    slow = sorted((name for name in rates if rates[name] < 0.5 * usual), key=lambda name: rates[name])
    if not slow or len(slow) > max(1, len(pasts) // 4):
        return
    name = slow[0]
    more = f", and {len(slow) - 1} more like it" if len(slow) > 1 else ""
    yield Advice(
        "slow-worker",
        "One worker is slow" if len(slow) == 1 else "Some workers are slow",
        f"{name} does {rates[name]:,.1f} chunks for each second of a thread, half of the workers {usual:,.1f} or more"
        f"{more}. Look at what else runs on its host; hedge=zds.Hedge() starts its stragglers a second time elsewhere.",
    )


def _mostly_missing(e: _Evidence) -> Iterator[Advice]:
    filled = e.account.filled_missing
    if filled >= 100 and filled > 0.5 * max(e.done, 1):
        yield Advice(
            "mostly-missing",
            "Most chunks are not stored",
            f'{filled:,} of {e.done:,} chunks came as fill values, each asked for and found absent. missing="skip" '
            "leaves them out, and a store that can be listed is not asked for them at all.",
        )


_Rule = Callable[[_Evidence], Iterator[Advice]]
_ALWAYS: tuple[_Rule, ...] = (_no_workers, _one_cause, _lost, _throttled)
_WITH_EVIDENCE: tuple[_Rule, ...] = (
    _consumer_bound,
    _too_little_room,
    _phase_bound,
    _scheduler_bound,
    _transfer_bound,
    _tiny_chunks,
    _slow_worker,
    _mostly_missing,
)
