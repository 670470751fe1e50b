"""Batches: within their bounds, growing with what was measured, cut without losing a number."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
from zarr_dask_stream.engine.events import BatchStats
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan

stats = st.builds(
    BatchStats,
    wall_s=st.floats(0, 100),
    setup_s=st.floats(0, 100),
    bytes_result=st.integers(0, 10**12),
)


@given(
    st.lists(st.tuples(st.integers(0, 10_000), stats), max_size=12),
    st.integers(1, 10**6),
    st.none() | st.integers(0, 10**9),
    st.integers(0, 4000),
)
def test_a_size_is_within_its_bounds(
    history: list[tuple[int, BatchStats]], capacity: int, remaining: int | None, threads: int
) -> None:
    limits = BatchLimits(chunks=512)
    batcher = Batcher(limits)
    for chunks, measured in history:
        batcher.observe(chunks, measured)
    size = batcher.size(capacity=capacity, remaining=remaining, threads=threads)
    assert 1 <= size <= limits.chunks
    assert size == 1 or size * 2 * threads < capacity
    assert remaining is None or size <= max(remaining, 1)


@given(st.lists(st.integers(1, 600), min_size=1, max_size=20))
def test_a_size_grows_step_by_step(sizes: list[int]) -> None:
    batcher = Batcher(BatchLimits(growth=4))
    largest = 1
    for chunks in sizes:
        batcher.observe(chunks, BatchStats(wall_s=1e-6))
        largest = max(largest, chunks)
        assert batcher.size(capacity=10**9, remaining=None, threads=1) <= largest * 4


def test_nothing_is_known_at_first() -> None:
    assert Batcher(BatchLimits()).size(capacity=10**9, remaining=None, threads=1) == 1


def settled(cost_s: float, *, result: int = 0, limits: BatchLimits | None = None, threads: int = 1) -> int:
    """Size after so many rounds that it no longer changes."""
    batcher, size = Batcher(limits or BatchLimits()), 1
    for _ in range(60):
        batcher.observe(size, BatchStats(wall_s=cost_s * size, bytes_result=result * size))
        size = batcher.size(capacity=10**9, remaining=None, threads=threads)
    return size


def test_the_first_batches_can_be_larger() -> None:
    batcher = Batcher(BatchLimits(first=8))
    assert batcher.size(capacity=1000, remaining=None, threads=4) == 8
    assert batcher.size(capacity=1000, remaining=3, threads=4) <= 3
    batcher.observe(8, BatchStats(wall_s=1.0))
    assert batcher.size(capacity=1000, remaining=None, threads=4) == 2


def test_a_batch_aims_at_its_duration() -> None:
    assert settled(0.01, limits=BatchLimits(target_s=0.2)) in range(19, 21)
    assert settled(10.0) == 1
    assert settled(1e-9) == BatchLimits().chunks


def test_large_results_make_small_batches() -> None:
    assert settled(1e-6, result=2**20, limits=BatchLimits(result_bytes=8 * 2**20)) == 8


def test_many_threads_get_longer_batches() -> None:
    """A client makes one task after the other: a thousand threads must not each want one every 0.25 s."""
    assert settled(0.01, threads=1000) > 4 * settled(0.01, threads=4)


def test_the_tail_is_shared_out() -> None:
    batcher = Batcher(BatchLimits())
    for size in (1, 8, 64, 512):
        batcher.observe(size, BatchStats(wall_s=1e-3 * size))
    remaining, sizes = 1000, []
    while remaining:
        sizes.append(min(batcher.size(capacity=10**9, remaining=remaining, threads=4), remaining))
        remaining -= sizes[-1]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= 1000 / 8 + 1, "no thread gets so much of the rest that the others wait for it"
    assert min(sizes[:-1]) == 40, "nor so little that the task costs more than the work"


def test_a_rising_cost_is_followed_faster_than_a_falling_one() -> None:
    def after(first_s: float, then_s: float) -> int:
        batcher = Batcher(BatchLimits())
        for cost in (first_s, first_s, first_s, then_s):
            batcher.observe(1000, BatchStats(wall_s=1000 * cost))
        return batcher.size(capacity=10**9, remaining=None, threads=1)

    steady_cheap, steady_dear = after(1e-4, 1e-4), after(1e-2, 1e-2)
    assert after(1e-4, 1e-2) < steady_cheap / 10
    assert after(1e-2, 1e-4) < steady_dear * 2


def test_the_first_chunk_does_not_stand_for_the_many_that_follow() -> None:
    """It opens the store and compiles the codec: a batch of 32 quick ones knows better, and one is enough."""
    batcher = Batcher(BatchLimits(target_s=0.2))
    batcher.observe(1, BatchStats(wall_s=0.01))
    batcher.observe(32, BatchStats(wall_s=32e-4))
    assert batcher.size(capacity=10**9, remaining=None, threads=1) > 0.2 / 1e-3 / 2


def test_a_slow_chunk_in_a_small_batch_does_not_shrink_all_that_follow() -> None:
    batcher = Batcher(BatchLimits())
    for _ in range(4):
        batcher.observe(1000, BatchStats(wall_s=0.1))
    before = batcher.size(capacity=10**9, remaining=None, threads=1)
    batcher.observe(32, BatchStats(wall_s=1.0))
    assert batcher.size(capacity=10**9, remaining=None, threads=1) > before / 4


# -- the cutter -------------------------------------------------------------------------------------

runs = st.lists(st.builds(range, st.integers(0, 50), st.integers(0, 80), st.integers(1, 4)), max_size=8)


@given(runs, st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_cuts_cover_the_runs_exactly(runs: list[range], sizes: list[int]) -> None:
    cutter = Cutter(iter(runs))
    numbers = list(itertools.chain(*runs))
    out: list[int] = []
    for size in itertools.cycle(sizes):
        if cutter.exhausted:
            break
        cut = cutter.cut(size)
        assert all(cut)
        assert sum(map(len, cut)) == min(size, len(numbers) - len(out))
        out += itertools.chain(*cut)
    assert out == numbers
    assert cutter.cut(5) == ()
    assert cutter.rest() == 0


@given(runs, st.integers(0, 60))
def test_the_rest_is_what_was_not_cut(runs: list[range], size: int) -> None:
    cutter = Cutter(runs)
    cut = cutter.cut(size)
    assert cutter.rest() == sum(map(len, runs)) - sum(map(len, cut))
    assert cutter.exhausted


def test_runs_are_drawn_only_as_needed() -> None:
    drawn = itertools.count()

    def endless() -> itertools.chain[range]:
        return itertools.chain.from_iterable([range(next(drawn) * 10, 10**9)] for _ in itertools.count())

    cutter = Cutter(endless())
    assert cutter.cut(25) == (range(25),)
    assert next(drawn) == 1


def test_what_a_predicate_finds_first_does_not_wait_for_a_full_batch() -> None:
    plan = ChunkPlan(ChunkGrid((10**9,), (1,)), (slice(0, 10**9),), lambda index: index[0] in {3, 5})
    cutter = Cutter(plan.runs())
    assert cutter.cut(1000) == (range(3, 6, 2),)


def test_leaving_early_under_a_predicate_asks_a_bounded_number_of_times() -> None:
    asked: list[tuple[int, ...]] = []

    def where(index: tuple[int, ...]) -> bool:
        asked.append(index)
        return True

    plan = ChunkPlan(ChunkGrid((10**9,), (1,)), (slice(0, 10**9),), where)
    cutter = Cutter(plan.runs())
    cutter.cut(1)
    assert cutter.rest() > 10**6
    assert len(asked) < 3 * 10**6


@given(
    st.lists(st.tuples(st.integers(0, 10_000), stats), max_size=12),
    st.integers(1, 10**4),
    st.none() | st.integers(0, 10**9),
    st.integers(1, 40),
    st.integers(1, 600),
)
def test_a_size_is_a_multiple_of_its_unit_where_that_fits(
    history: list[tuple[int, BatchStats]], capacity: int, remaining: int | None, threads: int, unit: int
) -> None:
    batcher = Batcher(BatchLimits(chunks=512, unit=unit))
    for chunks, measured in history:
        batcher.observe(chunks, measured)
    size = batcher.size(capacity=capacity, remaining=remaining, threads=threads)
    assert 1 <= size <= capacity
    assert size % unit == 0 or size == capacity < unit
    assert size <= max(512, unit)


def test_the_head_is_what_is_cut_next() -> None:
    cutter = Cutter([range(0), range(4, 6), range(0), range(9, 10)])
    heads = []
    while (head := cutter.head) is not None:
        heads.append(head)
        assert cutter.cut(1)[0][0] == head
    assert heads == [4, 5, 9]


def test_a_search_is_made_in_stretches() -> None:
    cutter = Cutter(itertools.chain([range(3, 5)], [range(0)] * 1000, [range(7, 8)]))
    assert (cutter.searching, cutter.exhausted, cutter.searching) == (True, False, False)
    assert cutter.cut(10) == (range(3, 5),)
    looks = 0
    while cutter.searching:
        assert not cutter.exhausted
        assert cutter.head in {4, 7}, "until it is found, what was cut last stands for it"
        looks += 1
    assert 10 < looks < 100
    assert cutter.cut(10) == (range(7, 8),)
    assert (cutter.exhausted, cutter.searching, cutter.head) == (True, False, None)
