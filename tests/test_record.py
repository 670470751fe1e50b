"""What a run writes down: noted when it is done, saved when it is due, read by the run that goes on after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import zarr

import zarr_dask_stream as zds
from zarr_dask_stream.engine.events import ChunksEmitted, ChunksFiltered, ChunksSkipped
from zarr_dask_stream.options import Options
from zarr_dask_stream.record import Record
from zarr_dask_stream.testing import ManualClock


@pytest.fixture
def options(tmp_path: Path) -> Options:
    array = zarr.create_array({}, shape=(12,), chunks=(1,), dtype="i4", fill_value=7)
    checkpoint = zds.Checkpoint(url=tmp_path / "ledger.json", every_s=10, every_chunks=5)
    return zds.stream_chunks(array, checkpoint=checkpoint)._options


def record_of(options: Options, clock: ManualClock, *, delivers: bool = True) -> Record:
    record = Record(options, None, delivers=delivers, now=clock, wall=lambda: 1.7e9 + clock())
    record.open()
    return record


def saved(options: Options) -> Any:
    assert options.checkpoint is not None
    return json.loads(Path(options.checkpoint.url).read_bytes())


def test_chunks_are_saved_when_enough_are_done_or_enough_time_has_passed(options: Options) -> None:
    clock = ManualClock()
    record = record_of(options, clock)
    record.acknowledge([0, 1, 2])
    record.save_if_due()
    assert saved(options)["finished"] == 0
    record.acknowledge([3, 4])
    record.save_if_due()
    assert saved(options)["finished"] == 5
    record.acknowledge([5])
    clock.advance(10)
    record.save_if_due()
    assert saved(options)["finished"] == 6
    record.acknowledge([6])
    record.close()
    assert saved(options)["finished"] == 7


@pytest.mark.parametrize(("delivers", "done"), [(True, [2, 5, 6]), (False, [0, 1, 2, 5, 6])])
def test_what_needs_no_consumer_is_done_at_once(options: Options, delivers: bool, done: list[int]) -> None:
    record = record_of(options, ManualClock(), delivers=delivers)
    record.hear(ChunksEmitted(0.0, (0, 1)))
    record.hear(ChunksFiltered(0.0, (2,)))
    record.hear(ChunksSkipped(0.0, (range(5, 7),), 2))
    assert [number for number in range(12) if number in record.done] == done
    record.close()


def test_how_far_a_target_has_come_is_saved_at_once_and_found_again(options: Options) -> None:
    record = record_of(options, ManualClock())
    assert record.target is None
    record.target = "begun"
    assert saved(options)["notes"] == {"target": "begun"}
    record.close()
    again = record_of(options, ManualClock())
    assert again.target == "begun"
    again.close()
