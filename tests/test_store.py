from __future__ import annotations

import errno
import importlib
import multiprocessing
import os
import pickle
import sys
import threading
import traceback
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from obstore.store import HTTPStore, S3Store
from obstore.store import LocalStore as ObstoreLocal
from obstore.store import MemoryStore as ObstoreMemory
from zarr.buffer import cpu
from zarr.storage import FsspecStore, LocalStore, LoggingStore, MemoryStore, ObjectStore, StorePath, ZipStore

from realparts.http_files import HttpStore
from zarr_dask_stream.errors import StoreError, StoreNotFoundError, StoreNotVisibleError, UsageError
from zarr_dask_stream.source.backend import ByteStore, RemoteBytes
from zarr_dask_stream.source.secret import Sealed, builtin_error, digest, display_url, redact, secrets_in
from zarr_dask_stream.source.store import StoreSpec, split_source

CONTENT = {"zarr.json": b"{}", "a/zarr.json": b"doc", "a/c/0/1": bytes(range(200)), "a/c/0/2": b"", "b": b"x" * 200_000}


class OddStore(LoggingStore[Any]):  # a store of somebody else's
    pass


def _fill_folder(folder: Path) -> Path:
    for key, value in CONTENT.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        (folder / key).write_bytes(value)
    return folder


def _zip(folder: Path) -> Path:
    path = folder / "store.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for key, value in CONTENT.items():
            file.writestr(key, value)
    return path


def _zarr_memory() -> MemoryStore:
    return MemoryStore({key: cpu.Buffer.from_bytes(value) for key, value in CONTENT.items()})


def _fsspec_memory(folder: Path) -> str:
    url = f"memory://{folder.name}"
    fsspec.filesystem("memory").pipe({f"/{folder.name}/{key}": value for key, value in CONTENT.items()})
    return url


def _obstore_memory() -> ObjectStore[Any]:
    store = ObstoreMemory()
    for key, value in CONTENT.items():
        store.put(key, value)
    return ObjectStore(store)


MAKERS: dict[str, Callable[[Path], Any]] = {
    "path": lambda folder: _fill_folder(folder / "s"),
    "file url": lambda folder: f"file://{_fill_folder(folder / 's p')}".replace(" ", "%20"),
    "zip": _zip,
    "local store": lambda folder: LocalStore(_fill_folder(folder / "s")),
    "zip store": lambda folder: ZipStore(_zip(folder)),
    "dict": lambda _: dict(CONTENT),
    "dict of buffers": lambda _: {key: cpu.Buffer.from_bytes(value) for key, value in CONTENT.items()},
    "memory store": lambda _: _zarr_memory(),
    "memory url": _fsspec_memory,
    "fsspec store of memory": lambda folder: FsspecStore.from_url(_fsspec_memory(folder)),
    "fsmap": lambda folder: fsspec.get_mapper(str(_fill_folder(folder / "s"))),
    "obstore local": lambda folder: ObjectStore(ObstoreLocal(_fill_folder(folder / "s"))),
    "obstore memory": lambda _: _obstore_memory(),
    "somebody's store": lambda folder: OddStore(LocalStore(_fill_folder(folder / "s"))),
    "somebody's store of memory": lambda _: OddStore(_zarr_memory()),
    "caching url": lambda folder: f"simplecache::{'file://' + str(_fill_folder(folder / 's'))}",
}


@pytest.fixture(params=[*MAKERS, "http"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "http":
        served: HttpStore = request.getfixturevalue("http_store")
        _fill_folder(served.directory)
        return served.url
    return MAKERS[request.param](tmp_path)


@pytest.fixture
def store(source: Any) -> ByteStore:
    return StoreSpec.parse(source).open()


# -- the same few calls on every kind -------------------------------------------------------------


def test_get(store: ByteStore) -> None:
    for key, value in CONTENT.items():
        assert store.get(key) == value
        assert type(store.get(key)) is bytes
        assert store.exists(key) or not value  # one byte of an empty value can't be asked for
    assert store.get("a/c/0/3") is None
    assert store.get("nowhere/zarr.json") is None
    assert not store.exists("a/c/0/3")


def test_the_beginning_of_a_value(store: ByteStore) -> None:
    for key, value in CONTENT.items():
        for count in {1, max(len(value) - 1, 1), len(value) or 1, len(value) + 1, 1 << 26}:
            assert store.get_head(key, count) == value[:count], (key, count)
    assert store.get_head("a/c/0/3", 10) is None
    assert store.get_head("nowhere/zarr.json", 10) is None


def test_ranges(store: ByteStore) -> None:
    value = CONTENT["a/c/0/1"]
    assert store.get_range("a/c/0/1", 10, 20) == value[10:20]
    assert store.get_range("a/c/0/1", 190, 300) == value[190:]
    assert store.get_suffix("a/c/0/1", 16) == value[-16:]
    assert store.get_range("a/c/0/3", 0, 1) is None
    assert store.get_suffix("a/c/0/3", 1) is None


def test_listing(store: ByteStore) -> None:
    if store.url.startswith("http"):
        with pytest.raises(StoreError, match="can't be listed"):
            store.list_prefix("")
        return
    assert sorted(store.list_prefix("")) == sorted(CONTENT)
    assert sorted(store.list_prefix("a/c")) == ["a/c/0/1", "a/c/0/2"]
    assert list(store.list_prefix("nowhere")) == []
    folders, keys = store.list_dir("")
    assert (sorted(folders), sorted(keys)) == (["a"], ["b", "zarr.json"])
    folders, keys = store.list_dir("a/c/0")
    assert (sorted(folders), sorted(keys)) == ([], ["1", "2"])
    assert store.list_dir("nowhere") == ([], [])


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "..", "a/..", "a\0b"])
def test_hostile_keys_stay_inside(store: ByteStore, key: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"outside")
    for call in (store.get, store.exists, lambda key: store.get_range(key, 0, 1), lambda key: store.get_suffix(key, 1)):
        with pytest.raises(UsageError, match="is not a key inside the store"):
            call(key)


def test_many_threads(store: ByteStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(store.get, ["a/c/0/1", "b", "nowhere"] * 20):
            assert got in (CONTENT["a/c/0/1"], CONTENT["b"], None)


def test_opened_once_for_each_process(source: Any) -> None:
    spec = StoreSpec.parse(source)
    copy = pickle.loads(pickle.dumps(spec))
    assert copy == spec
    assert hash(copy) == hash(spec)
    assert len(pickle.dumps(spec)) < 4096  # never the data
    if not spec.in_process_only:
        with ThreadPoolExecutor(4) as pool:
            assert len(set(pool.map(lambda _: id(copy.open()), range(8)))) == 1
        assert spec.open() is copy.open()
        before = spec.open()
        assert spec.refresh() is not before
    assert copy.open().get("zarr.json") == b"{}"


ELSEWHERE = ["path", "zip", "dict", "memory url", "obstore local", "obstore memory", "somebody's store of memory"]


def _open_elsewhere(specs: list[StoreSpec], answers: Any) -> None:
    for spec in specs:
        try:
            answers.put(spec.open().get("a/zarr.json"))
        except BaseException as error:  # noqa: BLE001  # handed to the parent
            answers.put((type(error).__name__, str(error)))


@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_in_another_process(tmp_path: Path, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    for kind in ELSEWHERE:
        (tmp_path / f"{method} {kind}").mkdir()
    sources = [MAKERS[kind](tmp_path / f"{method} {kind}") for kind in ELSEWHERE]
    specs = [StoreSpec.parse(source) for source in sources]
    assert [spec.open().get("a/zarr.json") for spec in specs] == [b"doc"] * len(specs)  # open here before a fork
    worker = context.Process(target=_open_elsewhere, args=(specs, answers))
    worker.start()
    got = dict(zip(ELSEWHERE, [answers.get(timeout=60) for _ in specs], strict=True))
    worker.join()
    for kind, spec in zip(ELSEWHERE, specs, strict=True):
        if method == "fork" and kind == "obstore local":
            assert "does not survive a fork" in got[kind][1]
        elif spec.in_process_only:
            assert got[kind][0] == "StoreNotVisibleError"
            assert "memory of another process" in got[kind][1]
        else:
            assert got[kind] == b"doc"
    assert [spec.in_process_only for spec in specs] == [False, False, True, True, False, True, True]


def test_a_forgotten_memory_store_is_not_an_empty_one() -> None:
    data = pickle.dumps(StoreSpec.parse(dict(CONTENT)))
    with pytest.raises(StoreNotVisibleError, match="memory of another process"):
        pickle.loads(data).open()


def test_the_same_object_is_the_same_store() -> None:
    store = _zarr_memory()
    assert StoreSpec.parse(store) == StoreSpec.parse(store)
    assert StoreSpec.parse(store) != StoreSpec.parse(_zarr_memory())


# -- what can't be used ---------------------------------------------------------------------------


def test_no_such_place(tmp_path: Path) -> None:
    for place in (tmp_path / "no", tmp_path / "no.zip"):
        with pytest.raises(StoreNotFoundError, match="there is no"):
            StoreSpec.parse(place).open().get("zarr.json")
    listing = StoreSpec.parse(tmp_path / "no").open().list_prefix("")
    with pytest.raises(StoreNotFoundError):
        list(listing)


def test_a_directory_that_vanishes_is_not_an_empty_store(tmp_path: Path) -> None:
    store = StoreSpec.parse(_fill_folder(tmp_path / "s")).open()
    assert store.get("nothing") is None
    (tmp_path / "s").rename(tmp_path / "t")
    for call in (store.get, store.exists, lambda key: store.get_range(key, 0, 1)):
        with pytest.raises(StoreNotFoundError):
            call("b")


def test_what_is_in_the_way_is_an_error_not_a_missing_key(tmp_path: Path) -> None:
    folder = _fill_folder(tmp_path / "s")
    (folder / "dir").mkdir()
    os.mkfifo(folder / "fifo")
    store = StoreSpec.parse(folder).open()
    with pytest.raises(IsADirectoryError):
        store.get("dir")
    with pytest.raises(NotADirectoryError):
        store.get("b/c")
    assert store.get("fifo") == b""  # and does not wait for a writer


def test_damaged_zip(tmp_path: Path) -> None:
    path = _zip(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.find(b"a/c/0/1") + 20] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(OSError, match="entry a/c/0/1"):
        StoreSpec.parse(path).open().get("a/c/0/1")
    path.write_bytes(b"no zip at all")
    with pytest.raises(StoreError, match="not a zip file"):
        StoreSpec.parse(str(path)).refresh()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (3, None, "expected a URL, a path"),
        ("", None, "expected a URL or a path"),
        ("nope://x", None, "unknown protocol 'nope'"),
        ("/tmp/x", {"key": "K"}, "storage_options go with a URL"),
        ({}, {"key": "K"}, "storage_options go with a URL"),
        ("s3://b", {"session": threading.Lock()}, "must be picklable"),
    ],
)
def test_bad_sources(source: Any, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        StoreSpec.parse(source, options)


def test_objects_that_have_a_store(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "a.zarr", name="x/y", shape=(2,), dtype="i2")
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    spec = StoreSpec.parse(tmp_path / "a.zarr")
    for source in (array, group, array.store, StorePath(array.store, "x")):
        assert StoreSpec.parse(source) == spec
    assert split_source(array)[1] == "x/y"
    assert StoreSpec.parse(os.path.relpath(tmp_path / "a.zarr")) == spec


# -- secrets --------------------------------------------------------------------------------------

CANARY = "cAnArY0123456789"
SECRETIVE: list[tuple[Any, dict[str, Any] | None]] = [
    ("s3://bucket/a.zarr", {"key": CANARY + "key", "secret": CANARY, "token": CANARY}),
    ("s3://bucket/a.zarr", {"client_kwargs": {"aws_secret_access_key": CANARY, "endpoint_url": f"http://u:{CANARY}@h"}}),
    (f"s3://{CANARY}:{CANARY}@bucket/a.zarr", None),
    (f"https://me:{CANARY}@127.0.0.1:9/a.zarr", None),
    (f"http://127.0.0.1:9/a.zarr?X-Amz-Signature={CANARY}&x=1", None),
    ("http://127.0.0.1:9/a.zarr", {"client_kwargs": {"headers": {"Authorization": f"Bearer {CANARY}"}}}),
    ("http://127.0.0.1:9/a.zip", {"headers": {"Authorization": CANARY}}),
    (f"simplecache::http://me:{CANARY}@127.0.0.1:9/a.zarr", None),
    (ObjectStore(S3Store("bucket", access_key_id=CANARY, secret_access_key=CANARY, endpoint="http://127.0.0.1:9",
                         client_options={"allow_http": True}, retry_config={"max_retries": 0})), None),
    (ObjectStore(HTTPStore(f"http://me:{CANARY}@127.0.0.1:9/a", client_options={"allow_http": True},
                           retry_config={"max_retries": 0})), None),
    (FsspecStore.from_url("http://127.0.0.1:9/a", storage_options={"headers": {"Authorization": CANARY}}), None),
]  # fmt: skip


@pytest.mark.parametrize(("source", "options"), SECRETIVE, ids=range(len(SECRETIVE)))
def test_no_secret_is_ever_shown(source: Any, options: Any) -> None:
    spec = StoreSpec.parse(source, options)
    copy = pickle.loads(pickle.dumps(spec))
    for shown in (spec, copy):
        for text in (repr(shown), str(shown), shown.url, shown.token, repr(shown.payload), repr(vars(shown))):
            assert CANARY not in text
    assert copy.token == spec.token


@pytest.mark.parametrize(
    ("source", "options"),
    [pair for pair in SECRETIVE if not str(pair[0]).startswith("s3://")],
    ids=range(len(SECRETIVE) - 3),
)
def test_no_secret_in_errors(source: Any, options: Any) -> None:
    spec = StoreSpec.parse(source, options)
    with pytest.raises(OSError) as caught:  # nobody listens on that port
        spec.open().get("zarr.json")
    assert CANARY not in "".join(traceback.format_exception(caught.value))
    assert CANARY not in repr(caught.value)
    assert CANARY.encode() not in pickle.dumps(caught.value)
    assert caught.value.__cause__ is None


def test_tokens() -> None:
    token = StoreSpec.parse("s3://bucket/a", {"key": "a", "secret": CANARY}).token
    assert token == StoreSpec.parse("s3://bucket/a", {"secret": CANARY, "key": "a"}).token
    assert token != StoreSpec.parse("s3://bucket/a", {"secret": CANARY + "x", "key": "a"}).token
    assert token != StoreSpec.parse("s3://bucket/b", {"secret": CANARY, "key": "a"}).token
    assert token != StoreSpec.parse("s3://bucket/a").token
    # A fast hash of a weak password could be guessed from.
    assert digest(b"public", b"pw") != digest(b"public" + b"pw")


def test_display_and_redaction() -> None:
    assert display_url("s3://k:s@bucket/a?b#c") == "s3://bucket/a?b#c"
    assert display_url("/plain/path") == "/plain/path"
    assert redact("see http://a:b@h/x?tok=1 and more") == "see http://***@h/x?*** and more"
    assert secrets_in("http://h/a?sig=abc&t=xyz", {}) == ("sig=abc&t=xyz", "abc", "xyz")
    assert secrets_in("", {"region": "eu", "endpoint_url": "http://h", "key": b"bytes", "headers": {"X": ["tok"]}}) == (
        "bytes",
        "tok",
    )
    assert repr(pickle.loads(pickle.dumps(Sealed("x")))) == "<sealed>"


class _ClientError(Exception):
    def __init__(self, status: int | None = None, code: str | None = None) -> None:
        super().__init__(f"boom {CANARY}")
        if status is not None:
            self.status = status
        if code is not None:
            self.response = {"Error": {"Code": code}}


class GenericError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind", "number"),
    [
        (_ClientError(503), OSError, errno.EBUSY),
        (_ClientError(429), OSError, errno.EBUSY),
        (_ClientError(403), PermissionError, errno.EACCES),
        (_ClientError(500), OSError, errno.EREMOTEIO),
        (_ClientError(408), TimeoutError, errno.ETIMEDOUT),
        (_ClientError(418), OSError, errno.EIO),
        (_ClientError(), OSError, errno.EIO),
        (TimeoutError(), TimeoutError, errno.ETIMEDOUT),
        (PermissionError("Forbidden"), PermissionError, errno.EACCES),
        (FileNotFoundError("x"), FileNotFoundError, errno.ENOENT),
        (OSError(errno.EBUSY, "slow down"), OSError, errno.EBUSY),
        (ConnectionResetError(), ConnectionResetError, errno.ECONNRESET),
        (ConnectionRefusedError(), ConnectionRefusedError, errno.ECONNREFUSED),
        (GenericError("Server returned non-2xx status code: 503"), OSError, errno.EBUSY),
        (GenericError("operation timed out"), TimeoutError, errno.ETIMEDOUT),
        (GenericError("whatever"), OSError, errno.EREMOTEIO),
    ],
    ids=repr,
)
def test_errors_of_clients_become_builtin(error: Exception, kind: type, number: int) -> None:
    built = builtin_error(error, "reading x", [CANARY])
    assert isinstance(built, kind)
    assert built.errno == number
    assert CANARY not in str(built)
    copy = pickle.loads(pickle.dumps(built))
    assert (type(copy), copy.errno) == (type(built), built.errno)


def test_the_service_s_own_code_is_kept() -> None:
    assert "ExpiredToken" in str(builtin_error(_ClientError(code="ExpiredToken"), "reading x", []))


@pytest.mark.parametrize(("code", "kind"), [("ExpiredToken", PermissionError), ("InternalError", OSError)])
def test_of_a_quoted_answer_only_code_and_message_are_kept(code: str, kind: type) -> None:
    answer = f"<?xml version='1.0'?>\n<Error><Code>{code}</Code>\n<Message>No good.</Message><Key>k</Key></Error>"
    error = GenericError(f"Error performing GET http://h/b - Server returned non-2xx status code: 400: {answer}")
    built = builtin_error(error, "reading x", [])
    assert type(built) is kind
    assert built.strerror == f"reading x: GenericError {code}: No good."


# -- packages that are not there ------------------------------------------------------------------


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function after which packages can't be imported, as if they were not installed."""

    loaded = importlib.import_module("fsspec.registry")._registry  # `fsspec.registry` itself is a view of it

    def lack(*packages: str) -> None:
        for name in [*sys.modules, *packages]:
            if name.partition(".")[0] in packages:
                monkeypatch.setitem(sys.modules, name, None)
        for protocol in ("s3", "s3a", "http", "https"):
            monkeypatch.delitem(loaded, protocol, raising=False)
        for name in [name for name in sys.modules if name == "fsspec.implementations.http"]:
            monkeypatch.delitem(sys.modules, name)

    return lack


@pytest.mark.parametrize(
    ("url", "packages", "says"),
    [
        ("s3://bucket/a.zarr", ["s3fs", "obstore"], "needs s3fs.*pip install 'zarr-dask-stream\\[s3\\]'"),
        ("simplecache::s3://bucket/a.zarr", ["s3fs"], "needs s3fs.*pip install 'zarr-dask-stream\\[s3\\]'"),
        ("https://host/a.zarr", ["aiohttp"], "needs aiohttp.*pip install 'zarr-dask-stream\\[http\\]'"),
        ("gs://bucket/a.zarr", ["gcsfs"], "gs://bucket/a.zarr needs a package.*gcsfs"),
        ("az://bucket/a.zarr", ["adlfs"], "az://bucket/a.zarr needs a package.*adlfs"),
    ],
)
def test_a_package_that_is_not_installed_is_named(url: str, packages: list[str], says: str, lacking: Any) -> None:
    lacking(*packages)
    with pytest.raises(UsageError, match=says):
        StoreSpec.parse(url).open()


# -- HTTP -----------------------------------------------------------------------------------------


def test_http_query_goes_behind_each_key(http_store: HttpStore) -> None:
    _fill_folder(http_store.directory)
    store = StoreSpec.parse(f"{http_store.url}/?sig={CANARY}").open()
    assert store.get("a/zarr.json") == b"doc"
    assert http_store.requests[-1][:2] == ("GET", f"/a/zarr.json?sig={CANARY}")
    assert [method for method, _, _ in http_store.requests] == ["GET"]


def test_http_reads_send_one_request(http_store: HttpStore) -> None:
    _fill_folder(http_store.directory)
    store = StoreSpec.parse(http_store.url).open()
    assert isinstance(store, RemoteBytes)
    assert store.get_range("b", 5, 10) == b"xxxxx"
    assert store.get_suffix("b", 7) == b"x" * 7
    assert http_store.requests == [("GET", "/b", "bytes=5-9"), ("GET", "/b", "bytes=-7")]


def test_a_server_that_ignores_ranges(http_store: HttpStore, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill_folder(http_store.directory)
    monkeypatch.setattr("realparts.http_files.parse_range", lambda _header, size: (0, size))
    store = StoreSpec.parse(http_store.url).open()
    assert store.get_range("a/c/0/1", 5, 10) == CONTENT["a/c/0/1"][5:10]
    assert store.get_suffix("a/c/0/1", 7) == CONTENT["a/c/0/1"][-7:]


def test_arrays_over_http(http_store: HttpStore) -> None:
    array = zarr.create_array(http_store.directory / "a.zarr", shape=(4,), chunks=(2,), dtype="i2")
    array[:] = np.arange(4)
    assert StoreSpec.parse(f"{http_store.url}/a.zarr/").open().get("c/1") is not None
