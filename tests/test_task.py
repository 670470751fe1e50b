"""What runs on a worker, run here: outcomes chunk by chunk, whatever the functions and the store do."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import zarr

from zarr_dask_stream.engine import task
from zarr_dask_stream.engine.events import BatchResult, Category
from zarr_dask_stream.engine.parcel import pack_result, unpack_result
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.task import Work, run_batch, run_guarded, zombies
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.selection import parse_region
from zarr_dask_stream.stages.batch import Batch, BatchRule, MapBatch
from zarr_dask_stream.stages.combine import Fold, Reducer, Together
from zarr_dask_stream.stages.transform import Filter, Map
from zarr_dask_stream.testing import Fault, FaultyStore

N = 12


@pytest.fixture
def store() -> FaultyStore:
    """Hold twelve chunks of two numbers, of which the last is not stored."""
    store = FaultyStore({})
    array = zarr.create_array(store, shape=(2 * N,), chunks=(2,), dtype="i4", fill_value=-1)
    array[: 2 * N - 2] = np.arange(2 * N - 2)
    return store


def work_of(store: Any, *, region: Any = None, **options: Any) -> Work:
    spec = open_array(store)
    return Work(spec=spec, box=parse_region(region, spec.shape), **options)


def run(work: Work, *numbers: int, guarded: bool = False) -> BatchResult:
    ranges = tuple(range(n, n + 1) for n in (numbers or range(N)))
    result = (run_guarded if guarded else run_batch)(work, ranges, worker="tester")
    outcomes = [*result.numbers, *result.filtered, *result.skipped, *result.unattempted]
    outcomes += [failure.number for failure in result.failures]
    assert sorted(outcomes) == sorted(numbers or range(N)), "each chunk has one outcome"
    return result


def map_of(fn: Callable[[Chunk], Any]) -> dict[str, Any]:
    return {"stages": (Map(fn),)}


def raises(error: BaseException, at: int = 3) -> Callable[[Chunk], Any]:
    def fn(chunk: Chunk) -> Any:
        if chunk.number == at:
            raise error
        return chunk.number

    return fn


@pytest.fixture(params=[False, True], ids=["plain", "guarded"])
def guarded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# -- outcomes ---------------------------------------------------------------------------------------


def test_values_come_with_their_numbers(store: FaultyStore, guarded: bool) -> None:
    result = run(work_of(store), guarded=guarded)
    assert dict(zip(result.numbers, (v.tolist() for v in result.values), strict=True)) == {
        n: ([2 * n, 2 * n + 1] if n < N - 1 else [-1, -1]) for n in range(N)
    }
    assert result.missing == {N - 1}
    stats = result.stats
    assert (stats.worker, stats.bytes_decoded, stats.bytes_result) == ("tester", 8 * N, 8 * N)
    assert stats.bytes_stored > 0
    assert stats.fetch_s + stats.decode_s > 0
    assert 0 < stats.wall_s < 10
    assert sum(stats.latency.values()) == N


def test_map_and_filter_run_in_their_order(store: FaultyStore, guarded: bool) -> None:
    stages = (Filter(lambda c: c.index[0] % 2 == 0), Map(lambda c: int(c.data.sum())), Filter(lambda c: c.data > 10))
    result = run(work_of(store, stages=stages), guarded=guarded)
    assert dict(zip(result.numbers, result.values, strict=True)) == {n: 4 * n + 1 for n in range(4, N, 2)}
    assert sorted(result.filtered) == [0, 1, 2, 3, 5, 7, 9, 11]


def test_chunks_are_cropped_to_the_region(store: FaultyStore) -> None:
    result = run(work_of(store, region=slice(3, 6)), 1, 2)
    assert [value.tolist() for value in result.values] == [[3], [4, 5]]


@pytest.mark.parametrize("rule", ["skip", "raise"])
def test_missing_chunks(store: FaultyStore, rule: Any, guarded: bool) -> None:
    result = run(work_of(store, missing=rule), guarded=guarded)
    assert len(result.numbers) == N - 1
    if rule == "skip":
        assert result.skipped == [N - 1]
        return
    [failure] = result.failures
    assert failure.category is Category.MISSING
    assert "(11,)" in failure.message


def test_a_run_for_its_effects_sends_no_values(store: FaultyStore) -> None:
    seen: list[Any] = []
    result = run(work_of(store, discard=True, **map_of(lambda c: seen.append(c.number))))
    assert result.values == ()
    assert sorted(seen) == result.numbers == list(range(N))


def test_a_bad_read_takes_no_neighbour_along(store: FaultyStore, guarded: bool) -> None:
    store.break_reads({"c/3": ConnectionError("reset"), "c/5": Fault(keep=2), "c/7": PermissionError("no")})
    result = run(work_of(store), guarded=guarded)
    assert {f.number: f.category for f in result.failures} == {
        3: Category.TRANSIENT,
        5: Category.CORRUPT,
        7: Category.PERMANENT,
    }
    assert all(f.worker == "tester" for f in result.failures)


def test_a_store_that_is_gone_fails_each_chunk(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    work = work_of(store)

    def gone(*args: Any, **kwargs: Any) -> Iterator[Any]:
        if args:
            raise OSError(errno.EIO, "disk gone")
        yield

    monkeypatch.setattr(task, "read_chunks", gone)
    result = run(work)
    assert len(result.failures) == N
    assert {f.category for f in result.failures} == {Category.TRANSIENT}


def test_an_array_that_is_another_one_here_is_not_visible() -> None:
    contents: dict[str, Any] = {}
    zarr.create_array(contents, shape=(4,), chunks=(2,), dtype="i4")
    work = work_of(contents)
    zarr.create_array(contents, shape=(4,), chunks=(1,), dtype="i4", overwrite=True)
    result = run(work, 0, 1)
    assert [f.category for f in result.failures] == [Category.NOT_VISIBLE] * 2


# -- functions that fail ----------------------------------------------------------------------------


class Unpicklable(Exception):  # noqa: N818  # it stands for a class of a user
    def __init__(self) -> None:
        super().__init__("held")
        self.lock = threading.Lock()


class NeedsTwo(Exception):  # noqa: N818  # a name of the user's own
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Mute(Exception):  # noqa: N818  # a name of the user's own
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "message", "travels"),
    [
        (ValueError("bad"), "bad", True),
        (SystemExit(3), "3", True),
        (asyncio.CancelledError(), "CancelledError", True),
        (GeneratorExit(), "GeneratorExit", True),
        (StopIteration(), "StopIteration", True),
        (Unpicklable(), "held", False),
        (NeedsTwo(1, 2), "1 and 2", False),
        (Mute(), "Mute", True),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "",
)
def test_whatever_a_function_raises_fails_its_chunk_alone(
    store: FaultyStore, guarded: bool, error: BaseException, message: str, travels: bool
) -> None:
    result = run(work_of(store, **map_of(raises(error))), guarded=guarded)
    [failure] = result.failures
    assert (failure.number, failure.category, failure.message) == (3, Category.FUNCTION, message)
    assert failure.error_type == type(error).__name__
    assert (failure.error is not None) is travels
    assert not failure.retryable
    assert "fn" in failure.traceback
    back = unpack_result(pack_result(result))
    assert [f.message for f in back.failures] == [message]


def test_the_policy_says_which_errors_of_functions_to_try_again(store: FaultyStore) -> None:
    again = work_of(store, retry=RetryPolicy(on=KeyError), **map_of(raises(KeyError("k"))))
    assert run(again).failures[0].retryable

    def broken(error: BaseException) -> bool:
        raise RuntimeError("the predicate itself")

    final = work_of(store, retry=RetryPolicy(on=broken), **map_of(raises(KeyError("k"))))
    [failure] = run(final).failures
    assert (failure.error_type, failure.retryable) == ("KeyError", False)


def test_ctrl_c_is_not_an_outcome(store: FaultyStore) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_batch(work_of(store, **map_of(raises(KeyboardInterrupt()))), (range(N),))


def test_a_batch_that_is_called_back_ends_between_two_chunks(store: FaultyStore) -> None:
    work = work_of(store, **map_of(lambda _: time.sleep(0.06)))
    result = run_batch(work, (range(N),), cancelled=lambda: True)
    done = len(result.numbers)
    assert 1 <= done < 6
    assert len(result.unattempted) == N - done


# -- reductions -------------------------------------------------------------------------------------


class Sum(Reducer):
    """Adds up in place, in two steps, so that a failure between them leaves a trace."""

    def __init__(self, add_fails: int | None = None, merge_fails: int | None = None) -> None:
        self.add_fails, self.merge_fails = add_fails, merge_fails

    def create(self) -> list[int]:
        return [0, 0]

    def add(self, partial: list[int], chunk: Chunk) -> list[int]:
        partial[0] += chunk.index[0]
        if chunk.index[0] == self.add_fails:
            raise ArithmeticError("half of it is in")
        partial[1] += 1
        return partial

    def merge(self, left: list[int], right: list[int]) -> list[int]:
        left[0] += right[0]
        if right[0] == self.merge_fails:
            raise ArithmeticError("half of it is merged")
        left[1] += right[1]
        return left


def fold_all(work: Work, *, guarded: bool = False) -> tuple[dict[Any, Any], list[int]]:
    """Run until nothing is left to try; merge partials as the client would."""
    assert work.fold is not None
    partials: dict[Any, Any] = {}
    dead: list[int] = []
    left = list(range(N))
    for _ in range(N):
        result = run(work, *left, guarded=guarded)
        dead += [f.number for f in result.failures]
        for key, partial in (result.partial or {}).items():
            partials[key] = work.fold.reducer.merge(partials[key], partial) if key in partials else partial
        left = result.unattempted
        if not left:
            break
    assert not left
    return partials, sorted(dead)


def test_a_fold_travels_as_one_partial_for_each_key(store: FaultyStore, guarded: bool) -> None:
    work = work_of(store, fold=Fold(Sum(), key=lambda index: index[0] % 3))
    result = run(work, guarded=guarded)
    assert result.values == ()
    assert result.partial == {0: [18, 4], 1: [22, 4], 2: [26, 4]}


@pytest.mark.parametrize("add_fails", range(N))
def test_a_fold_that_raises_half_way_counts_nothing_twice(store: FaultyStore, add_fails: int) -> None:
    partials, dead = fold_all(work_of(store, fold=Fold(Sum(add_fails=add_fails))))
    assert dead == [add_fails]
    assert partials == {(): [sum(range(N)) - add_fails, N - 1]}


def test_a_merge_that_raises_half_way_counts_nothing_twice(store: FaultyStore) -> None:
    work = work_of(store, fold=Fold(Sum(add_fails=2, merge_fails=7)))
    partials, dead = fold_all(work)
    assert dead == [2, 7]
    assert partials == {(): [sum(range(N)) - 9, N - 2]}


def test_two_reducers_stay_in_step_when_one_fails(store: FaultyStore) -> None:
    work = work_of(store, fold=Fold(Together({"good": Sum(), "bad": Sum(add_fails=5)})))
    partials, dead = fold_all(work)
    assert dead == [5]
    assert partials[()]["good"] == partials[()]["bad"] == [sum(range(N)) - 5, N - 1]


def test_a_key_that_fails_fails_its_chunk(store: FaultyStore) -> None:
    partials, dead = fold_all(work_of(store, fold=Fold(Sum(), key=lambda index: 1 // (index[0] - 4))))
    assert dead == [4]
    assert sum(partial[1] for partial in partials.values()) == N - 1


def test_a_batch_that_folds_nothing_brings_no_partial(store: FaultyStore) -> None:
    result = run(work_of(store, fold=Fold(Sum()), stages=(Filter(lambda _: False),)))
    assert result.partial is None
    assert len(result.filtered) == N


# -- functions of many chunks -----------------------------------------------------------------------


def many_of(fn: Callable[[Batch], Any], size: int = 5) -> dict[str, Any]:
    return {"stages": (MapBatch(fn, BatchRule(size=size)),)}


def test_a_function_of_many_is_called_with_batches(store: FaultyStore, guarded: bool) -> None:
    seen: list[tuple[int, str]] = []

    def many(batch: Batch) -> Any:
        seen.append((len(batch), batch.trigger))
        return np.stack([chunk.data for chunk in batch]).sum(axis=1)

    result = run(work_of(store, **many_of(many)), guarded=guarded)
    assert dict(zip(result.numbers, map(int, result.values), strict=True)) == {
        n: 4 * n + 1 if n < N - 1 else -2 for n in range(N)
    }
    assert seen == [(5, "size"), (5, "size"), (2, "end")]
    assert result.missing == {N - 1}


def test_of_a_batch_that_fails_only_the_chunk_to_blame_does(store: FaultyStore, guarded: bool) -> None:
    def many(batch: Batch) -> list[int]:
        return [100 // (4 - (chunk.number or 0)) for chunk in batch]

    result = run(work_of(store, **many_of(many)), guarded=guarded)
    assert [(f.number, f.error_type, f.category) for f in result.failures] == [
        (4, "ZeroDivisionError", Category.FUNCTION)
    ]
    assert len(result.numbers) == N - 1
    assert "many" in result.failures[0].traceback


def test_chunks_that_can_not_be_read_are_in_no_batch(store: FaultyStore) -> None:
    store.break_reads({"c/2": ConnectionResetError("gone")})
    result = run(work_of(store, **many_of(lambda batch: [len(batch)] * len(batch), size=20)))
    assert [failure.number for failure in result.failures] == [2]
    assert set(map(int, result.values)) == {N - 1}


def test_a_batch_that_is_cut_short_leaves_what_waited_untried(store: FaultyStore) -> None:
    slow = (Map(lambda _: time.sleep(0.03)), MapBatch(list, BatchRule(size=100)))
    result = run_batch(work_of(store, stages=slow), (range(N),), cancelled=lambda: True)
    assert result.numbers == []
    assert result.unattempted == list(range(N))


# -- functions that hang ----------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    monkeypatch.setattr(task, "_GRACE_S", 0.05)
    event = threading.Event()
    yield event
    event.set()
    deadline = time.monotonic() + 5
    while zombies() and time.monotonic() < deadline:
        time.sleep(0.01)


def hangs(gate: threading.Event, at: int = 3) -> Callable[[Chunk], Any]:
    def fn(chunk: Chunk) -> Any:
        if chunk.number == at:
            gate.wait(30)
            raise ValueError("too late")
        return chunk.number

    return fn


def test_a_hung_function_is_named_and_left_behind(store: FaultyStore, gate: threading.Event) -> None:
    before = zombies()
    began = time.monotonic()
    result = run(work_of(store, timeout=0.2, **map_of(hangs(gate))), guarded=True)
    assert time.monotonic() - began < 5
    [failure] = result.failures
    assert (failure.number, failure.category, failure.error_type) == (3, Category.TIMEOUT, "TimeoutError")
    assert "0.2 s" in failure.message
    assert sorted([*result.numbers, *result.unattempted]) == [n for n in range(N) if n != 3]
    assert zombies() == before + 1 == result.stats.zombies
    assert result.stats.wall_s < 0.2, "the hang is not what a chunk costs"


def test_what_a_left_behind_thread_still_does_changes_nothing(store: FaultyStore, gate: threading.Event) -> None:
    result = run(work_of(store, timeout=0.1, **map_of(hangs(gate))), guarded=True)
    before = dataclasses.replace(result, numbers=list(result.numbers), failures=list(result.failures))
    gate.set()
    deadline = time.monotonic() + 5
    while zombies() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (result.numbers, result.failures) == (before.numbers, before.failures)
    assert len(result.values) == len(result.numbers)


def test_a_hung_fold_loses_and_doubles_nothing(store: FaultyStore, gate: threading.Event) -> None:
    class Stuck(Sum):
        def add(self, partial: list[int], chunk: Chunk) -> list[int]:
            if chunk.index[0] == 6:
                partial[0] += 1000
                gate.wait(30)
            return super().add(partial, chunk)

    partials, dead = fold_all(work_of(store, timeout=0.1, fold=Fold(Stuck())), guarded=True)
    assert dead == [6]
    assert partials == {(): [sum(range(N)) - 6, N - 1]}


def test_reading_and_stages_have_a_timeout_each(store: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_GRACE_S", 0.1)
    store.break_reads({"c/2": Fault(delay_s=0.4)})
    result = run(work_of(store, timeout=0.5, **map_of(lambda _: time.sleep(0.4))), 2, guarded=True)
    assert result.numbers == [2]


def test_when_a_call_for_many_hangs_each_is_to_be_tried_alone(store: FaultyStore, gate: threading.Event) -> None:
    def many(batch: Batch) -> list[int]:
        if any(chunk.number == 5 for chunk in batch):
            gate.wait(60)
        return [chunk.number or 0 for chunk in batch]

    work = work_of(store, timeout=0.2, stages=(MapBatch(many, BatchRule(size=4)),))
    result = run_guarded(work, (range(N),))
    assert result.numbers == [0, 1, 2, 3], "a batch before it is not lost"
    assert result.apart == [4, 5, 6, 7]
    assert result.unattempted == [8, 9, 10, 11]
    assert result.failures == [], "nobody is blamed for being in its company"
    alone = run_guarded(work, (range(5, 6),))
    assert [(failure.number, failure.category) for failure in alone.failures] == [(5, Category.TIMEOUT)]
    assert "a stage function took longer" in alone.failures[0].message
    assert run_guarded(work, (range(6, 7),)).numbers == [6]


@pytest.mark.parametrize("fold", [None, Fold(Together({}))])
def test_what_hangs_after_a_call_for_many_is_the_one_chunk(
    store: FaultyStore, gate: threading.Event, fold: Fold | None
) -> None:
    stages = (MapBatch(list, BatchRule(size=100)), Map(hangs(gate)))
    result = run_guarded(work_of(store, timeout=0.2, stages=stages, fold=fold), (range(6),))
    assert [(failure.number, failure.category) for failure in result.failures] == [(3, Category.TIMEOUT)]
    assert result.apart == []
    assert sorted([*result.numbers, *result.unattempted]) == [0, 1, 2, 4, 5]


@pytest.mark.parametrize("timeout", [None, 1e12, float("inf")])
def test_any_timeout_can_be_waited_for(store: FaultyStore, timeout: float | None) -> None:
    assert run(work_of(store, timeout=timeout), guarded=True).numbers == list(range(N))


# -- packing ----------------------------------------------------------------------------------------


class Celsius(np.float64):
    pass


@pytest.mark.parametrize(
    "values",
    [
        [np.float32(1.5), np.float32("nan")],
        [np.int64(1), np.int64(2)],
        [np.bool_(True), np.bool_(False)],
        [np.complex64(1 + 2j)] * 2,
        [np.datetime64("2020-01-02", "D"), np.datetime64("NaT", "D")],
        [np.timedelta64(5, "ms")] * 2,
        [np.float16(0.1)] * 3,
        [np.float32(1), np.float64(2)],
        [np.datetime64("2020-01-02", "D"), np.datetime64("2020-01-02", "s")],
        [np.bytes_(b"a\0"), np.bytes_(b"b\0")],
        [np.str_("a\0"), np.str_("b\0")],
        [np.array((1, 2.0), dtype=[("a", "i4"), ("b", "f8")])[()]] * 2,
        [Celsius(3), Celsius(4)],
        [1, 2.5, "three", None],
        [np.float32(1), None],
        [(np.int8(1), "x"), (np.int8(2), "y")],
        [],
    ],
    ids=str,
)
def test_packed_values_are_what_they_were(values: list[Any]) -> None:
    packed, nbytes = task._pack(list(values))
    assert nbytes >= 0
    back = list(packed)
    assert [type(value) for value in back] == [type(value) for value in values]
    assert [getattr(value, "dtype", None) for value in back] == [getattr(value, "dtype", None) for value in values]
    for value, expected in zip(back, values, strict=True):
        assert value == expected or value != value  # noqa: PLR0124  # NaN and NaT


def test_many_scalars_travel_as_one_buffer() -> None:
    packed, nbytes = task._pack([np.float64(n) for n in range(1000)])
    assert isinstance(packed, np.ndarray)
    assert nbytes == 8000


class Liar:
    nbytes = "many"


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [
        (np.zeros(1000), 8000),
        (b"x" * 500, 500),
        ((np.zeros(10), np.zeros(20)), 64 + 240),
        ({"a": np.zeros(10), "b": b"12"}, 64 + 82),
        ([np.zeros(1)] * 1000, 64 + 8000),
        (Liar(), 64),
        (None, 64),
    ],
    ids=lambda x: type(x).__name__,
)
def test_sizes_are_guessed_from_within(value: Any, nbytes: int) -> None:
    assert task._pack([value] * 3)[1] == 3 * nbytes
