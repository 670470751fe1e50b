"""Rows of a real S3 server: far away, near by, and with requests that hang."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from obstore.store import S3Store
from zarr.storage import ObjectStore

import zarr_dask_stream as zds
from benchmarks import data, limit, peers
from benchmarks.contest import Contender, Figure, Outcome, Ratio, Row, share, times
from benchmarks.data import Stored
from benchmarks.local_rows import BANDS, FROM_ZARR, TENSORSTORE, peer
from benchmarks.places import CORES, LATENCY_S, Bench
from benchmarks.road import Delays
from benchmarks.streams import streaming

# Requests in flight, all processes together: on two cores a server, a road and two clients keep up with so many at a
# latency of 30 ms; with twice as many, bare loops are already bound by the processor.
_IN_FLIGHT = 8 * CORES


def _counted(bench: Bench, contender: Contender, delays: Delays, in_flight: int = _IN_FLIGHT) -> Contender:
    """Let the contender's figures tell what went over the road, too, and how near it came to what that allows."""

    def run() -> Outcome:
        bench.road.set(delays)
        bench.road.take_traffic()
        begin = time.perf_counter()
        outcome = contender.run()
        seconds = time.perf_counter() - begin
        traffic = bench.road.take_traffic()
        traffic["requests_per_chunk"] = traffic["requests"] / outcome.chunks
        traffic["of_added_latency"] = outcome.chunks / seconds / (in_flight / delays.latency_s)
        return replace(outcome, figures={**outcome.figures, **traffic}, seconds=seconds)

    return replace(contender, run=run)


def _client(bench: Bench, library: Literal["obstore", "s3fs"], endpoint: str, in_flight: int) -> limit.Client:
    options = bench.s3.obstore_options(endpoint) if library == "obstore" else bench.s3.options_at(endpoint)
    return limit.Client(library, json.dumps(options), in_flight)


def _bare(bench: Bench, stored: Stored, client: limit.Client) -> Contender:
    def run() -> Outcome:
        sums = bench.bare.run(limit.sum_objects, stored, client)
        return Outcome(stored.chunks, float(sums.sum(dtype="f8")))

    return Contender(f"limit, {client.library}", run, "limit", work=stored.url)


def _alone(bench: Bench, name: str, stored: Stored) -> Contender:
    """Return a bare loop with one request in flight, which tells how long a request takes when nobody disturbs it."""
    client = _client(bench, "obstore", bench.road.url, 1)

    def run() -> Outcome:
        sums = bench.bare.run_one(limit.sum_objects, stored, client)
        return Outcome(stored.chunks, float(sums.sum(dtype="f8")))

    return Contender(name, run, "limit", work=stored.url)


def _through_s3fs(bench: Bench, endpoint: str) -> dict[str, object]:
    """Return options that obstore has no counterpart for, so that s3fs reads."""
    return {**bench.s3.options_at(endpoint), "config_kwargs": {"max_pool_connections": _IN_FLIGHT}}


def _own_store(bench: Bench, stored: Stored, endpoint: str) -> ObjectStore[S3Store]:
    bucket, _, prefix = stored.url.removeprefix("s3://").partition("/")
    return ObjectStore(S3Store(bucket, prefix=prefix, **bench.s3.obstore_options(endpoint)), read_only=True)


def _tensorstore(bench: Bench, stored: Stored, endpoint: str, in_flight: int) -> Callable[[], Outcome]:
    os.environ.setdefault("AWS_ACCESS_KEY_ID", bench.s3.key)
    os.environ.setdefault("AWS_SECRET_ACCESS_KEY", bench.s3.secret)

    def run() -> Outcome:
        array = peers.tensorstore_on_s3(stored.url, endpoint, in_flight)
        return Outcome(stored.chunks, peers.tensorstore_bands(stored, array=array))

    return run


def _far(bench: Bench) -> tuple[Stored, Stored, Stored, dict[str, float]]:
    """Return an array on the server, a part of it of one row, one of a few rows, and their totals."""
    layout = Stored("", (bench.sized(16), 100), (128, 128), "zstd")
    local = data.make(bench.folder, "s3", layout, bench.seed)
    stored = replace(local, url=bench.upload(local, "small"))
    parts, totals = [], {}
    for rows in (1, 4):
        part = data.part(bench.folder, "s3", layout, bench.seed, (rows, 100))
        parts.append(replace(part, url=bench.upload(part, f"small-part-{rows}")))
        totals[parts[-1].url] = peers.zarr_whole(part)
    return stored, parts[0], parts[1], totals


def s3(bench: Bench) -> Row:
    """Small objects far away."""
    stored, few, some, totals = _far(bench)
    each = _IN_FLIGHT // CORES
    url, options = bench.road.url, bench.s3.options_at(bench.road.url)
    alone, obstore, s3fs = "one request at a time", "limit, obstore", "limit, s3fs"
    contenders = [
        _alone(bench, alone, few),
        _bare(bench, stored, _client(bench, "obstore", url, each)),
        _bare(bench, stored, _client(bench, "s3fs", url, each)),
        streaming("stream", stored, bench.client, storage_options=options, requests=each),
        streaming("stream, s3fs", stored, bench.client, storage_options=_through_s3fs(bench, url), requests=each),
        streaming("stream, store passed", stored, bench.client, source=_own_store(bench, stored, url), requests=each),
        streaming("stream, adaptive", stored, bench.client, storage_options=options),
        peer(FROM_ZARR, few, peers.from_zarr, bench.client, options, few=True),
        peer(BANDS, some, peers.from_zarr_bands, bench.client, options, few=True),
        Contender(
            TENSORSTORE, _tensorstore(bench, stored, url, _IN_FLIGHT), "peer", work=stored.url, family=TENSORSTORE
        ),
    ]
    ideal = f"{_IN_FLIGHT} / latency of one request"
    return Row(
        f"{stored.chunks:,} chunks of 64 KiB, zstd, on an S3 server behind a road that adds {LATENCY_S * 1e3:.0f} ms "
        f"to each request; sum of each chunk; {_IN_FLIGHT} requests in flight, the most at which bare loops are not "
        "bound by two cores; the latency is that of a bare loop with one request in flight, with the server's own time",
        [_counted(bench, contender, Delays(LATENCY_S)) for contender in contenders],
        [
            Ratio(f"≥ 0.85 of {ideal}", "stream", alone, 0.85, share=True, factor=_IN_FLIGHT),
            Ratio(f"the bare loop's share of {ideal}", obstore, alone, None, share=True, factor=_IN_FLIGHT),
            share("stream", obstore, 0.85, "a bare loop, obstore"),
            share("stream, s3fs", s3fs, 0.85, "a bare loop, s3fs"),
            share("stream, store passed", obstore, 0.85, "a bare loop, the store passed as an object"),
            times("stream, adaptive", contenders[7].name, 5.0, FROM_ZARR),
        ],
        expected=totals,
    )


def s3_large(bench: Bench) -> Row:
    """Large objects near by."""
    layout = Stored("", (bench.sized(16), 4), (1024, 2048), "zstd")
    local = data.make(bench.folder, "s3-large", layout, bench.seed)
    stored = replace(local, url=bench.upload(local, "large"))
    url, in_flight = bench.s3.endpoint, 4 * CORES
    options = bench.s3.options_at(url)
    obstore, s3fs = "limit, obstore", "limit, s3fs"
    return Row(
        f"{stored.chunks:,} chunks of 8 MiB, zstd, on an S3 server on this machine; sum of each chunk; bare loops keep "
        f"{in_flight} requests in flight",
        [
            _bare(bench, stored, _client(bench, "obstore", url, in_flight // CORES)),
            _bare(bench, stored, _client(bench, "s3fs", url, in_flight // CORES)),
            streaming("stream", stored, bench.client, storage_options=options),
            streaming("stream, s3fs", stored, bench.client, storage_options=_through_s3fs(bench, url)),
            peer(FROM_ZARR, stored, peers.from_zarr, bench.client, options),
            Contender(
                TENSORSTORE, _tensorstore(bench, stored, url, in_flight), "peer", work=stored.url, family=TENSORSTORE
            ),
        ],
        [
            share("stream", obstore, 0.90, "a bare loop, obstore"),
            share("stream, s3fs", s3fs, 0.90, "a bare loop, s3fs"),
        ],
    )


def tail(bench: Bench) -> Row:
    """One of a hundred requests hangs."""
    layout = Stored("", (bench.sized(32), 100), (128, 128), "zstd")
    local = data.make(bench.folder, "tail", layout, bench.seed)
    stored = replace(local, url=bench.upload(local, "tail"))
    options = bench.s3.options_at(bench.road.url)
    each = _IN_FLIGHT // CORES
    clean, hanging = Delays(LATENCY_S), Delays(LATENCY_S, hang_every=100, hang_s=5.0)

    def contender(name: str, delays: Delays, hedge: zds.Hedge | None) -> Contender:
        stream = streaming(name, stored, bench.client, storage_options=options, requests=each, hedge=hedge)
        return _counted(bench, stream, delays)

    return Row(
        f"{stored.chunks:,} chunks of 64 KiB as in `s3`, {_IN_FLIGHT} requests in flight; where requests hang, exactly "
        "one of each hundred takes 5 s longer",
        [
            contender("clean, hedge on", clean, zds.Hedge()),
            contender("hanging, hedge on", hanging, zds.Hedge()),
            contender("hanging, hedge off", hanging, None),
        ],
        [
            Ratio("≤ 1.3x the time of a clean run", "hanging, hedge on", "clean, hedge on", 1 / 1.3, share=True),
            Figure("requests sent per chunk", "hanging, hedge on", "requests_per_chunk"),
        ],
    )
