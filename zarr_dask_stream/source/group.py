"""A group of arrays: what is in it, what dimensions are called, and which arrays are coordinates of others.

The rules are those of xarray: an array that bears the name of its only dimension is a coordinate, and so is
one that an attribute ``coordinates`` names.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from zarr_dask_stream.errors import StoreError, StoreNotFoundError, UsageError
from zarr_dask_stream.source.array import ArraySpec, interpret, open_array
from zarr_dask_stream.source.backend import ByteStore, check_key
from zarr_dask_stream.source.metadata import (
    Node,
    consolidated,
    consolidated_arrays,
    dimension_names,
    find_node,
    join,
    read_document,
    walk_arrays,
)
from zarr_dask_stream.source.store import StoreSpec, split_source

__all__ = ["Entry", "Group", "guess", "open_group"]

T = TypeVar("T")

_AT_ONCE = 16  # documents that are asked for at the same time
_MOST_NAMED = 12


@dataclass(frozen=True)
class Entry:
    """An array of a group: its document and its attributes."""

    node: Node
    attributes: dict[str, Any]

    @property
    def dims(self) -> tuple[str, ...] | None:
        """Names of its axes; None unless all have one."""
        if self.node.document.get("shape") == []:
            return ()
        names = dimension_names(self.node, self.attributes)
        return None if names is None or None in names else names  # type: ignore[return-value]  # no None left

    @property
    def coordinates(self) -> list[str]:
        """Names of the arrays that it says are its coordinates."""
        return _words(self.attributes)


@dataclass(frozen=True)
class Group:
    """A group, as far as its metadata say.

    Parameters
    ----------
    store : StoreSpec
        Where it is.
    path : str
        Path in the store, "" for the root.
    zarr_format : int
        2 or 3.
    attributes : dict
        Its attributes.
    entries : dict of str to Entry
        The arrays directly in it.
    listed : bool
        Whether these are all there are: a store that can't be listed may have others.
    """

    store: StoreSpec
    path: str
    zarr_format: int
    attributes: dict[str, Any]
    entries: dict[str, Entry]
    listed: bool = True

    @property
    def url(self) -> str:
        """Display form of its place."""
        return join(self.store.url, self.path)

    @property
    def coordinates(self) -> frozenset[str]:
        """Names of the arrays that are coordinates."""
        named = itertools.chain(_words(self.attributes), *(entry.coordinates for entry in self.entries.values()))
        own = (name for name, entry in self.entries.items() if entry.dims == (name,))
        return frozenset(itertools.chain((name for name in named if name in self.entries), own))

    @property
    def variables(self) -> list[str]:
        """Names of the arrays that are not."""
        return sorted(self.entries.keys() - self.coordinates)

    def find(self, name: str) -> Entry | None:
        """Return an array by its name, or by a path below the group; None where there is none."""
        if name in self.entries:
            return self.entries[name]
        node = find_node(self.store.open(), join(self.path, check_key(name)), self.zarr_format)
        if node is None or not node.is_array:
            return None
        # Attributes of version 2 have a key of their own, which is read with the array.
        spec = open_array(self.store, path=join(self.path, name))
        self.entries[name] = Entry(node, spec.attributes)
        return self.entries[name]

    def entry(self, name: Any) -> Entry:
        """Return an array by its name.

        Raises
        ------
        UsageError
            If there is none; the message guesses what was meant.
        """
        entry = self.find(name.strip("/")) if isinstance(name, str) else None
        if entry is None:
            raise UsageError(f"there is no array {name!r} in {self.url}{guess(name, self.entries)}")
        return entry

    def array(self, name: str) -> ArraySpec:
        """Open an array."""
        entry = self.entry(name)
        return interpret(self.store, join(self.path, name.strip("/")), entry.node, entry.attributes)


def _words(attributes: Mapping[str, Any]) -> list[str]:
    named = attributes.get("coordinates")
    return named.split() if isinstance(named, str) else []


def guess(name: Any, known: Iterable[str]) -> str:
    """Say what was meant, or what there is.

    Examples
    --------
    >>> guess("t2n", ["t2m", "u10"]), guess("x", ["t2m", "u10"])
    ("; did you mean 't2m'?", "; there are 't2m', 'u10'")
    """
    names = sorted(map(str, known))
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    if not names:
        return "; there is none at all"
    shown = ", ".join(map(repr, names[:_MOST_NAMED]))
    return f"; there are {shown}{', ...' if len(names) > _MOST_NAMED else ''}"


# -- opening --------------------------------------------------------------------------------------


def open_group(
    source: Any,
    *,
    path: str = "",
    storage_options: Mapping[str, Any] | None = None,
    use_consolidated: bool | None = None,
) -> Group:
    """Read what a group holds: from consolidated metadata where there are any, else by listing it.

    Parameters
    ----------
    source : str, PathLike, zarr.Group, zarr store or mapping
        Where it is; see `StoreSpec.parse`.
    path : str
        Path of the group inside `source`.
    storage_options : mapping, optional
        Options for a URL.
    use_consolidated : bool, optional
        False not to look for consolidated metadata, True to insist on them.

    Raises
    ------
    StoreNotFoundError
        If there is no such group.
    UsageError
        If an array is there.
    StoreError, OSError
        If the store can't be read.

    Examples
    --------
    >>> import zarr
    >>> root = zarr.create_group({})
    >>> for name in ("t2m", "time"):
    ...     _ = root.create_array(name, shape=(4,), dtype="f4", dimension_names=["time"])
    >>> group = open_group(root)
    >>> group.variables, sorted(group.coordinates), group.entry("t2m").dims
    (['t2m'], ['time'], ('time',))
    """
    spec = StoreSpec.parse(source, storage_options)
    full = check_key(join(split_source(source)[1].strip("/"), path.strip("/")))
    store = spec.open()
    try:
        found = None if use_consolidated is False else _from_consolidated(spec, store, full, depth=0)
        if found is None and use_consolidated:
            raise StoreError(f"{join(spec.url, full)} has no consolidated metadata; leave consolidated=True away")
        return found or _by_listing(spec, store, full)
    except NotADirectoryError:
        raise StoreNotFoundError(f"{store.url} is a file, and a directory or a .zip file is needed") from None


def _from_above(spec: StoreSpec, store: ByteStore, path: str) -> Group | None:
    """Read a group out of the consolidated metadata of a group above it."""
    depths = range(1, len(path.split("/")) + 1 if path else 1)
    return next(filter(None, (_from_consolidated(spec, store, path, depth=depth) for depth in depths)), None)


def _from_consolidated(spec: StoreSpec, store: ByteStore, path: str, *, depth: int) -> Group | None:
    """Read a group out of consolidated metadata, its own or those of the group so many levels above."""
    parts = path.split("/") if path else []
    above, below = "/".join(parts[: len(parts) - depth]), "/".join(parts[len(parts) - depth :])
    for version, key, nodes in consolidated(store, above):
        group = _in_documents(spec, path, (version, key, nodes), below)
        if group is not None:
            return group
    return None


def _in_documents(
    spec: StoreSpec, path: str, documents: tuple[int, str, Mapping[str, Any]], below: str
) -> Group | None:
    """Read a group out of consolidated documents; `below` is its path in them."""
    version, key, nodes = documents
    entries = {}
    for folder, node in consolidated_arrays(version, key, nodes):
        parent, _, own = folder.rpartition("/")
        if parent == below and own:
            attributes = _dict(nodes.get(join(folder, ".zattrs"))) if version == 2 else node.attributes
            entries[own] = Entry(node, attributes)
    if version == 2:
        there, attributes = join(below, ".zgroup") in nodes, _dict(nodes.get(join(below, ".zattrs")))
    elif below:
        there, attributes = below in nodes, _dict(_dict(nodes.get(below)).get("attributes"))
    else:  # the group itself is beside the consolidated documents, not among them
        own_node = find_node(spec.open(), path, 3)
        there, attributes = own_node is not None, {} if own_node is None else own_node.attributes
    return Group(spec, path, version, attributes, entries) if there or entries else None


def _by_listing(spec: StoreSpec, store: ByteStore, path: str) -> Group:
    node = find_node(store, path)
    if node is None:
        raise StoreNotFoundError(f"there is no zarr group at {join(spec.url, path)}{_there(store)}")
    if node.is_array:
        raise UsageError(f"{join(spec.url, path)} is an array, and a group is needed: stream_chunks takes an array")
    version = node.zarr_format
    own = node.key in {join(path, "zarr.json"), join(path, ".zgroup")}
    attributes = node.attributes if version == 3 else _json(store, join(path, ".zattrs"))
    try:
        folders, _ = store.list_dir(path) if own else ([], [])
    except (StoreError, OSError):
        own, folders = False, []
    if not own:
        return _from_above(spec, store, path) or Group(spec, path, version, attributes, {}, listed=False)

    def read(folder: str) -> Entry | None:
        place = join(path, folder)
        document = _json(store, join(place, "zarr.json" if version == 3 else ".zarray"))
        if not document or (version == 3 and document.get("node_type") != "array"):
            return None
        key = join(place, "zarr.json" if version == 3 else ".zarray")
        own = document.get("attributes") if version == 3 else _json(store, join(place, ".zattrs"))
        return Entry(Node(version, True, document, key), _dict(own))

    found = dict(zip(folders, _many(read, folders, local=store.is_local), strict=True))
    return Group(spec, path, version, attributes, {name: entry for name, entry in found.items() if entry is not None})


def _many(read: Callable[[str], T], names: list[str], *, local: bool) -> list[T]:
    if local or len(names) < 2:
        return [read(name) for name in names]
    with ThreadPoolExecutor(min(_AT_ONCE, len(names))) as pool:
        return list(pool.map(read, names))


def _json(store: ByteStore, key: str) -> dict[str, Any]:
    """Read a document; what is not there, or no document, is an empty one."""
    raw = read_document(store, key)
    try:
        return _dict(json.loads(raw)) if raw is not None else {}
    except (ValueError, RecursionError):
        return {}


def _dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _there(store: ByteStore) -> str:
    try:
        found = [repr(summary.path) for summary in itertools.islice(walk_arrays(store, ""), _MOST_NAMED)]
    except (StoreError, OSError):
        return ""
    return f"; arrays there: {', '.join(found)}" if found else ""
