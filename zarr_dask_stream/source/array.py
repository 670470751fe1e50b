"""What an array is: read once on the client, shipped to the workers as data.

zarr-python interprets the metadata (dtype, fill value, codecs); a worker never asks it again.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.buffer import cpu
from zarr.registry import get_codec_class, get_numcodec
from zarr.storage import MemoryStore

from zarr_dask_stream.errors import (
    MetadataError,
    StoreError,
    StoreNotFoundError,
    StoreNotVisibleError,
)
from zarr_dask_stream.source.backend import ByteStore, check_key
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.locks import ForkedLock
from zarr_dask_stream.source.metadata import (
    MAX_CODECS,
    ArraySummary,
    Node,
    brief,
    check_structure,
    codecs_inside,
    dimension_names,
    find_node,
    join,
    read_document,
    walk_arrays,
)
from zarr_dask_stream.source.secret import digest
from zarr_dask_stream.source.store import StoreSpec, here, split_source

__all__ = [
    "ArraySpec",
    "ArraySummary",
    "check_visible",
    "interpret",
    "list_arrays",
    "locate",
    "open_array",
    "zarr_array",
]

#: Bytes counted for one element that is stored elsewhere than in its array (variable-length strings).
_LOOSE_ITEM_BYTES = 64
_MAX_NAMES = 12
#: Their index takes 256 MiB.
_MAX_PER_SHARD = 1 << 24
_quiet = ForkedLock()


@dataclass(frozen=True)
class ArraySpec:
    """An array's structure, as small picklable data.

    Attributes
    ----------
    store : StoreSpec
        Where it is.
    path : str
        Path in the store, "" for the root.
    zarr_format : int
        2 or 3.
    shape, chunks : tuple of int
        Lengths in elements; `chunks` is the unit that is decoded (the inner chunk of a shard).
    shards : tuple of int or None
        Shape of one stored object where it holds several chunks.
    dtype : numpy.dtype
        In native byte order: what reads give.
    stored_dtype : numpy.dtype
        As zarr names it; in version 2 with the byte order of the stored bytes.
    fill_value : Any
        As the metadata have it (None is possible in version 2).
    fill : numpy.ndarray
        What an element that is not stored reads as, 0-d, of `dtype`, exact to the bit.
    dimension_names : tuple or None
        One name or None for each axis.
    codecs : tuple of dict
        The codec chain as plain configuration, in the order of encoding.
    metadata : str
        Canonical JSON of the structural metadata.
    metadata_key : str
        The key it came from: the array's own document, or consolidated metadata above it.
    fingerprint : str
        Digest of `metadata`.
    attributes : dict
        User attributes. They stay in the process that opened the array: pickles carry none.

    Examples
    --------
    >>> import zarr
    >>> store = {}
    >>> _ = zarr.create_array(store, shape=(5, 7), chunks=(2, 3), dtype="f4")
    >>> spec = open_array(store)
    >>> spec
    ArraySpec('memory://(a dict of this process)', shape=(5, 7), chunks=(2, 3), dtype=float32, v3)
    >>> len(spec.grid), spec.chunk_key((1, 2)), spec.chunk_nbytes, spec.nbytes
    (9, 'c/1/2', 24, 140)
    """

    store: StoreSpec
    path: str
    zarr_format: int = field(compare=False)
    shape: tuple[int, ...] = field(compare=False)
    chunks: tuple[int, ...] = field(compare=False)
    shards: tuple[int, ...] | None = field(compare=False)
    dtype: np.dtype[Any] = field(compare=False)
    stored_dtype: np.dtype[Any] = field(compare=False)
    fill_value: Any = field(compare=False)
    fill: npt.NDArray[Any] = field(compare=False)
    dimension_names: tuple[str | None, ...] | None = field(compare=False)
    codecs: tuple[dict[str, Any], ...] = field(compare=False)
    metadata: str
    metadata_key: str = field(compare=False)
    fingerprint: str = field(compare=False)
    key_prefix: str = field(compare=False)
    key_separator: str = field(compare=False)
    attributes: dict[str, Any] = field(compare=False, default_factory=dict)

    def __repr__(self) -> str:
        place = join(self.store.url, self.path)
        shards = "" if self.shards is None else f", shards={self.shards}"
        return (
            f"ArraySpec({place!r}, shape={self.shape}, chunks={self.chunks}{shards}, "
            f"dtype={self.dtype}, v{self.zarr_format})"
        )

    def __getstate__(self) -> dict[str, Any]:
        # cached_property writes into __dict__: keep what was worked out here at home.
        names = self.__dataclass_fields__
        return {name: value for name, value in self.__dict__.items() if name in names} | {"attributes": {}}

    @property
    def url(self) -> str:
        """Display form of the array's place."""
        return join(self.store.url, self.path)

    @cached_property
    def grid(self) -> ChunkGrid:
        """The chunk grid."""
        return ChunkGrid(self.shape, self.chunks, self.shards)

    @cached_property
    def item_nbytes(self) -> int:
        """Bytes of one decoded element; an estimate of 64 where elements vary in length."""
        return _LOOSE_ITEM_BYTES if self.dtype.kind in "OT" else self.dtype.itemsize

    @cached_property
    def chunk_nbytes(self) -> int:
        """Decoded bytes of a full chunk (an estimate where elements vary in length)."""
        return math.prod(self.chunks) * self.item_nbytes

    @cached_property
    def nbytes(self) -> int:
        """Decoded bytes of the whole array (an estimate where elements vary in length)."""
        return math.prod(self.shape) * self.item_nbytes

    def chunk_key(self, index: Sequence[int]) -> str:
        """Key of the stored object at `index` in the grid of stored objects (shards where there are any)."""
        return self.key_prefix + self.key_separator.join(map(str, index))

    def store_key(self, number: int) -> str:
        """Key of the stored object that holds chunk `number`."""
        if self.shards is None:
            return self.chunk_key(self.grid.index(number))
        return self.chunk_key(self.grid.shard_grid.index(self.grid.shard_of(number)[0]))


# -- opening --------------------------------------------------------------------------------------


def open_array(source: Any, *, path: str = "", storage_options: Mapping[str, Any] | None = None) -> ArraySpec:
    """Read an array's metadata, once.

    Parameters
    ----------
    source : str, PathLike, zarr.Array, zarr.Group, zarr store or mapping
        Where the array is; see `StoreSpec.parse`.
    path : str
        Path of the array inside `source`.
    storage_options : mapping, optional
        Options for a URL.

    Raises
    ------
    StoreNotFoundError
        If there is no such store, or no such array in it: nothing, or a group (the message names those there are).
    UsageError
        If `source` can't be understood, or needs a package that is not installed.
    MetadataError
        If the metadata are malformed, absurd, or name an unknown codec or grid.
    OSError
        If the store can't be reached or refuses to answer.

    Examples
    --------
    >>> import zarr
    >>> store = {}
    >>> _ = zarr.create_array(store, name="t2m", shape=(4,), dtype="f4")
    >>> open_array(store, path="t2m").shape
    (4,)
    >>> open_array(store, path="t2")
    Traceback (most recent call last):
    ...
    zarr_dask_stream.errors.StoreNotFoundError: there is no array 't2' in \
memory://(a dict of this process); arrays there: 't2m'
    """
    spec = StoreSpec.parse(source, storage_options)
    full = check_key(join(split_source(source)[1].strip("/"), path.strip("/")))
    zarr_format = source.metadata.zarr_format if isinstance(source, zarr.Array) and not path else None
    store, node = locate(spec, full, zarr_format)
    if node is None:
        raise StoreNotFoundError(_no_array(store, full))
    if not node.is_array:
        what = f"{join(spec.url, full)} is a group, and an array is needed"
        raise StoreNotFoundError(f"{what}: {_named(store, full)}")
    return interpret(spec, full, node, _attributes(store, full, node))


def list_arrays(source: Any, *, path: str = "", storage_options: Mapping[str, Any] | None = None) -> list[ArraySummary]:
    """List the arrays at and below `path`, in order of their paths.

    Examples
    --------
    >>> import zarr
    >>> store = {}
    >>> _ = zarr.create_array(store, name="a/b", shape=(4,), chunks=(2,), dtype="i2")
    >>> list_arrays(store)
    [ArraySummary(path='a/b', shape=(4,), dtype='int16', chunks=(2,), shards=None, zarr_format=3)]
    """
    store = StoreSpec.parse(source, storage_options).open()
    return list(walk_arrays(store, check_key(join(split_source(source)[1].strip("/"), path.strip("/")))))


def _find(store: ByteStore, path: str, zarr_format: int | None) -> Node | None:
    try:
        return find_node(store, path, zarr_format)
    except NotADirectoryError:
        what = f"{store.url} is a file, or said to be inside one"
        raise StoreNotFoundError(f"{what}: a directory or a .zip file is needed") from None


def locate(spec: StoreSpec, path: str, zarr_format: int | None = None) -> tuple[ByteStore, Node | None]:
    """Open a store and find the node at `path`, None where there is none.

    A store opened long ago that refuses is asked once more, with credentials as they are now.
    """
    was_open, store = spec.is_open, spec.open()
    try:
        return store, _find(store, path, zarr_format)
    except PermissionError:
        if store.is_local or not was_open:
            raise
    store = spec.refresh()
    return store, _find(store, path, zarr_format)


def _no_array(store: ByteStore, path: str) -> str:
    what = f"there is no array {path!r} in {store.url}" if path else f"there is no zarr array at {store.url}"
    return f"{what}; {_named(store, '')}"


def _named(store: ByteStore, path: str) -> str:
    """Name the arrays below `path`, if listing works; a failure to list must not hide the real problem."""
    try:
        found = [repr(summary.path) for summary in itertools.islice(walk_arrays(store, path), _MAX_NAMES + 1)]
    except (StoreError, OSError):
        return "which arrays it has can't be listed; give the path of one"
    if not found:
        return "no array was found there; check the path"
    return f"arrays there: {', '.join(found[:_MAX_NAMES])}{', ...' if len(found) > _MAX_NAMES else ''}"


def _attributes(store: ByteStore, path: str, node: Node) -> dict[str, Any]:
    if node.zarr_format == 3:
        return node.attributes
    try:
        own = read_document(store, join(path, ".zattrs"))
        value = json.loads(own) if own is not None else {}
    except (ValueError, PermissionError):
        return {}
    return value if isinstance(value, dict) else {}


def zarr_array(
    document: Mapping[str, Any], zarr_format: int, *, mode: Literal["r", "r+"] = "r"
) -> tuple[Any, dict[str, Any]]:
    """Open an array that exists only as this document, through zarr's public API.

    Returns
    -------
    tuple
        The `zarr.Array`, and the mapping of keys to zarr buffers that is its whole store: chunks put there
        are read by it.
    """
    key = ".zarray" if zarr_format == 2 else "zarr.json"
    values: dict[str, Any] = {key: cpu.Buffer.from_bytes(json.dumps(document).encode())}
    with _quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr remarks on codecs and dtypes; the writer has seen that
        return zarr.open_array(MemoryStore(values), mode=mode, zarr_format=2 if zarr_format == 2 else 3), values


def interpret(spec: StoreSpec, path: str, node: Node, attributes: dict[str, Any]) -> ArraySpec:
    """Make the description of an array from its document.

    Raises
    ------
    MetadataError
        If the document is malformed, absurd, or names an unknown codec or grid.
    """
    where = join(spec.url, path)
    check_structure(node, where)
    _check_codecs(node, where)
    prefix, separator = _keys(node, path, where)
    # One element of an array like this one, of which nothing is stored, is the fill value itself.
    ones = {**node.document, "shape": [1] * len(node.document["shape"]), "attributes": {}}
    if node.zarr_format == 2:
        ones["chunks"] = [max(1, n) for n in ones["chunks"]]
    try:
        array, _ = zarr_array(ones, node.zarr_format)
        _check_item(array.dtype, array.chunks, where)
        _check_shard(array.chunks, array.shards, where)
        # With the dtype: text without axes comes as a scalar, which knows no length but its own.
        sample = np.asarray(array[...], array.dtype)
    except MetadataError:
        raise
    except Exception as error:
        raise MetadataError(f"{where}: zarr can't make sense of the metadata: {brief(error, 300)}") from error
    dtype = _native(sample.dtype)
    metadata = node.canonical
    return ArraySpec(
        store=spec,
        path=path,
        zarr_format=node.zarr_format,
        shape=tuple(node.document["shape"]),
        chunks=tuple(array.chunks),
        shards=None if array.shards is None else tuple(array.shards),
        dtype=dtype,
        stored_dtype=array.dtype,
        fill_value=array.fill_value,
        fill=sample.astype(dtype).reshape(-1)[:1].reshape(()).copy(),
        dimension_names=dimension_names(node, attributes),
        codecs=codec_list(node),
        metadata=metadata,
        metadata_key=node.key,
        fingerprint=digest(metadata.encode()),
        key_prefix=prefix,
        key_separator=separator,
        attributes=attributes,
    )


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    # Variable-length strings know no byte order and refuse the question.
    return dtype if dtype.kind == "T" else dtype.newbyteorder("=")


def _check_item(dtype: np.dtype[Any], chunks: Sequence[int], where: str) -> None:
    size = math.prod(chunks) * dtype.itemsize
    if size > 1 << 40:
        raise MetadataError(
            f"{where}: one chunk of shape {tuple(chunks)} and dtype {dtype} would take {size:.3g} bytes; "
            "the metadata are damaged, or the array must be rewritten in smaller chunks"
        )


def _check_shard(chunks: Sequence[int], shards: Sequence[int] | None, where: str) -> None:
    if shards is not None and math.prod(shards) // math.prod(chunks) > _MAX_PER_SHARD:
        raise MetadataError(
            f"{where}: a shard of {math.prod(shards) // math.prod(chunks):,} chunks, and the index of at most "
            f"{_MAX_PER_SHARD:,} is read; the metadata are damaged, or the array must be rewritten in smaller shards"
        )


def _keys(node: Node, path: str, where: str) -> tuple[str, str]:
    """Return what stands before the first index number in a chunk key, and between the numbers."""
    lead = f"{path}/" if path else ""
    scalar = not node.document["shape"]
    if node.zarr_format == 2:
        separator = node.document.get("dimension_separator", ".")
        name, scalar_key = "v2", "0"
    else:
        encoding = node.document.get("chunk_key_encoding")
        encoding = {"name": encoding} if isinstance(encoding, str) else encoding
        encoding = encoding if isinstance(encoding, dict) else {}
        name = str(encoding.get("name"))
        configuration = encoding.get("configuration") or {}
        usual = "/" if name == "default" else "."
        separator = configuration.get("separator", usual) if isinstance(configuration, dict) else None
        scalar_key = "c" if name == "default" else "0"
    if name not in ("default", "v2") or separator not in (".", "/"):
        raise MetadataError(
            f"{where}: chunk key encoding {brief(name)} with separator {brief(separator)} is not supported; "
            "'default' and 'v2' with '.' or '/' are"
        )
    if scalar:
        return lead + scalar_key, separator
    return (f"{lead}c{separator}" if name == "default" else lead), separator


def codec_list(node: Node) -> tuple[dict[str, Any], ...]:
    """Return the codec chain in the order of encoding; version 2 as filters and compressor."""
    if node.zarr_format == 2:
        compressor = node.document.get("compressor")
        return (*(node.document.get("filters") or ()), *((compressor,) if compressor else ()))
    return tuple({"name": codec} if isinstance(codec, str) else codec for codec in node.document["codecs"])


def _check_codecs(node: Node, where: str) -> None:
    try:
        codecs = codec_list(node)
        if len(codecs) > MAX_CODECS:
            raise MetadataError(f"{where}: a chain of {len(codecs)} codecs; at most {MAX_CODECS} are undone")
        inside = () if node.zarr_format == 2 else _inside(codecs, where)
        if node.zarr_format == 2 and _is_for_objects(node.document.get("compressor")):
            raise MetadataError(f"{where}: codec {brief(codecs[-1]['id'])} is a filter, and stands for the compressor")
        for codec in inside or codecs:
            _check_codec(codec, node.zarr_format, where)
    except (KeyError, TypeError, AttributeError) as error:
        raise MetadataError(
            f"{where}: the codec chain is malformed: {type(error).__name__}: {brief(error, 200)}"
        ) from error


def _inside(codecs: Sequence[Any], where: str) -> list[Mapping[str, Any]]:
    try:
        return list(codecs_inside(codecs))
    except MetadataError as error:
        raise MetadataError(f"{where}: {error}") from None


def _is_for_objects(codec: Any) -> bool:
    return isinstance(codec, dict) and str(codec.get("id")).startswith("vlen-")


def _check_codec(codec: Mapping[str, Any], zarr_format: int, where: str) -> None:
    name = codec["name" if zarr_format == 3 else "id"]
    if str(name).removeprefix("numcodecs.") == "pickle":
        raise MetadataError(
            f"{where}: codec 'pickle' runs whatever code the stored bytes hold, so it is never used; rewrite the array "
            "with another one ('vlen-utf8' or 'json2', for example), where you trust it"
        )
    try:
        with _quiet, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if zarr_format == 3:
                get_codec_class(name)
            else:
                get_numcodec(dict(codec))  # type: ignore[arg-type]  # a TypedDict with only "id"
    except Exception as error:
        registry = "zarr.codecs" if zarr_format == 3 else "numcodecs"
        raise MetadataError(
            f"{where}: codec {brief(name)} can't be used here ({brief(error, 200)}); install the package that "
            f"registers it with zarr's codec registry ({registry}), on the client and on the workers"
        ) from error


# -- the same array on a worker -------------------------------------------------------------------

_seen: set[tuple[int, str, str, str]] = set()


def check_visible(spec: ArraySpec) -> None:
    """Make sure that this process sees the array that the client opened; once per process and array.

    An array whose path does not exist here would otherwise read as fill values without any error.

    Raises
    ------
    StoreNotVisibleError
        If the store is not there, the array is not in it, or another array is.
    OSError
        If the store can't be reached or refuses to answer.
    """
    mark = (os.getpid(), spec.store.token, spec.path, spec.fingerprint)
    if mark in _seen:
        return
    try:
        node = _find(spec.store.open(), spec.path, spec.zarr_format)
    except StoreNotFoundError as error:
        raise StoreNotVisibleError(_not_visible(spec, str(error))) from None
    if node is None or not node.is_array:
        raise StoreNotVisibleError(_not_visible(spec, "there is no array of this name there"))
    if digest(node.canonical.encode()) != spec.fingerprint:
        raise StoreNotVisibleError(_not_visible(spec, _difference(spec, node)))
    _seen.add(mark)


def _not_visible(spec: ArraySpec, problem: str) -> str:
    return (
        f"{spec.url} is not what the client sees when it is opened on {here()}: {problem}. Put the store where "
        "every worker reaches it under the same name (a shared disk, s3://), or run the workers on the "
        "client's host"
    )


def _difference(spec: ArraySpec, node: Node) -> str:
    expected = json.loads(spec.metadata)
    names = sorted(
        name
        for name in {*expected, *node.document} - {"attributes", "consolidated_metadata"}
        if expected.get(name) != node.document.get(name)
    )
    shown = "; ".join(
        f"{name} is {_short(node.document.get(name))}, expected {_short(expected.get(name))}" for name in names
    )
    return f"another array is there ({shown})"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
