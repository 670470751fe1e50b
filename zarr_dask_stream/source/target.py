"""An array that is to be written: what it will be, whether its place is free, and how it gets there.

It is described as its reader will see it before anything of it exists: workers are told what to write by the same
kind of description from which they read.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from typing import Any

import zarr
from zarr.storage import MemoryStore

from zarr_dask_stream.errors import MetadataError, StoreError, StoreNotFoundError, UsageError
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.array import ArraySpec, interpret, open_array
from zarr_dask_stream.source.backend import ByteStore, check_key
from zarr_dask_stream.source.files import MappingBytes
from zarr_dask_stream.source.metadata import Node, find_node, join
from zarr_dask_stream.source.store import StoreSpec, split_source
from zarr_dask_stream.source.template import CREATE_OPTIONS

__all__ = ["Place", "Target", "check_options", "existing_target", "find_place", "new_target"]

#: Documents of a node: the last to go, and the first to come.
DOCUMENTS = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
_OBSTORE_LOCAL = "obstore LocalStore("  # how such a store is shown, before its folder
_ASIDE = ".zds-"  # folders for what is not whole yet


@dataclass(frozen=True)
class Place:
    """Where something is to be written: a store, and a path in it."""

    store: StoreSpec
    path: str

    @property
    def url(self) -> str:
        """Display form."""
        return join(self.store.url, self.path)

    def node(self) -> Node | None:
        """Find what is there; only its own document counts, no consolidated copy of one that is gone."""
        store = self.store.open()
        try:
            node = find_node(store, self.path)
        except (StoreNotFoundError, NotADirectoryError):
            return None
        own = {join(self.path, name) for name in ("zarr.json", ".zarray", ".zgroup")}
        return node if node is not None and node.key in own else None

    def strangers(self) -> list[str]:
        """Name what is at the place and no part of a Zarr node, as far as the store can be listed."""
        try:
            folders, keys = self.store.open().list_dir(self.path)
        except (StoreNotFoundError, NotADirectoryError):
            return []
        return sorted(name for name in {*folders, *keys} if not name.startswith(_ASIDE))

    def version_above(self) -> int | None:
        """Return the format of the nearest group above, or None where there is none."""
        parts = self.path.split("/") if self.path else []
        for depth in reversed(range(len(parts))):
            node = Place(self.store, "/".join(parts[:depth])).node()
            if node is not None:
                return node.zarr_format
        return None

    def meets(self, other: Place) -> bool:
        """Whether one of two places is the other one, or lies in it."""
        mine, theirs = self._parts, other._parts
        shorter = min(len(mine), len(theirs))
        return mine[:shorter] == theirs[:shorter]

    @property
    def _parts(self) -> list[str]:
        url, kind = self.store.url.rpartition("::")[2], self.store.kind
        if url.startswith(_OBSTORE_LOCAL):
            url, kind = f"/{url[len(_OBSTORE_LOCAL) : -1]}", "local"
        elif url.startswith("file://"):
            url, kind = url.removeprefix("file://"), "local"
        if kind in {"local", "zip"}:
            url = os.path.realpath(url)  # two links may lead to one folder
        elif kind == "memory":
            opened = self.store.open()
            # A MemoryStore and the dict that it was made with are one place.
            url = str(id(opened.mapping)) if isinstance(opened, MappingBytes) else self.store.token
        return [part for part in join(url, self.path).split("/") if part]


@dataclass(frozen=True)
class Target:
    """An array to be written.

    Attributes
    ----------
    spec : ArraySpec
        What it is or will be.
    documents : tuple of (str, bytes)
        The documents to put, keys relative to the store, those of groups above it first and its own last. None
        for an array that exists.
    overwrite : bool
        Whether an array that is in its place makes room.
    """

    spec: ArraySpec
    documents: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    overwrite: bool = False

    @property
    def place(self) -> Place:
        """Where it is."""
        return Place(self.spec.store, self.spec.path)

    @property
    def exists(self) -> bool:
        """Whether it is written to as it is, rather than made."""
        return not self.documents

    def check_free(self) -> None:
        """Refuse a place where something is that may not be replaced.

        Raises
        ------
        UsageError
            If an array is there and `overwrite` is not set, if a group is there, or what is no part of Zarr.
        """
        place = self.place
        node = place.node()
        if node is not None and not node.is_array:
            raise UsageError(
                f"{place.url} is a group, and would have to go with all that is in it: name a path inside it, or "
                "another place"
            )
        if node is not None and not self.overwrite:
            raise UsageError(
                f"{place.url} exists: choose another place, or say overwrite=True to replace it. (An interrupted run "
                "goes on into it with the checkpoint that it was started with)"
            )
        if node is None:
            found = place.strangers()
            if found:
                names = ", ".join(map(repr, found[:5])) + (", ..." if len(found) > 5 else "")
                raise UsageError(f"{place.url} is not empty and no Zarr array ({names}): choose another place")
        self._check_above()

    def _check_above(self) -> None:
        parts = self.spec.path.split("/") if self.spec.path else []
        for depth in range(len(parts)):
            above = Place(self.spec.store, "/".join(parts[:depth]))
            node = above.node()
            if node is None:
                continue
            if node.is_array:
                raise UsageError(f"{above.url} is an array, and {self.spec.path!r} can't lie inside it")
            if node.zarr_format != self.spec.zarr_format:
                raise UsageError(
                    f"{above.url} is a group of version {node.zarr_format}, and an array of version "
                    f"{self.spec.zarr_format} in it would not be found: say zarr_format={node.zarr_format}"
                )

    def create(self) -> None:
        """Put its documents, after what is in its place is gone. Does no harm where it was done before."""
        store, path = self.spec.store.open(), self.spec.path
        if self.overwrite and self.place.node() is not None:
            store.clear(path, DOCUMENTS)
        *above, own = _by_node(self.documents)
        for documents in above:
            if not any(_has(store, key) for key, _ in documents):
                _put(store, documents)
        _put(store, own)

    def check_same(self) -> None:
        """Refuse to go on into what is not the array that an earlier run has begun to write.

        Raises
        ------
        StoreError
            If nothing is there, or something else.
        """
        node = self.place.node()
        if node is None or not node.is_array or node.canonical != self.spec.metadata:
            what = "is not there any more" if node is None else "is another array now"
            raise StoreError(
                f"{self.place.url} {what}: it is not what an earlier run, or the caller, has begun with. Open it "
                "anew, or begin again with a new checkpoint"
            )


def _has(store: ByteStore, key: str) -> bool:
    try:
        return store.exists(key)
    except StoreNotFoundError:
        return False  # not even the store is there yet


def _put(store: ByteStore, documents: Iterable[tuple[str, bytes]]) -> None:
    for key, document in documents:
        store.put(key, document)


def _by_node(documents: Iterable[tuple[str, bytes]]) -> list[list[tuple[str, bytes]]]:
    """Group documents by the node they describe, nodes above others first."""
    nodes: dict[str, list[tuple[str, bytes]]] = {}
    for key, document in documents:
        nodes.setdefault(key.rpartition("/")[0], []).append((key, document))
    return [nodes[path] for path in sorted(nodes, key=lambda path: len(path.split("/")) if path else 0)]


# -- making targets -------------------------------------------------------------------------------


def find_place(target: Any, path: str = "", storage_options: Mapping[str, Any] | None = None) -> Place:
    """Find where a target is, from whatever names a store.

    Raises
    ------
    UsageError
        If it can't be understood.
    """
    store = StoreSpec.parse(target, storage_options)
    return Place(store, check_key(join(split_source(target)[1].strip("/"), path.strip("/"))))


def existing_target(array: zarr.Array) -> Target:  # type: ignore[type-arg]  # zarr 3.0 has no parameter
    """Describe an open array that is to be written to as it is.

    Raises
    ------
    UsageError
        If it was opened for reading only.
    """
    if array.read_only:
        raise UsageError(f"the target {array.name!r} was opened for reading only: open it with mode='r+'")
    return Target(open_array(array))


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that ``zarr.create_array`` does not have.

    Examples
    --------
    >>> check_options({"compressor": None})
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.UsageError: a new array has no option 'compressor'; did you mean 'compressors'? There are \
attributes, chunk_key_encoding, chunks, compressors, config, dimension_names, dtype, fill_value, filters, order, \
serializer, shards, zarr_format
    """
    for name in options:
        if name not in CREATE_OPTIONS:
            near = get_close_matches(name, CREATE_OPTIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UsageError(f"a new array has no option {name!r}{hint} There are {', '.join(CREATE_OPTIONS)}")
    version, order = options.get("zarr_format"), options.get("order")
    if version is not None and as_whole(version) not in (2, 3):
        raise UsageError(f"zarr_format is 2 or 3, got {version!r}")
    if order is not None and not (isinstance(order, str) and order in ("C", "F")):
        raise UsageError(f'order is "C" or "F", got {order!r}')
    for name in ("attributes", "config"):
        given = options.get(name)
        if given is not None and not isinstance(given, Mapping) and not is_dataclass(given):
            raise UsageError(f"{name} is a mapping, got {given!r}")


def check_writing(overwrite: Any, verify: Any) -> None:
    """Refuse words that mean nothing: ``overwrite="no"`` would be taken for yes, and data be lost.

    Examples
    --------
    >>> check_writing("no", True)
    Traceback (most recent call last):
        ...
    zarr_dask_stream.errors.UsageError: overwrite is True or False, got 'no'
    """
    if not isinstance(overwrite, bool):
        raise UsageError(f"overwrite is True or False, got {overwrite!r}")
    if not isinstance(verify, bool) and not (isinstance(verify, str) and verify == "read"):
        raise UsageError(f'verify is True, False or "read", got {verify!r}')


def new_target(place: Place, options: Mapping[str, Any], *, overwrite: bool = False) -> Target:
    """Describe an array that does not exist yet.

    Parameters
    ----------
    place : Place
        Where it will be.
    options : mapping
        What ``zarr.create_array`` takes.
    overwrite : bool
        Whether an array that is in its place makes room.

    Raises
    ------
    UsageError
        If zarr can't make such an array.

    Examples
    --------
    >>> target = new_target(find_place({}), {"shape": (4,), "chunks": (2,), "dtype": "f4"})
    >>> target.spec
    ArraySpec('memory://(a dict of this process)', shape=(4,), chunks=(2,), dtype=float32, v3)
    >>> [key for key, _ in target.documents]
    ['zarr.json']
    """
    values: dict[str, Any] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr remarks on dtypes and codecs; they are the source's, or asked for
            array = zarr.create_array(MemoryStore(values), name=place.path or None, **options)
    except (ValueError, TypeError, NotImplementedError, KeyError, OverflowError) as error:
        raise UsageError(f"zarr can't make such a target: {error}") from error
    documents = tuple((key, bytes(value.to_bytes())) for key, value in values.items())
    version = array.metadata.zarr_format
    key = join(place.path, "zarr.json" if version == 3 else ".zarray")
    node = Node(version, True, json.loads(values[key].to_bytes()), key)
    try:
        spec = interpret(place.store, place.path, node, dict(array.attrs))
    except MetadataError as error:
        raise UsageError(f"zarr can't make such a target: {error}") from error
    return Target(spec, tuple(sorted(documents, key=lambda pair: pair[0] == key)), overwrite)
