"""Partial results as plain JSON, and back: how a ledger keeps them.

Nothing is ever pickled or evaluated: values are rebuilt from JSON of known kinds, arrays from their bytes.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from zarr_dask_stream.errors import StoreError, UsageError

__all__ = ["decode_value", "encode_value", "shortened"]


def encode_value(value: Any) -> Any:
    """Turn a partial into plain JSON: numbers, text, lists, dicts, tuples, sets, bytes, NumPy values.

    Raises
    ------
    UsageError
        If it holds anything else; a ledger never contains pickles.

    Examples
    --------
    >>> decode_value(encode_value({(0, 1): [np.float32(1.5), float("nan")]}))
    {(0, 1): [np.float32(1.5), nan]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode_array(value)
    if isinstance(value, int):
        return value if -(2**53) < value < 2**53 else {"int": str(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list):
        return [encode_value(one) for one in value]
    if type(value) in (tuple, set, frozenset):
        return {type(value).__name__: [encode_value(one) for one in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode_value(k), encode_value(v)] for k, v in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    raise UsageError(
        f"a checkpointed reduction keeps its partials as JSON, and {type(value).__name__} has no place there: "
        "use numbers, text, lists, tuples, dicts, sets, bytes and NumPy arrays"
    )


def _encode_array(value: np.ndarray[Any, Any] | np.generic) -> Any:
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise UsageError(f"a checkpointed partial can't hold arrays of {array.dtype}")
    raw = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    kind = "scalar" if isinstance(value, np.generic) else "array"
    dtype = array.dtype.descr if array.dtype.names else array.dtype.str
    return {kind: [dtype, list(array.shape), raw]}


def decode_value(value: Any) -> Any:
    """Rebuild what `encode_value` wrote; raises StoreError for anything else."""
    if isinstance(value, list):
        return [decode_value(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise StoreError("the ledger holds a value of an unknown kind")
    ((kind, content),) = value.items()
    decode = _DECODERS.get(kind)
    if decode is None:
        raise StoreError(f"the ledger holds a value of an unknown kind: {shortened(kind)}")
    try:
        return decode(content)
    except _UNREADABLE as error:
        raise StoreError(f"the ledger holds a damaged value of kind {kind!r}: {shortened(error)}") from error


#: What is raised by the functions below for anything but what `encode_value` wrote.
_UNREADABLE = (
    ArithmeticError, AttributeError, binascii.Error, LookupError, MemoryError, RecursionError, SyntaxError, TypeError,
    ValueError,
)  # fmt: skip


def shortened(said: Any) -> str:
    """Return something out of a file as a piece of a sentence: it may be of any length."""
    text = str(said) if isinstance(said, Exception) else repr(said)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _decode_array(content: Any) -> Any:
    dtype, shape, raw = content
    kind = np.dtype([tuple(one) for one in dtype] if isinstance(dtype, list) else str(dtype))
    if kind.hasobject:
        raise ValueError("arrays of objects are not read from a ledger")
    return np.frombuffer(base64.b64decode(raw, validate=True), kind).reshape(shape).copy()


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "complex": lambda c: complex(float(c[0]), float(c[1])),
    "bytes": lambda c: base64.b64decode(c, validate=True),
    "tuple": lambda c: tuple(decode_value(one) for one in c),
    "set": lambda c: {decode_value(one) for one in c},
    "frozenset": lambda c: frozenset(decode_value(one) for one in c),
    "dict": lambda c: {decode_value(k): decode_value(v) for k, v in c},
    "array": _decode_array,
    "scalar": lambda c: _decode_array(c)[()],
}
