"""Every kind of store that can be written to: whole or not at all, and what can't be says so."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import zarr
from fsspec import FSMap
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from obstore.store import LocalStore as ObstoreLocal
from obstore.store import S3Store
from zarr.storage import LocalStore, LoggingStore, MemoryStore, ObjectStore

from realparts.fault_proxy import FaultProxy
from realparts.http_files import HttpStore
from realparts.s3 import S3Server
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.backend import ByteStore, RemoteBytes
from zarr_dask_stream.source.files import LocalFiles
from zarr_dask_stream.source.remote import FsspecFiles, ObstoreObjects
from zarr_dask_stream.source.store import StoreSpec


class OddStore(LoggingStore[Any]):  # a store of somebody else's
    pass


SOURCES: dict[str, Callable[[Path], Any]] = {
    "folder": lambda folder: folder,
    "dict": lambda _: {},
    "zarr memory": lambda _: MemoryStore(),
    "fsspec memory": lambda folder: f"memory://{folder.name}-{uuid.uuid4().hex}",
    "fsspec with folders": lambda folder: FSMap("", DirFileSystem(str(folder), LocalFileSystem())),
    "obstore": lambda folder: ObjectStore(ObstoreLocal(folder)),
    "another zarr store": lambda folder: OddStore(LocalStore(folder)),
}


@pytest.fixture(params=list(SOURCES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ByteStore:
    """Return an empty store of each kind."""
    return StoreSpec.parse(SOURCES[request.param](tmp_path)).open()


def test_what_is_put_is_there(store: ByteStore) -> None:
    values = {"zarr.json": b"{}", "a/c/0/1": bytes(range(200)), "a/c/0/2": b"", "b": b"x" * 300_000}
    for key, value in values.items():
        store.put(key, value)
    assert {key: store.get(key) for key in values} == values
    assert {key: store.size(key) for key in [*values, "no"]} == {**{k: len(v) for k, v in values.items()}, "no": None}
    assert sorted(store.list_prefix("")) == sorted(values)
    store.put("b", np.arange(3, dtype="u1"))
    assert store.get("b") == b"\0\1\2"


def test_what_is_removed_is_gone(store: ByteStore) -> None:
    for key in ("zarr.json", "c/0", "c/1", "other/zarr.json"):
        store.put(key, b"1")
    store.remove(["c/0", "c/never"])
    assert sorted(store.list_prefix("")) == ["c/1", "other/zarr.json", "zarr.json"]
    store.clear("other", ["zarr.json"])
    assert sorted(store.list_prefix("")) == ["c/1", "zarr.json"]
    store.clear("")
    assert list(store.list_prefix("")) == []
    store.flush()


def test_keys_outside_the_store_are_refused(store: ByteStore) -> None:
    with pytest.raises(UsageError, match="not a key inside the store"):
        store.put("../b", b"")


def test_zarr_reads_what_was_put(store: ByteStore, request: pytest.FixtureRequest) -> None:
    """Not only we: in a mapping the values have to be zarr's buffers."""
    written: dict[str, Any] = {}
    zarr.create_array(written, shape=(4,), chunks=(2,), dtype="i2")[:] = [1, 2, 3, 4]
    for key, value in written.items():
        store.put(key, value.to_bytes())
    if request.node.callspec.params["store"] == "folder":
        assert np.asarray(zarr.open_array(store.url, mode="r")[:]).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("source", [{}, MemoryStore()], ids=["dict", "memory store"])
def test_zarr_reads_what_was_put_into_a_mapping(source: Any) -> None:
    written: dict[str, Any] = {}
    zarr.create_array(written, shape=(4,), chunks=(2,), dtype="i2")[:] = [1, 2, 3, 4]
    store = StoreSpec.parse(source).open()
    for key, value in written.items():
        store.put(key, value.to_bytes())
    assert np.asarray(zarr.open_array(source, mode="r")[:]).tolist() == [1, 2, 3, 4]


# -- what can't be written to ---------------------------------------------------------------------


def test_a_zip_file_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("zarr.json", "{}")
    with pytest.raises(UsageError, match=r"a\.zip can't be written to; write to a folder or"):
        StoreSpec.parse(tmp_path / "a.zip").open().put("zarr.json", b"")


def test_plain_http_is_refused(http_store: HttpStore) -> None:
    with pytest.raises(UsageError, match="plain HTTP is for reading"):
        StoreSpec.parse(http_store.url).open().put("zarr.json", b"")


def test_a_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="its cache would go on giving what was there before; leave it out"):
        StoreSpec.parse(f"simplecache::file://{tmp_path}").open().put("zarr.json", b"")


def test_a_store_opened_for_reading_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="opened for reading only"):
        StoreSpec.parse(OddStore(LocalStore(tmp_path, read_only=True))).open().put("zarr.json", b"")


def test_a_mapping_that_can_only_be_read_is_refused() -> None:
    proxy: MappingProxyType[str, Any] = MappingProxyType({})
    with pytest.raises(UsageError, match="can't be written to: it is a mappingproxy"):
        StoreSpec.parse(proxy).open().put("zarr.json", b"")


# -- files ----------------------------------------------------------------------------------------


def test_what_is_not_whole_lies_aside(tmp_path: Path) -> None:
    store = LocalFiles(str(tmp_path), str(tmp_path))
    (tmp_path / "aside").mkdir()
    (tmp_path / "aside").chmod(0o500)
    if os.geteuid() != 0:
        with pytest.raises(PermissionError, match=r"writing c/0 of .*Permission denied"):
            store.put("c/0", b"1", aside="aside")
    (tmp_path / "aside").chmod(0o700)
    store.put("c/0", b"1", aside="aside")
    assert sorted(store.list_prefix("")) == ["c/0"]
    assert list((tmp_path / "aside").iterdir()) == []
    assert store.is_prepared("aside")
    store.discard("aside")
    assert not store.is_prepared("aside")
    with pytest.raises(OSError, match=r"writing c/1 of .*No such file or directory"):
        store.put("c/1", b"1", aside="aside")


def test_a_write_that_fails_leaves_nothing_but_what_was_there(tmp_path: Path) -> None:
    store = LocalFiles(str(tmp_path), str(tmp_path))
    store.put("c", b"file")
    store.prepare("aside")
    with pytest.raises(OSError, match=r"writing c/0 of .*: (Not a directory|File exists)"):
        store.put("c/0", b"1", aside="aside")
    (tmp_path / "d" / "0").mkdir(parents=True)
    with pytest.raises(OSError, match=r"writing d/0 of .*: Is a directory") as caught:
        store.put("d/0", b"1", aside="aside")
    assert caught.value.errno == errno.EISDIR
    assert sorted(store.list_prefix("")) == ["c"]


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    """While one key is written over and over, whoever reads it gets one value whole."""
    store = LocalFiles(str(tmp_path), str(tmp_path))
    store.prepare("aside")
    values = [bytes([n]) * 200_000 for n in range(4)]
    store.put("c/0", values[0])
    stop = threading.Event()

    def write(value: bytes) -> None:
        while not stop.is_set():
            store.put("c/0", value, aside="aside")

    threads = [threading.Thread(target=write, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    try:
        seen = {store.get("c/0") for _ in range(200)}
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen <= set(values)


def test_a_folder_is_cleared_without_following_links(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("kept")
    store = LocalFiles(str(tmp_path), str(tmp_path / "store"))
    store.put("a/zarr.json", b"{}")
    (tmp_path / "store" / "a" / "c").symlink_to(elsewhere)
    store.clear("a", ["zarr.json"])
    assert list(store.list_prefix("")) == []
    assert (elsewhere / "kept").exists()


# -- S3 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.make_bucket(f"writing-{uuid.uuid4().hex[:8]}")


def _s3(server: S3Server, bucket: str, kind: str, endpoint: str | None = None) -> RemoteBytes:
    where = f"{kind}-{uuid.uuid4().hex[:8]}"
    if kind == "obstore":
        source: Any = ObjectStore(S3Store(bucket, prefix=where, **server.obstore_options(endpoint)))
        options = None
    else:
        source = f"s3://{bucket}/{where}"
        options = server.options_at(endpoint or server.endpoint) | (
            {"default_cache_type": "none"} if kind == "s3fs" else {}
        )
    store = StoreSpec.parse(source, options).open()
    assert isinstance(store, FsspecFiles if kind == "s3fs" else ObstoreObjects)
    return store


def _send(store: RemoteBytes, key: str, data: bytes, **options: Any) -> None:
    store.begin(store.send(key, data, **options)).result(30)


@pytest.fixture(params=["s3fs", "url", "obstore"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_s3(s3_server: S3Server, bucket: str, kind: str) -> None:
    store = _s3(s3_server, bucket, kind)
    values = {f"c/{n}": bytes([n]) * (n * 1000) for n in range(40)}
    for key, value in values.items():
        store.put(key, value)
    assert {key: store.get(key) for key in values} == values
    assert store.size("c/3") == 3000
    assert store.size("c/99") is None
    store.remove(["c/0", "c/99"])
    assert sorted(store.list_prefix("")) == sorted(values.keys() - {"c/0"})
    store.clear("c", ["1"])
    assert list(store.list_prefix("")) == []


def _methods(proxy: FaultProxy, key: str) -> list[str]:
    return [request.split()[0] for request, _ in proxy.requests if key in request]


def test_s3_says_what_it_has_stored(
    s3_server: S3Server, bucket: str, kind: str, fault_proxy: Callable[..., FaultProxy]
) -> None:
    """Verified by the tag of its answer: no second request."""
    proxy = fault_proxy(s3_server.endpoint)
    store = _s3(s3_server, bucket, kind, proxy.url)
    data = b"x" * 5000
    digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
    _send(store, "c/0", data, verify=True, digest=digest)
    assert _methods(proxy, "c/0") == ["PUT"]
    # Another digest than the service's: it may count otherwise, so its length is asked for.
    _send(store, "c/1", data, verify=True, digest="0" * 32)
    assert _methods(proxy, "c/1") == ["PUT", "HEAD"]


def test_another_length_than_was_sent_is_an_error(
    s3_server: S3Server, bucket: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _s3(s3_server, bucket, kind)
    write = type(store)._write

    async def half(self: Any, key: str, data: bytes) -> Any:
        await write(self, key, data[: len(data) // 2])

    monkeypatch.setattr(type(store), "_write", half)
    with pytest.raises(OSError, match="10 bytes were sent, and 5 are stored") as caught:
        _send(store, "c/0", b"0123456789", verify=True)
    assert caught.value.errno == errno.EIO


def test_refusals_are_errors_with_a_number(
    s3_server: S3Server, bucket: str, kind: str, fault_proxy: Callable[..., FaultProxy]
) -> None:
    proxy = fault_proxy(s3_server.endpoint)
    store = _s3(s3_server, bucket, kind, proxy.url)
    for fault, number in (("slow_down", errno.EBUSY), ("reset", errno.ECONNRESET)):
        proxy.inject(fault, times=2, match="PUT")  # aiohttp itself tries again on a connection that was idle
        with pytest.raises(OSError, match="writing c/0 of s3://") as caught:
            _send(store, "c/0", b"1")
        assert caught.value.errno in {number, errno.EREMOTEIO}
        assert s3_server.secret not in str(caught.value)
        proxy.clear()
    proxy.inject("slow_down", times=2)
    store.put("c/0", b"2")  # documents are written with patience
    assert store.get("c/0") == b"2"


def test_no_right_to_write(s3_server: S3Server, bucket: str, kind: str) -> None:
    server = type(s3_server)(s3_server.endpoint, s3_server.key, "wrong", s3_server.pid)
    store = _s3(server, bucket, kind)
    with pytest.raises(PermissionError, match="writing c/0 of s3://"):
        _send(store, "c/0", b"1")
