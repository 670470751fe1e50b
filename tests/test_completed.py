"""The set of finished chunks: like a set of numbers, small, and not to be fooled."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.engine.completed import Completed
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan, parse_region


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_completed_is_a_set_and_survives_packing(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    grid = ChunkGrid(shape, tuple(data.draw(st.integers(1, 3)) for _ in shape))
    region = tuple(slice(*sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n))))) for n in shape)
    plan = ChunkPlan(grid, parse_region(region, shape))
    planned = list(plan)
    chosen = set(data.draw(st.lists(st.sampled_from(planned)))) if planned else set()
    done = Completed(plan)
    done.add(chosen)
    done.add(chosen)
    again = Completed.unpack(plan, done.pack())
    assert len(done) == len(again) == len(chosen)
    assert [n for run in again.missing_from(plan.runs()) for n in run] == [n for n in planned if n not in chosen]
    assert all((n in again) == (n in chosen) for n in planned)


def test_ten_million_chunks_fit_in_about_a_megabyte() -> None:
    plan = ChunkPlan(ChunkGrid((10_000_000,), (1,)), (slice(0, 10_000_000),))
    done = Completed(plan)
    done.add(np.random.default_rng(0).permutation(10_000_000)[:5_000_000].tolist())
    assert len(done.pack()) < 1.8e6


@pytest.mark.parametrize("text", ["", "!!!", "AAAA", "eJwDAAAAAAE="])
def test_damaged_set_is_refused(text: str) -> None:
    plan = ChunkPlan(ChunkGrid((100,), (1,)), (slice(0, 100),))
    with pytest.raises(zds.StoreError):
        Completed.unpack(plan, text)
