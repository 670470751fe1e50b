"""All that is in a group: groups below it with their attributes, arrays, and the copy of it all in one document."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zarr_dask_stream.errors import StoreError
from zarr_dask_stream.source.backend import ByteStore
from zarr_dask_stream.source.metadata import MOST_DEEP, Node, consolidated, find_node, join, read_document
from zarr_dask_stream.source.store import StoreSpec

__all__ = ["Hierarchy", "consolidate", "group_documents", "walk_hierarchy"]


@dataclass
class Hierarchy:
    """What is at and below a path.

    Attributes
    ----------
    store : StoreSpec
        Where.
    path : str
        The path, "" for the root.
    zarr_format : int
        2 or 3.
    groups : dict of str to dict
        Attributes of the groups, by path below `path`; that at `path` itself is "".
    arrays : list of str
        Paths of the arrays below `path`, in order; one at `path` itself is "".
    consolidated : bool
        Whether the group has its documents in one.
    """

    store: StoreSpec
    path: str
    zarr_format: int = 3
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    arrays: list[str] = field(default_factory=list)
    consolidated: bool = False


def walk_hierarchy(spec: StoreSpec, path: str) -> Hierarchy | None:
    """Find all groups and arrays at and below a path; None where there is no node.

    By the consolidated metadata where there are any, else by listing folders.

    Examples
    --------
    >>> import zarr
    >>> group = zarr.create_group({}, attributes={"title": "T"})
    >>> _ = group.create_array("a/b", shape=(2,), dtype="i2")
    >>> found = walk_hierarchy(StoreSpec.parse(group), "")
    >>> found.groups, found.arrays, found.consolidated
    ({'': {'title': 'T'}, 'a': {}}, ['a/b'], False)
    """
    store = spec.open()
    node = find_node(store, path)
    if node is None:
        return None
    found = Hierarchy(spec, path, node.zarr_format)
    if node.is_array:
        found.arrays.append("")
        return found
    for version, _, documents in consolidated(store, path):
        if version == node.zarr_format:
            found.consolidated = True
            found.groups[""] = _attributes(store, path, node)
            _take_consolidated(found, version, documents)
            found.arrays.sort()
            return found
    _walk(store, found, "", node)
    found.arrays.sort()
    return found


def _take_consolidated(found: Hierarchy, version: int, documents: Mapping[str, Any]) -> None:
    for name, document in documents.items():
        if not isinstance(document, dict):
            continue
        folder, _, last = name.rpartition("/") if version == 2 else (name, "", "")
        if version == 3:
            if document.get("node_type") == "array":
                found.arrays.append(folder)
            else:
                found.groups[folder] = dict(document.get("attributes") or {})
        elif last == ".zarray":
            found.arrays.append(folder)
        elif last == ".zgroup":
            attributes = documents.get(join(folder, ".zattrs"))
            found.groups[folder] = dict(attributes) if isinstance(attributes, dict) else {}


def _walk(store: ByteStore, found: Hierarchy, below: str, node: Node) -> None:
    full = join(found.path, below)
    if node.is_array:
        found.arrays.append(below)
        return  # below an array there are only chunks
    found.groups[below] = _attributes(store, full, node)
    folders, _ = store.list_dir(full)
    if folders and below.count("/") >= MOST_DEEP:
        raise StoreError(f"{store.url} has groups within groups, more than {MOST_DEEP} deep; name one further down")
    for folder in sorted(folders):
        child = find_node(store, join(full, folder), found.zarr_format)
        if child is not None:
            _walk(store, found, join(below, folder), child)


def _attributes(store: ByteStore, path: str, node: Node) -> dict[str, Any]:
    if node.zarr_format == 3:
        return node.attributes
    raw = read_document(store, join(path, ".zattrs"))
    try:
        value = json.loads(raw) if raw is not None else {}
    except ValueError as error:
        raise StoreError(f"{join(path, '.zattrs')} of {store.url} is not valid JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def group_documents(zarr_format: int, path: str, attributes: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Make the documents of a group, by key.

    Examples
    --------
    >>> dict(group_documents(2, "g", {"a": 1}))
    {'g/.zattrs': b'{"a": 1}', 'g/.zgroup': b'{"zarr_format": 2}'}
    """
    if zarr_format == 2:
        yield join(path, ".zattrs"), _json(dict(attributes))
        yield join(path, ".zgroup"), _json({"zarr_format": 2})
    else:
        yield join(path, "zarr.json"), _json({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def consolidate(zarr_format: int, path: str, documents: Iterable[tuple[str, bytes]]) -> tuple[str, bytes]:
    """Make the document that has all others of a group in it: its key and its content.

    Parameters
    ----------
    zarr_format : int
        2 or 3.
    path : str
        Path of the group.
    documents : iterable of (str, bytes)
        Documents of the group and of all that is below it, by key.
    """
    lead = f"{path}/" if path else ""
    plain = {key.removeprefix(lead): json.loads(document) for key, document in documents}
    if zarr_format == 2:
        return join(path, ".zmetadata"), _json({"metadata": plain, "zarr_consolidated_format": 1})
    own = plain.pop("zarr.json")
    nodes = {key.removesuffix("/zarr.json"): document for key, document in plain.items()}
    for document in nodes.values():
        if document.get("node_type") == "group":
            document["consolidated_metadata"] = _inline({})  # as zarr-python has it: they are in the one above
    return join(path, "zarr.json"), _json({**own, "consolidated_metadata": _inline(nodes)})


def _inline(nodes: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": "inline", "must_understand": False, "metadata": dict(nodes)}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()
