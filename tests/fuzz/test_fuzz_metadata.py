"""Metadata documents that are nearly right: understood, or refused with a sentence of ours, at no great expense.

Tried for version 0.1: 900 inputs for each test, 2,700 in all, without a finding. The usual run tries 15 each.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, GzipCodec, TransposeCodec

from fuzz.mutation import as_json, bounded, changed, fine_or_refused, fuzzed, spliced
from zarr_dask_stream.errors import MetadataError
from zarr_dask_stream.source.array import list_arrays, open_array
from zarr_dask_stream.source.codec import compile_chain
from zarr_dask_stream.source.shard import ShardLayout

#: An array's description, what zarr makes of it for one element, and a compiled chain fit in this many times over.
MOST_BYTES = 1 << 24


def _documents() -> list[tuple[str, dict[str, Any]]]:
    kinds: list[dict[str, Any]] = [
        {"dtype": "f4"},
        {"dtype": "f8", "shards": (8, 6), "fill_value": np.nan},
        {"dtype": "i2", "serializer": BytesCodec(endian="big"), "filters": [TransposeCodec(order=(1, 0))]},
        {"dtype": "u1", "compressors": [GzipCodec(), Crc32cCodec()]},
        {"dtype": "M8[s]", "compressors": None},
        {"dtype": str},
        {"dtype": "f4", "zarr_format": 2},
        {"dtype": "U5", "zarr_format": 2, "order": "F"},
        {"dtype": [("a", "i4"), ("b", "f8")], "zarr_format": 2},
        {"dtype": "i4", "zarr_format": 2, "filters": [numcodecs.Delta("i4")], "compressors": numcodecs.LZ4()},
    ]  # fmt: skip
    found = []
    for options in kinds:
        store: dict[str, Any] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some of these are not in the specification yet
            zarr.create_array(store, shape=(10, 10), chunks=(4, 3), dimension_names=None, **options)
        key = "zarr.json" if "zarr.json" in store else ".zarray"
        found.append((key, json.loads(store[key].to_bytes())))
    return found


DOCUMENTS = _documents()


def _look(store: dict[str, bytes]) -> None:
    """Do all that is done with metadata before a chunk is read."""
    with fine_or_refused(MOST_BYTES):
        list_arrays(store)
        spec = open_array(store)
        compile_chain(spec)
        if spec.shards is not None:
            ShardLayout(spec)
        assert len(spec.grid) >= 0
        assert spec.chunk_nbytes >= 0
        assert repr(spec)


@given(data=st.data())
@fuzzed
def test_changed_documents(data: st.DataObject) -> None:
    key, document = data.draw(st.sampled_from(DOCUMENTS))
    _look({key: as_json(data.draw(changed(document)))})


@given(data=st.data())
@fuzzed
def test_changed_bytes(data: st.DataObject) -> None:
    key, document = data.draw(st.sampled_from(DOCUMENTS))
    _look({key: data.draw(spliced(as_json(document)))})


@given(data=st.data())
@fuzzed
def test_changed_consolidated_documents(data: st.DataObject) -> None:
    documents = [document for key, document in DOCUMENTS if key == "zarr.json"]
    group = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {},
        "consolidated_metadata": {"kind": "inline", "metadata": {"a": documents[0], "b/c": documents[1]}},
    }
    store = {"zarr.json": as_json(data.draw(changed(group)))}
    for path in ("", "a", "b/c", "b"):
        with fine_or_refused(MOST_BYTES):
            list_arrays(store, path=path)
            open_array(store, path=path)


@pytest.mark.parametrize(
    ("zarr_format", "dtype"),
    [
        (2, "|S2147483647"),
        (2, "<U536870911"),
        (2, "|V2147483647"),
        (2, [["a", "<f4"], ["b", "|S900000000"]]),
        (2, [["a", "<f8", [10000, 10000]]]),
        (3, {"name": "null_terminated_bytes", "configuration": {"length_bytes": 2000000000}}),
        (3, {"name": "raw_bytes", "configuration": {"length_bytes": 2000000000}}),
        (3, {"name": "fixed_length_utf32", "configuration": {"length_bytes": 2000000000}}),
        (3, {"name": "structured", "configuration": {"fields": [["a", "int8"], ["b", "r16000000000"]]}}),
    ],
)
def test_elements_that_would_fill_the_memory(zarr_format: int, dtype: Any) -> None:
    key, document = next(pair for pair in DOCUMENTS if pair[1]["zarr_format"] == zarr_format)
    document = {**document, "dtype" if zarr_format == 2 else "data_type": dtype, "fill_value": None}
    with bounded(MOST_BYTES), pytest.raises(MetadataError, match="one element would take"):
        open_array({key: as_json(document)})


@pytest.mark.parametrize("depth", [500, 5_000, 200_000])
def test_documents_nested_without_end(depth: int) -> None:
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    for key, document in (DOCUMENTS[0], DOCUMENTS[6]):
        raw = as_json(
            {**document, "attributes": "HERE", "filters": None} | ({"order": "HERE"} if key == ".zarray" else {})
        )
        _look({key: raw.replace(b'"HERE"', deep)})
    _look({"zarr.json": b'{"zarr_format": 3, "node_type": "group", "consolidated_metadata": ' + deep + b"}"})
