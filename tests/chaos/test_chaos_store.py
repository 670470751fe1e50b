"""A real S3 server behind a road on which answers are refused, lost, cut short and late."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from distributed import Client
from obstore.store import S3Store
from zarr.storage import ObjectStore

import zarr_dask_stream as zds
from chaos.scene import assemble_rows, assert_all_there, within, write_rows
from counted import balanced
from realparts.fault_proxy import FaultProxy, Faults
from realparts.leaks import LeakCheck
from realparts.s3 import S3Server
from zarr_dask_stream.engine.events import ChunkRetried, Notice, SlowedDown
from zarr_dask_stream.source.store import StoreSpec

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]

COUNT = 400
#: Only what is below a chunk's key: without its metadata no stream begins.
CHUNKS_ONLY = r"GET .*/c/"
#: An option that only s3fs has, so that it and not obstore is used.
ONLY_S3FS = {"default_cache_type": "none"}
#: Enough tries that a chunk met by a fault in one of six tries does not run out of them.
PATIENT = zds.RetryPolicy(attempts=12, corrupt_attempts=12, wait_initial=0.05, wait_max=1.0)

StartProxy = Callable[..., FaultProxy]


@pytest.fixture(scope="module")
def place(s3_server: S3Server) -> tuple[str, np.ndarray]:
    bucket = s3_server.make_bucket(f"chaos-{uuid.uuid4().hex[:8]}")
    store = ObjectStore(S3Store(bucket, prefix="rows.zarr", **s3_server.obstore_options()))
    return f"s3://{bucket}/rows.zarr", write_rows(store, COUNT, width=1000)


def options_for(server: S3Server, proxy: FaultProxy, kind: str) -> dict[str, Any]:
    return server.options_at(proxy.url) | (ONLY_S3FS if kind == "s3fs" else {})


@pytest.mark.parametrize(
    ("kind", "ordered", "seed"),
    [
        ("obstore", True, 1),
        pytest.param("obstore", False, 2, marks=pytest.mark.sample),
        ("s3fs", False, 3),
        ("s3fs", True, 4),
    ],
)
def test_refusals_resets_hangs_and_cut_bodies_cost_no_chunk(
    *,
    client: Client,
    leak_check: LeakCheck,
    s3_server: S3Server,
    fault_proxy: StartProxy,
    place: tuple[str, np.ndarray],
    kind: str,
    ordered: bool,
    seed: int,
) -> None:
    url, data = place
    data = data[:200]
    proxy = fault_proxy(s3_server.endpoint, seed=seed)
    stream = zds.stream_chunks(
        url,
        storage_options=options_for(s3_server, proxy, kind),
        client=client,
        region=slice(0, 200),
        ordered=ordered,
        timeout=3.0,
        hedge=zds.Hedge(min_s=0.2, budget=0.1),
        retry=PATIENT,
    )
    proxy.set(
        Faults(slow_down=0.1, reset=0.06, hang=0.02, truncate=0.06, latency_s=0.002, jitter_s=0.01, match=CHUNKS_ONLY)
    )
    with within(100):
        out = assemble_rows(stream, data)
    assert_all_there(stream.report, out, data)
    assert all(proxy.counts[fault] for fault in ("slow_down", "reset", "hang", "truncate"))
    assert stream.report.retries > 0


class Ear:
    """Notes when the stream slows down, how fast it may go from then on, and how much was asked for by then."""

    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy
        self.heard: list[tuple[float, int, float]] = []

    def __call__(self, notice: Notice) -> None:
        if isinstance(notice, SlowedDown):
            self.heard.append((notice.at, self._proxy.counts.total(), notice.requests_per_s))


@pytest.mark.parametrize(("ordered", "seed"), [pytest.param(False, 5, marks=pytest.mark.sample), (True, 6)])
def test_a_store_that_refuses_requests_is_asked_more_slowly(
    *,
    client: Client,
    leak_check: LeakCheck,
    s3_server: S3Server,
    fault_proxy: StartProxy,
    place: tuple[str, np.ndarray],
    ordered: bool,
    seed: int,
) -> None:
    url, data = place
    proxy = fault_proxy(s3_server.endpoint, seed=seed)
    ear = Ear(proxy)
    in_flight = 16

    def heal_in_time(_: int) -> None:
        if len(ear.heard) == 3:
            proxy.set(Faults())

    stream = zds.stream_chunks(
        url,
        callbacks=[ear],
        storage_options=options_for(s3_server, proxy, "obstore"),
        client=client,
        ordered=ordered,
        concurrency=in_flight,
        retry=PATIENT,
    )
    proxy.set(Faults(slow_down=0.1, latency_s=0.002, jitter_s=0.01, match=CHUNKS_ONLY))
    with within(100):
        out = assemble_rows(stream, data, heal_in_time)
    assert_all_there(stream.report, out, data)
    assert stream.report.retries > 0
    assert len(ear.heard) >= 3
    first = ear.heard[0][2]
    for (begin, asked, rate), (end, asked_by_then, _) in pairwise(ear.heard[:3]):
        took = end - begin
        # The rate climbs back to what it was before the first cut within twenty seconds; a bucket and what was out
        # already may come on top.
        most = rate * (took + 0.25) + 2 * first / 20 * took**2 / 2 + in_flight
        sent = asked_by_then - asked
        assert sent <= most, f"{sent} requests in {took:.2f} s at {rate:.1f}/s, {most:.0f}"


# -- credentials that expire --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("obstore", marks=pytest.mark.sample), "s3fs"])
@pytest.mark.parametrize("ordered", [True, False])
def test_credentials_that_expire_for_a_while_cost_no_chunk(
    *,
    client: Client,
    leak_check: LeakCheck,
    s3_server: S3Server,
    fault_proxy: StartProxy,
    place: tuple[str, np.ndarray],
    kind: str,
    ordered: bool,
) -> None:
    url, data = place
    proxy = fault_proxy(s3_server.endpoint)
    kinds: list[str] = []

    def listen(notice: Notice) -> None:
        if isinstance(notice, ChunkRetried):
            kinds.append(notice.failure.category.value)

    def expire_when_due(count: int) -> None:
        if count == 100:
            proxy.inject("expired", times=40, match=CHUNKS_ONLY)

    stream = zds.stream_chunks(
        url,
        storage_options=options_for(s3_server, proxy, kind),
        client=client,
        ordered=ordered,
        concurrency=16,
        retry=PATIENT,
        callbacks=[listen],
    )
    with within(60):
        out = assemble_rows(stream, data, expire_when_due)
    assert_all_there(stream.report, out, data)
    assert proxy.counts["expired"] == 40
    assert kinds
    assert set(kinds) == {"credentials"}


@pytest.mark.parametrize("kind", [pytest.param("obstore", marks=pytest.mark.sample), "s3fs"])
def test_a_store_is_opened_anew_once_for_a_wave_of_expired_credentials(
    *,
    s3_server: S3Server,
    fault_proxy: StartProxy,
    place: tuple[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    url, data = place
    proxy = fault_proxy(s3_server.endpoint)
    options = options_for(s3_server, proxy, kind)
    opened: list[str] = []
    refresh = StoreSpec.refresh

    def count(self: StoreSpec) -> Any:
        opened.append(self.url)
        return refresh(self)

    monkeypatch.setattr(StoreSpec, "refresh", count)
    stream = zds.stream_chunks(url, storage_options=options, region=slice(0, 60), retry=PATIENT, concurrency=1)
    proxy.inject("expired", times=5, match=CHUNKS_ONLY)
    out = assemble_rows(stream, data[:60])
    assert_all_there(stream.report, out, data[:60])
    assert len(opened) == 1
    assert stream.report.retries == 5


@pytest.mark.parametrize("kind", [pytest.param("obstore", marks=pytest.mark.sample), "s3fs"])
def test_credentials_that_stay_expired_end_in_one_clear_error(
    *,
    client: Client,
    leak_check: LeakCheck,
    s3_server: S3Server,
    fault_proxy: StartProxy,
    place: tuple[str, np.ndarray],
    kind: str,
) -> None:
    url, _ = place
    proxy = fault_proxy(s3_server.endpoint)
    stream = zds.stream_chunks(
        url,
        storage_options=options_for(s3_server, proxy, kind),
        client=client,
        retry=zds.RetryPolicy(attempts=4, wait_initial=0.05, wait_max=0.2),
    )
    proxy.set(Faults(expired=1.0, match=CHUNKS_ONLY))
    with within(60), pytest.raises(zds.ChunkError, match=r"ExpiredToken|token has expired"):
        stream.run()
    assert stream.report.outcome == "failed"
    assert stream.report.emitted == 0
    assert balanced(stream.report)
    assert s3_server.secret not in stream.report.error
