"""Which batches are late, and which are two copies of the same."""

from __future__ import annotations

import math

from zarr_dask_stream.engine.copies import Copies, Running
from zarr_dask_stream.engine.events import Batch
from zarr_dask_stream.source.hedging import Hedge


def running(number: int, since: float = 0.0, *, count: int = 1, suspect: bool = False) -> Running:
    return Running(Batch(number, (range(count),), count, count, suspect=suspect), since)


def copies_of(**options: float) -> Copies:
    copies = Copies(Hedge(**{"quantile": 0.5, "factor": 2.0, "min_s": 0.0, "budget": 1.0, **options}))
    for _ in range(8):
        copies.observe(elapsed_s=1.0, chunks=1)
    return copies


def test_without_hedging_nothing_is_ever_late() -> None:
    copies = Copies(None)
    assert not copies.on
    assert copies.late([running(1)], 1e9) == []


def test_nothing_is_late_before_there_is_a_usual_time() -> None:
    assert Copies(Hedge()).late([running(1)], 1e9) == []


def test_a_larger_batch_has_more_time() -> None:
    late = copies_of().late([running(1, count=2), running(2, count=1)], 3.0)
    assert [batch.id for batch in late] == [2]


def test_suspects_and_pairs_are_left_alone() -> None:
    copies = copies_of()
    copies.pair(1, 2)
    out = [running(1), running(2), running(3, suspect=True)]
    assert copies.late(out, 100.0) == []
    assert (copies.out, copies.part(1), copies.out, copies.part(2)) == (1, 2, 0, None)
    assert [batch.id for batch in copies.late(out[1:], 200.0)] == [2], "the one that is left may be late again"


def test_what_the_budget_refuses_is_not_asked_again() -> None:
    copies = copies_of(budget=0.5)
    copies.started(4)
    one, other = running(1, count=2), running(2, count=2)
    assert copies.afford(one.batch)
    assert not copies.afford(other.batch)
    assert [batch.id for batch in copies.late([one, other], 100.0)] == [1]


def test_it_looks_now_and_then() -> None:
    copies = copies_of(min_s=4.0)
    out = [running(1)]
    assert copies.late(out, 1.0) == []
    assert 2.0 <= copies.look_at <= 5.0
    assert copies.late(out, copies.look_at - 0.01) == []
    assert copies.late(out, 8.0) == [out[0].batch]
    assert not math.isinf(copies.look_at)
