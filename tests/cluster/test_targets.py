"""Targets written by real worker processes: on disk, on S3, and where a worker sees something else than the client."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from obstore.store import S3Store
from zarr.codecs import GzipCodec
from zarr.storage import ObjectStore

import zarr_dask_stream as zds
from cluster.streaming import SHAPE, pattern, write_array
from copying import METADATA, read
from counted import balanced
from realparts.cluster import TcpCluster
from realparts.fault_proxy import FaultProxy, Faults
from realparts.leaks import LeakCheck
from realparts.s3 import S3Server
from zarr_dask_stream.errors import StoreNotVisibleError

pytestmark = pytest.mark.cluster

#: Tries often and soon: what is tested is that trying again heals, not how long to wait.
EAGER = zds.RetryPolicy(attempts=12, corrupt_attempts=12, wait_initial=0.02, wait_max=0.2)
LAYOUTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "shards": {"chunks": (7, 5), "shards": (21, 25)},
    "version 2": {"zarr_format": 2, "chunks": (60, 1)},
    "one": {"chunks": SHAPE, "compressors": GzipCodec()},
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_copy_on_disk(client: Client, leak_check: LeakCheck, tmp_path: Path, layout: str) -> None:
    data = write_array(tmp_path / "source")
    stream = zds.stream_chunks(tmp_path / "source", client=client, ordered=False)
    report = stream.to_zarr(tmp_path / "target", **LAYOUTS[layout]).run()
    assert (read(tmp_path / "target") == data).all()
    assert balanced(report)
    files = [path for path in (tmp_path / "target").rglob("*") if path.is_file() and path.name not in METADATA]
    assert report.bytes_written == sum(path.stat().st_size for path in files)
    assert not list(tmp_path.rglob(".zds-*"))


def test_functions_run_where_it_is_written(client: Client, tmp_path: Path) -> None:
    data = write_array(tmp_path / "source")

    def halve(chunk: zds.Chunk) -> Any:
        return chunk.data[::2] / 2

    stream = zds.stream_chunks(tmp_path / "source", client=client).map(halve, dtype="f8", chunks=(3, None))
    stream.to_zarr(tmp_path / "target").run()
    np.testing.assert_array_equal(read(tmp_path / "target"), data[::2] / 2)


def test_items_come_home_as_what_was_written(client: Client, tmp_path: Path) -> None:
    write_array(tmp_path / "source")
    stream = zds.stream_chunks(tmp_path / "source", client=client).to_zarr(tmp_path / "target")
    written = [chunk.data for chunk in stream]
    assert sum(one.objects for one in written) == 100
    assert written[-1].region == (slice(54, 60), slice(45, 50))


# -- S3 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    name = s3_server.make_bucket(f"targets-{uuid.uuid4().hex[:8]}")
    write_array(f"s3://{name}/source", storage_options=s3_server.storage_options)
    return name


def _target(server: S3Server, bucket: str, kind: str, endpoint: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Return a target that nobody else has, and its options."""
    name = uuid.uuid4().hex[:8]
    if kind == "obstore":
        return ObjectStore(S3Store(bucket, prefix=name, **server.obstore_options(endpoint))), {}
    options = server.options_at(endpoint or server.endpoint) | (
        {"default_cache_type": "none"} if kind == "s3fs" else {}
    )
    return f"s3://{bucket}/{name}", {"storage_options": options}


def _read(server: S3Server, target: Any, bucket: str) -> Any:
    prefix = target.store.prefix if isinstance(target, ObjectStore) else target.partition(bucket)[2].strip("/")
    store = ObjectStore(S3Store(bucket, prefix=str(prefix), **server.obstore_options()))
    return np.asarray(zarr.open_array(store, mode="r")[...])


@pytest.mark.parametrize("kind", ["s3fs", "url", "obstore"])
@pytest.mark.parametrize("verify", [True, "read"])
def test_a_copy_from_s3_to_s3(client: Client, s3_server: S3Server, bucket: str, kind: str, verify: Any) -> None:
    target, options = _target(s3_server, bucket, kind)
    stream = zds.stream_chunks(f"s3://{bucket}/source", storage_options=s3_server.storage_options, client=client)
    report = stream.to_zarr(target, verify=verify, chunks=(7, 5), shards=(14, 10), **options).run()
    assert balanced(report)
    assert (_read(s3_server, target, bucket) == pattern()).all()
    with pytest.raises(zds.UsageError, match="exists: choose another place"):
        stream.to_zarr(target, **options)
    stream.to_zarr(target, overwrite=True, chunks=(30, 50), **options).run()
    assert (_read(s3_server, target, bucket) == pattern()).all()
    assert s3_server.secret not in repr(stream)


@pytest.mark.parametrize("kind", ["s3fs", "url"])
def test_refusals_resets_and_hangs_cost_no_chunk(
    *,
    client: Client,
    s3_server: S3Server,
    bucket: str,
    kind: str,
    fault_proxy: Callable[..., FaultProxy],
    tmp_path: Path,
) -> None:
    data = write_array(tmp_path / "source")
    proxy = fault_proxy(s3_server.endpoint, seed=7)
    target, options = _target(s3_server, bucket, kind, proxy.url)
    proxy.set(Faults(slow_down=0.04, reset=0.04, hang=0.01, match="PUT .*/c/"))
    stream = zds.stream_chunks(tmp_path / "source", client=client, timeout=2.0, retry=EAGER)
    report = stream.to_zarr(target, **options).run()
    assert report.outcome == "done"
    assert report.retries > 0
    assert sum(proxy.counts[kind] for kind in ("slow_down", "reset", "hang")) > 0
    assert (_read(s3_server, target, bucket) == data).all()


def test_requests_to_s3_are_in_flight_together(
    client: Client, s3_server: S3Server, bucket: str, fault_proxy: Callable[..., FaultProxy], tmp_path: Path
) -> None:
    """Each is answered late: what is written one after the other would show."""
    write_array(tmp_path / "source")
    proxy = fault_proxy(s3_server.endpoint)
    target, options = _target(s3_server, bucket, "url", proxy.url)
    proxy.set(Faults(latency_s=0.2, match="PUT"))
    zds.stream_chunks(tmp_path / "source", client=client).to_zarr(target, **options).run()
    assert proxy.peak_in_flight >= 8


# -- what is not the same for all -----------------------------------------------------------------


@pytest.mark.parametrize("target", [{}, "memory://there"], ids=["a dict", "memory"])
def test_memory_of_the_client_is_refused(client: Client, tmp_path: Path, target: Any) -> None:
    write_array(tmp_path / "source")
    stream = zds.stream_chunks(tmp_path / "source", client=client).to_zarr(target, overwrite=True)
    with pytest.raises(StoreNotVisibleError, match="lives in the memory of another process"):
        stream.run()


# -- a cluster that changes -----------------------------------------------------------------------


def test_a_worker_killed_in_the_middle_costs_nothing(
    start_tcp_cluster: Callable[..., TcpCluster], tmp_path: Path
) -> None:
    data = write_array(tmp_path / "source")
    cluster = start_tcp_cluster(workers=2)

    def slow(chunk: zds.Chunk) -> Any:
        time.sleep(0.02)
        return chunk.data

    with Client(cluster.address, set_as_default=False) as client:
        stream = zds.stream_chunks(tmp_path / "source", client=client).rechunk((20, 10)).map(slow)
        stream = stream.to_zarr(tmp_path / "target", chunks=(4, 5), shards=(20, 10))
        for count, _ in enumerate(stream, 1):
            if count == 3:
                cluster.workers[0].kill()
                cluster.add_worker()
    assert (read(tmp_path / "target") == data).all()
    assert stream.report.emitted == 15
    assert not list(tmp_path.rglob(".zds-*"))
