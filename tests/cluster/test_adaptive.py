"""A cluster that shrinks to nothing and grows again, while a stream runs on it and a chunk kills workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client, LocalCluster

import zarr_dask_stream as zds


@pytest.mark.slow
@pytest.mark.sample
@pytest.mark.cluster
@pytest.mark.timeout(180)
def test_adaptive_from_zero_and_over_a_chunk_that_kills(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "a"), shape=(300, 10), chunks=(1, 10), dtype="i8")
    array[:] = np.arange(3000).reshape(300, 10)

    def total(chunk: zds.Chunk) -> Any:
        if chunk.index == (123, 0):
            os._exit(7)
        return int(chunk.data.sum())

    with (
        LocalCluster(
            n_workers=0,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
            silence_logs=50,
        ) as cluster,
        Client(cluster) as client,
    ):
        cluster.adapt(minimum=0, maximum=2)
        stream = zds.stream_chunks(str(tmp_path / "a"), client=client, on_error="skip").map(total)
        got = {chunk.index[0]: chunk.data for chunk in stream}
    assert got == {i: 100 * i + 45 for i in range(300) if i != 123}
    [letter] = stream.report.dead_letters
    assert letter.index == (123, 0)
    assert letter.category == "cluster"
    assert stream.report.total == 300
