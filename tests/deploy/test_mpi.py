"""The MPI deployment on a real MPI: its script makes scheduler, client and workers of the processes of one job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from chaos.scene import write_rows
from deploy.listening import SCRIPT
from deploy.midrun import COUNT, answer_in, stats, wait_for_progress
from realparts.packages import need_command, python_with
from realparts.process import Process, wait_until

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def python() -> Path:
    return Path(python_with(DEPLOY / "mpi" / "requirements.txt"))


def command(
    python: Path, folder: Path, *words: str, processes: int = 4, **env: str
) -> tuple[list[str], dict[str, str]]:
    """Return a command of `mpirun` and its environment."""
    launcher = [str(python.parent / "mpirun"), "--oversubscribe", "-n", str(processes)]
    exported = [word for name in env for word in ("-x", name)]
    script = [str(python), str(DEPLOY / "mpi" / "run.py"), "--interface", "lo", "--scratch", str(folder)]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Open MPI asks of root to say that it is meant, twice.
    twice = {f"{part}_ALLOW_RUN_AS_ROOT{end}": "1" for part in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    full = {**os.environ, "PATH": programs, "PYTHONWARNINGS": "ignore", **twice, **env}
    return [*launcher, *exported, *script, *words], full


def mpirun(python: Path, folder: Path, *words: str, processes: int = 4, **env: str) -> subprocess.CompletedProcess[str]:
    line, full = command(python, folder, *words, processes=processes, **env)
    return subprocess.run(line, cwd=folder, env=full, capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.sample
def test_stats_as_an_mpi_job(python: Path, tmp_path: Path) -> None:
    data = write_rows(str(tmp_path / "rows.zarr"), 50)
    tls = tmp_path / "tls"
    need_command("openssl", "openssl")
    subprocess.run([sys.executable, str(DEPLOY / "tcp" / "certificates.py"), str(tls)], check=True)
    job = ["zds", "stats", str(tmp_path / "rows.zarr"), "--checkpoint", str(tmp_path / "stats.ledger"), "--json"]
    words = ["--protocol", "tls", "--", *job, "--scheduler", "{scheduler}"]
    done = mpirun(python, tmp_path, *words, DASK_CONFIG=str(tls))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
    assert all(worker.startswith("tls://127.0.0.1:") for worker in answer["report"]["workers"])


def test_the_exit_code_is_the_commands(python: Path, tmp_path: Path) -> None:
    done = mpirun(python, tmp_path, "--", "zds", "stats", "nowhere.zarr", "--scheduler", "{scheduler}", processes=3)
    assert done.returncode == 3, done.stderr
    assert "nowhere.zarr" in done.stderr


def test_everybody_listens_where_asked_alone(python: Path, tmp_path: Path) -> None:
    done = mpirun(python, tmp_path, "--", sys.executable, SCRIPT, "{scheduler}", "1", processes=3)
    assert done.returncode == 0, done.stderr
    said: dict[str, dict[str, list[str]]] = json.loads(done.stdout)
    assert len(said) == 2
    assert {address for one in said.values() for address in one["http"]} == {"127.0.0.1"}  # MPI has ports of its own


@pytest.mark.timeout(180)
def test_a_job_that_lost_a_process_goes_on_from_its_ledger(python: Path, tmp_path: Path) -> None:
    url, ledger = tmp_path / "rows.zarr", tmp_path / "stats.ledger"
    data = write_rows(str(url), COUNT)
    words = ["--", "zds", *stats(url, ledger, "{scheduler}")]
    line, env = command(python, tmp_path, *words)
    first = Process.start("first", line, folder=tmp_path, env=env)
    try:
        wait_for_progress(first, ledger)
        worker = next(process for process in ranks(tmp_path) if process.environ().get("OMPI_COMM_WORLD_RANK") == "2")
        worker.kill()
        wait_until(lambda: not first.alive, what="the end of the MPI job", timeout_s=30)
        assert first.popen.returncode != 0
    finally:
        first.end()
    wait_until(lambda: not ranks(tmp_path), what="the end of all its processes", timeout_s=30)
    done = mpirun(python, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    answer = answer_in(done.stdout)
    assert 0 < answer["report"]["resumed"] < COUNT
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())


def ranks(folder: Path) -> list[psutil.Process]:
    """Return the processes of MPI jobs in a folder, and the commands that they run."""
    found = psutil.process_iter(["cmdline"])
    return [one for one in found if any(str(folder) in word for word in one.info["cmdline"] or [])]
