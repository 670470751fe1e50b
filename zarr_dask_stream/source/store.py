"""A small picklable description of a store, which opens the same store on any host.

What can't travel (a dict, a `MemoryStore`, fsspec's ``memory://``) stays in the process it lives in:
its description does travel, and opening it elsewhere says so instead of finding an empty store there.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from weakref import WeakValueDictionary

import fsspec
import zarr
from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore, MemoryStore, ObjectStore, StorePath, ZipStore

from zarr_dask_stream.errors import StoreError, StoreNotFoundError, StoreNotVisibleError, UsageError
from zarr_dask_stream.source.backend import ByteStore
from zarr_dask_stream.source.files import LocalFiles, MappingBytes, ZipEntries
from zarr_dask_stream.source.locks import ForkedLock
from zarr_dask_stream.source.remote import (
    FsspecFiles,
    MemoryFiles,
    ObstoreObjects,
    ZarrKeys,
    claim_runtime,
    hasty_store,
    obstore_for_s3,
    open_filesystem,
    rebuild_filesystem,
    split_query,
)
from zarr_dask_stream.source.secret import Sealed, builtin_error, digest, display_url, secrets_in

__all__ = ["StoreSpec", "here", "split_source", "store_errors"]

#: Stores that are kept open in a process: a worker may live long, and URLs that are signed are new ones each time.
_MOST_OPENED = 32
#: A store object larger than this when pickled carries its data with it and must not travel.
_MAX_PICKLE_BYTES = 1 << 16


class _Resident:
    """An object that lives in this process only; its pickle is a name, not the object."""

    __slots__ = ("__weakref__", "name", "pid", "value")

    def __init__(self, name: str, pid: int, value: Any) -> None:
        self.name, self.pid, self.value = name, pid, value

    def __repr__(self) -> str:
        return f"<resident {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _find_resident, (self.name, self.pid)


_residents: WeakValueDictionary[str, _Resident] = WeakValueDictionary()
_resident_of: WeakValueDictionary[tuple[int, int], _Resident] = WeakValueDictionary()


def _resident(value: Any) -> _Resident:
    """Return the one resident of `value` in this process; it keeps the object alive."""
    pid = os.getpid()
    known = _resident_of.get((pid, id(value)))
    if known is None or known.value is not value:
        known = _Resident(uuid.uuid4().hex, pid, value)
        _residents[known.name] = known
        _resident_of[pid, id(value)] = known
    return known


def _find_resident(name: str, pid: int) -> _Resident:
    known = _residents.get(name) if pid == os.getpid() else None
    return _Resident(name, pid, None) if known is None else known


def here() -> str:
    """Name this host and process, for messages."""
    return f"host {socket.gethostname()}, process {os.getpid()}"


@dataclass(frozen=True)
class StoreSpec:
    """Where a store is and how to open it.

    Attributes
    ----------
    kind : str
        ``local``, ``zip``, ``memory`` (objects of this process), ``fsspec``, ``obstore`` or ``zarr``.
    url : str
        Display form, without credentials.
    token : str
        Stable digest of the place and the options: equal for equal descriptions in any process. It
        changes with the credentials, which can't be got back from it.
    in_process_only : bool
        True where the data can't be reached from another process.

    Examples
    --------
    >>> spec = StoreSpec.parse("s3://bucket/data.zarr", {"key": "AKIA", "secret": "hush"})
    >>> spec
    StoreSpec('s3://bucket/data.zarr')
    >>> spec.in_process_only
    False
    """

    kind: str
    url: str
    token: str
    in_process_only: bool = field(default=False, compare=False)
    payload: Sealed = field(default_factory=lambda: Sealed(None), compare=False, repr=False)

    def __repr__(self) -> str:
        return f"StoreSpec({self.url!r})"

    @classmethod
    def parse(cls, source: Any, storage_options: Mapping[str, Any] | None = None) -> StoreSpec:
        """Describe the store behind `source`.

        Parameters
        ----------
        source : str, PathLike, zarr.Array, zarr.Group, zarr store or mapping
            A URL or path (``file://``, ``s3://``, ``https://``, ``memory://``, ``*.zip`` and any
            protocol fsspec knows), or an object that has or is a store.
        storage_options : mapping, optional
            Options for a URL: what fsspec's file system for it takes.

        Raises
        ------
        UsageError
            If `source` is nothing of that kind, or options are given for something that takes none.
        """
        options = dict(storage_options or {})
        store, _ = split_source(source)
        if isinstance(store, StoreSpec):
            spec = store
        elif isinstance(store, str | os.PathLike):
            return _parse_place(store, options)
        else:
            spec = _parse_object(store)
        if options:
            raise UsageError(f"storage_options go with a URL; {type(source).__name__} already says how it is opened")
        return spec

    def open(self) -> ByteStore:
        """Open the store in this process, or return the one opened before.

        Raises
        ------
        StoreNotVisibleError
            If the data live in another process.
        StoreError
            If it can't be opened.
        """
        if self.in_process_only:
            return _open(self)
        with _opened_lock:
            if _opened_pid[0] != os.getpid():  # a fork: connections and loops stay with the parent
                _opened.clear()
                _opened_pid[0] = os.getpid()
            store = _opened.pop(self.token, None)
            if store is None:
                store = _open(self)
            _opened[self.token] = store  # at the end: used last
            if len(_opened) > _MOST_OPENED:
                # Its connections are closed with it, as soon as nobody reads from it any more.
                del _opened[next(iter(_opened))]
            return store

    @property
    def is_open(self) -> bool:
        """Whether this process has opened the store before, and still has it open."""
        with _opened_lock:
            return _opened_pid[0] == os.getpid() and self.token in _opened

    def refresh(self) -> ByteStore:
        """Open the store anew, with fresh connections and credentials, for all readers of this process."""
        with _opened_lock:
            _opened.pop(self.token, None)
        return self.open()


_opened: dict[str, ByteStore] = {}
_opened_pid = [os.getpid()]
_opened_lock = ForkedLock()


def split_source(source: Any) -> tuple[Any, str]:
    """Take an object apart into its store and the path inside it."""
    if isinstance(source, zarr.Array | zarr.Group | zarr.AsyncArray | zarr.AsyncGroup | StorePath):
        return source.store, str(source.path)
    return source, ""


# -- describing -----------------------------------------------------------------------------------


def _parse_place(place: str | os.PathLike[str], options: dict[str, Any]) -> StoreSpec:
    text = os.fspath(place)
    if not text or "\0" in text:
        raise UsageError(f"expected a URL or a path, got {text!r}")
    if text.startswith("file://"):
        text = unquote(urlsplit(text).path)
    if "://" in text or "::" in text:
        return _parse_url(text, options)
    if options:
        raise UsageError(f"storage_options go with a URL, and {text!r} is a local path: leave them out")
    return _local(text)


def _local(path: str) -> StoreSpec:
    path = os.path.expanduser(path)  # noqa: PTH111  # where there is no home, pathlib raises
    path = os.path.abspath(path)  # noqa: PTH100  # pathlib would keep '..', and make two stores of one
    kind = "zip" if path.endswith(".zip") and not Path(path).is_dir() else "local"
    return StoreSpec(kind, path, digest(f"{kind}:{path}".encode()), payload=Sealed(path))


def _parse_url(url: str, options: dict[str, Any]) -> StoreSpec:
    try:
        urlsplit(url.rpartition("::")[2])
    except ValueError as error:
        raise UsageError(f"expected a URL or a path, got a senseless URL: {error}") from None
    if url.endswith(".zip") and "::" not in url:
        protocol = url.partition("://")[0]
        url, options = f"zip::{url}", ({protocol: options} if options else {})
    protocols = [part.partition("://")[0] for part in url.split("::")]
    for protocol in protocols:
        if protocol not in fsspec.available_protocols() and protocol not in fsspec.registry:
            raise UsageError(
                f"{display_url(url)!r}: unknown protocol {protocol!r}; use a path, or one of fsspec's "
                "protocols such as s3, gs, az, https, memory (each needs its package installed)"
            )
    shown, local = display_url(url), "memory" in protocols
    place = f"{shown}#{os.getpid()}" if local else shown
    private = _canonical((url if url != shown else "", options))
    return StoreSpec(
        "fsspec",
        shown,
        digest(f"fsspec:{place}".encode(), private),
        in_process_only=local,
        payload=Sealed((url, options, os.getpid() if local else None)),
    )


def _canonical(value: tuple[str, Mapping[str, Any]]) -> bytes:
    """Return the same bytes for the same URL and options in any process; none for nothing private."""
    if not any(value):
        return b""
    try:
        return json.dumps(value, sort_keys=True).encode()
    except TypeError:
        pass
    try:
        return pickle.dumps(value)
    except Exception:  # noqa: BLE001  # pickle raises anything
        raise UsageError(
            "storage_options must be picklable, because they travel to the workers; got one that is not"
        ) from None


def _parse_object(store: Any) -> StoreSpec:
    if type(store) is LocalStore:
        return _local(str(store.root))
    if type(store) is ZipStore:
        return _local(str(store.path))
    if type(store) is FsspecStore:
        return _parse_filesystem(store.fs, store.path)
    if isinstance(store, fsspec.FSMap):
        return _parse_filesystem(store.fs, store.root)
    if type(store) is ObjectStore:
        claim_runtime(_obstore_url(store.store))
        return _parse_portable("obstore", store.store, _obstore_url(store.store))
    if isinstance(store, MemoryStore):
        return _parse_resident(store, "memory://(a MemoryStore of this process)")
    if isinstance(store, Store):
        return _parse_portable("zarr", store, f"zarr store {type(store).__name__}")
    if isinstance(store, Mapping):
        return _parse_resident(store, f"memory://(a {type(store).__name__} of this process)")
    raise UsageError(f"expected a URL, a path, a zarr array, group or store, or a mapping, got {type(store).__name__}")


def _parse_filesystem(fs: Any, root: str) -> StoreSpec:
    inner = getattr(fs, "sync_fs", fs)
    protocol = inner.protocol if isinstance(inner.protocol, str) else inner.protocol[0]
    if protocol in {"file", "local"} and type(inner).__name__ == "LocalFileSystem":
        return _local(root)
    if protocol == "memory":
        return _parse_url(f"memory://{root.lstrip('/')}", {})
    url = display_url(root if "://" in root else f"{protocol}://{root}")
    return _parse_portable("fsspec", (inner, root), url)


def _parse_portable(kind: str, value: Any, url: str) -> StoreSpec:
    """Describe an object that travels by pickle, if it is small and can; else one that stays here."""
    try:
        data = pickle.dumps(value)
    except Exception:  # noqa: BLE001  # pickle raises anything
        return _parse_resident(value, url, kind)
    if len(data) > _MAX_PICKLE_BYTES:
        return _parse_resident(value, url, kind)
    return StoreSpec(kind, url, digest(f"{kind}:{url}".encode(), data), payload=Sealed(value))


def _parse_resident(value: Any, url: str, kind: str = "memory") -> StoreSpec:
    resident = _resident(value)
    return StoreSpec(kind, url, digest(resident.name.encode()), in_process_only=True, payload=Sealed(resident))


def _obstore_url(store: Any) -> str:
    config = getattr(store, "config", None) or {}
    bucket = next((str(config[name]) for name in ("bucket", "container_name") if name in config), "")
    name = type(store).__name__
    scheme = {"S3Store": "s3", "GCSStore": "gs", "AzureStore": "az"}.get(name)
    prefix = str(getattr(store, "prefix", None) or "").strip("/")
    if scheme:
        return f"{scheme}://{bucket}/{prefix}".rstrip("/")
    if name == "HTTPStore":
        return display_url(str(getattr(store, "url", "http://")))
    return f"obstore {name}({prefix})"


# -- opening --------------------------------------------------------------------------------------


def _open(spec: StoreSpec) -> ByteStore:
    value = spec.payload.value
    if isinstance(value, _Resident):
        if value.pid != os.getpid() or value.value is None:
            raise _not_here(spec)
        value = value.value
    if spec.kind == "local":
        return LocalFiles(spec.url, value)
    if spec.kind == "zip":
        return ZipEntries(spec.url, value)
    if spec.kind == "memory":
        return _open_memory(spec, value)
    if spec.kind == "fsspec":
        return _open_fsspec(spec, value)
    if spec.kind == "obstore":
        secrets = secrets_in("", {"config": dict(getattr(value, "config", None) or {})})
        return ObstoreObjects(spec.url, hasty_store(value), secrets=secrets, patient=value)
    return ZarrKeys(spec.url, value)


def _open_memory(spec: StoreSpec, value: Any) -> ByteStore:
    if isinstance(value, MemoryStore):
        # The dict of a MemoryStore has no public name; without it each read would cross a loop.
        contents = getattr(value, "_store_dict", None)
        return ZarrKeys(spec.url, value) if contents is None else MappingBytes(spec.url, contents)
    return MappingBytes(spec.url, value)


def _open_fsspec(spec: StoreSpec, value: tuple[Any, ...]) -> ByteStore:
    if len(value) == 2:
        fs, root = value
        secrets = secrets_in("", fs.storage_options)
        return FsspecFiles(
            spec.url,
            rebuild_filesystem(fs),
            root,
            secrets=secrets,
            patient=lambda: rebuild_filesystem(fs, patient=True),
        )
    url, options, pid = value
    if pid is not None and pid != os.getpid():
        raise _not_here(spec)
    secrets = secrets_in(url, options)
    if url.startswith("memory://"):
        return MemoryFiles(spec.url, url.removeprefix("memory://"))
    store = obstore_for_s3(url, options)
    if store is not None:
        return ObstoreObjects(spec.url, store, secrets=secrets, patient=obstore_for_s3(url, options, patient=True))
    base, query = split_query(url)
    problem: OSError | None = None
    try:
        fs, root = open_filesystem(base, options)
    except ImportError as error:
        raise UsageError(_lacking(spec, error)) from None
    except Exception as error:  # noqa: BLE001  # client libraries raise anything
        problem = builtin_error(error, f"opening {spec.url}", secrets)
    if isinstance(problem, FileNotFoundError):
        raise StoreNotFoundError(f"there is no {spec.url}: {problem.strerror}")
    if problem is not None:
        raise problem  # outside the handler: no context, which could hold credentials
    return FsspecFiles(
        spec.url,
        fs,
        root,
        query=query,
        secrets=secrets,
        patient=lambda: open_filesystem(base, options, patient=True)[0],
    )


#: Our extras, by what they bring: protocols and the package that reads them.
_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "http": ("aiohttp", "http"), "https": ("aiohttp", "http")}


def _lacking(spec: StoreSpec, error: ImportError) -> str:
    """Say which package is missing, and how to get it."""
    cause = error.__cause__ or error.__context__
    for protocol in re.findall(r"(\w+)://", spec.url):
        package, extra = _EXTRAS.get(protocol, ("", ""))
        if package and (cause is None or package in str(cause)):
            return (
                f"{spec.url} needs {package}, which is not installed on {here()}: "
                f"pip install 'zarr-dask-stream[{extra}]'"
            )
    return f"{spec.url} needs a package that is not installed on {here()}: {error}"


def _not_here(spec: StoreSpec) -> StoreNotVisibleError:
    return StoreNotVisibleError(
        f"{spec.url} lives in the memory of another process and can't be read on {here()}; "
        "write it to a store that all workers reach (shared disk, s3://), or stream without a remote cluster"
    )


@contextlib.contextmanager
def store_errors() -> Iterator[None]:
    """Turn what a store's client raises while metadata are read into a `StoreError`."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"the store can't be read: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    """Return what an error says, without the number that Python puts before it."""
    where = "" if error.filename is None else f": {error.filename}"
    return f"{error.strerror}{where}" if error.strerror else str(error)
