"""Suspects are kept apart, and blamed for what they can have done."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zarr_dask_stream.engine.events import Batch, Blame
from zarr_dask_stream.engine.isolation import NOWHERE, Isolation


def suspect(number: int) -> Batch:
    return Batch(number, (range(number, number + 1),), 1, 8, suspect=True)


def isolation_of(workers: Mapping[str, int], suspects: int = 0) -> Isolation:
    isolation = Isolation()
    isolation.update(workers)
    isolation.add(suspect(number) for number in range(suspects))
    return isolation


def bound(isolation: Isolation) -> dict[str, int]:
    return {worker: batch.id for worker, batch in isolation.bind(anywhere=True)}


def test_each_worker_gets_one_suspect() -> None:
    isolation = isolation_of({"a": 1, "b": 1}, suspects=3)
    assert bound(isolation) == {"a": 0, "b": 1}
    assert bound(isolation) == {}
    isolation.release([1])
    assert bound(isolation) == {"b": 2}
    assert isolation.outside is None, "a worker of one thread does one thing at a time: the others may wait there"


def test_workers_of_several_threads_are_shared_with_nobody() -> None:
    isolation = isolation_of({"a": 4, "b": 4, "c": 4, "d": 4}, suspects=9)
    places = [isolation.outside]
    assert bound(isolation) == {"a": 0, "b": 1}
    places.append(isolation.outside)
    isolation.release([0, 1])
    assert [*places, isolation.outside] == [None, ("c", "d"), None]


def test_a_single_worker_has_to_do_for_all() -> None:
    isolation = isolation_of({"a": 4}, suspects=2)
    assert bound(isolation) == {"a": 0}
    assert isolation.outside is None


def test_without_workers_one_suspect_goes_out_and_no_other_is_bound_beside_it() -> None:
    isolation = isolation_of({}, suspects=2)
    assert list(isolation.bind()) == [], "not at once"
    assert bound(isolation) == {NOWHERE: 0}
    assert isolation.unbound
    isolation.update({"a": 1, "b": 1})
    assert bound(isolation) == {}, "any worker may get it"
    isolation.release([0])
    assert bound(isolation) == {"a": 1}


def test_what_can_run_nowhere_is_named() -> None:
    isolation = isolation_of({"a": 4, "b": 4, "c": 4}, suspects=1)
    assert bound(isolation) == {"a": 0}
    assert isolation.outside == ("b", "c")
    isolation.place([7, 8], isolation.outside)
    assert isolation.update({"a": 4, "c": 4, "d": 4}) == []
    assert sorted(isolation.update({"d": 4})) == [0, 7, 8]
    isolation.release([0, 7, 8])
    assert isolation.update({}) == []


def test_blame() -> None:
    isolation = isolation_of({"a": 1, "b": 4}, suspects=1)
    bound(isolation)
    assert isolation.blame(0, "a", others=True) is Blame.NONE, "it waited in the queue"
    isolation.begun(0, "a")
    assert isolation.blame(0, "a", others=True) is Blame.SOLE, "on one thread there is nothing beside it"
    assert isolation.blame(0, "b", others=True) is Blame.NONE, "it was elsewhere"
    isolation.begun(0, "b")
    assert isolation.remove("b") is None
    assert isolation.blame(0, "b", others=True) is Blame.SHARED
    assert isolation.blame(0, "b", others=False) is Blame.SOLE


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 4)), st.integers(0, 9))
def test_there_is_always_a_worker_for_a_suspect_and_one_for_the_others(workers: dict[str, int], suspects: int) -> None:
    isolation = isolation_of(workers, suspects)
    places = bound(isolation)
    assert bool(places) == bool(suspects)
    if isolation.outside is not None:
        assert isolation.outside
        assert set(isolation.outside) == set(workers) - set(places)


class IsolationStates(RuleBasedStateMachine):
    """Any history of suspects and workers: no two suspects meet, none is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.isolation = Isolation()
        self.workers: set[str] = set()
        self.waiting: set[int] = set()
        self.out: dict[int, str] = {}
        self.serial = 0

    @rule()
    def a_suspect_comes(self) -> None:
        self.isolation.add([suspect(self.serial)])
        self.waiting.add(self.serial)
        self.serial += 1

    @rule(anywhere=st.booleans())
    def they_are_bound(self, anywhere: bool) -> None:
        for worker, batch in self.isolation.bind(anywhere=anywhere):
            self.waiting.remove(batch.id)
            self.out[batch.id] = worker

    @rule(workers=st.sets(st.sampled_from("abcd")), threads=st.integers(1, 3))
    def the_cluster_is_looked_at(self, workers: set[str], threads: int) -> None:
        self.workers = workers
        stranded = self.isolation.update(dict.fromkeys(sorted(workers), threads))
        assert sorted(stranded) == sorted(b for b, w in self.out.items() if w and w not in workers)
        self.isolation.release(stranded)
        for batch in stranded:
            del self.out[batch]

    @precondition(lambda self: self.out)
    @rule(which=st.integers(0, 20))
    def a_worker_dies(self, which: int) -> None:
        worker = list(self.out.values())[which % len(self.out)]
        there = [batch for batch, where in self.out.items() if where == worker]
        if worker:
            self.workers.discard(worker)
            assert self.isolation.remove(worker) == there[0]
        self.isolation.release(there)
        for batch in there:
            del self.out[batch]

    @precondition(lambda self: self.out or self.waiting)
    @rule(which=st.integers(0, 20))
    def one_is_called_back_or_done(self, which: int) -> None:
        known = [*self.out, *sorted(self.waiting)]
        batch = known[which % len(known)]
        self.isolation.release([batch])
        self.out.pop(batch, None)
        self.waiting.discard(batch)

    @invariant()
    def apart(self) -> None:
        places = list(self.out.values())
        assert len(places) == len(set(places))
        assert NOWHERE not in places or self.isolation.unbound

    def teardown(self) -> None:
        self.the_cluster_is_looked_at({"a", "b"}, 1)
        while self.out or self.waiting:
            self.they_are_bound(anywhere=False)
            assert self.out, "a suspect waits for ever"
            self.one_is_called_back_or_done(0)


IsolationStates.TestCase.settings = settings(deadline=None)
TestIsolation = IsolationStates.TestCase
