"""The demo: right numbers, from real data, and a table that people can read."""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from rich.console import Console

from zarr_dask_stream.cli import demo as shown
from zarr_dask_stream.cli.command import zds
from zarr_dask_stream.demo import BAND_DEGREES, band_names, sample_file
from zarr_dask_stream.watch.report import Report


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def answer(kept: Path) -> dict[str, Any]:
    """What ``zds demo --keep DIR --json`` says."""
    result = CliRunner().invoke(zds, ["demo", "--keep", str(kept), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def turbidity() -> np.ndarray:
    """The climatology as pvlib has it: latitude (north first), longitude, month; 20 times the turbidity."""
    with h5py.File(sample_file(), "r") as file:
        return np.asarray(file["LinkeTurbidity"][:])


def test_the_means_are_those_of_numpy(answer: dict[str, Any], turbidity: np.ndarray) -> None:
    rows = len(turbidity) * BAND_DEGREES // 180
    bands = turbidity.reshape(-1, rows, *turbidity.shape[1:])
    expected = np.stack([band.mean(axis=(0, 1)) for band in bands]) / 20
    np.testing.assert_allclose(answer["mean"], expected, rtol=1e-12)
    assert len(answer["bands"]) == len(expected)
    assert answer["report"]["emitted"] == answer["report"]["total"] == 1296


@pytest.mark.parametrize(
    ("latitude", "longitude", "month"), [(52.54, 13.42, 1), (-33.87, 151.21, 7), (23.41, 25.72, 8)]
)
def test_a_place_on_earth_is_where_pvlib_finds_it(
    answer: dict[str, Any], kept: Path, latitude: float, longitude: float, month: int
) -> None:
    import pandas as pd  # noqa: PLC0415  # slow, and only this test compares with pvlib itself
    from pvlib.clearsky import lookup_linke_turbidity  # noqa: PLC0415  # optional

    time = pd.DatetimeIndex([f"2021-{month:02}-15"])
    expected = float(lookup_linke_turbidity(time, latitude, longitude, interp_turbidity=False).iloc[0])
    array = zarr.open_array(str(kept / "linke_turbidity.zarr"), mode="r")
    row, column = int((90 - latitude) * 12), int((180 + longitude) * 12)
    assert np.asarray(array[month - 1, row, column]).item() / 20 == pytest.approx(expected)
    band = answer["bands"][int((90 - latitude) // BAND_DEGREES)]
    low, high = (int(edge) for edge in band.split()[0].split("-"))
    assert low <= abs(latitude) <= high
    assert band.endswith("N" if latitude > 0 else "S")


def test_the_kept_array_can_be_gone_on_with_and_is_not_written_over(answer: dict[str, Any], kept: Path) -> None:
    target = str(kept / "linke_turbidity.zarr")
    found = CliRunner().invoke(zds, ["info", target])
    assert "month, latitude, longitude" in found.stdout
    again = CliRunner().invoke(zds, ["demo", "--keep", str(kept)])
    assert again.exit_code == 2
    assert target in again.stderr


def _console(*, terminal: bool, encoding: str) -> tuple[Console, io.BytesIO]:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return Console(file=out, force_terminal=terminal, width=80, highlight=False, _environ={}), raw


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_table_fits_into_80_columns_on_any_terminal(
    answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    console, raw = _console(terminal=True, encoding=encoding)
    monkeypatch.setattr(shown, "screen", lambda: console)
    shown._show(np.array(answer["mean"]), Report(total=3, emitted=3), [("written to", "x in 1 s")], kept=True)
    text = raw.getvalue().decode(encoding)
    plain = "".join(piece.partition("m")[2] for piece in ("m" + text).split("\x1b["))
    assert all(len(line.rstrip()) <= 80 for line in plain.splitlines())
    for name in band_names():
        assert name.split()[0] in plain
    assert ("█" in plain) == (encoding == "utf-8")
    assert "Haziest: 4.30 at 15-30 N in Aug" in plain
    assert "zds info x" in plain


def test_means_that_could_not_be_read_are_shown_as_such(
    answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    means = np.array(answer["mean"])
    means[0, 3] = means[5] = np.nan
    console = Console(width=120)
    monkeypatch.setattr(shown, "screen", lambda: console)
    shown._show(means, Report(), [], kept=False)
    text = capsys.readouterr().out
    assert "nan stands where a mean is missing" in text
    assert "Haziest" not in text


def test_without_its_extra_the_demo_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pvlib" else find(name, *rest))
    result = CliRunner().invoke(zds, ["demo"])
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "pip install 'zarr-dask-stream[demo]'" in line


def test_nothing_is_left_behind_even_by_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shown, "write_sample", interrupted)
    assert CliRunner().invoke(zds, ["demo"]).exit_code == 130
    assert list(tmp_path.iterdir()) == []
