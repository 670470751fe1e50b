"""A client that can't reach the workers: results come home through the scheduler, which talks an older pickle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import zarr_dask_stream as zds
from chaos.scene import assemble_rows, assert_all_there, write_rows
from realparts.leaks import LeakCheck
from zarr_dask_stream.engine.gather import Gatherer

pytestmark = pytest.mark.cluster


def variously(chunk: zds.Chunk) -> Any:
    """Return arrays of every layout, and values that are none."""
    row = chunk.data
    kinds: list[Any] = [
        row,
        np.asfortranarray(np.stack([row, row + 1])),
        row[:, ::2],
        {"all": row, "sum": row.sum()},
        row[:, :0],
    ]
    return kinds[chunk.index[0] % len(kinds)]


@pytest.fixture
def hide_workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after whose call no stream reaches a worker directly."""

    async def no(_: Gatherer) -> bool:
        return False

    return lambda: monkeypatch.setattr(Gatherer, "_can_reach_workers", no)


@pytest.mark.parametrize("ordered", [True, False])
def test_chunks_come_home_through_the_scheduler(
    *, client: Client, leak_check: LeakCheck, tmp_path: Path, hide_workers: Callable[[], None], ordered: bool
) -> None:
    place = str(tmp_path / "rows.zarr")
    data = write_rows(place, 100)
    hide_workers()
    stream = zds.stream_chunks(place, client=client, ordered=ordered)
    out = assemble_rows(stream, data)
    assert_all_there(stream.report, out, data)


def test_results_of_every_layout_come_home_as_they_do_directly(
    client: Client, leak_check: LeakCheck, tmp_path: Path, hide_workers: Callable[[], None]
) -> None:
    place = str(tmp_path / "rows.zarr")
    write_rows(place, 50)
    stream = zds.stream_chunks(place, client=client).map(variously)
    direct = [chunk.data for chunk in stream]
    hide_workers()
    for one, other in zip(direct, [chunk.data for chunk in stream], strict=True):
        assert type(one) is type(other)
        if isinstance(one, dict):
            np.testing.assert_array_equal(one["all"], other["all"])
            assert one["sum"] == other["sum"]
        else:
            np.testing.assert_array_equal(one, other)
            assert (one.dtype, one.shape, one.strides) == (other.dtype, other.shape, other.strides)
            assert one.flags.writeable == other.flags.writeable
