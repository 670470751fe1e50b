"""What a new array takes over from another one, within a format and across."""

from __future__ import annotations

import base64
import struct
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, GzipCodec, TransposeCodec, ZstdCodec

from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.target import find_place, new_target
from zarr_dask_stream.source.template import complete_options

#: The same codec in version 2 and in version 3.
PAIRS: list[tuple[Any, Any]] = [
    (None, ()),
    (numcodecs.Zstd(3), (ZstdCodec(level=3),)),
    (numcodecs.GZip(2), (GzipCodec(level=2),)),
    (numcodecs.Blosc("zstd", 7, 2), (BloscCodec(cname="zstd", clevel=7, shuffle="bitshuffle", typesize=4),)),
    (numcodecs.Blosc("lz4", 1, 0), (BloscCodec(cname="lz4", clevel=1, shuffle="noshuffle", typesize=4),)),
]


def like(spec: ArraySpec, given: Any = None, **changes: Any) -> Any:
    """Make an array that is like another one, and open it."""
    settings = {"shape": spec.shape, "dtype": spec.dtype, "chunks": None, "keep_attributes": True, **changes}
    store: dict[str, Any] = {}
    new_target(find_place(store), complete_options(spec, given or {}, **settings)).create()
    return zarr.open_array(store)


def made(**options: Any) -> ArraySpec:
    return open_array(zarr.create_array({}, **{"shape": (9, 8), "chunks": (3, 2), "dtype": "f4", **options}))


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=repr)
def test_compressors_have_their_like_in_the_other_format(old: Any, new: Any) -> None:
    there = like(made(zarr_format=2, compressors=old), {"zarr_format": 3})
    assert there.compressors == new
    back = like(open_array(there), {"zarr_format": 2})
    assert back.compressors == (() if old is None else (old,))


@pytest.mark.parametrize("codec", [numcodecs.LZ4(), numcodecs.BZ2()])
def test_one_that_has_none_gives_way_to_zarrs_own(codec: Any) -> None:
    assert like(made(zarr_format=2, compressors=codec), {"zarr_format": 3}).compressors == (ZstdCodec(level=0),)


def test_filters_go_with_their_dtype() -> None:
    spec = made(zarr_format=2, dtype="i4", filters=[numcodecs.Delta("<i4")])
    assert like(spec).filters == (numcodecs.Delta("<i4"),)
    assert like(spec, dtype=np.dtype("f8")).filters == ()
    assert like(spec, {"zarr_format": 3}).filters == ()
    turned = made(filters=[TransposeCodec(order=(1, 0))])
    assert like(turned, dtype=np.dtype("f8")).filters == (TransposeCodec(order=(1, 0)),)


def test_blosc_is_set_to_the_size_of_elements() -> None:
    spec = made(compressors=BloscCodec(cname="lz4", shuffle="shuffle"))
    (codec,) = like(spec, dtype=np.dtype("f8")).compressors
    assert (codec.typesize, getattr(codec.cname, "value", codec.cname)) == (8, "lz4")


@pytest.mark.parametrize(("dtype", "kept"), [("f8", -9.5), ("i4", 0), ("f4", -9.5)])
def test_a_fill_value_is_kept_where_the_dtype_can_hold_it(dtype: str, kept: Any) -> None:
    assert like(made(fill_value=-9.5), dtype=np.dtype(dtype)).fill_value == kept


def test_byte_order_is_kept_in_version_2() -> None:
    spec = made(zarr_format=2, dtype=">f4")
    assert like(spec).dtype == np.dtype(">f4")
    assert like(spec).metadata == like(spec, dtype=np.dtype("f4")).metadata


def test_names_of_axes_go_where_the_format_has_them() -> None:
    new = like(made(zarr_format=2, attributes={"_ARRAY_DIMENSIONS": ["y", "x"], "a": 1}), {"zarr_format": 3})
    assert new.metadata.dimension_names == ("y", "x")
    assert set(new.attrs) == {"a", "_FillValue"}
    old = like(open_array(new), {"zarr_format": 2})
    assert dict(old.attrs) == {"_ARRAY_DIMENSIONS": ["y", "x"], "a": 1}


@pytest.mark.parametrize(
    ("dtype", "fill", "coded"),
    [
        ("f4", -9999.0, base64.standard_b64encode(struct.pack("<d", -9999.0)).decode()),
        ("i2", 7, 7),
        ("bool", True, True),
    ],
)
def test_what_xarray_takes_for_missing(dtype: str, fill: Any, coded: Any) -> None:
    names = {"_ARRAY_DIMENSIONS": ["y", "x"]}
    new = like(made(zarr_format=2, dtype=dtype, fill_value=fill, attributes=names), {"zarr_format": 3})
    assert new.attrs["_FillValue"] == coded
    back = like(open_array(new), {"zarr_format": 2})
    assert back.fill_value == fill
    assert "_FillValue" not in back.attrs
    # In version 3 nothing is masked without the attribute; in version 2 nothing is without a fill value.
    plain = like(made(dtype=dtype, dimension_names=["y", "x"]), {"zarr_format": 2})
    assert plain.fill_value is None


def test_attributes_stay_at_home_where_that_is_asked() -> None:
    assert dict(like(made(attributes={"a": 1}), keep_attributes=False).attrs) == {}


@pytest.mark.parametrize(
    ("given", "chunks", "found"),
    [
        ({}, None, ((3, 2), (6, 8))),
        ({"chunks": (9, 9)}, None, ((9, 9), None)),
        ({"shards": (3, 4)}, None, ((3, 2), (3, 4))),
        ({"shards": None}, None, ((3, 2), None)),
        ({}, (5, 5), ((5, 5), None)),
        ({"zarr_format": 2}, None, ((3, 2), None)),
    ],
)
def test_chunks_and_shards(given: Any, chunks: Any, found: Any) -> None:
    new = like(made(shards=(6, 8)), given, chunks=chunks)
    assert (new.chunks, new.shards) == found
