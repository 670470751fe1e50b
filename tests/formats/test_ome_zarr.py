"""OME-Zarr images as ome-zarr-py writes them: one level, in tiles with a margin."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from scipy import ndimage

import zarr_dask_stream as zds
from formats.samples import example

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it remarks on itself
    from ome_zarr.format import FormatV04, FormatV05
    from ome_zarr.writer import write_image

pytestmark = pytest.mark.filterwarnings("ignore")  # of the writer and its libraries


@pytest.fixture(params=[FormatV04, FormatV05], ids=["0.4", "0.5"])
def image(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, np.ndarray[Any, Any]]:
    """Write two channels of noise with some bright spots, many of them on borders of tiles."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 90, (2, 60, 80)).astype("u2")
    for y, x in [(15, 31), (16, 32), (40, 5), (0, 0), (59, 79), (31, 64)]:
        pixels[:, y, x] = rng.integers(500, 900, 2)
    storage = {"chunks": (1, 16, 32)}
    write_image(
        pixels,
        str(tmp_path / "image.zarr"),
        scale_factors=[2],
        axes="cyx",
        fmt=request.param(),
        storage_options=storage,
    )
    return tmp_path / "image.zarr", pixels


@pytest.mark.parametrize("level", [0, 1])
def test_spots_at_the_borders_of_tiles_are_found_once(image: tuple[Path, Any], level: int) -> None:
    store, pixels = image
    axes, paths = example("microscopy").levels(store)
    assert (axes, len(paths)) == (["c", "y", "x"], 2)
    whole: Any = zarr.open_group(store, mode="r")[paths[level]]
    values = whole[:]
    assert level or (values == pixels).all()
    found = list(example("microscopy").spots(store, level, floor=95))
    brightest = (ndimage.maximum_filter(values, (1, 5, 5), mode="nearest") == values) & (values > 95)
    assert sorted(found) == [tuple(map(int, place)) for place in np.argwhere(brightest)]
    assert len(found) >= 8


def test_the_names_of_the_axes(image: tuple[Path, Any]) -> None:
    """Version 0.5 says them with each array, 0.4 does not."""
    store, _ = image
    _, paths = example("microscopy").levels(store)
    stream = zds.stream_chunks(store, path=paths[0], concurrency=1)
    if zarr.open_group(store, mode="r").metadata.zarr_format == 3:
        assert stream.dims == ("c", "y", "x")
        assert next(iter(stream)).to_xarray().dims == ("c", "y", "x")
    else:
        assert stream.dims is None


def test_the_example_prints_where_the_spots_are(image: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    example("microscopy").main(str(image[0]), "1")
    assert capsys.readouterr().out.splitlines()
