"""The command `zds`, from inside (fast) and as a process (exit codes, signals, terminals)."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import zarr
from click.testing import CliRunner, Result
from distributed import LocalCluster

from realparts.fault_proxy import FaultProxy
from realparts.http_files import HttpStore
from zarr_dask_stream.cli import command
from zarr_dask_stream.cli.command import zds
from zarr_dask_stream.engine import cluster


def run(*args: str) -> Result:
    return CliRunner().invoke(zds, args)


def answer(*args: str, code: int = 0) -> dict[str, Any]:
    """Run with --json; standard output must be one JSON object and nothing else."""
    result = run(*args, "--json")
    assert result.exit_code == code, result.stderr
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def sentence(result: Result, code: int) -> str:
    """Return the one line on standard error of a run that failed."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.fixture
def data() -> np.ndarray:
    data = np.random.default_rng(3).normal(10, 3, (30, 20))
    data[4, 5] = np.nan
    return data


@pytest.fixture
def url(tmp_path: Path, data: np.ndarray) -> str:
    """A group with a good array "good", a sparse one "deep/sparse" and a sharded one "sharded"."""
    root = zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    good = root.create_array("good", shape=(30, 20), chunks=(10, 10), dtype="f8", dimension_names=["y", "x"])
    good[:] = data
    sparse = root.create_array("deep/sparse", shape=(8,), chunks=(2,), dtype="i2", fill_value=-1)
    sparse[:2] = 5
    sharded = root.create_array("sharded", shape=(8, 8), chunks=(2, 2), shards=(4, 4), dtype="u1")
    sharded[:] = 1
    return str(tmp_path / "group.zarr")


@pytest.fixture
def corrupt(url: str) -> str:
    """One of the six chunks of "good" is cut in half, another is not compressed data at all."""
    folder = Path(url) / "good" / "c"
    (folder / "1" / "0").write_bytes((folder / "1" / "0").read_bytes()[:40])
    (folder / "2" / "1").write_bytes(b"no such thing")
    return url


# -- the whole ------------------------------------------------------------------------------------


def test_help_names_the_commands_and_the_exit_codes() -> None:
    text = run("--help").stdout
    for word in ("demo", "info", "stats", "verify", "copy", "run", "bench", "Exit codes: 0", "130 interrupted"):
        assert word in text
    assert "..." not in text.split("Commands:")[1]  # no sentence is cut


@pytest.mark.parametrize("name", ["demo", "info", "stats", "verify", "copy", "run", "bench"])
def test_each_command_explains_itself(name: str) -> None:
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["frobnicate"], "frobnicate"),
        (["stats"], "URL"),
        (["stats", "x", "--frob"], "--frob"),
        (["stats", "x", "--region", "1:2:3:4"], "1:2:3:4"),
        (["stats", "x", "--where", "open('f')"], "a call is not part of the language"),
        (["stats", "x", "--retries", "-1"], "--retries"),
        (["stats", "x", "--timeout", "0"], "--timeout"),
        (["stats", "x", "--max-bytes", "lots"], "max_bytes"),
        (["stats", "x", "--concurrency", "0"], "--concurrency"),
        (["stats", "x", "--workers", "0"], "--workers"),
        (["stats", "x", "--workers", "1", "--scheduler", "tcp://h:1"], "one of them"),
        (["verify", "x", "--dead-letters", "/no/such/folder/file"], "/no/such/folder/file"),
        (["stats", "x", "--rate-limit", "fast"], "200/s"),
        (["stats", "x", "--rate-limit", "0"], "--rate-limit"),
        (["verify", "x", "--only-failed", "/no/such/file"], "/no/such/file"),
        (["run", "json", "x"], "MODULE:FUNCTION"),
        (["run", "json:no", "x"], "json has no 'no'"),
        (["run", "no_such_module:f", "x"], "'no_such_module'"),
        (["run", "json:JSONDecodeError", "x"], "one argument"),
        (["stats", "gopher://host/x"], "gopher"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(args: list[str], says: str) -> None:
    assert says in sentence(run(*args), 2)


@pytest.mark.parametrize("args", [["--region", "40:50,:"], ["--region", "1,2,3"], ["--where", "i2 == 0"]])
def test_what_does_not_fit_the_array_is_wrong_usage(url: str, args: list[str]) -> None:
    sentence(run("stats", url, "--path", "good", *args), 2)


@pytest.mark.parametrize("name", ["info", "stats", "verify", "bench"])
@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("nowhere.zarr", "there is no directory"),
        ("folder", "there is no zarr array at"),
        ("file.py", "file.py is a file, or said to be inside one: a directory or a .zip file"),
        ("file.py/below", "file.py/below is a file, or said to be inside one"),
        ("broken.zip", "is not a zip file"),
        ("half.zarr", "is not valid JSON"),
        ("locked.zarr", "the store can't be read"),
    ],
)
def test_what_is_no_array_is_one_sentence_and_exit_code_3(tmp_path: Path, name: str, place: str, says: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.py").write_text("x = 1")
    (tmp_path / "broken.zip").write_bytes(b"PK")
    (tmp_path / "half.zarr").mkdir()
    (tmp_path / "half.zarr" / "zarr.json").write_text('{"zarr_format": 3,')
    (tmp_path / "locked.zarr").mkdir()
    (tmp_path / "locked.zarr" / "zarr.json").symlink_to("zarr.json")  # what fails for everybody, root included
    text = sentence(run(name, str(tmp_path / place)), 3)
    assert says in text
    assert "Errno" not in text


def test_a_group_where_an_array_is_needed_names_the_arrays(url: str) -> None:
    text = sentence(run("stats", url), 3)
    assert "'good'" in text
    assert "'deep/sparse'" in text


@pytest.mark.parametrize("name", ["info", "stats", "verify"])
def test_a_store_that_is_not_there_is_exit_code_3(name: str, tmp_path: Path) -> None:
    assert "nowhere.zarr" in sentence(run(name, str(tmp_path / "nowhere.zarr")), 3)


def test_an_array_that_is_not_there_is_exit_code_3_and_names_those_that_are(url: str) -> None:
    assert "'deep/sparse'" in sentence(run("stats", url, "--path", "godo"), 3)
    assert "'deep/sparse'" in sentence(run("info", url, "--path", "godo"), 3)


def test_a_server_out_of_reach_is_exit_code_3() -> None:
    assert "127.0.0.1:9" in sentence(run("info", "http://127.0.0.1:9/data.zarr"), 3)


def test_a_scheduler_out_of_reach_is_exit_code_3(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_CONNECT_S", 0.5)
    text = sentence(run("stats", url, "--path", "good", "--scheduler", "tcp://127.0.0.1:9"), 3)
    assert "no Dask scheduler answers at tcp://127.0.0.1:9" in text


def test_secrets_among_the_options_are_never_repeated(url: str) -> None:
    for pair in ("hush-hush", "=hush-hush", "a=1"):
        result = run("info", "http://127.0.0.1:9/x", "--storage-option", pair, "--storage-option", "a.b=hush-hush")
        assert result.exit_code in (2, 3)
        assert "hush-hush" not in result.output
    assert "a.b" in sentence(run("info", url, "--storage-option", "a=1", "--storage-option", "a.b=2"), 2)


def test_storage_options_nest_and_are_read_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def parse(_url: str, options: Any) -> Any:
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("zarr_dask_stream.cli.info.StoreSpec.parse", parse)
    pairs = ["anon=true", "key=AKIA=", "client_kwargs.endpoint_url=http://h:1", "client_kwargs.n=3", 'id="17"']
    result = run("info", "s3://b/x", *(word for pair in pairs for word in ("--storage-option", pair)))
    assert result.exit_code == 130
    assert seen == [{"anon": True, "key": "AKIA=", "client_kwargs": {"endpoint_url": "http://h:1", "n": 3}, "id": "17"}]


def test_debug_adds_the_traceback_and_keeps_the_exit_code(tmp_path: Path) -> None:
    result = run("info", str(tmp_path / "no.zarr"), "--debug")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")


def test_a_mistake_of_ours_is_told_from_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("zarr_dask_stream.cli.info.locate", broken)
    monkeypatch.setattr(
        "zarr_dask_stream.cli.info.StoreSpec.parse", lambda *_: type("S", (), {"open": lambda _: None})()
    )
    assert "ZeroDivisionError: oh" in sentence(run("info", "x"), 70)


def test_the_group_can_be_called_from_python_too(url: str) -> None:
    assert command.zds.main(["info", url, "--json"], standalone_mode=False) == 0


# -- info -----------------------------------------------------------------------------------------


def test_info_describes_an_array(url: str) -> None:
    about = answer("info", url, "--path", "good", "--stored")
    assert about["shape"] == [30, 20]
    assert about["chunk_shape"] == [10, 10]
    assert about["dimension_names"] == ["y", "x"]
    assert about["dtype"] == "float64"
    assert (about["sharded"], about["shard_shape"], about["consolidated"]) == (False, None, False)
    assert (about["chunks"], about["chunks_stored"], about["grid_shape"]) == (6, 6, [3, 2])
    assert (about["nbytes"], about["chunk_nbytes"]) == (4800, 800)
    text = run("info", url, "--path", "good", "--stored").stdout
    for word in (
        "30 x 20",
        "10 x 10 (800 B decoded)",
        "y, x",
        "float64",
        "zstd",
        "not sharded",
        "6 in a grid of 3 x 2",
    ):
        assert word in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_info_looks_into_shards(url: str) -> None:
    about = answer("info", url, "--path", "sharded")
    assert (about["sharded"], about["shard_shape"], about["chunk_shape"]) == (True, [4, 4], [2, 2])
    assert any(codec.startswith("zstd") for codec in about["codecs"])


def test_info_of_version_2_with_consolidated_metadata_only(tmp_path: Path) -> None:
    store = str(tmp_path / "old.zarr")
    root = zarr.open_group(store, mode="w", zarr_format=2)
    root.create_array("t", shape=(4,), chunks=(2,), dtype=">f4", fill_value=math.nan)
    zarr.consolidate_metadata(store)
    (tmp_path / "old.zarr" / "t" / ".zarray").unlink()
    about = answer("info", store, "--path", "t")
    assert (about["zarr_format"], about["dtype"], about["fill_value"], about["consolidated"]) == (2, ">f4", "NaN", True)


def test_info_lists_the_arrays_of_a_group(url: str) -> None:
    arrays = {about["path"]: about for about in answer("info", url, "--stored")["arrays"]}
    assert list(arrays) == ["deep/sparse", "good", "sharded"]
    assert arrays["deep/sparse"]["chunks"] == 4
    assert arrays["deep/sparse"]["chunks_stored"] == 1
    text = run("info", url).stdout
    assert "a group with 3 arrays" in text
    for word in ("deep/sparse", "30 x 20", "2 x 2 in 4 x 4", "float64", "int16"):
        assert word in text
    assert [about["path"] for about in answer("info", url, "--path", "deep")["arrays"]] == ["deep/sparse"]


def test_info_shows_a_damaged_array_among_the_others(url: str) -> None:
    document = Path(url) / "good" / "zarr.json"
    document.write_text(document.read_text().replace('"zstd"', '"never-heard-of"'))
    arrays = {about["path"]: about for about in answer("info", url)["arrays"]}
    assert "never-heard-of" in arrays["good"]["error"]
    assert arrays["sharded"]["chunks"] == 16
    assert "never-heard-of" in run("info", url).stdout


def test_info_of_an_empty_group(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "empty.zarr"), mode="w")
    assert "no arrays" in run("info", str(tmp_path / "empty.zarr")).stdout


# -- stats ----------------------------------------------------------------------------------------


def test_stats_agree_with_numpy(url: str, data: np.ndarray) -> None:
    found = answer("stats", url, "--path", "good")
    assert (found["count"], found["nan_count"], found["missing_chunks"]) == (599, 1, 0)
    assert found["min"] == np.nanmin(data)
    assert found["max"] == np.nanmax(data)
    assert found["mean"] == pytest.approx(np.nanmean(data), rel=1e-13)
    assert found["std"] == pytest.approx(np.nanstd(data), rel=1e-13)
    assert found["report"]["emitted"] == 6
    text = run("stats", url, "--path", "good").stdout
    assert "missing chunks  0" in text
    assert "chunks/s" in text


def test_stats_of_a_part(url: str, data: np.ndarray) -> None:
    found = answer("stats", url, "--path", "good", "--region", "5:25,-10:", "--where", "i0 != 1", "--concurrency", "1")
    part = np.concatenate([data[5:10, 10:], data[20:25, 10:]])
    assert (found["count"], found["report"]["total"]) == (100, 2)
    assert found["mean"] == pytest.approx(part.mean(), rel=1e-13)


def test_stats_count_missing_chunks_with_the_fill_value(url: str) -> None:
    found = answer("stats", url, "--path", "deep/sparse")
    assert (found["count"], found["missing_chunks"], found["min"], found["max"]) == (8, 3, -1, 5)


def test_stats_of_dates_are_those_that_dates_have(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "t"), shape=(4,), chunks=(2,), dtype="M8[D]")
    array[:] = np.array(["2020-01-02", "NaT", "2019-05-01", "2021-01-01"], "M8[D]")
    found = answer("stats", str(tmp_path / "t"), "--concurrency", "1")
    assert (found["min"], found["max"], found["nan_count"]) == ("2019-05-01", "2021-01-01", 1)
    assert "mean" not in found


def test_stats_of_nothing_and_of_nan_are_null_in_json(tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "t"), shape=(4,), chunks=(2,), dtype="f4")
    array[:] = np.nan
    found = answer("stats", str(tmp_path / "t"), "--concurrency", "1")
    assert (found["count"], found["mean"], found["min"]) == (0, None, None)


def test_stats_of_text_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    zarr.create_array(str(tmp_path / "t"), shape=(4,), chunks=(2,), dtype="U3", zarr_format=2)
    assert "<U3" in sentence(run("stats", str(tmp_path / "t")), 2)


def test_stats_go_on_without_bad_chunks_and_say_so(corrupt: str) -> None:
    result = run("stats", corrupt, "--path", "good", "--retries", "0", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["count"] in (399, 400)
    assert "2 of 6 chunks could not be read" in result.stderr


@pytest.mark.cluster
def test_stats_on_a_cluster_that_runs_already(url: str, data: np.ndarray, local_cluster: LocalCluster) -> None:
    found = answer("stats", url, "--path", "good", "--scheduler", local_cluster.scheduler_address)
    assert found["mean"] == pytest.approx(np.nanmean(data), rel=1e-13)
    assert all(worker.startswith("tcp://") for worker in found["report"]["workers"])


# -- verify ---------------------------------------------------------------------------------------


def test_verify_is_content_with_a_good_array(url: str) -> None:
    result = run("verify", url, "--path", "deep/sparse")
    assert result.exit_code == 0
    assert "all 1 stored chunks" in result.stdout
    assert "3 are not stored" in result.stdout


def test_verify_names_each_bad_chunk_with_the_reason(corrupt: str, tmp_path: Path) -> None:
    file = tmp_path / "dead.jsonl"
    result = run("verify", corrupt, "--path", "good", "--retries", "0", "--dead-letters", str(file))
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith("bad chunk (1, 0): ")
    assert lines[1].startswith("bad chunk (2, 1): ")
    assert "2 of 6 chunks" in lines[2]
    letters = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda letter: letter["index"])
    assert [letter["index"] for letter in letters] == [[1, 0], [2, 1]]
    assert letters[0]["region"] == [[10, 20], [0, 10]]
    assert all(letter["attempts"] == 1 and letter["message"] for letter in letters)


def test_verify_names_a_folder_in_place_of_a_chunk(url: str) -> None:
    chunk = Path(url) / "good" / "c" / "1" / "0"
    chunk.unlink()
    chunk.mkdir()
    result = run("verify", url, "--path", "good", "--retries", "0")
    assert result.exit_code == 1
    assert "bad chunk (1, 0): " in result.stdout


def test_verify_as_json(corrupt: str) -> None:
    found = answer("verify", corrupt, "--path", "good", "--retries", "1", code=1)
    assert (found["chunks"], found["good"], found["not_stored"], found["bad"]) == (6, 4, 0, 2)
    assert {tuple(letter["index"]) for letter in found["report"]["dead_letters"]} == {(1, 0), (2, 1)}
    assert found["report"]["retries"] == 2


def test_progress_goes_to_standard_error(url: str) -> None:
    result = run("verify", url, "--path", "good", "--progress", "--concurrency", "1")
    assert "zds: 6/6 chunks" in result.stderr
    assert "zds:" not in result.stdout
    assert run("verify", url, "--path", "good", "--no-progress").stderr == ""


# -- as a process ---------------------------------------------------------------------------------

ZDS = [str(Path(sys.executable).with_name("zds"))]
MODULE = [sys.executable, "-m", "zarr_dask_stream"]


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return `start(*args)`, which runs a command in a session and a folder of its own, away from the source."""
    folder = tmp_path / "run"
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    started: list[subprocess.Popen[str]] = []

    def start(*args: str, **options: Any) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        process = subprocess.Popen(args, cwd=folder, env=environment, text=True, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_reader_that_has_seen_enough_ends_a_command_quietly(url: str, start: Start) -> None:
    process = start(*ZDS, "run", "builtins:repr", url, "--path", "good", "--concurrency", "1")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(30) == 141


@pytest.mark.cluster
def test_a_process_with_workers_exits_with_its_code_and_leaves_nothing(
    corrupt: str, tmp_path: Path, start: Start
) -> None:
    process = start(*MODULE, "verify", corrupt, "--path", "good", "--workers", "2", "--retries", "0", "--json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "")
    assert json.loads(out)["bad"] == 2
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name != "dask-scratch-space"] == []


@pytest.fixture
def hanging(url: str, http_store: HttpStore, fault_proxy: Callable[..., FaultProxy]) -> tuple[str, FaultProxy]:
    """The array "good" on a server that never answers for a chunk."""
    Path(url).rename(http_store.directory / "group.zarr")
    proxy = fault_proxy(http_store.url)
    proxy.inject("hang", times=100, match=r"/c/\d")
    return f"{proxy.url}/group.zarr/good", proxy


def wait_for(ready: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def send(process: subprocess.Popen[str], number: signal.Signals) -> None:
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: everybody gets it
    else:
        process.send_signal(number)


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline().strip()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("number", "workers", "code"),
    [
        (signal.SIGINT, [], 130),
        (signal.SIGTERM, [], 143),
        (signal.SIGHUP, [], 143),
        # Starting and ending processes takes long where others are busy too.
        pytest.param(signal.SIGINT, ["--workers", "2"], 130, marks=[pytest.mark.slow, pytest.mark.sample]),
    ],
)
def test_a_run_that_is_interrupted_twice_ends_soon_and_leaves_nothing(
    hanging: tuple[str, FaultProxy], start: Start, number: signal.Signals, workers: list[str], code: int
) -> None:
    url, proxy = hanging
    process = start(*ZDS, "stats", url, *workers)
    wait_for(lambda: proxy.counts["hang"], process)
    family = psutil.Process(process.pid).children(recursive=True)
    if number != signal.SIGHUP:  # nobody is there to wait for a run whose terminal was closed
        send(process, number)
        said = next_line(process)
        assert re.fullmatch(r"finishing \d chunks? in flight; press Ctrl-C again to stop at once", said)
    sent = time.monotonic()
    send(process, number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert time.monotonic() - sent < 10
    assert [line for line in err.splitlines() if line] == [f"Error: {'interrupted' if code == 130 else 'terminated'}"]
    assert psutil.wait_procs(family, timeout=5)[1] == []


@pytest.mark.cluster
def test_an_interrupt_while_workers_start_leaves_nothing(url: str, start: Start) -> None:
    process = start(*ZDS, "stats", url, "--path", "good", "--workers", "2")
    family: list[psutil.Process] = []

    def workers_start() -> bool:
        found = psutil.Process(process.pid).children(recursive=True)
        family[:] = [child for child in found if "spawn_main" in " ".join(child.cmdline())]
        return len(family) >= 1

    wait_for(workers_start, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    ours, _, theirs = err.partition("Traceback")
    assert [line for line in ours.splitlines() if line] == ["Error: interrupted"]
    # A worker that is caught while Python itself starts it finds its parent's semaphores gone, and says so.
    assert not theirs or ("spawn_main" in theirs and "zarr_dask_stream" not in theirs)
    assert psutil.wait_procs(family, timeout=5)[1] == []


def read_terminal(descriptor: int, until: Callable[[bytes], bool], timeout_s: float = 60.0) -> bytes:
    seen = b""
    deadline = time.monotonic() + timeout_s
    while not until(seen) and time.monotonic() < deadline:
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                seen += os.read(descriptor, 65536)
            except OSError:  # the other end is closed
                break
    return seen


def test_a_bar_on_the_terminal_and_results_in_the_pipe(hanging: tuple[str, FaultProxy], start: Start) -> None:
    url, proxy = hanging
    ours, theirs = pty.openpty()
    try:
        process = start(*ZDS, "stats", url, "--timeout", "30", stderr=theirs)
        drawn = read_terminal(ours, lambda seen: b"0/6 chunks" in seen)
        assert b"\x1b[?25l" in drawn
        wait_for(lambda: proxy.counts["hang"], process)
        process.send_signal(signal.SIGINT)
        drawn += read_terminal(ours, lambda seen: b"in flight" in seen, 5)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
        drawn += read_terminal(ours, lambda seen: b"interrupted" in seen, 5)
    finally:
        os.close(theirs)
        os.close(ours)
    assert (process.returncode, out) == (130, "")
    assert drawn.rindex(b"\x1b[?25h") > drawn.rindex(b"\x1b[?25l")
    assert drawn.rstrip().endswith(b"interrupted")
