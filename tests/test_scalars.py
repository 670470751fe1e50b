"""Numbers as callers give them: whatever is none is refused with a sentence, and NumPy's are as good as Python's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zarr

import zarr_dask_stream as zds
from zarr_dask_stream import reducers
from zarr_dask_stream.scalars import as_real, as_whole

NEITHER = [np.array([1, 2]), int, True, "3", float("nan"), ..., [1, 2, 3]]


def stream(**options: Any) -> zds.ChunkStream:
    array = zarr.create_array({}, shape=(8, 6), chunks=(2, 3), dtype="f4", fill_value=1)
    return zds.stream_chunks(array, concurrency=options.pop("concurrency", 1), **options)


COUNTS: dict[str, Callable[[Any], Any]] = {
    "concurrency": lambda n: stream(concurrency=n),
    "requests": lambda n: stream(requests=n),
    "take": lambda n: stream().take(n),
    "batch": lambda n: stream().batch(size=n),
    "map_batch": lambda n: stream().map_batch(list, size=n),
    "share": lambda n: stream().share(n),
    "ask": lambda n: stream().producer().ask(n),
    "rechunk": lambda n: stream().rechunk((n, None)),
    "halo": lambda n: stream().halo(n),
    "window size": lambda n: stream().window(along=0, size=n),
    "window axis": lambda n: stream().window(along=n, size=2),
    "window every": lambda n: stream().window(every=n),
    "map chunks": lambda n: stream().map(np.asarray, chunks=(n, None)),
    "slices axis": lambda n: zds.stream_slices(stream().spec, n),
    "slices start": lambda n: zds.stream_slices(stream().spec, 0, start=n),
    "loader": lambda n: zds.Loader(stream(), batch_size=n),
    "loader axis": lambda n: zds.Loader(stream(), batch_size=2, axis=n),
    "attempts": lambda n: zds.RetryPolicy(attempts=n),
    "every_chunks": lambda n: zds.Checkpoint(url="ledger", every_chunks=n),
    "write": lambda n: zds.write_chunks({}, [((n, 0), np.ones((2, 3)))], shape=(8, 6), chunks=(2, 3), dtype="f8"),
}


@pytest.mark.parametrize("what", COUNTS)
@pytest.mark.parametrize("given", [*NEITHER, 1.5], ids=repr)
def test_what_only_looks_like_a_count_is_refused(what: str, given: Any) -> None:
    with pytest.raises(zds.UsageError, match=r".{20}"):
        COUNTS[what](given)


AMOUNTS: dict[str, Callable[[Any], Any]] = {
    "quantile": lambda x: zds.Hedge(quantile=x),
    "factor": lambda x: zds.Hedge(factor=x),
    "min_s": lambda x: zds.Hedge(min_s=x),
    "budget": lambda x: zds.Hedge(budget=x),
    "timeout": lambda x: stream(timeout=x),
    "wait_max": lambda x: zds.RetryPolicy(wait_max=x),
    "rate": lambda x: zds.RateLimit(requests=x),
    "every_s": lambda x: zds.Checkpoint(url="ledger", every_s=x),
    "window seconds": lambda x: stream().window(seconds=x),
    "batch seconds": lambda x: stream().batch(seconds=x),
}


@pytest.mark.parametrize("what", AMOUNTS)
@pytest.mark.parametrize("given", [*NEITHER, "", 1j, -1], ids=repr)
def test_what_only_looks_like_an_amount_is_refused(what: str, given: Any) -> None:
    with pytest.raises(zds.UsageError, match=r".{20}"):
        AMOUNTS[what](given)


@pytest.mark.parametrize("given", ["no", None, 0, np.array([1, 2]), []], ids=repr)
def test_a_switch_of_a_reducer_is_true_or_false(given: Any) -> None:
    """Any text counts as true: skipna="no" was taken for yes."""
    for name in ("sum", "mean", "argmax", "quantile", "moments"):
        with pytest.raises(zds.UsageError, match="skipna is True or False"):
            getattr(reducers, name)(**({"q": 0.5} if name == "quantile" else {}), skipna=given)
    assert reducers.sum(skipna=np.False_).skipna is False  # type: ignore[arg-type]  # as it comes out of a comparison


@pytest.mark.parametrize("given", ["", " ", [], "x", True, 1.5, float("nan")], ids=repr)
def test_a_budget_of_memory_is_a_size(given: Any) -> None:
    """Dask takes no text at all for one byte."""
    with pytest.raises(zds.UsageError, match="max_bytes is bytes"):
        stream(max_bytes=given)


@pytest.mark.parametrize("word", ["missing", "on_error", "ordered", "progress"])
@pytest.mark.parametrize("given", [np.array([1, 2]), [], ..., 1.5], ids=repr)
def test_a_choice_is_one_of_its_words(word: str, given: Any) -> None:
    with pytest.raises(zds.UsageError, match=f"{word} must be"):
        stream(**{word: given})


def test_numbers_of_numpy_are_numbers() -> None:
    policy = zds.RetryPolicy(attempts=np.int64(3), wait_max=np.float32(2.0), budget=np.uint8(7))  # type: ignore[arg-type]  # callers need not be typed
    assert (type(policy.attempts), type(policy.wait_max), type(policy.budget)) == (int, float, int)
    assert zds.RateLimit(requests=np.int32(20)).requests == 20  # type: ignore[arg-type]  # callers need not be typed
    assert len(list(stream(timeout=np.float32(9.0), retry=policy).take(np.int16(3)))) == 3  # type: ignore[arg-type]  # callers need not be typed
    assert (as_whole(10**30), as_real(10**400), as_real(np.float64("nan"))) == (10**30, None, None)


WRONG: list[tuple[str, Any]] = [
    ("overwrite", "no"), ("overwrite", 1), ("verify", np.array([1, 2])), ("verify", "write"), ("dtype", "nonsense"),
    ("dtype", np.array([1, 2])), ("dtype", 1.5), ("attributes", "x"), ("attributes", [1]), ("config", "x"),
    ("order", "x"), ("order", np.array([1, 2])), ("zarr_format", np.array([1, 2])), ("zarr_format", "3"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given"), WRONG, ids=repr)
def test_options_of_targets(name: str, given: Any) -> None:
    """overwrite="no" was taken for yes, which costs somebody an array."""
    target: dict[str, Any] = {}
    with pytest.raises(zds.UsageError, match=f"^{name} is "):
        stream().to_zarr(target, **{name: given})
    if name != "dtype":
        made = {"shape": (4,), "chunks": (2,), "dtype": "f4", name: given}
        with pytest.raises((zds.UsageError, TypeError), match=name):
            zds.write_chunks(target, [], **made)
    assert not target


def test_words_that_are_arrays() -> None:
    with pytest.raises(zds.UsageError, match="how"):
        stream().share(2, np.array([1, 2]))  # type: ignore[arg-type]
    with pytest.raises(zds.UsageError, match="boundary"):
        stream().halo(1, np.array([1, 2, 3]))
