"""Arrays on a real S3 server, over HTTP and in zip files, read by real worker processes; and a road that breaks."""

from __future__ import annotations

import json
import logging
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import zarr
from distributed import Client
from zarr.storage import ObjectStore, ZipStore

import zarr_dask_stream as zds
from cluster.streaming import CHUNK_COUNT, CHUNKS, SHAPE, assemble, pattern, total_of, write_array
from counted import balanced
from realparts.fault_proxy import FaultProxy, Faults
from realparts.http_files import HttpStore
from realparts.s3 import S3Server, serve_s3
from zarr_dask_stream import errors
from zarr_dask_stream.engine.events import Notice

pytestmark = [pytest.mark.cluster, pytest.mark.s3, pytest.mark.usefixtures("client")]

StartProxy = Callable[..., FaultProxy]

BUCKET = "cluster-tests"
FORMATS: dict[str, dict[str, Any]] = {
    "v2": {"zarr_format": 2},
    "v3": {"zarr_format": 3},
    "sharded": {"zarr_format": 3, "shards": (12, 10)},
}

#: Tries often and soon: what is tested is that trying again heals, not how long to wait.
EAGER = zds.RetryPolicy(attempts=12, corrupt_attempts=12, wait_initial=0.02, wait_max=0.2)


@pytest.fixture(scope="module")
def s3(s3_server: S3Server) -> S3Server:
    """Return the server with one array of each format, and a group with consolidated metadata."""
    s3_server.make_bucket(BUCKET)
    options = s3_server.storage_options
    for name, extra in FORMATS.items():
        write_array(f"s3://{BUCKET}/{name}.zarr", storage_options=options, **extra)
    for version in (2, 3):
        url = f"s3://{BUCKET}/group{version}.zarr"
        group = zarr.open_group(url, mode="w", zarr_format=version, storage_options=options)
        group.create_array("deep/down", shape=SHAPE, chunks=CHUNKS, dtype="i4", fill_value=-1)[:] = pattern()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr remarks that consolidation is no part of format 3
            zarr.consolidate_metadata(group.store)
    return s3_server


@pytest.fixture
def data() -> np.ndarray:
    return pattern()


def by_url(server: S3Server, name: str, endpoint: str | None = None, **options: Any) -> dict[str, Any]:
    """Return arguments of `stream_chunks` for an array at a URL, which obstore or s3fs reads."""
    storage_options = server.options_at(endpoint or server.endpoint)
    return {"array": f"s3://{BUCKET}/{name}.zarr", "storage_options": {**storage_options, **options}}


def by_object_store(server: S3Server, name: str, endpoint: str | None = None) -> dict[str, Any]:
    """Return arguments of `stream_chunks` for an array in a store object of obstore."""
    store = obstore.store.S3Store(BUCKET, prefix=f"{name}.zarr", **server.obstore_options(endpoint))
    return {"array": ObjectStore(store, read_only=True)}


ROADS = pytest.mark.parametrize("road", [by_url, by_object_store])


# -- the main path ------------------------------------------------------------------------------------


@ROADS
@pytest.mark.parametrize("name", FORMATS)
def test_streams_whole_array(s3: S3Server, data: np.ndarray, road: Any, name: str) -> None:
    stream = zds.stream_chunks(**road(s3, name), ordered=name != "v2")
    np.testing.assert_array_equal(assemble(stream), data)
    assert stream.report.emitted == CHUNK_COUNT
    assert stream.report.bytes_decoded == data.nbytes
    assert stream.report.bytes_stored > 0
    assert balanced(stream.report)


@ROADS
def test_a_region_reads_only_its_chunks(s3: S3Server, data: np.ndarray, road: Any) -> None:
    stream = zds.stream_chunks(**road(s3, "v3"), region=(slice(7, 20), slice(3, 11)))
    out = np.full_like(data, -7)
    for chunk in stream:
        out[chunk.region] = chunk.data
    np.testing.assert_array_equal(out[7:20, 3:11], data[7:20, 3:11])
    assert (out == -7).sum() == data.size - 13 * 8
    assert stream.report.total == 9


@ROADS
@pytest.mark.parametrize("version", [2, 3])
def test_consolidated_metadata(s3: S3Server, data: np.ndarray, road: Any, version: int) -> None:
    stream = zds.stream_chunks(**road(s3, f"group{version}"), path="deep/down")
    np.testing.assert_array_equal(assemble(stream), data)


@ROADS
def test_missing_chunks(s3: S3Server, data: np.ndarray, road: Any) -> None:
    options = s3.storage_options
    name = f"sparse-{road.__name__}"
    array = zarr.create_array(
        f"s3://{BUCKET}/{name}.zarr", shape=SHAPE, chunks=CHUNKS, dtype="i4", fill_value=-1, storage_options=options
    )
    array[6:12] = data[6:12]
    chunks = {chunk.index: chunk for chunk in zds.stream_chunks(**road(s3, name))}
    assert len(chunks) == CHUNK_COUNT
    assert {index for index, chunk in chunks.items() if not chunk.missing} == {(1, column) for column in range(10)}
    assert all((chunk.data == -1).all() for chunk in chunks.values() if chunk.missing)
    stream = zds.stream_chunks(**road(s3, name), missing="skip")
    assert [chunk.index for chunk in stream] == [(1, column) for column in range(10)]
    assert stream.report.skipped_missing == 90
    with pytest.raises(zds.ChunkError, match="is not stored"):
        list(zds.stream_chunks(**road(s3, name), missing="raise"))


# -- refused --------------------------------------------------------------------------------------------


def spoken(error: BaseException) -> str:
    """Return all that an error says, its causes and traceback included."""
    return "".join(traceback.format_exception(error))


def test_wrong_credentials_by_url(s3: S3Server) -> None:
    arguments = by_url(s3, "v3", key="AKIAWRONGKEY", secret="wrong-secret-canary")
    with pytest.raises(zds.StoreError, match=f"s3://{BUCKET}/v3.zarr") as caught:
        zds.stream_chunks(**arguments)
    assert "AKIAWRONGKEY" not in spoken(caught.value)
    assert "wrong-secret-canary" not in spoken(caught.value)


def test_wrong_credentials_of_an_object_store(s3: S3Server) -> None:
    options = {**s3.obstore_options(), "access_key_id": "AKIAWRONGKEY", "secret_access_key": "wrong-secret-canary"}
    store = obstore.store.S3Store(BUCKET, prefix="v3.zarr", retry_config={"max_retries": 0}, **options)
    with pytest.raises(zds.StoreError, match=f"s3://{BUCKET}/v3.zarr") as caught:
        zds.stream_chunks(ObjectStore(store, read_only=True))
    assert "AKIAWRONGKEY" not in spoken(caught.value)
    assert "wrong-secret-canary" not in spoken(caught.value)


def test_wrong_bucket(s3: S3Server) -> None:
    with pytest.raises(errors.StoreNotFoundError, match="bucket"):
        zds.stream_chunks("s3://no-such-bucket-here/v3.zarr", storage_options=s3.storage_options)
    store = obstore.store.S3Store("no-such-bucket-here", prefix="v3.zarr", **s3.obstore_options())
    with pytest.raises(errors.StoreNotFoundError, match="bucket"):
        zds.stream_chunks(ObjectStore(store, read_only=True))


@ROADS
def test_wrong_path_names_what_is_there(s3: S3Server, road: Any) -> None:
    with pytest.raises(errors.StoreNotFoundError, match="deep/down"):
        zds.stream_chunks(**road(s3, "group3"), path="deep/up")


def test_a_server_that_is_not_there(s3: S3Server) -> None:
    options = by_url(s3, "v3", endpoint="http://127.0.0.1:9", config_kwargs={"retries": {"total_max_attempts": 1}})
    with pytest.raises(zds.StoreError, match=r"v3\.zarr"):
        zds.stream_chunks(**options)


# -- secrets --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secretive(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[S3Server]:
    """A server of its own, whose credentials are words that occur nowhere else."""
    with serve_s3(tmp_path_factory.mktemp("secretive"), key="AKIACANARYKEY", secret="canary/secret+word") as server:
        server.make_bucket(BUCKET)
        write_array(f"s3://{BUCKET}/v3.zarr", storage_options=server.storage_options)
        yield server


CANARIES = ("AKIACANARYKEY", "canary/secret+word", "canary%2Fsecret", "signature=")


def leaves_no_trace(texts: dict[str, str]) -> None:
    found = [
        f"{place}: {canary}"
        for place, text in texts.items()
        for canary in CANARIES
        if canary in text.lower() or canary in text
    ]
    assert not found


@ROADS
def test_secrets_appear_nowhere(
    client: Client, secretive: S3Server, road: Any, caplog: pytest.LogCaptureFixture, fault_proxy: StartProxy
) -> None:
    heard: list[Notice] = []
    keys: set[str] = set()
    proxy = fault_proxy(secretive.endpoint)
    proxy.set(Faults(slow_down=0.2, reset=0.05, truncate=0.1, match="/c/"))

    def fail(chunk: zds.Chunk) -> int:
        if chunk.index == (3, 3):
            raise LookupError("mine")
        return total_of(chunk)

    with caplog.at_level(logging.DEBUG, "zarr_dask_stream"):
        stream = zds.stream_chunks(
            **road(secretive, "v3", proxy.url), retry=EAGER, on_error="skip", callbacks=[heard.append]
        ).map(fail)
        for _ in stream:
            keys.update(map(str, client.run_on_scheduler(lambda dask_scheduler: list(dask_scheduler.tasks))))
        proxy.set(Faults(truncate=1, match="/c/3/3"))
        with pytest.raises(zds.ChunkError) as caught:
            list(zds.stream_chunks(**road(secretive, "v3", proxy.url), retry=zds.RetryPolicy(attempts=1)))
    assert keys
    assert stream.report.dead_lettered == 1
    report = stream.report
    logs = [*client.get_worker_logs().values(), client.get_scheduler_logs()]
    leaves_no_trace(
        {
            "repr of the stream": repr(stream),
            "options": repr(vars(stream)),
            "report": repr(report) + json.dumps(report.to_dict()) + report._repr_html_(),
            "events": "".join(f"{notice!r}{notice.to_dict()}" for notice in heard),
            "keys": " ".join(keys),
            "error": spoken(caught.value),
            "dead letters": "".join(
                f"{letter!r}{letter.to_dict()}{letter.traceback}" for letter in report.dead_letters
            ),
            "own log": caplog.text,
            "logs of the cluster": repr(logs),
            "graph": " ".join(task.key for task in stream.take(5).to_delayed()),
        }
    )


# -- a road that breaks -----------------------------------------------------------------------------------------


@ROADS
@pytest.mark.parametrize("name", ["v3", pytest.param("sharded", marks=pytest.mark.slow)])
def test_faults_that_pass_are_healed(
    s3: S3Server, fault_proxy: StartProxy, data: np.ndarray, road: Any, name: str
) -> None:
    proxy = fault_proxy(s3.endpoint, seed=4)
    stream = zds.stream_chunks(**road(s3, name, proxy.url), retry=EAGER)
    proxy.set(Faults(slow_down=0.1, reset=0.1, truncate=0.1, latency_s=0.001))
    np.testing.assert_array_equal(assemble(stream), data)
    assert proxy.counts["slow_down"] > 0
    assert proxy.counts["reset"] > 0
    assert proxy.counts["truncate"] > 0
    assert stream.report.emitted == CHUNK_COUNT
    assert stream.report.retries > 0
    assert balanced(stream.report)


@ROADS
@pytest.mark.parametrize("kind", ["slow_down", "reset", pytest.param("truncate", marks=pytest.mark.slow), "hang"])
def test_each_fault_costs_a_retry_of_its_chunk_alone(
    s3: S3Server, fault_proxy: StartProxy, data: np.ndarray, road: Any, kind: str
) -> None:
    proxy = fault_proxy(s3.endpoint)
    arguments = road(s3, "v3", proxy.url)
    proxy.inject(kind, times=1 if kind == "hang" else 6, match="/c/3/3")
    stream = zds.stream_chunks(
        **arguments,
        retry=zds.RetryPolicy(attempts=50, corrupt_attempts=50, wait_initial=0.01, wait_max=0.05),
        timeout=2.0 if kind == "hang" else 60.0,
    )
    np.testing.assert_array_equal(assemble(stream), data)
    assert 1 <= stream.report.retries <= 6
    assert stream.report.dead_lettered == 0
    assert balanced(stream.report)


@ROADS
@pytest.mark.parametrize("kind", ["slow_down", pytest.param("truncate", marks=pytest.mark.slow)])
def test_a_fault_that_stays_is_a_dead_letter(
    s3: S3Server, fault_proxy: StartProxy, data: np.ndarray, road: Any, kind: str
) -> None:
    proxy = fault_proxy(s3.endpoint)
    arguments = road(s3, "v3", proxy.url)
    proxy.set(Faults(match="/c/3/3", **{kind: 1.0}))
    policy = zds.RetryPolicy(attempts=2, wait_initial=0.01)
    stream = zds.stream_chunks(**arguments, retry=policy, on_error="skip")
    expected = data.copy()
    expected[18:24, 15:20] = -7
    np.testing.assert_array_equal(assemble(stream), expected)
    (letter,) = stream.report.dead_letters
    assert (letter.index, letter.attempts) == ((3, 3), 2)
    assert "c/3/3" in letter.message
    assert stream.report.retries == 1
    assert balanced(stream.report)


def test_trying_again_does_not_multiply(s3: S3Server, fault_proxy: StartProxy) -> None:
    # s3fs and botocore each try several times unless told otherwise; times our attempts, a storm on a busy server.
    proxy = fault_proxy(s3.endpoint)
    proxy.set(Faults(match="/c/3/3", slow_down=1.0))
    policy = zds.RetryPolicy(attempts=3, wait_initial=0.01)
    stream = zds.stream_chunks(**by_url(s3, "v3", proxy.url), retry=policy, on_error="skip")
    assert sum(1 for _ in stream) == CHUNK_COUNT - 1
    assert sum("/c/3/3" in request for request, _ in proxy.requests) == 3


# -- other stores on a cluster --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_http(http_store: HttpStore, data: np.ndarray, name: str) -> None:
    write_array(str(http_store.directory / "array.zarr"), **FORMATS[name])
    stream = zds.stream_chunks(f"{http_store.url}/array.zarr")
    np.testing.assert_array_equal(assemble(stream), data)
    assert balanced(stream.report)


def test_http_over_a_road_that_breaks(http_store: HttpStore, fault_proxy: StartProxy, data: np.ndarray) -> None:
    write_array(str(http_store.directory / "array.zarr"))
    proxy = fault_proxy(http_store.url, seed=2)
    stream = zds.stream_chunks(f"{proxy.url}/array.zarr", retry=EAGER)
    proxy.set(Faults(slow_down=0.1, reset=0.1, truncate=0.1))
    np.testing.assert_array_equal(assemble(stream), data)
    assert stream.report.retries > 0


def test_http_missing_chunks(http_store: HttpStore) -> None:
    zarr.create_array(str(http_store.directory / "array.zarr"), shape=SHAPE, chunks=CHUNKS, dtype="i4", fill_value=-1)
    stream = zds.stream_chunks(f"{http_store.url}/array.zarr", missing="skip")
    assert list(stream) == []
    assert stream.report.skipped_missing == CHUNK_COUNT


@pytest.mark.parametrize("name", FORMATS)
def test_zip(tmp_path: Path, data: np.ndarray, name: str) -> None:
    with ZipStore(tmp_path / "array.zip", mode="w", compression=zipfile.ZIP_STORED) as store:
        write_array(store, **FORMATS[name])
    stream = zds.stream_chunks(tmp_path / "array.zip")
    np.testing.assert_array_equal(assemble(stream), data)
    assert balanced(stream.report)
