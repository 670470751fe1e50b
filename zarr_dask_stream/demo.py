"""The main job on real data: a year of the atmosphere, as chunks, through the cluster, into one small table.

The data are the Linke turbidity climatology that pvlib ships (its package `pvlib`, file
``data/LinkeTurbidities.h5``): for each month a global grid of 5 arc minutes. Rows run from 90 degrees
north to 90 south, columns from 180 west to 180 east, and a cell holds 20 times the turbidity, as pvlib's
``clearsky.lookup_linke_turbidity`` documents.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.stages import reducers
from zarr_dask_stream.stream import ChunkStream

__all__ = ["BAND_DEGREES", "band_means", "band_names", "sample_file", "write_sample"]

BAND_DEGREES = 15
_MONTHS, _ROWS, _COLUMNS = 12, 2160, 4320
_BANDS = 180 // BAND_DEGREES
_BAND_ROWS = _ROWS // _BANDS
#: One month, one latitude band, 40 degrees of longitude: 84 KiB, small on purpose. Many small chunks are
#: what a task for each chunk is bad at.
_CHUNKS = (1, _BAND_ROWS, 480)
_SCALE = 20.0


def sample_file() -> Path:
    """Find the climatology in the installed pvlib, without importing it.

    Raises
    ------
    UsageError
        If the packages of the extra `demo` are not installed.
    """
    found = importlib.util.find_spec("pvlib")
    if found is None or found.origin is None or importlib.util.find_spec("h5py") is None:
        raise UsageError(
            "the demo needs pvlib, for the data it ships, and h5py to read them: pip install 'zarr-dask-stream[demo]'"
        )
    return Path(found.origin).parent / "data" / "LinkeTurbidities.h5"


def write_sample(target: Path) -> None:
    """Write the climatology as a Zarr array at `target`: months first, chunked, compressed."""
    h5py = importlib.import_module("h5py")
    array = zarr.create_array(
        target,
        shape=(_MONTHS, _ROWS, _COLUMNS),
        chunks=_CHUNKS,
        dtype="uint8",
        fill_value=0,
        dimension_names=["month", "latitude", "longitude"],
        attributes={"long_name": "Linke turbidity", "scale_factor": 1 / _SCALE, "source": "pvlib LinkeTurbidities.h5"},
    )
    with h5py.File(sample_file(), "r") as file:
        source = file["LinkeTurbidity"]
        for start in range(0, _ROWS, _BAND_ROWS):  # a band at a time: the whole would take 112 MB twice
            rows = slice(start, start + _BAND_ROWS)
            array[:, rows] = np.moveaxis(source[rows], 2, 0)


def month_and_band(index: tuple[int, ...]) -> tuple[int, int]:
    """Return the group of a chunk: chunks are a month thick and a band high, so the index says it."""
    return index[0], index[1]


def band_means(stream: ChunkStream) -> tuple[npt.NDArray[np.float64], ChunkStream]:
    """Reduce the sample to the mean turbidity of each band (north first) in each month.

    Returns
    -------
    tuple
        The means, shape (bands, months), NaN where no chunk could be read; and the stream that ran, for
        its report.
    """
    reduced = stream.group_by(month_and_band).reduce(reducers.mean())
    means = np.full((_BANDS, _MONTHS), np.nan)
    found: dict[Any, Any] = reduced.compute()
    for (month, band), mean in found.items():
        means[band, month] = mean / _SCALE
    return means, reduced


def band_names() -> list[str]:
    """Name the bands, north first.

    Examples
    --------
    >>> names = band_names()
    >>> names[0], names[5], names[6], names[-1]
    ('75-90 N', '0-15 N', '0-15 S', '75-90 S')
    """
    edges = range(90, -90, -BAND_DEGREES)
    return [f"{min(abs(e), abs(e - BAND_DEGREES))}-{max(abs(e), abs(e - BAND_DEGREES))} {'NS'[e <= 0]}" for e in edges]
