"""What a new array takes over from another one: dtype, fill value, codecs, names, across the formats.

The result are the options that ``zarr.create_array`` takes. What a format does not know is put as the other one
has it: dimension names are a field in version 3 and xarray's attribute in version 2.
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numcodecs
import numpy as np
from zarr.abc.codec import ArrayArrayCodec, ArrayBytesCodec, BytesBytesCodec
from zarr.codecs import BloscCodec, GzipCodec, TransposeCodec, ZstdCodec

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import ArraySpec, zarr_array
from zarr_dask_stream.source.grid import Index

__all__ = ["CREATE_OPTIONS", "complete_options"]

#: What a caller may say of a new array, in zarr's words.
CREATE_OPTIONS = (
    "attributes", "chunk_key_encoding", "chunks", "compressors", "config", "dimension_names", "dtype", "fill_value",
    "filters", "order", "serializer", "shards", "zarr_format",
)  # fmt: skip
_XARRAY_NAMES = "_ARRAY_DIMENSIONS"
_SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")


def complete_options(
    spec: ArraySpec,
    given: Mapping[str, Any],
    *,
    shape: Index,
    dtype: np.dtype[Any],
    chunks: Index | None,
    keep_attributes: bool,
) -> dict[str, Any]:
    """Complete what a caller says of a new array with what another one is like.

    Parameters
    ----------
    spec : ArraySpec
        The array to be like.
    given : mapping
        Options of ``zarr.create_array`` that were given; they stand.
    shape : tuple of int
        Shape of the new array.
    dtype : numpy.dtype
        What it holds, unless `given` says so.
    chunks : tuple of int or None
        Chunk shape where `given` names neither chunks nor shards; None for that of `spec`, with its shards.
    keep_attributes : bool
        Whether user attributes are taken over.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.source.array import open_array
    >>> old = zarr.create_array({}, shape=(9,), chunks=(3,), dtype="i2", fill_value=-1, zarr_format=2)
    >>> options = complete_options(
    ...     open_array(old), {"zarr_format": 3}, shape=(6,), dtype=old.dtype, chunks=None, keep_attributes=True
    ... )
    >>> options["chunks"], options["fill_value"], options["compressors"]
    ((3,), np.int16(-1), [ZstdCodec(level=0, checksum=False)])
    """
    version = given.get("zarr_format") or spec.zarr_format
    try:
        dtype = np.dtype(given["dtype"]) if given.get("dtype") is not None else dtype
    except TypeError as error:
        raise UsageError(f"dtype is what NumPy takes for one, got {given['dtype']!r}") from error
    same = dtype.newbyteorder("=") == spec.dtype if dtype.kind != "T" else spec.dtype.kind == "T"
    options: dict[str, Any] = {"shape": shape, "zarr_format": version, "dtype": _dtype(spec, dtype, version, same=same)}
    options |= _partition(spec, given, chunks, version)
    options |= _fill_value(spec, dtype, version, same=same)
    options |= _codecs(spec, dtype, version, same=same)
    options |= _names(spec, version, keep_attributes=keep_attributes)
    if keep_attributes and same and version != spec.zarr_format:
        options |= _mask(spec, options["attributes"], version)
    if version == spec.zarr_format:
        options |= _keys(spec)
    named = {name: value for name, value in given.items() if name != "dtype" or value is not None}
    return {**options, **named, "zarr_format": version, "dtype": options["dtype"]}


def _dtype(spec: ArraySpec, dtype: np.dtype[Any], version: int, *, same: bool) -> Any:
    if same and spec.dtype.kind in "OT":
        array, _ = zarr_array(json.loads(spec.metadata), spec.zarr_format)
        # Only zarr's own description tells text of varying length from other objects.
        return getattr(array.metadata, "data_type", None) or array.metadata.dtype
    if same and version == 2 and spec.zarr_format == 2:
        return spec.stored_dtype
    return dtype


def _partition(spec: ArraySpec, given: Mapping[str, Any], chunks: Index | None, version: int) -> dict[str, Any]:
    if "chunks" in given:
        return {"shards": None}
    if chunks is not None:
        return {"chunks": chunks, "shards": None}
    return {"chunks": spec.chunks, "shards": spec.shards if version == 3 else None}


def _fill_value(spec: ArraySpec, dtype: np.dtype[Any], version: int, *, same: bool) -> dict[str, Any]:
    if same:
        known = spec.fill_value is not None or version == 3
        return {"fill_value": spec.fill[()] if known else None}
    fill = spec.fill
    with contextlib.suppress(ValueError, TypeError, OverflowError), np.errstate(all="ignore"):
        cast = fill.astype(dtype)
        if spec.fill_value is not None and (cast == fill or (cast != cast and fill != fill)):  # noqa: PLR0124  # NaN
            return {"fill_value": cast[()]}
    return {}


def _keys(spec: ArraySpec) -> dict[str, Any]:
    document = json.loads(spec.metadata)
    if spec.zarr_format == 2:
        separator = document.get("dimension_separator", ".")
        return {"chunk_key_encoding": {"name": "v2", "separator": separator}, "order": document.get("order", "C")}
    encoding = document.get("chunk_key_encoding")
    return {"chunk_key_encoding": encoding} if isinstance(encoding, dict) else {}


def _names(spec: ArraySpec, version: int, *, keep_attributes: bool) -> dict[str, Any]:
    attributes = dict(spec.attributes) if keep_attributes else {}
    if version == spec.zarr_format:
        named = {"dimension_names": spec.dimension_names} if version == 3 and spec.dimension_names else {}
        if version == 2 and _XARRAY_NAMES in spec.attributes:
            attributes[_XARRAY_NAMES] = spec.attributes[_XARRAY_NAMES]
        return {"attributes": attributes, **named}
    names = spec.dimension_names
    attributes.pop(_XARRAY_NAMES, None)
    if version == 3:
        return {"attributes": attributes, **({"dimension_names": names} if names else {})}
    if names and all(name is not None for name in names):
        attributes[_XARRAY_NAMES] = list(names)
    return {"attributes": attributes}


def _mask(spec: ArraySpec, attributes: dict[str, Any], version: int) -> dict[str, Any]:
    """Keep what xarray takes for missing: in version 2 the fill value itself, in version 3 an attribute."""
    if not spec.dimension_names:
        return {}
    if version == 3:
        coded = None if spec.fill_value is None else _coded(spec.fill)
        return {} if coded is None else {"attributes": {**attributes, "_FillValue": coded}}
    if "_FillValue" not in attributes:
        # Without a value for what is not stored, zeros are read, and nothing is masked.
        return {"fill_value": None} if not spec.fill.dtype.hasobject and spec.fill == spec.fill.dtype.type() else {}
    fill = _decoded(attributes["_FillValue"], spec.dtype)
    if fill is None:
        return {}
    without = {name: value for name, value in attributes.items() if name != "_FillValue"}
    return {"attributes": without, "fill_value": fill}


def _decoded(coded: Any, dtype: np.dtype[Any]) -> Any:
    """Read a fill value as xarray writes it into attributes of version 3; None where it is something else."""
    with contextlib.suppress(TypeError, ValueError, struct.error, OverflowError):
        if dtype.kind == "f" and isinstance(coded, str):
            return dtype.type(struct.unpack("<d", base64.standard_b64decode(coded))[0])
        if dtype.kind in "iub" and isinstance(coded, int):
            return dtype.type(coded)
        if dtype.kind == "U" and isinstance(coded, str):
            return coded
    return None


def _coded(fill: Any) -> Any:
    """Write a fill value as xarray writes it into attributes of version 3; None where it does not."""
    kind, value = fill.dtype.kind, fill[()]
    if kind == "b":
        return bool(value)
    if kind in "iu":
        return int(value)
    if kind == "f":
        return base64.standard_b64encode(struct.pack("<d", float(value))).decode()
    if kind == "U":
        return str(value)
    return None


# -- codecs ---------------------------------------------------------------------------------------


def _codecs(spec: ArraySpec, dtype: np.dtype[Any], version: int, *, same: bool) -> dict[str, Any]:
    document = json.loads(spec.metadata)
    if spec.zarr_format == 2:
        return _from_v2(document, dtype, version, same=same)
    chain = _chain(document)
    outer = [codec for codec in chain if isinstance(codec, BytesBytesCodec)]
    if version == 2:
        found = [_to_v2(codec) for codec in outer] or [()]  # what is stored as it is stays so
        return {"compressors": found[0]} if len(found) == 1 and found[0] is not None else {}
    filters = [c for c in chain if isinstance(c, ArrayArrayCodec) and (same or isinstance(c, TransposeCodec))]
    options: dict[str, Any] = {"filters": filters, "compressors": [_fitted(codec, dtype) for codec in outer]}
    serializers = [codec for codec in chain if isinstance(codec, ArrayBytesCodec)]
    return options | ({"serializer": serializers[0]} if same and serializers else {})


def _chain(document: Mapping[str, Any]) -> Sequence[Any]:
    """Return the codecs of one chunk as zarr-python has them; those inside the shards where there are any."""
    array, _ = zarr_array(document, 3)
    codecs: Sequence[Any] = array.metadata.codecs
    inner = getattr(codecs[0], "codecs", None) if len(codecs) == 1 else None
    return codecs if inner is None else inner


def _fitted(codec: Any, dtype: np.dtype[Any]) -> Any:
    """Set a codec to elements of another size, where it cares."""
    if not isinstance(codec, BloscCodec) or dtype.itemsize == 0 or dtype.kind in "OT":
        return codec
    return BloscCodec(
        cname=codec.cname,
        clevel=codec.clevel,
        shuffle=codec.shuffle,
        blocksize=codec.blocksize,
        typesize=min(dtype.itemsize, 255),
    )


def _from_v2(document: Mapping[str, Any], dtype: np.dtype[Any], version: int, *, same: bool) -> dict[str, Any]:
    compressor = document.get("compressor")
    if version == 3:
        found = _to_v3(compressor, dtype) if compressor else []
        return {} if found is None else {"compressors": found}
    options: dict[str, Any] = {"compressors": numcodecs.get_codec(dict(compressor)) if compressor else None}
    filters = [numcodecs.get_codec(dict(f)) for f in document.get("filters") or ()]
    varying = any(f.codec_id.startswith("vlen-") or f.codec_id in {"json2", "pickle"} for f in filters)
    # A filter is made for one dtype; that of varying length comes with the dtype.
    return options | ({"filters": filters or None} if same and not varying else {})


def _to_v3(compressor: Mapping[str, Any], dtype: np.dtype[Any]) -> list[Any] | None:
    """Return the codec of version 3 that does the same as one of version 2; None where the format has none."""
    kind = compressor.get("id")
    if kind == "zstd":
        return [ZstdCodec(level=compressor.get("level", 0), checksum=bool(compressor.get("checksum", False)))]
    if kind == "gzip":
        return [GzipCodec(level=compressor.get("level", 1))]
    if kind == "blosc":
        number = compressor.get("shuffle", 1)
        shuffle: Any = _SHUFFLES[number] if 0 <= number < len(_SHUFFLES) else None  # None: by the size of an element
        return [
            BloscCodec(
                cname=compressor.get("cname", "lz4"),
                clevel=compressor.get("clevel", 5),
                shuffle=shuffle,
                blocksize=compressor.get("blocksize", 0),
                typesize=min(dtype.itemsize, 255) or 1,
            )
        ]
    return None


def _word(option: Any) -> str:
    """Return an option of a codec as text; some releases of zarr have members of enums there."""
    return str(getattr(option, "value", option))


def _to_v2(codec: Any) -> Any:
    """Return the compressor of version 2 that does the same as a codec of version 3, or None."""
    if isinstance(codec, ZstdCodec):
        return numcodecs.Zstd(level=codec.level, checksum=codec.checksum)
    if isinstance(codec, GzipCodec):
        return numcodecs.GZip(level=codec.level)
    if isinstance(codec, BloscCodec):
        shuffle = _SHUFFLES.index(_word(codec.shuffle))
        name = _word(codec.cname)
        return numcodecs.Blosc(cname=name, clevel=codec.clevel, shuffle=shuffle, blocksize=codec.blocksize)
    return None
