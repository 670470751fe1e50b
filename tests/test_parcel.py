"""What a worker sends home arrives, or says why not."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import numpy as np
import pytest

from zarr_dask_stream.engine.events import BatchResult, Category, Failure
from zarr_dask_stream.engine.parcel import Parcel, pack_result, unpack_result
from zarr_dask_stream.errors import UsageError


class OnlyHereError(Exception):
    """Stands for a class of a package that the client has not installed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _refuse, ()


def _refuse() -> None:
    raise ImportError("no module named worker_only")


def there_and_back(result: BatchResult) -> BatchResult:
    return unpack_result(pickle.loads(pickle.dumps(pack_result(result))))


def test_arrays_travel_without_a_copy_of_theirs() -> None:
    big = np.arange(1 << 16)
    parcel = pack_result(BatchResult(numbers=[1], values=[big]))
    assert len(parcel.data) < 1000
    assert parcel.__sizeof__() > big.nbytes
    np.testing.assert_array_equal(unpack_result(parcel).values[0], big)


def test_errors_come_home_as_themselves() -> None:
    failure = Failure(3, Category.FUNCTION, "KeyError", "gone", error=KeyError("gone"))
    [again] = there_and_back(BatchResult(failures=[failure])).failures
    assert isinstance(again.error, KeyError)
    assert again.number == 3


@pytest.mark.parametrize("error", [OnlyHereError("x"), ValueError(threading.Lock())])
def test_an_error_that_cannot_travel_costs_nothing_but_itself(error: Exception) -> None:
    failure = Failure(3, Category.FUNCTION, type(error).__name__, "told in words", error=error)
    good = Failure(4, Category.TRANSIENT, "OSError", "reset", error=OSError("reset"))
    result = there_and_back(BatchResult(numbers=[7], values=[7.5], failures=[failure, good]))
    assert result.values == [7.5]
    assert [f.error is None for f in result.failures] == [True, False]
    assert result.failures[0].message == "told in words"


def test_a_partial_that_cannot_travel_fails_its_chunks() -> None:
    result = there_and_back(BatchResult(numbers=[1, 2], partial={(): threading.Lock()}))
    assert result.numbers == []
    assert [failure.number for failure in result.failures] == [1, 2]
    assert "can't be sent" in result.failures[0].message


def test_a_result_that_cannot_be_unpacked_is_a_clear_error() -> None:
    parcel = Parcel(b"not a pickle", [])
    with pytest.raises(UsageError, match="can't be unpacked on the client"):
        unpack_result(parcel)
