"""What makes a stream this one and no other: its array, options, functions and reducers, as a digest."""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["fingerprint", "identity"]


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Digest of what makes a stream: array, region, predicate, stages."""
    text = json.dumps(identity(dict(parts)), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


def identity(part: Any, _within: tuple[int, ...] = ()) -> Any:
    """Describe a stage, function or reducer so that the same code gives the same description.

    Functions are told apart by module, name, byte code, constants and what they close over; objects
    by class and attributes. Plain data, to be hashed into a plan's fingerprint.
    """
    if part is None or isinstance(part, (bool, int, float, str, bytes, complex)):
        return repr(part)
    if id(part) in _within:
        return "itself"
    within = (*_within, id(part))
    if isinstance(part, types.FunctionType):
        cells = [_cell(cell, within) for cell in part.__closure__ or ()]
        defaults = identity(part.__defaults__, within)
        return [part.__module__, part.__qualname__, _code(part.__code__), cells, defaults]
    if isinstance(part, types.MethodType):
        return [identity(part.__func__, within), identity(part.__self__, within)]
    if isinstance(part, type):
        return [part.__module__, part.__qualname__]
    if isinstance(part, (np.ndarray, np.generic)):
        array = np.asarray(part)
        raw = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        return [str(array.dtype), array.shape, hashlib.sha256(raw).hexdigest()]
    if isinstance(part, (list, tuple)):
        return [identity(one, within) for one in part]
    if isinstance(part, (set, frozenset)):
        return sorted(repr(identity(one, within)) for one in part)
    if isinstance(part, Mapping):
        return [[identity(k, within), identity(v, within)] for k, v in part.items()]
    name = [type(part).__module__, type(part).__qualname__]
    return [name, [[key, identity(value, within)] for key, value in _state(part).items()]]


def _state(part: Any) -> dict[str, Any]:
    """Return the attributes of an object, wherever it keeps them."""
    if isinstance(part, functools.partial):
        return {"func": part.func, "args": part.args, "keywords": part.keywords}
    slots = [s for kind in type(part).__mro__ for s in getattr(kind, "__slots__", ()) if hasattr(part, s)]
    own = {**getattr(part, "__dict__", {}), **{slot: getattr(part, slot) for slot in slots}}
    # What it has worked out meanwhile and kept does not make it another one.
    return {k: v for k, v in own.items() if not isinstance(getattr(type(part), k, None), functools.cached_property)}


def _cell(cell: Any, within: tuple[int, ...]) -> Any:
    try:
        return identity(cell.cell_contents, within)
    except ValueError:
        return "empty"


def _code(code: types.CodeType) -> Any:
    constants = [_code(c) if isinstance(c, types.CodeType) else identity(c) for c in code.co_consts]
    return [hashlib.sha256(code.co_code).hexdigest(), list(code.co_names), constants]
