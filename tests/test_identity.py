"""What makes two functions, reducers or arrays the same."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from zarr_dask_stream.engine.identity import identity
from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.stages.statistics import Mean


def test_identity_tells_functions_apart() -> None:
    def adder(n: int) -> Any:
        return lambda chunk: chunk.data + n

    assert identity(adder(1)) == identity(adder(1))
    assert identity(adder(1)) != identity(adder(2))
    assert identity(functools.partial(max, 1)) != identity(functools.partial(max, 2))
    assert identity(Mean()) == identity(Mean())
    assert identity(np.arange(3)) != identity(np.arange(4))


def test_what_was_worked_out_meanwhile_makes_no_other_thing_of_it() -> None:
    grid = ChunkGrid((4, 4), (2, 2))
    before = identity(grid)
    assert grid.grid_shape == (2, 2)
    assert identity(grid) == before != identity(ChunkGrid((4, 4), (2, 4)))


def test_identity_of_a_function_that_closes_over_itself_ends() -> None:
    def loop(chunk: Any) -> Any:
        return loop

    assert identity(loop)
