"""Jobs on the command line: a function of one's own, stopped and resumed, and bad chunks run again."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from click.testing import CliRunner, Result
from distributed import LocalCluster

from realparts.fault_proxy import FaultProxy
from realparts.http_files import HttpStore
from zarr_dask_stream.cli.command import zds
from zarr_dask_stream.cli.options import _parse_rate

Start = Callable[..., subprocess.Popen[str]]
FUNCTIONS = """
import time
import numpy as np

def everything(chunk):
    return {"max": chunk.data.max(), "first": chunk.data[:2, 0], "at": chunk.index, "none": None}

def slowly(chunk):
    time.sleep(0.1)
    return int(chunk.data.sum())

def opaque(chunk):
    return object()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current directory: an array of 60 chunks and a module that nothing has imported yet."""
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(60, 4), chunks=(1, 4), dtype="f8")
    array[:] = np.arange(240).reshape(60, 4)
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Return `start(*args)`, which runs the command in the folder, in a session of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        command = [str(Path(sys.executable).with_name("zds")), *args]
        process = subprocess.Popen(
            command, cwd=folder, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(*args: str) -> Result:
    return CliRunner().invoke(zds, args)


def sentence(result: Result) -> str:
    assert result.exit_code == 2, result.output
    return result.stderr


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def rows(file: Path) -> list[int]:
    return sorted(line["index"][0] for line in lines(file))


def damage(folder: Path, row: int) -> bytes:
    chunk = folder / "a.zarr" / "c" / str(row) / "0"
    good = chunk.read_bytes()
    chunk.write_bytes(b"damaged")
    return good


def repair(folder: Path, row: int, good: bytes) -> None:
    (folder / "a.zarr" / "c" / str(row) / "0").write_bytes(good)


def wait_for(ready: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- a function of one's own ------------------------------------------------------------------------


def test_a_function_of_the_current_directory_becomes_lines_on_standard_output(folder: Path) -> None:
    result = run("run", "mine:everything", "a.zarr", "--region", "3:5", "--ordered")
    assert result.exit_code == 0, result.stderr
    first, second = map(json.loads, result.stdout.splitlines())
    assert first == {
        "index": [3, 0],
        "region": [[3, 4], [0, 4]],
        "value": {"max": 15.0, "first": [12.0], "at": [3, 0], "none": None},
    }
    assert second["index"] == [4, 0]
    assert "2 lines to standard output" in result.stderr


def test_a_result_without_a_place_in_json_is_a_dead_letter_that_says_so(folder: Path) -> None:
    result = run("run", "mine:opaque", "a.zarr", "--where", "i0 < 2", "--out", "o", "--dead-letters", "bad")
    assert result.exit_code == 1
    assert [letter["category"] for letter in lines(folder / "bad")] == ["function"] * 2
    assert "no place in JSON" in result.stderr


@pytest.mark.cluster
def test_a_function_travels_to_workers_that_have_no_such_module(
    folder: Path, start: Start, local_cluster: LocalCluster
) -> None:
    process = start(
        "run", "mine:everything", "a.zarr", "--scheduler", local_cluster.scheduler_address, "--out", "o", "--json"
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, json.loads(out)["lines"]) == (0, 60), err
    assert rows(folder / "o") == list(range(60))


def test_a_module_that_is_broken_is_wrong_usage(folder: Path) -> None:
    (folder / "broken_one.py").write_text("1 / 0")
    assert "ZeroDivisionError" in sentence(run("run", "broken_one:f", "a.zarr"))
    assert "everything, opaque, slowly" in sentence(run("run", "mine:f", "a.zarr"))


@pytest.mark.parametrize(
    ("text", "requests", "nbytes"),
    [("200", 200, math.inf), ("200/s", 200, math.inf), ("6000/min", 100, math.inf), ("1 MiB/s", math.inf, 2**20)],
)
def test_rates(text: str, requests: float, nbytes: float) -> None:
    rate = _parse_rate(text)
    assert (rate.requests_per_s, rate.bytes_per_s) == (requests, nbytes)


def test_hedging_and_a_rate_reach_the_stream(folder: Path) -> None:
    began = time.monotonic()
    assert run("stats", "a.zarr", "--region", ":20", "--rate-limit", "40/s", "--hedge").exit_code == 0
    assert time.monotonic() - began > 0.2


# -- stopped and resumed ----------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_asked_to_stop_finishes_what_it_began_and_goes_on_later(
    folder: Path, start: Start, number: signal.Signals
) -> None:
    job = ["run", "mine:slowly", "a.zarr", "--out", "o", "--checkpoint", "ledger", "--concurrency", "4"]
    process = start(*job)
    wait_for(lambda: (folder / "o").exists() and (folder / "o").read_text(), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "in flight; press Ctrl-C again to stop at once" in err
    assert "cancelled" in out
    before = rows(folder / "o")
    assert 0 < len(before) < 60
    result = run(*job, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["report"]["resumed"], found["lines"], found["lines_again"]) == (len(before), 60 - len(before), 0)
    assert rows(folder / "o") == list(range(60))


@pytest.mark.cluster
def test_a_killed_job_loses_no_line_and_says_which_stand_twice(folder: Path, start: Start) -> None:
    job = ["run", "mine:slowly", "a.zarr", "--out", "o", "--checkpoint", "ledger", "--concurrency", "4"]
    process = start(*job)
    wait_for(lambda: (folder / "o").exists() and (folder / "o").read_text().count("\n") > 4, process)
    process.kill()
    process.communicate()
    with (folder / "o").open("a") as file:
        file.write('{"index": [59')  # cut off in the middle
    result = run(*job, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(rows(folder / "o")) == set(range(60))
    assert len(rows(folder / "o")) == 60 + found["lines_again"]
    assert found["lines_again"] > 0
    assert "more than once" in result.stderr


@pytest.mark.cluster
def test_a_ledger_in_use_has_an_exit_code_of_its_own(folder: Path, start: Start) -> None:
    """Wrong usage it was, like a misspelt option: a script could not tell that the same command is right later."""
    job = ["run", "mine:slowly", "a.zarr", "--out", "o", "--checkpoint", "ledger", "--concurrency", "4"]
    process = start(*job)
    wait_for(lambda: (folder / "o").exists() and (folder / "o").read_text(), process)
    second = run(*job)
    assert second.exit_code == 75, second.output
    assert "another run is using the ledger" in second.stderr
    process.kill()
    process.communicate()
    assert run(*job).exit_code == 0
    assert set(rows(folder / "o")) == set(range(60)), "the second one has left the lines of the first alone"


def test_a_ledger_whose_lines_are_gone_is_refused(folder: Path) -> None:
    job = ["run", "mine:everything", "a.zarr", "--out", "o", "--checkpoint", "ledger"]
    assert run(*job).exit_code == 0
    (folder / "o").unlink()
    assert "60 chunks as done" in sentence(run(*job))
    (folder / "o").write_text("my diary\n")
    assert "line 1 is not a result" in sentence(run(*job))
    assert (folder / "o").read_text() == "my diary\n"


def test_statistics_go_on_and_another_command_is_refused(folder: Path) -> None:
    whole = json.loads(run("stats", "a.zarr", "--checkpoint", "ledger", "--json").stdout)
    again = json.loads(run("stats", "a.zarr", "--checkpoint", "ledger", "--json").stdout)
    assert (again["mean"], again["report"]["resumed"]) == (whole["mean"], 60)
    assert "another stream" in sentence(run("verify", "a.zarr", "--checkpoint", "ledger"))


@pytest.mark.cluster
def test_a_store_that_never_answers_is_given_up_after_the_timeout(
    folder: Path, start: Start, http_store: HttpStore, fault_proxy: Callable[..., FaultProxy]
) -> None:
    (folder / "a.zarr").rename(http_store.directory / "a.zarr")
    proxy = fault_proxy(http_store.url)
    proxy.inject("hang", times=1000, match=r"/c/\d")
    process = start("verify", f"{proxy.url}/a.zarr", "--timeout", "2", "--retries", "1000", "--json")
    wait_for(lambda: proxy.counts["hang"], process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    report = json.loads(out)["report"]
    assert report["cancelled"] == report["total"] == 60


# -- bad chunks again -------------------------------------------------------------------------------


def test_bad_chunks_are_run_again_after_the_repair_and_only_those(folder: Path) -> None:
    good = damage(folder, 7)
    job = ["run", "mine:everything", "a.zarr", "--out", "o", "--retries", "0"]
    assert run(*job, "--dead-letters", "bad").exit_code == 1
    # The same file in both places: it is read before it is written.
    assert run("verify", "a.zarr", "--retries", "0", "--only-failed", "bad", "--dead-letters", "bad").exit_code == 1
    assert [letter["index"] for letter in lines(folder / "bad")] == [[7, 0]]
    repair(folder, 7, good)
    result = run("verify", "a.zarr", "--only-failed", "bad", "--json")
    assert (result.exit_code, json.loads(result.stdout)["chunks"]) == (0, 1)
    assert run(*job, "--only-failed", "bad").exit_code == 0
    assert rows(folder / "o") == list(range(60))
    nothing = run("verify", "a.zarr", "--only-failed", "bad", "--where", "i0 < 7", "--json")
    assert (nothing.exit_code, json.loads(nothing.stdout)["chunks"]) == (0, 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("no json", "line 1 is not a dead letter"),
        ('{"index": [0, 0]}\n[1]', "line 2 is not a dead letter"),
        ('{"index": "__import__"}', "line 1 is not a dead letter"),
        ('{"index": [true, 0]}', "line 1 is not a dead letter"),
        ('{"index": [60, 0]}', "outside the grid"),
        ('{"index": [-1, 0]}', "outside the grid"),
        ('{"index": [0]}', "outside the grid"),
        ('{"index": [0, 0], "region": [[5, 6], [0, 4]]}', "another array"),
        ('{"index": [0, 0], "array": "elsewhere.zarr"}', "another array"),
        ('{"index": [0, 0], "shape": [1, 1]}', "another array"),
        ("[" * 100_000, "line 1 is not a dead letter"),
        ("\udcff", "can't be read"),
    ],
)
def test_a_list_that_does_not_fit_is_wrong_usage(folder: Path, text: str, says: str) -> None:
    (folder / "bad").write_bytes(text.encode(errors="surrogateescape"))
    assert says in sentence(run("verify", "a.zarr", "--only-failed", "bad"))


def test_the_report_of_a_run_is_a_page_beside_its_results(folder: Path) -> None:
    """Of every command that streams, and of runs with bad chunks, too."""
    damage(folder, 3)
    commands = [
        ["stats", "a.zarr"],
        ["verify", "a.zarr"],
        ["run", "mine:everything", "a.zarr", "--out", "lines.jsonl"],
        ["copy", "a.zarr", "copied.zarr"],
    ]
    for command in commands:
        page = folder / f"{command[0]}.html"
        result = run(*command, "--report", str(page))
        assert result.exit_code == 1, result.output
        text = page.read_text(encoding="utf-8")
        assert "a.zarr" in text
        assert "1 chunk given up" in text


def test_a_page_that_could_not_be_written_is_refused_before_the_work(folder: Path) -> None:
    result = run("stats", "a.zarr", "--report", str(folder / "nowhere" / "r.html"))
    assert "there is no folder" in sentence(result)
