"""Chains of codecs that zarr-python would undo for us: those that nothing would bound are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from zarr_dask_stream.errors import MetadataError
from zarr_dask_stream.source.inflate import COMPRESSORS
from zarr_dask_stream.source.metadata import brief, codecs_inside

__all__ = ["VARYING", "refuse_unbounded"]

#: Codecs whose data begin with the number of elements, for which the library makes room before it looks further.
VARYING = frozenset({"vlen-utf8", "vlen-bytes", "vlen-array"})
#: How many times as wide as the array's own elements those of a filter may be, and as long as it came what all filters
#: make of a chunk: one of those in use takes single bits or bytes for numbers.
_WIDER = 64


def refuse_unbounded(document: Mapping[str, Any], itemsize: int, where: str, *, counted: bool) -> None:
    """Refuse what is left of a chain, where nothing would bound the memory that it takes.

    Parameters
    ----------
    document : mapping
        The array's metadata, with the codecs that are left to zarr-python.
    itemsize : int
        Bytes of one element of the array.
    where : str
        The array, for the message.
    counted : bool
        Whether the last codec begins with the number of elements, which is compared before it is undone.

    Raises
    ------
    MetadataError
        If there is a compressor, or a codec of varying length, that others stand before; or filters that make the data
        many times as long.

    Examples
    --------
    >>> refuse_unbounded({"zarr_format": 2, "filters": [{"id": "delta", "dtype": "<i4"}]}, 4, "a.zarr", counted=False)
    >>> refuse_unbounded({"zarr_format": 2, "filters": [{"id": "zstd"}, {"id": "delta"}]}, 4, "a.zarr", counted=False)
    Traceback (most recent call last):
    ...
    zarr_dask_stream.errors.MetadataError: a.zarr: codec 'zstd' stands behind one that can't be undone here, in a \
chain of ['zstd', 'delta'], so that nothing would bound what comes out of it; rewrite the array with another chain
    """
    left = list(_left(document))
    names = [name for name, _ in left]
    behind = names[:-1] if counted else names
    for name in behind:
        if name in COMPRESSORS or name in VARYING:
            raise MetadataError(
                f"{where}: codec {brief(name)} stands behind one that can't be undone here, in a chain of "
                f"{brief(names)}, so that nothing would bound what comes out of it; rewrite the array with another "
                "chain"
            )
    for name, settings in left:
        for option in ("dtype", "astype", "encode_dtype", "decode_dtype"):
            width = _width(settings.get(option))
            if width > _WIDER * itemsize:
                raise MetadataError(
                    f"{where}: codec {brief(name)} makes elements of {width:,} bytes out of such of {itemsize:,}; the "
                    "metadata are damaged, or the array must be rewritten with another chain"
                )
    if math.prod(_growth(name, settings) for name, settings in left) > _WIDER:
        raise MetadataError(
            f"{where}: filters {brief(names)} would make more than {_WIDER} bytes of each one; the metadata are "
            "damaged, or the array must be rewritten with another chain"
        )


def _left(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Walk names and settings of the codecs, in the order of encoding."""
    if document["zarr_format"] == 2:
        for codec in (*(document.get("filters") or ()), document.get("compressor")):
            if codec:
                yield str(codec["id"]), codec
    else:
        for codec in codecs_inside(document["codecs"]):
            yield str(codec["name"]).removeprefix("numcodecs."), codec.get("configuration") or {}


def _growth(name: str, settings: Mapping[str, Any]) -> float:
    """Return how many bytes a filter makes of one when it is undone, at least one."""
    if name == "packbits":
        return 8.0
    decoded = _width(settings.get("decode_dtype" if name == "astype" else "dtype"))
    encoded = _width(settings.get("encode_dtype" if name == "astype" else "astype"))
    return max(decoded / encoded, 1.0) if decoded and encoded else 1.0


def _width(dtype: Any) -> int:
    try:
        return 0 if dtype is None else np.dtype(dtype).itemsize
    except (TypeError, ValueError, SyntaxError):  # zarr-python will say what is wrong with it
        return 0
