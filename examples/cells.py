"""Totals of an AnnData Zarr store: of a dense matrix, and of a sparse one, row block by row block.

$ python examples/cells.py cells.zarr X
$ python examples/cells.py cells.zarr layers/counts
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr
from scipy import sparse

import zarr_dask_stream as zds


def row_blocks(store: Any, matrix: str = "X", **options: Any) -> Iterator[tuple[int, Any]]:
    """Walk a sparse matrix: the number of a row, and a csr matrix of the rows from there on.

    The entries of a row lie together, one row after the other, and ``indptr`` says where each begins. So a box
    of entries is a block of rows; a row that the border of a box cuts is in two blocks, in each with its part.
    """
    group: Any = zarr.open_group(store, path=matrix, mode="r")
    rows, columns = group.attrs["shape"]
    begins = group["indptr"][:]

    def block(item: zds.Chunk) -> Any:
        (entries,) = item.region
        first = int(np.searchsorted(begins, entries.start, "right")) - 1
        last = int(np.searchsorted(begins, entries.stop, "left"))
        indptr = np.clip(begins[first : last + 1], entries.start, entries.stop) - entries.start
        shape = (last - first, columns)
        return first, sparse.csr_matrix((item.data["data"], item.data["indices"], indptr), shape=shape)

    assert len(begins) == rows + 1
    for item in zds.stream_dataset(store, ["data", "indices"], group=matrix, **options).map(block):
        yield item.data


def totals(store: Any, matrix: str = "X", **options: Any) -> tuple[Any, Any]:
    """Add up the rows and the columns of a matrix, dense or csr."""
    found: Any = zarr.open(store, path=matrix, mode="r")
    if isinstance(found, zarr.Array):
        stream = zds.stream_chunks(store, path=matrix, **options)
        sums = stream.reduce({"cells": zds.reducers.sum(axis=1), "genes": zds.reducers.sum(axis=0)}).compute()
        return sums["cells"], sums["genes"]
    cells, genes = (np.zeros(n) for n in found.attrs["shape"])
    for first, rows in row_blocks(store, matrix, **options):
        cells[first : first + rows.shape[0]] += np.asarray(rows.sum(axis=1)).ravel()
        genes += np.asarray(rows.sum(axis=0)).ravel()
    return cells, genes


def main(store: str, matrix: str = "X") -> None:
    """Print the totals."""
    cells, genes = totals(store, matrix)
    print("of cells:", *cells)
    print("of genes:", *genes)


if __name__ == "__main__":
    main(*sys.argv[1:])
