"""A path that begins with ``~`` is one in the home directory, wherever a path is taken."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import zarr_dask_stream as zds
from zarr_dask_stream.cli.command import zds as command


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, and another one to work in that stays empty."""
    home, work = tmp_path / "home of ü", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    array = zarr.create_array(str(home / "a.zarr"), shape=(6,), chunks=(2,), dtype="i4")
    array[:] = np.arange(6)
    return home


@pytest.mark.parametrize("place", ["~/a.zarr", Path("~/a.zarr")], ids=["text", "path"])
def test_paths_of_streams(home: Path, place: str | Path) -> None:
    """Taken literally, a target would be made in a folder called ~, and who wants to be rid of it types rm -r ~."""
    stream = zds.stream_chunks(place, concurrency=1, checkpoint="~/a.ledger")
    stream.to_zarr("~/b.zarr").run().to_html("~/r.html")
    assert np.asarray(zarr.open_array(str(home / "b.zarr"))[:]).tolist() == list(range(6))
    assert {"a.ledger", "r.html"} <= {path.name for path in home.iterdir()}
    assert not list(Path.cwd().iterdir())


def test_paths_of_commands(home: Path) -> None:
    """Shells put the home directory in place of ~ in ``--out ~/x``, and not in ``--out=~/x``."""
    options = ["--out=~/o.jsonl", "--report=~/r.html", "--dead-letters=~/d.jsonl", "--checkpoint=~/c.ledger"]
    done = CliRunner().invoke(command, ["run", "numpy:max", "~/a.zarr", "--concurrency", "1", *options])
    assert done.exit_code == 0, done.output
    assert {"o.jsonl", "r.html", "d.jsonl", "c.ledger"} <= {path.name for path in home.iterdir()}
    again = CliRunner().invoke(command, ["verify", "~/a.zarr", "--concurrency", "1", "--only-failed=~/d.jsonl"])
    assert again.exit_code == 0, again.output
    assert not list(Path.cwd().iterdir())


def test_a_ledger_by_file_url(home: Path) -> None:
    """What is quoted in a URL is a character of the path, for a ledger as for an array."""
    zds.stream_chunks(home / "a.zarr", concurrency=1, checkpoint=(home / "led ger").as_uri()).run()
    assert (home / "led ger").is_file()


def test_without_a_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it is for a user whom the system does not know
    assert zds.stream_chunks(home / "a.zarr", concurrency=1).run().emitted == 3
