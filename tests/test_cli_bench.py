"""The command that compares a run with bare loops: that its account adds up, not how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

from zarr_dask_stream.cli.bench import advise
from zarr_dask_stream.cli.command import zds


@pytest.fixture
def url(tmp_path: Path) -> str:
    array = zarr.create_array(str(tmp_path / "a"), shape=(64, 64), chunks=(8, 8), shards=(16, 16), dtype="f4")
    array[:] = np.arange(4096).reshape(64, 64)
    return str(tmp_path / "a")


@pytest.mark.parametrize(
    "workers", [[], pytest.param(["--workers", "1"], marks=[pytest.mark.cluster, pytest.mark.slow, pytest.mark.sample])]
)
def test_both_sides_read_the_same_chunks(url: str, workers: list[str]) -> None:
    result = CliRunner().invoke(zds, ["bench", url, "--chunks", "20", "--seconds", "5", "--json", *workers])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert 0 < found["chunks"] <= 20
    ratio = found["ratio"]
    assert 0 < ratio["least"] <= ratio["median"] <= ratio["most"]
    for side in ("stream", "limit"):
        assert set(found["seconds"][side]) == {"schedule", "fetch", "decode", "compute", "transfer", "wait"}
        assert all(spent >= 0 for spent in found["seconds"][side].values())
        assert found["seconds"][side]["decode"] > 0


def test_a_table_and_one_sentence_of_advice(url: str) -> None:
    result = CliRunner().invoke(zds, ["bench", url, "--chunks", "8", "--seconds", "1"])
    assert result.exit_code == 0, result.stderr
    assert "of the limit (" in result.stdout
    assert result.stdout.splitlines()[-1].split(":")[0] in (
        "too short to judge", "tiny chunks", "scheduler-bound", "fetch-bound", "decode-bound",
    )  # fmt: skip


def test_nothing_to_read_is_wrong_usage(url: str) -> None:
    assert CliRunner().invoke(zds, ["bench", url, "--where", "i0 > 99"]).exit_code == 2


@pytest.mark.parametrize(
    ("ratio", "nbytes", "fetch", "decode", "says"),
    [
        (0.3, 4096, 1.0, 1.0, "tiny chunks"),
        (0.3, 2**22, 1.0, 1.0, "scheduler-bound"),
        (0.9, 4096, 2.0, 1.0, "fetch-bound"),
        (0.9, 4096, 1.0, 2.0, "decode-bound"),
    ],
)
def test_advice_names_what_holds_a_run_back(ratio: float, nbytes: int, fetch: float, decode: float, says: str) -> None:
    assert advise(ratio, nbytes, {"fetch": fetch, "decode": decode}).startswith(says)
