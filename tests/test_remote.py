"""What the clients of remote stores do by themselves, and what they leave to the stream."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import zarr
from obstore.store import S3Store
from zarr.storage import FsspecStore, ObjectStore

import zarr_dask_stream as zds
from realparts.fault_proxy import FaultProxy, Faults
from realparts.http_files import HttpStore
from realparts.process import wait_until
from realparts.s3 import S3Server
from zarr_dask_stream.engine.events import ChunkRetried, Notice, SlowedDown
from zarr_dask_stream.source.array import list_arrays, open_array
from zarr_dask_stream.source.reader import read_chunks, stored_numbers

StartProxy = Callable[..., FaultProxy]

CHUNKS_ONLY = r"GET .*/c/"
#: An option that only s3fs has, so that it and not obstore is used.
ONLY_S3FS = {"default_cache_type": "none"}
QUICK = zds.RetryPolicy(attempts=12, wait_initial=0.01, wait_max=0.02)


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    """A bucket with one array of twelve chunks."""
    name = s3_server.make_bucket(f"remote-{uuid.uuid4().hex[:8]}")
    store = ObjectStore(S3Store(name, prefix="a.zarr", **s3_server.obstore_options()))
    zarr.create_array(store, shape=(12, 10), chunks=(1, 10), dtype="i4")[:] = np.arange(120).reshape(12, 10)
    return name


def by_s3fs(server: S3Server, bucket: str, endpoint: str) -> dict[str, Any]:
    return {"array": f"s3://{bucket}/a.zarr", "storage_options": server.options_at(endpoint) | ONLY_S3FS}


def by_chain(server: S3Server, bucket: str, endpoint: str) -> dict[str, Any]:
    return {"array": f"simplecache::s3://{bucket}/a.zarr", "storage_options": {"s3": server.options_at(endpoint)}}


def by_obstore(server: S3Server, bucket: str, endpoint: str) -> dict[str, Any]:
    return {"array": f"s3://{bucket}/a.zarr", "storage_options": server.options_at(endpoint)}


def by_store_of_fsspec(server: S3Server, bucket: str, endpoint: str) -> dict[str, Any]:
    options = server.options_at(endpoint) | {"asynchronous": True}
    return {"array": FsspecStore.from_url(f"s3://{bucket}/a.zarr", storage_options=options, read_only=True)}


def by_store_of_obstore(server: S3Server, bucket: str, endpoint: str) -> dict[str, Any]:
    return {"array": ObjectStore(S3Store(bucket, prefix="a.zarr", **server.obstore_options(endpoint)))}


def roads(*chosen: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("road", chosen, ids=lambda road: road.__name__)


@roads(by_s3fs, by_obstore, by_store_of_fsspec, by_store_of_obstore)
def test_each_refusal_of_a_chunk_is_heard(s3_server: S3Server, bucket: str, fault_proxy: StartProxy, road: Any) -> None:
    proxy = fault_proxy(s3_server.endpoint)
    heard: list[Notice] = []
    stream = zds.stream_chunks(
        **road(s3_server, bucket, proxy.url), retry=QUICK, concurrency=1, callbacks=[heard.append]
    )
    proxy.inject("slow_down", times=7, match=CHUNKS_ONLY)
    assert sum(int(chunk.data.sum()) for chunk in stream) == 7140
    assert proxy.counts["slow_down"] == 7
    assert stream.report.retries == 7
    retried = [notice.failure.category.value for notice in heard if isinstance(notice, ChunkRetried)]
    assert retried == ["throttled"] * 7
    assert any(isinstance(notice, SlowedDown) for notice in heard)


@roads(by_s3fs, by_chain, by_obstore, by_store_of_fsspec, by_store_of_obstore)
def test_metadata_and_listings_outlive_refusals(
    s3_server: S3Server, bucket: str, fault_proxy: StartProxy, road: Any
) -> None:
    proxy = fault_proxy(s3_server.endpoint)
    arguments = road(s3_server, bucket, proxy.url)
    source, options = arguments["array"], arguments.get("storage_options")
    proxy.inject("slow_down", match=r"GET .*zarr\.json")
    proxy.inject("reset", match=r"GET .*zarr\.json")
    spec = open_array(source, storage_options=options)
    proxy.inject("slow_down", match="list-type=2")
    assert list(stored_numbers(spec)) == list(range(12))
    proxy.inject("slow_down", match="list-type=2")
    assert [summary.path for summary in list_arrays(source, storage_options=options)] == [""]
    assert (proxy.counts["slow_down"], proxy.counts["reset"]) == (3, 1)


@roads(by_chain)
def test_a_refusal_behind_a_cache_is_tried_again_by_us_alone(
    s3_server: S3Server, bucket: str, fault_proxy: StartProxy, road: Any
) -> None:
    proxy = fault_proxy(s3_server.endpoint)
    spec = open_array(**_named(road(s3_server, bucket, proxy.url)))
    proxy.set(Faults(slow_down=1.0, match=CHUNKS_ONLY))
    (read,) = read_chunks(spec, [3])
    assert isinstance(read.error, OSError)
    assert proxy.counts["slow_down"] <= 3  # the cache hides what went wrong: it is asked for once more behind it


@roads(by_s3fs, by_chain, by_store_of_fsspec)
def test_retries_that_were_asked_for_are_left_alone(
    s3_server: S3Server, bucket: str, fault_proxy: StartProxy, road: Any
) -> None:
    proxy = fault_proxy(s3_server.endpoint)
    server = _Asking(s3_server, {"config_kwargs": {"retries": {"total_max_attempts": 3, "mode": "standard"}}})
    spec = open_array(**_named(road(server, bucket, proxy.url)))
    proxy.inject("slow_down", times=2, match=CHUNKS_ONLY)
    (read,) = read_chunks(spec, [3])
    assert read.error is None
    assert proxy.counts["slow_down"] == 2


def test_metadata_outlive_refusals_over_http(http_store: HttpStore, fault_proxy: StartProxy) -> None:
    zarr.create_array(str(http_store.directory / "a.zarr"), shape=(4,), chunks=(2,), dtype="i4")
    proxy = fault_proxy(http_store.url)
    proxy.inject("slow_down", match=r"zarr\.json")
    proxy.inject("reset", match=r"zarr\.json")
    proxy.inject("truncate", match=r"zarr\.json")
    assert open_array(f"{proxy.url}/a.zarr").shape == (4,)
    assert sum(proxy.counts[kind] for kind in ("slow_down", "reset", "truncate")) == 3


def test_a_store_that_goes_on_refusing_is_told_of_soon(http_store: HttpStore, fault_proxy: StartProxy) -> None:
    proxy = fault_proxy(http_store.url)
    proxy.set(Faults(slow_down=1.0))
    with pytest.raises(zds.StoreError, match="503"):
        zds.stream_chunks(f"{proxy.url}/a.zarr")
    assert proxy.counts["slow_down"] <= 5


class _Asking:
    """A server whose options ask for something beside what is needed."""

    def __init__(self, server: S3Server, more: dict[str, Any]) -> None:
        self._server, self._more = server, more

    def options_at(self, endpoint: str) -> dict[str, Any]:
        return self._server.options_at(endpoint) | self._more


def _named(arguments: dict[str, Any]) -> dict[str, Any]:
    return {"source": arguments.pop("array"), **arguments}


# -- connections ----------------------------------------------------------------------------------

#: Reads everything twice, with other connections the second time, and ends while the I/O thread has other things to do.
READ_AND_EXIT = """
import json, sys, threading, time
from fsspec.asyn import get_loop
import zarr_dask_stream as zds

for source, options in json.loads(sys.argv[1]):
    stream = zds.stream_chunks(source, storage_options=options, concurrency=1, missing="skip")
    print(sum(int(chunk.data.sum()) for chunk in stream))
    stream.spec.store.refresh()
    print(sum(int(chunk.data.sum()) for chunk in stream))
get_loop().call_soon_threadsafe(time.sleep, 0.2)
"""


@pytest.mark.slow
@pytest.mark.sample
def test_connections_are_closed_before_python_ends(s3_server: S3Server, bucket: str, http_store: HttpStore) -> None:
    array = zarr.create_array(str(http_store.directory / "a.zarr"), shape=(4,), chunks=(2,), dtype="i4")
    array[:] = 1
    by_s3 = by_s3fs(s3_server, bucket, s3_server.endpoint)
    cached = by_chain(s3_server, bucket, s3_server.endpoint)
    sources = [[road["array"], road["storage_options"]] for road in (by_s3, cached)]
    sources.append([f"{http_store.url}/a.zarr", {}])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", READ_AND_EXIT, json.dumps(sources)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["7140", "7140", "7140", "7140", "4", "4"]


def _connections(server: HttpStore) -> int:
    port = urlsplit(server.url).port
    found = psutil.Process().net_connections("tcp")
    return sum(bool(c.raddr) and c.raddr[1] == port and c.status == psutil.CONN_ESTABLISHED for c in found)


def test_stores_that_were_used_long_ago_are_closed(http_store: HttpStore) -> None:
    zarr.create_array(str(http_store.directory / "a.zarr"), shape=(4,), chunks=(2,), dtype="i4")
    urls = [f"{http_store.url}/a.zarr?signature={n}" for n in range(80)]
    assert all(open_array(url).shape == (4,) for url in urls)
    wait_until(lambda: _connections(http_store) <= 32, what="connections to be closed", timeout_s=5)
    first = open_array(urls[0])
    assert first.store.open() is open_array(urls[0]).store.open()
