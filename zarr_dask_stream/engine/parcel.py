"""The way home of a batch's result: packed and unpacked by us, so that what refuses is an error with a name.

A cluster asks for ever for a result that can't be packed on the worker or unpacked on the client. Here
the first is the failure of the chunk it belongs to, and the second ends the stream with a clear error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import pickle
from typing import Any, SupportsIndex

import cloudpickle

from zarr_dask_stream.engine.events import BatchResult, Category, Failure
from zarr_dask_stream.errors import UsageError

__all__ = ["Parcel", "pack_result", "unpack_result"]

_PROTOCOL = 5  # the first that leaves large buffers where they are


class Parcel:
    """A packed result: the pickle, and the memory of its arrays beside it.

    Parameters
    ----------
    data : bytes
        The pickle.
    buffers : list
        Memory of arrays, not copied on packing.
    errors : list of bytes
        The exceptions of failed chunks, each packed for itself: one whose class only the worker knows
        loses its class on the way home, and costs nothing else.
    """

    __slots__ = ("buffers", "data", "errors")

    def __init__(self, data: bytes, buffers: list[Any], errors: list[bytes] | None = None) -> None:
        self.data, self.buffers, self.errors = data, buffers, errors or []

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # Results that come home through Dask's scheduler are packed by a protocol that knows no buffers.
        outside = operator.index(protocol) >= _PROTOCOL
        buffers = self.buffers if outside else [_copied(buffer) for buffer in self.buffers]
        return Parcel, (self.data, buffers, self.errors)

    def __sizeof__(self) -> int:
        # What a cluster takes for the memory it needs on the worker.
        return len(self.data) + sum(memoryview(buffer).nbytes for buffer in self.buffers)


def _copied(buffer: Any) -> bytes | bytearray:
    raw = pickle.PickleBuffer(buffer).raw()
    return bytes(raw) if raw.readonly else bytearray(raw)


def pack_result(result: BatchResult) -> Parcel:
    """Pack a result; a chunk whose value refuses becomes a failed chunk in it.

    Examples
    --------
    >>> import threading
    >>> packed = pack_result(BatchResult(numbers=[3, 4], values=["good", threading.Lock()]))
    >>> result = unpack_result(packed)
    >>> result.numbers, result.values, result.failures[0].number, result.failures[0].message
    ([3], ['good'], 4, "its result can't be sent to the client: cannot pickle '_thread.lock' object")
    """
    errors = _take_errors_out(result)
    try:
        parcel = _dumps(result)
    except Exception:  # noqa: BLE001  # a user's object may refuse in any way
        _leave_out_what_refuses(result)
        parcel = _dumps(result)
    parcel.errors = errors
    return parcel


def unpack_result(parcel: Parcel) -> BatchResult:
    """Unpack a result.

    Raises
    ------
    UsageError
        If a value in it refuses.
    """
    try:
        result = pickle.loads(parcel.data, buffers=parcel.buffers)  # noqa: S301  # from our own worker, as all of Dask
    except Exception as error:
        raise UsageError(
            f"a result of the stream's functions can't be unpacked on the client ({type(error).__name__}: {error}): "
            "return arrays, numbers and other plain data, or objects whose module can be imported here"
        ) from error
    assert isinstance(result, BatchResult)
    for at, packed in enumerate(parcel.errors):
        with contextlib.suppress(Exception):  # the failure's own words are still there
            carried = pickle.loads(packed)  # noqa: S301  # as above
            result.failures[at] = dataclasses.replace(result.failures[at], error=carried)
    return result


def _take_errors_out(result: BatchResult) -> list[bytes]:
    errors = []
    for at, failure in enumerate(result.failures):
        try:
            errors.append(cloudpickle.dumps(failure.error, _PROTOCOL))
        except Exception:  # noqa: BLE001  # a user's exception may refuse in any way
            errors.append(cloudpickle.dumps(None, _PROTOCOL))
        result.failures[at] = dataclasses.replace(failure, error=None)
    return errors


def _dumps(value: Any) -> Parcel:
    """Pickle by the fast way, or by value what only the program that runs the stream knows."""
    buffers: list[Any] = []
    try:
        data = pickle.dumps(value, _PROTOCOL, buffer_callback=buffers.append)
        if b"__main__" not in data:
            return Parcel(data, buffers)
    except Exception:  # noqa: BLE001, S110  # the second way says what is wrong
        pass
    buffers.clear()
    return Parcel(cloudpickle.dumps(value, _PROTOCOL, buffer_callback=buffers.append), buffers)


def _leave_out_what_refuses(result: BatchResult) -> None:
    if problem := _refusal(result.partial):
        problems = dict.fromkeys(result.numbers, problem)
        result.partial, result.numbers = None, []
    else:
        found = [(n, value, _refusal(value)) for n, value in zip(result.numbers, result.values, strict=False)]
        problems = {n: problem for n, _, problem in found if problem}
        result.values = [value for _, value, problem in found if not problem]
        result.numbers = [n for n in result.numbers if n not in problems]
    result.failures += [
        Failure(
            number,
            Category.FUNCTION,
            type(problem).__name__,
            f"its result can't be sent to the client: {problem}",
            worker=result.stats.worker,
        )
        for number, problem in problems.items()
    ]
    result.missing -= problems.keys()


def _refusal(value: Any) -> Exception | None:
    """Return what packing this value raises, or None."""
    try:
        _dumps(value)
    except Exception as error:  # noqa: BLE001  # a user's object may refuse in any way
        return error
    return None
