"""The deployments under deploy/ run for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from chaos.scene import write_rows
from cluster.streaming import CHUNK_COUNT, pattern, write_array
from deploy.listening import SCRIPT
from deploy.midrun import COUNT, answer_in, stats, wait_for_progress
from realparts.process import Process, wait_until

pytestmark = [pytest.mark.cluster]

RUN = Path(__file__).resolve().parents[2] / "deploy" / "tcp" / "run.py"


def command(logs: Path, *job: str) -> list[str]:
    return [sys.executable, str(RUN), "--workers", "2", "--logs", str(logs), "--", *job]


def environment() -> dict[str, str]:
    """Let `dask` and `zds` be those of the interpreter that runs the tests."""
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def run(folder: Path, *job: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder / "logs", *job), cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )


def still_running(logs: Path) -> list[Sequence[str]]:
    """Name the scheduler, workers and nannies of the cluster with these logs."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "dask" in " ".join(words) and any(str(logs) in word for word in words):
            found.append(words)
    return found


def test_stats_job_on_separate_processes(tmp_path: Path) -> None:
    write_array(str(tmp_path / "array.zarr"))
    done = run(tmp_path, "zds", "stats", str(tmp_path / "array.zarr"), "--scheduler", "{scheduler}", "--json")
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert answer["mean"] == pattern().mean()
    assert (answer["min"], answer["max"]) == (0, pattern().max())
    assert answer["report"]["emitted"] == CHUNK_COUNT
    assert all(worker.startswith("tcp://127.0.0.1:") for worker in answer["report"]["workers"])
    assert not still_running(tmp_path / "logs")


def test_exit_code_is_the_jobs(tmp_path: Path) -> None:
    done = run(tmp_path, "zds", "stats", str(tmp_path / "nowhere.zarr"), "--scheduler", "{scheduler}")
    assert done.returncode == 3, done.stderr
    assert "nowhere.zarr" in done.stderr
    assert not still_running(tmp_path / "logs")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_signal_ends_job_and_cluster(tmp_path: Path, number: signal.Signals, code: int) -> None:
    logs = tmp_path / "logs"
    job = [sys.executable, "-c", "import pathlib, time; pathlib.Path('began').touch(); time.sleep(60)"]
    process = Process.start("run", command(logs, *job), folder=tmp_path, env=environment())
    try:
        process.wait_ready((tmp_path / "began").exists)
        assert still_running(logs)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does, to everybody in the foreground
        else:
            process.popen.send_signal(number)
        wait_until(lambda: not process.alive, what="the end of the cluster", timeout_s=30.0)
        assert process.popen.returncode == code
        assert not still_running(logs)
    finally:
        process.end()


def test_cluster_that_can_not_start_says_why(tmp_path: Path) -> None:
    wrong = [sys.executable, str(RUN), "--host", "198.51.100.1", "--logs", str(tmp_path / "logs"), "--", "true"]
    done = subprocess.run(wrong, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "the scheduler did not start" in done.stderr
    assert not still_running(tmp_path / "logs")


def test_command_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    done = run(tmp_path, "no-such-command")
    assert done.returncode == 3
    assert "no command no-such-command here: activate the environment" in done.stderr


def test_everybody_listens_on_loopback_alone(tmp_path: Path) -> None:
    done = run(tmp_path, sys.executable, SCRIPT, "{scheduler}", "2")
    assert done.returncode == 0, done.stderr
    said: dict[str, dict[str, list[str]]] = json.loads(done.stdout)
    assert len(said) == 3
    assert {address for one in said.values() for address in one["all"]} == {"127.0.0.1"}


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells a process that its parent is dead")
def test_killed_without_warning_it_leaves_no_cluster_and_goes_on_from_the_ledger(tmp_path: Path) -> None:
    url, ledger, logs = tmp_path / "rows.zarr", tmp_path / "stats.ledger", tmp_path / "logs"
    data = write_rows(str(url), COUNT)
    job = command(logs, "zds", *stats(url, ledger, "{scheduler}"))
    first = Process.start("first", job, folder=tmp_path, env=environment())
    try:
        wait_for_progress(first, ledger)
    finally:
        first.popen.kill()
        first.popen.wait()
    wait_until(lambda: not still_running(logs), what="the end of scheduler and workers", timeout_s=30.0)
    done = subprocess.run(job, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = answer_in(done.stdout)
    assert 0 < answer["report"]["resumed"] < COUNT
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
