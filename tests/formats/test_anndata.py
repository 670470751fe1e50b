"""AnnData stores as anndata writes them: dense matrices, and sparse ones by blocks of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import zarr_dask_stream as zds
from formats.samples import example

pytestmark = pytest.mark.filterwarnings("ignore")  # of the writer and its libraries

CELLS, GENES = 60, 25


@pytest.fixture(params=[2, 3])
def cells(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Any]:
    """Write counts of which some cells, the first and the last too, have none."""
    counts = sparse.random(CELLS, GENES, density=0.3, format="csr", random_state=1, dtype="f4").tolil()
    for empty in (0, 7, 8, CELLS - 1):
        counts[empty] = 0
    counts = counts.tocsr()
    names = {
        "obs": pd.DataFrame(index=pd.Index([f"cell{n}" for n in range(CELLS)], dtype=object)),
        "var": pd.DataFrame(index=pd.Index([f"gene{n}" for n in range(GENES)], dtype=object)),
    }
    data = anndata.AnnData(X=counts.toarray(), layers={"counts": counts}, **names)
    with anndata.settings.override(zarr_write_format=request.param):
        data.write_zarr(tmp_path / "cells.zarr", chunks=(16, 10))
    return tmp_path / "cells.zarr", counts


@pytest.mark.parametrize("matrix", ["X", "layers/counts"])
def test_totals_of_cells_and_genes(cells: tuple[Path, Any], matrix: str) -> None:
    store, counts = cells
    found = example("cells").totals(store, matrix, concurrency=1)
    for axis, sums in enumerate(found):
        np.testing.assert_allclose(sums, np.asarray(counts.sum(axis=1 - axis)).ravel(), rtol=1e-5)


@pytest.mark.parametrize("entries", [1, 7, 64, 10_000])
def test_blocks_of_rows_add_up_to_the_matrix(cells: tuple[Path, Any], entries: int) -> None:
    """Whatever the boxes: borders within rows, at their ends, several rows to a box, several boxes to a row."""
    store, counts = cells
    total = sparse.csr_matrix(counts.shape, dtype=counts.dtype)
    for first, rows in example("cells").row_blocks(store, "layers/counts", chunks=entries, concurrency=1):
        assert rows.nnz <= entries
        padding = [(first, counts.shape[1]), (counts.shape[0] - first - rows.shape[0], counts.shape[1])]
        above, below = (sparse.csr_matrix(shape, dtype=rows.dtype) for shape in padding)
        total = total + sparse.vstack([above, rows, below])
    assert (total != counts).nnz == 0


def test_columns_of_a_table_go_together(cells: tuple[Path, Any]) -> None:
    store, _ = cells
    (item,) = zds.stream_dataset(store, ["_index"], group="obs", concurrency=1)
    assert item.data["_index"].tolist()[:2] == ["cell0", "cell1"]


def test_the_example_prints_totals(cells: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    example("cells").main(str(cells[0]))
    first, second = capsys.readouterr().out.splitlines()
    assert len(first.split()) == CELLS + 2
    assert len(second.split()) == GENES + 2
