"""Reading from a real S3 server, through s3fs and through obstore."""

from __future__ import annotations

import pickle
import traceback
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zarr
from obstore.store import S3Store
from zarr.storage import FsspecStore, ObjectStore

from conformance.oracle import assemble, same_bits, sample
from realparts.fault_proxy import FaultProxy, Faults
from realparts.s3 import S3Server
from zarr_dask_stream.errors import StoreNotFoundError
from zarr_dask_stream.source.array import ArraySpec, check_visible, list_arrays, open_array
from zarr_dask_stream.source.reader import read_chunks, stored_numbers
from zarr_dask_stream.source.remote import FsspecFiles, ObstoreObjects, obstore_for_s3

DATA = sample("f4", (16, 30))
#: An option that only s3fs has, so that it and not obstore is used.
ONLY_S3FS = {"default_cache_type": "none"}


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    """Fill a bucket with a plain array, a sharded one and a version 2 one."""
    name = s3_server.make_bucket(f"reader-{uuid.uuid4().hex[:8]}")
    store = ObjectStore(S3Store(name, prefix="d.zarr", **s3_server.obstore_options()))
    group = zarr.create_group(store)
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "in/shards": {"shards": (8, 15)}}
    for path, options in kinds.items():
        array = group.create_array(path, shape=(20, 30), chunks=(4, 5), dtype="f4", fill_value=-1, **options)
        array[:16] = DATA
    old = zarr.create_array(store, name="old", shape=(20, 30), chunks=(4, 5), dtype="f4", fill_value=-1, zarr_format=2)
    old[:16] = DATA
    return name


def _sources(server: S3Server, bucket: str, endpoint: str | None = None) -> dict[str, tuple[Any, Any]]:
    options = server.options_at(endpoint or server.endpoint)
    url = f"s3://{bucket}/d.zarr"
    return {
        "s3fs": (url, options | ONLY_S3FS),
        "url": (url, options),
        "obstore": (ObjectStore(S3Store(bucket, prefix="d.zarr", **server.obstore_options(endpoint))), None),
    }


@pytest.fixture(params=["s3fs", "url", "obstore"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _open(server: S3Server, bucket: str, kind: str, path: str, endpoint: str | None = None) -> ArraySpec:
    source, options = _sources(server, bucket, endpoint)[kind]
    return open_array(source, path=path, storage_options=options)


def test_the_client_that_is_used(s3_server: S3Server, bucket: str, kind: str) -> None:
    store = _open(s3_server, bucket, kind, "plain").store.open()
    assert isinstance(store, FsspecFiles if kind == "s3fs" else ObstoreObjects)
    assert obstore_for_s3("s3://b/a", {"anon": True}) is None  # the region is not known without asking
    assert obstore_for_s3("s3://b/a", {"anon": True, "client_kwargs": {"region_name": "eu-west-1"}}) is not None
    assert obstore_for_s3("s3://b/a", {"profile": "mine"}) is None


@pytest.mark.parametrize("path", ["plain", "in/shards", "old"])
def test_read_whole(s3_server: S3Server, bucket: str, kind: str, path: str) -> None:
    spec = pickle.loads(pickle.dumps(_open(s3_server, bucket, kind, path)))
    check_visible(spec)
    want = np.full((20, 30), -1, "f4")
    want[:16] = DATA
    same_bits(assemble(spec), want)
    (read,) = read_chunks(spec, [7])
    same_bits(np.asarray(read.data), want[4:8, 5:10])


def test_listing(s3_server: S3Server, bucket: str, kind: str) -> None:
    source, options = _sources(s3_server, bucket)[kind]
    assert [summary.path for summary in list_arrays(source, storage_options=options)] == ["in/shards", "old", "plain"]
    for path in ("plain", "old"):
        assert list(stored_numbers(_open(s3_server, bucket, kind, path))) == list(range(24))
    with pytest.raises(StoreNotFoundError, match="arrays there: 'in/shards', 'old', 'plain'"):
        _open(s3_server, bucket, kind, "plane")


def test_no_such_bucket(s3_server: S3Server, kind: str) -> None:
    with pytest.raises((StoreNotFoundError, PermissionError)):
        _open(s3_server, f"none-{uuid.uuid4().hex[:8]}", kind, "")


def test_wrong_credentials_are_no_missing_chunks(s3_server: S3Server, bucket: str) -> None:
    wrong = {**s3_server.storage_options, "secret": "cAnArYwrong"}
    for options in (wrong, wrong | ONLY_S3FS):
        with pytest.raises(PermissionError) as caught:
            open_array(f"s3://{bucket}/d.zarr", path="plain", storage_options=options)
        assert "cAnArYwrong" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("path", ["plain", "in/shards"])
def test_requests(
    s3_server: S3Server, bucket: str, kind: str, path: str, fault_proxy: Callable[..., FaultProxy]
) -> None:
    proxy = fault_proxy(s3_server.endpoint)
    spec = _open(s3_server, bucket, kind, path, proxy.url)
    before = len(proxy.requests)
    assert all(read.error is None for read in read_chunks(spec, range(24)))
    sent = proxy.requests[before:]
    assert len(sent) == (24 if path == "plain" else 4), sent  # one for each object
    assert not any(request.startswith("HEAD") for request, _ in sent)


def test_faults_never_read_as_fill_values(
    s3_server: S3Server, bucket: str, kind: str, fault_proxy: Callable[..., FaultProxy]
) -> None:
    proxy = fault_proxy(s3_server.endpoint, seed=3)
    spec = _open(s3_server, bucket, kind, "plain", proxy.url)
    proxy.set(Faults(slow_down=0.2, reset=0.2, truncate=0.1, latency_s=0.001))
    reads = list(read_chunks(spec, range(24), timeout=20))
    proxy.clear()
    assert not any(read.missing for read in reads)
    for read in reads:
        if read.error is None:
            region = spec.grid.region(read.number)
            same_bits(np.asarray(read.data), DATA[region])
        else:
            assert isinstance(read.error, OSError)


def test_expired_credentials_and_refresh(s3_server: S3Server, bucket: str) -> None:
    spec = _open(s3_server, bucket, "url", "plain")
    before = spec.store.open()
    assert spec.store.refresh() is not before
    assert spec.store.open().get("plain/zarr.json") is not None


def test_a_store_object_of_fsspec(s3_server: S3Server, bucket: str) -> None:
    options = {**s3_server.storage_options, "asynchronous": True}
    store = FsspecStore.from_url(f"s3://{bucket}/d.zarr", storage_options=options, read_only=True)
    array = zarr.open_array(store, path="plain", mode="r")
    assert array[0, 0] == DATA[0, 0]  # its session is bound to zarr's loop from here on
    spec = open_array(array)
    same_bits(assemble(pickle.loads(pickle.dumps(spec)))[:16], DATA)
