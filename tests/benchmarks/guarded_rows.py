"""Rows about what supervision costs while nothing fails."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr_dask_stream as zds
from benchmarks import data
from benchmarks.contest import Contender, Outcome, Ratio, Row
from benchmarks.data import Stored
from benchmarks.places import Bench
from benchmarks.streams import stream_sums

_OFF: dict[str, Any] = {"retry": zds.RetryPolicy(attempts=1), "timeout": None}
_RATE = zds.RateLimit(requests=1e9, bytes=1e15)


@contextmanager
def _nothing_more() -> Iterator[dict[str, Any]]:
    yield {}


@contextmanager
def _ledger() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="zds-bench-ledger-") as folder:
        yield {"checkpoint": str(Path(folder, "ledger"))}


def supervise(bench: Bench) -> Row:
    """All policies on, one at a time and together, beside none at all."""
    layout = Stored("", (bench.sized(200), 200), (100, 100), "zstd")
    stored = data.make(bench.folder, "small", layout, bench.seed)

    def contender(name: str, more: Callable[[], Any] = _nothing_more, **options: Any) -> Contender:
        def run() -> Outcome:
            with more() as others:
                return stream_sums(stored, bench.client, **{**_OFF, **options, **others})

        return Contender(name, run, "stream", work=stored.url)

    defaults: dict[str, Any] = {"retry": zds.RetryPolicy(), "timeout": 60.0}
    hedge: dict[str, Any] = {"hedge": zds.Hedge()}
    rate: dict[str, Any] = {"rate_limit": _RATE}
    every = {**defaults, **hedge, **rate, "on_error": "skip"}
    alone = {
        "retry and timeout": contender("retry and timeout", **defaults),
        "hedge": contender("hedge", **hedge),
        "rate limit": contender("rate limit", **rate),
        "checkpoint": contender("checkpoint", _ledger),
    }
    return Row(
        f"{layout.chunks:,} chunks as in `small`; all on: retry, timeout, hedge, rate limit, checkpoint, dead letters",
        [contender("all off"), *alone.values(), contender("all on", _ledger, **every)],
        [
            Ratio("≥ 0.95 of everything off", "all on", "all off", 0.95, share=True),
            *(Ratio(f"{name} alone, of everything off", name, "all off", None, share=True) for name in alone),
        ],
    )
