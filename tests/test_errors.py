"""The exception tree: whose fault it is, and that nothing is lost on the way between processes."""

from __future__ import annotations

import copy
import inspect
import pickle

import cloudpickle
import pytest

from zarr_dask_stream import errors

PLAIN = [
    cls
    for _, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.ZdsError) and cls is not errors.ChunkError
]


def test_all_lists_the_whole_tree() -> None:
    assert sorted(errors.__all__) == sorted([*(cls.__name__ for cls in PLAIN), "ChunkError"])


@pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling(cls: type[errors.ZdsError], protocol: int) -> None:
    error = cls("one sentence")
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is cls
    assert str(back) == "one sentence"
    assert back.args == error.args


@pytest.mark.parametrize("cls", PLAIN, ids=lambda cls: cls.__name__)
def test_errors_have_text_without_arguments(cls: type[errors.ZdsError]) -> None:
    assert str(cls()) == ""


def test_a_chunk_error_keeps_its_place() -> None:
    error = errors.ChunkError("it failed", index=(1, 2), attempts=3)
    for back in (pickle.loads(pickle.dumps(error)), cloudpickle.loads(cloudpickle.dumps(error)), copy.copy(error)):
        assert (str(back), back.index, back.attempts) == ("it failed", (1, 2), 3)


def test_builtin_handlers_catch_what_they_should() -> None:
    with pytest.raises(ValueError, match="region"):
        raise errors.UsageError("region")
    with pytest.raises(FileNotFoundError, match="no store"):
        raise errors.StoreNotFoundError("no store")
    assert issubclass(errors.MissingChunkError, errors.StoreError)
    assert not issubclass(errors.ClusterError, errors.StoreError)
    assert not issubclass(errors.MissingChunkError, FileNotFoundError)
