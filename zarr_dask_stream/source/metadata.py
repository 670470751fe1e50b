"""Finding and checking metadata documents: plain JSON, before zarr-python interprets it.

A node is looked for where its own document should be (version 3, then 2), then in the consolidated
metadata of the groups above it, so that consolidated-only stores work.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zarr_dask_stream.errors import MetadataError, StoreError
from zarr_dask_stream.source.backend import ByteStore

__all__ = [
    "ArraySummary",
    "Node",
    "brief",
    "check_structure",
    "codecs_inside",
    "consolidated",
    "consolidated_arrays",
    "dimension_names",
    "find_node",
    "join",
    "read_document",
    "summarize",
    "walk_arrays",
]

#: Documents that are longer are refused before they are read. Consolidated metadata of ten thousand arrays fit.
MAX_DOCUMENT_BYTES = 1 << 26
#: Groups within groups that are walked through; what is deeper can still be named.
MOST_DEEP = 64
_MAX_LENGTH = 2**63 - 1
_MAX_CHUNK_BYTES = 1 << 40
_MAX_AXES = 32
#: Each codec may make its input somewhat longer; that many can't make a bomb of it.
MAX_CODECS = 16
_MAX_NESTED = 8
_MAX_ITEM_BYTES = 1 << 24
# The types whose name says their length: raw bits, and NumPy's text, bytes and voids.
_LONG = re.compile(r"(?:(?=r)|[<>|=])([rSUVa])(\d+)")
_NO_STRUCTURE = frozenset({"attributes", "consolidated_metadata"})


@dataclass(frozen=True)
class Node:
    """A metadata document and where it was found.

    Attributes
    ----------
    zarr_format : int
        2 or 3.
    is_array : bool
        Whether it describes an array (else a group).
    document : dict
        The JSON object.
    key : str
        Key that was read.
    attributes : dict
        User attributes; empty where they are kept in a key of their own that has not been read.
    """

    zarr_format: int
    is_array: bool
    document: dict[str, Any]
    key: str

    @property
    def attributes(self) -> dict[str, Any]:
        """User attributes kept in the document itself."""
        found = self.document.get("attributes")
        return dict(found) if isinstance(found, Mapping) else {}

    @property
    def canonical(self) -> str:
        """The structural part as text that does not depend on spacing, order or attributes."""
        part = {name: value for name, value in self.document.items() if name not in _NO_STRUCTURE}
        return json.dumps(part, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class ArraySummary:
    """What the metadata of an array say, for a listing.

    Examples
    --------
    >>> ArraySummary("t2m", (4, 6), "float32", (2, 3), None, 3)
    ArraySummary(path='t2m', shape=(4, 6), dtype='float32', chunks=(2, 3), shards=None, zarr_format=3)
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    zarr_format: int


def join(*parts: str) -> str:
    """Join parts of a key, leaving out empty ones."""
    return "/".join(part for part in parts if part)


def brief(said: Any, most: int = 80) -> str:
    """Return what a document says, or an error that quotes it, as a piece of a sentence: it may be of any length.

    Examples
    --------
    >>> brief("regular"), brief([1] * 99, most=12), brief(ValueError("no such codec"))
    ("'regular'", '[1, 1, 1,...', 'no such codec')
    """
    text = " ".join((str(said) if isinstance(said, BaseException) else repr(said)).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _load(raw: bytes, key: str, url: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MetadataError(
            f"{key} of {url} is not valid JSON ({error}); the store is damaged or still being written"
        ) from error
    if not isinstance(value, dict):
        raise MetadataError(f"{key} of {url} should hold a JSON object, got {type(value).__name__}")
    return value


def read_document(store: ByteStore, key: str) -> bytes | None:
    """Return a document as it is stored, None where there is none.

    Raises
    ------
    MetadataError
        If it is longer than any sensible one; it is not read to its end then.
    """
    raw = store.get_head(key, MAX_DOCUMENT_BYTES + 1)
    if raw is not None and len(raw) > MAX_DOCUMENT_BYTES:
        raise MetadataError(
            f"{key} of {store.url} is longer than {MAX_DOCUMENT_BYTES >> 20} MiB, the most that is read of a metadata "
            "document; the store is damaged, or data are kept where attributes should be"
        )
    return raw


def _read(store: ByteStore, key: str) -> dict[str, Any] | None:
    raw = read_document(store, key)
    return None if raw is None else _load(raw, key, store.url)


def _own(store: ByteStore, path: str, key: str) -> Node | None:
    full = join(path, key)
    document = _read(store, full)
    if document is None:
        return None
    if key != "zarr.json":
        return Node(2, key == ".zarray", document, full)
    kind = document.get("node_type")
    if document.get("zarr_format") != 3 or kind not in ("array", "group"):
        raise MetadataError(
            f"{full} of {store.url} should say zarr_format 3 and node_type array or group, "
            f"got {brief(document.get('zarr_format'))} and {brief(kind)}"
        )
    return Node(3, kind == "array", document, full)


def find_node(store: ByteStore, path: str, zarr_format: int | None = None) -> Node | None:
    """Find the document of the node at `path`; None where nothing describes one.

    Parameters
    ----------
    store : ByteStore
        Where to look.
    path : str
        Path of the node, "" for the root.
    zarr_format : int, optional
        2 or 3 to look for that version only.
    """
    keys = {2: (".zarray", ".zgroup"), 3: ("zarr.json",)}.get(zarr_format or 0, ("zarr.json", ".zarray", ".zgroup"))
    denied: PermissionError | None = None
    for key in keys:
        try:
            node = _own(store, path, key)
        except PermissionError as error:
            # Without the right to list, S3 answers 403 for a key that is not there: try the others first.
            denied = denied or error
            continue
        if node is not None:
            return node
    if denied is not None:
        raise denied
    return _find_consolidated(store, path, zarr_format)


def _find_consolidated(store: ByteStore, path: str, zarr_format: int | None) -> Node | None:
    parts = path.split("/") if path else []
    for depth in range(len(parts) + 1):
        above, below = "/".join(parts[:depth]), "/".join(parts[depth:])
        for version, key, nodes in consolidated(store, above):
            if zarr_format in {None, version}:
                for name, is_array in _names_of(below, version):
                    if isinstance(nodes.get(name), dict):
                        document = nodes[name]
                        kind = is_array if version == 2 else document.get("node_type") == "array"
                        return Node(version, kind, document, key)
    return None


def _names_of(below: str, version: int) -> Iterator[tuple[str, bool]]:
    if version == 3:
        yield below, True
    else:
        yield join(below, ".zarray"), True
        yield join(below, ".zgroup"), False


def consolidated(store: ByteStore, above: str) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Give the consolidated documents kept in the group `above`, as (version, key, documents)."""
    for version, key in ((3, join(above, "zarr.json")), (2, join(above, ".zmetadata"))):
        try:
            document = _read(store, key)
        except PermissionError:
            continue
        inner = (document or {}).get("consolidated_metadata") if version == 3 else document
        nodes = inner.get("metadata") if isinstance(inner, dict) else None
        if isinstance(nodes, dict):
            yield version, key, nodes


def dimension_names(node: Node, attributes: Mapping[str, Any]) -> tuple[str | None, ...] | None:
    """Return what the axes of an array are called, or None where nothing or nonsense is said about it.

    Version 3 has a field for it, xarray an attribute, and NCZarr an entry of its own.
    """
    shape, refs = node.document.get("shape"), node.document.get("_NCZARR_ARRAY")
    names = node.document.get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS")
    if not names and isinstance(refs, dict) and isinstance(refs.get("dimrefs"), list):
        names = [str(name).rpartition("/")[2] for name in refs["dimrefs"]]
    if not isinstance(names, list) or not isinstance(shape, list) or len(names) != len(shape):
        return None
    if not all(name is None or isinstance(name, str) for name in names):
        return None
    return tuple(names) or None


# -- structure ------------------------------------------------------------------------------------


def check_structure(node: Node, where: str) -> None:
    """Refuse what is malformed or absurd before zarr-python, or memory, has to deal with it.

    Raises
    ------
    MetadataError
        Saying which field, what was expected and what was got.
    """
    shape = _lengths(node.document.get("shape"), "shape", where, least=0)
    chunks = _chunk_shape(node, where)
    if len(shape) != len(chunks):
        raise MetadataError(f"{where}: shape {shape} and chunk shape {chunks} have different numbers of axes")
    if len(shape) > _MAX_AXES:
        raise MetadataError(f"{where}: {len(shape)} axes; at most {_MAX_AXES} can be read")
    if math.prod(chunks) > _MAX_CHUNK_BYTES:
        raise MetadataError(
            f"{where}: one chunk of shape {chunks} would hold {math.prod(chunks):.3g} elements; "
            "the metadata are damaged, or the array must be rewritten in smaller chunks"
        )
    item_nbytes = _item_nbytes(node.document.get("dtype" if node.zarr_format == 2 else "data_type"))
    if item_nbytes > _MAX_ITEM_BYTES:
        raise MetadataError(
            f"{where}: one element would take {item_nbytes:.3g} bytes, and at most {_MAX_ITEM_BYTES:,} can be read; "
            "the metadata are damaged, or what is stored as one element should be an axis"
        )


def _item_nbytes(dtype: Any) -> float:
    """Return the bytes of one element as far as they are told here; making sense of the type is left to zarr.

    zarr makes an element to know the fill value: a line of metadata must not be able to fill the memory.
    """
    if isinstance(dtype, str):
        found = _LONG.fullmatch(dtype)
        if found is None:
            return 0
        unit = 1 / 8 if found[1] == "r" else 4 if found[1] == "U" else 1
        return float(found[2][:18]) * unit
    if isinstance(dtype, dict):
        configuration = dtype.get("configuration")
        inner = configuration if isinstance(configuration, dict) else {}
        length = inner.get("length_bytes")
        own = min(length, _MAX_LENGTH) if isinstance(length, int) else 0.0
        return own + _item_nbytes(inner.get("fields"))
    if isinstance(dtype, list):  # fields: a name, a type, and in version 2 perhaps a shape
        return sum(_field_nbytes(field) for field in dtype if isinstance(field, list) and len(field) >= 2)
    return 0


def _field_nbytes(field: list[Any]) -> float:
    shape = field[2] if len(field) > 2 else ()
    lengths = shape if isinstance(shape, list) else [shape]
    # Eight bytes for a type that says no length: only what is far too long matters here.
    return max(_item_nbytes(field[1]), 8) * math.prod(
        float(min(max(n, 0), _MAX_LENGTH)) for n in lengths if isinstance(n, int)
    )


def _lengths(value: Any, name: str, where: str, *, least: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        isinstance(n, int) and not isinstance(n, bool) and least <= n <= _MAX_LENGTH for n in value
    ):
        raise MetadataError(
            f"{where}: {name} should be a list of integers from {least} to 2**63 - 1, got {brief(value)}"
        )
    return tuple(value)


def _chunk_shape(node: Node, where: str) -> tuple[int, ...]:
    if node.zarr_format == 2:
        # Old writers gave an axis of length zero chunks of length zero.
        return _lengths(node.document.get("chunks"), "chunks", where, least=0)
    grid = node.document.get("chunk_grid")
    name = grid.get("name") if isinstance(grid, dict) else grid
    if not isinstance(grid, dict) or name != "regular":
        raise MetadataError(
            f"{where}: chunk grid {brief(name)} is not supported, only 'regular' is; rewrite the array with "
            "chunks of one shape"
        )
    configuration = grid.get("configuration")
    value = configuration.get("chunk_shape") if isinstance(configuration, dict) else None
    return _lengths(value, "chunk_shape", where, least=1)


def sharding(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the configuration of the sharding codec where it is the whole chain, else None."""
    codecs = document.get("codecs")
    if isinstance(codecs, list) and len(codecs) == 1 and isinstance(codecs[0], dict):
        configuration = codecs[0].get("configuration")
        if codecs[0].get("name") == "sharding_indexed" and isinstance(configuration, dict):
            return configuration
    return None


def codecs_inside(codecs: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Walk the codecs of a chain of version 3, and those of the shards in it.

    Raises
    ------
    MetadataError
        If there are shards within shards without end, or a chain is too long.
    TypeError, KeyError, AttributeError
        If it is malformed.

    Examples
    --------
    >>> inner = {"name": "sharding_indexed", "configuration": {"codecs": ["bytes", {"name": "zstd"}]}}
    >>> [codec["name"] for codec in codecs_inside([inner, {"name": "crc32c"}])]
    ['sharding_indexed', 'bytes', 'zstd', 'crc32c']
    """
    if len(codecs) > MAX_CODECS:
        raise MetadataError(f"a chain of {len(codecs)} codecs; at most {MAX_CODECS} are undone")
    if depth > _MAX_NESTED:
        raise MetadataError(f"shards within shards, more than {_MAX_NESTED} deep; no more are read")
    for codec in codecs:
        named: Mapping[str, Any] = {"name": codec} if isinstance(codec, str) else codec
        yield named
        if named["name"] == "sharding_indexed":
            configuration = named.get("configuration") or {}
            for chain in ("codecs", "index_codecs"):
                yield from codecs_inside(configuration.get(chain) or (), depth + 1)


# -- listings -------------------------------------------------------------------------------------


def summarize(node: Node, path: str) -> ArraySummary:
    """Summarize an array's document; what is malformed shows as it is."""

    def ints(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()

    document = node.document
    if node.zarr_format == 2:
        dtype = document.get("dtype")
        chunks, shards = ints(document.get("chunks")), None
    else:
        dtype = document.get("data_type")
        grid = document.get("chunk_grid")
        configuration = grid.get("configuration") if isinstance(grid, dict) else None
        chunks, shards = ints(configuration.get("chunk_shape") if isinstance(configuration, dict) else None), None
        inner = sharding(document)
        if inner is not None:
            chunks, shards = ints(inner.get("chunk_shape")), chunks
    name = dtype if isinstance(dtype, str) else json.dumps(dtype)
    return ArraySummary(path, ints(document.get("shape")), name, chunks, shards, node.zarr_format)


def walk_arrays(store: ByteStore, path: str) -> Iterator[ArraySummary]:
    """Walk the arrays below `path` in order: by the consolidated metadata, else by listing folders."""
    for version, key, nodes in consolidated(store, path):
        found = [summarize(node, join(path, name)) for name, node in consolidated_arrays(version, key, nodes)]
        if found:
            yield from sorted(found, key=lambda summary: summary.path)
            return
    yield from _walk_folders(store, path)


def consolidated_arrays(version: int, key: str, nodes: Mapping[str, Any]) -> Iterator[tuple[str, Node]]:
    """Walk the arrays among consolidated documents, as (path, document)."""
    for name, document in nodes.items():
        if not isinstance(document, dict):
            continue
        folder, _, last = name.rpartition("/")
        if version == 2 and last == ".zarray":
            yield folder, Node(2, True, document, key)
        elif version == 3 and document.get("node_type") == "array":
            yield name, Node(3, True, document, key)


def _walk_folders(store: ByteStore, path: str) -> Iterator[ArraySummary]:
    waiting = [path]
    while waiting:
        here = waiting.pop()
        folders, keys = store.list_dir(here)
        array = _array_among(store, here, keys)
        if array is not None:
            yield summarize(array, here)  # below an array there are only chunks
        elif here.count("/") < MOST_DEEP:
            waiting += [join(here, folder) for folder in sorted(folders, reverse=True)]


def _array_among(store: ByteStore, path: str, keys: Sequence[str]) -> Node | None:
    for key in ("zarr.json", ".zarray"):
        if key in keys:
            try:
                node = _own(store, path, key)
            except StoreError:
                continue
            if node is not None and node.is_array:
                return node
    return None
