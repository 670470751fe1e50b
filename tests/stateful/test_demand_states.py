"""Consumers that ask, take, give up and leave in any order: never more is submitted than was asked for."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
from zarr_dask_stream.engine.dispatch import Broadcast, Dispatch, OnDemand, Partition
from zarr_dask_stream.engine.events import Batch, BatchDone, BatchResult, Category, Failure, Input, Threads, Tick
from zarr_dask_stream.engine.instructions import Instruction, Notify, Submit
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.window import Window, WindowLimits
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan, parse_region
from zarr_dask_stream.watch.report import Report

NBYTES = 10
KEYS = 4
GOOD, FILTERED, AGAIN = "good", "filtered", "again"


def dispatch_of(how: str, consumers: int) -> Dispatch:
    if how == "partition":
        return Partition(consumers, lambda index: index[0] % KEYS)
    return Broadcast(consumers) if how == "broadcast" else OnDemand(consumers)


class Scene:
    """A machine and a dispatch as a driver puts them together, in no time and with no cluster."""

    def __init__(
        self, how: str, consumers: int, chunks: int, window: int | None, *, ordered: bool, threads: int
    ) -> None:
        grid = ChunkGrid((chunks,), (1,))
        self.plan = ChunkPlan(grid, parse_region(None, grid.shape))
        self.dispatch = dispatch_of(how, consumers)
        self.machine = Supervisor(
            self.plan,
            Cutter(self.plan.runs()),
            Window(WindowLimits(chunks=window, nbytes=10**6)),
            Batcher(BatchLimits()),
            RetryPolicy(wait_initial=0.0, attempts=3, breaker=None),
            chunk_nbytes=NBYTES,
            total=chunks,
            ordered=ordered,
            rng=random.Random(0),
        )
        self.report = Report()
        self.now = 0.0
        self.out: dict[int, Batch] = {}
        self.submitted: set[int] = set()
        self.put: list[int] = []
        self.got: dict[int, list[int]] = {who: [] for who in range(consumers)}
        self.asked = Counter[int]()
        self.tell()
        self.feed(Threads(threads, 1))

    def feed(self, event: Input) -> None:
        self.follow(self.machine.handle(event, self.now))
        while (item := self.machine.take(hold=True)) is not None:
            self.put.append(item.number)
            self.dispatch.put(Chunk.planned(self.plan, item.number, item.value))

    def follow(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Notify):
                self.report.handle(instruction.notice)
            elif isinstance(instruction, Submit):
                for batch in instruction.batches:
                    self.out[batch.id] = batch
                    self.note([n for run in batch.ranges for n in run])

    def note(self, numbers: list[int]) -> None:
        if not self.submitted.issuperset(numbers):
            self.submitted.update(numbers)
            assert self.machine.demand is not None
            assert self.machine.in_flight <= self.machine.demand - self.machine.counts.emitted, "nobody asked for this"

    def tell(self) -> None:
        self.machine.hand_out(self.dispatch.left())
        self.machine.demand = self.dispatch.demand

    def ask(self, who: int, count: int) -> None:
        self.asked[who] += count
        self.dispatch.ask(who, count)
        self.tell()
        if self.machine.hungry:
            self.feed(Tick())

    def outstanding(self, who: int) -> int:
        return self.asked[who] - len(self.got[who])

    def take(self, who: int, most: int) -> list[Chunk]:
        chunks = self.dispatch.take(who, min(most, max(self.outstanding(who), 0)))
        self.got[who] += [chunk.index[0] for chunk in chunks]
        self.tell()
        if self.machine.hungry:
            self.feed(Tick())
        return chunks

    def answer(self, which: int, outcomes: list[str]) -> None:
        keys = list(self.out)
        batch = self.out.pop(keys[which % len(keys)])
        result = BatchResult()
        for position, number in enumerate(n for run in batch.ranges for n in run):
            outcome = outcomes[position % len(outcomes)]
            if outcome == GOOD:
                result.numbers.append(number)
            elif outcome == FILTERED:
                result.filtered.append(number)
            else:
                result.failures.append(Failure(number, Category.TRANSIENT, "OSError", "scripted"))
        result.values = list(result.numbers)
        self.now += 1.0
        self.feed(BatchDone(batch.id, result))


class DemandStates(RuleBasedStateMachine):
    """Anything in any order."""

    @initialize(
        how=st.sampled_from(["demand", "partition", "broadcast"]),
        consumers=st.integers(1, 4),
        chunks=st.integers(0, 80),
        window=st.none() | st.integers(1, 20),
        ordered=st.booleans(),
        threads=st.integers(1, 4),
    )
    def begin(self, *, how: str, consumers: int, chunks: int, window: int | None, ordered: bool, threads: int) -> None:
        self.how, self.ordered = how, ordered
        self.scene = Scene(how, consumers, chunks, window, ordered=ordered, threads=threads)
        self.left: set[int] = set()
        self.owner: dict[int, int] = {}

    def who(self, who: int) -> int:
        return who % len(self.scene.got)

    @rule(who=st.integers(0, 3), count=st.integers(1, 12))
    def somebody_asks(self, who: int, count: int) -> None:
        if self.who(who) not in self.left:
            self.scene.ask(self.who(who), count)

    @rule(who=st.integers(0, 3), count=st.integers(1, 12))
    def somebody_gives_up(self, who: int, count: int) -> None:
        who = self.who(who)
        if who not in self.left:
            self.scene.ask(who, -min(count, max(self.scene.outstanding(who), 0)))

    @rule(who=st.integers(0, 3), count=st.integers(1, 12))
    def somebody_takes(self, who: int, count: int) -> None:
        who = self.who(who)
        chunks = self.scene.take(who, count)
        assert not (chunks and who in self.left)
        if self.how == "partition":
            for chunk in chunks:
                assert self.owner.setdefault(chunk.index[0] % KEYS, who) == who, "a key has one consumer"

    @precondition(lambda self: self.how == "demand")
    @rule(who=st.integers(0, 3), count=st.integers(1, 12))
    def somebody_can_not_use_what_it_took(self, who: int, count: int) -> None:
        who = self.who(who)
        chunks = self.scene.take(who, count)
        if chunks:
            del self.scene.got[who][-len(chunks) :]
            self.scene.asked[who] -= len(chunks)
            self.scene.dispatch.give_back(who, chunks)
            self.scene.tell()

    @precondition(lambda self: self.scene.out)
    @rule(which=st.integers(0, 50), outcomes=st.lists(st.sampled_from([GOOD, GOOD, FILTERED, AGAIN]), min_size=1))
    def a_batch_comes_back(self, which: int, outcomes: list[str]) -> None:
        self.scene.answer(which, outcomes)

    @rule(who=st.integers(0, 3))
    def somebody_leaves(self, who: int) -> None:
        who = self.who(who)
        if len(self.left) + 1 < len(self.scene.got):
            self.left.add(who)
            self.owner = {key: owner for key, owner in self.owner.items() if owner != who}
            self.scene.dispatch.leave(who)
            self.scene.tell()

    @invariant()
    def what_is_held_is_in_flight(self) -> None:
        if not hasattr(self, "scene"):
            return
        self.scene.machine.check()
        held = self.scene.machine._held
        returned = sum(not in_flight for _, in_flight in getattr(self.scene.dispatch, "_shared", ()))
        assert held == len(self.scene.dispatch) - returned

    @invariant()
    def each_item_goes_where_it_should(self) -> None:
        if not hasattr(self, "scene"):
            return
        got, put = self.scene.got, self.scene.put
        if self.how == "broadcast":
            assert all(numbers == put[: len(numbers)] for numbers in got.values())
            return
        everything = [number for numbers in got.values() for number in numbers]
        assert len(everything) == len(set(everything))
        assert set(everything) <= set(put)
        if self.ordered and not self.left and self.how == "partition":
            assert all(numbers == sorted(numbers) for numbers in got.values())

    def teardown(self) -> None:
        if not hasattr(self, "scene"):
            return
        scene = self.scene
        scene.follow(scene.machine.finish("stopped early", scene.now))
        report = scene.report
        ends = report.emitted + report.filtered + report.skipped_missing + report.dead_lettered + report.cancelled
        assert report.total == ends == len(scene.plan)


TestDemandStates = DemandStates.TestCase
TestDemandStates.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@settings(deadline=None, max_examples=40)
@given(
    how=st.sampled_from(["demand", "partition", "broadcast"]),
    consumers=st.integers(1, 4),
    chunks=st.integers(0, 60),
    window=st.none() | st.integers(1, 12),
    ordered=st.booleans(),
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=40),
    data=st.data(),
)
def test_whoever_goes_on_asking_gets_everything(
    *,
    how: str,
    consumers: int,
    chunks: int,
    window: int | None,
    ordered: bool,
    steps: list[tuple[int, int]],
    data: Any,
) -> None:
    """Nobody waits for ever: where all come back, the stream ends, and each item went where it should."""
    scene = Scene(how, consumers, chunks, window, ordered=ordered, threads=2)
    for _ in range(40 * (chunks + 1)):
        if scene.machine.done and not len(scene.dispatch):
            break
        for which, count in steps:
            who = which % consumers
            if scene.outstanding(who) <= 0:
                scene.ask(who, count)
            scene.take(who, count)
        for who in range(consumers):  # nobody stays away for good
            if scene.outstanding(who) <= 0:
                scene.ask(who, 1)
            scene.take(who, 5)
        if scene.out:
            scene.answer(data.draw(st.integers(0, 9)), [GOOD])
    assert scene.machine.done
    if how == "broadcast":
        assert all(sorted(numbers) == list(range(chunks)) for numbers in scene.got.values())
    else:
        assert sorted(n for numbers in scene.got.values() for n in numbers) == list(range(chunks))
