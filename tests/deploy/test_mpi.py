"""The MPI deployment on a real MPI: its script makes scheduler, client and workers of the processes of one job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.scene import write_rows
from realparts.packages import need_command, python_with

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def python() -> Path:
    return Path(python_with(DEPLOY / "mpi" / "requirements.txt"))


def mpirun(python: Path, folder: Path, *words: str, processes: int = 4, **env: str) -> subprocess.CompletedProcess[str]:
    launcher = [str(python.parent / "mpirun"), "--oversubscribe", "-n", str(processes)]
    exported = [word for name in env for word in ("-x", name)]
    script = [str(python), str(DEPLOY / "mpi" / "run.py"), "--interface", "lo", "--scratch", str(folder)]
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Open MPI asks of root to say that it is meant, twice.
    twice = {f"{part}_ALLOW_RUN_AS_ROOT{end}": "1" for part in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    return subprocess.run(
        [*launcher, *exported, *script, *words],
        cwd=folder,
        env={**os.environ, "PATH": programs, "PYTHONWARNINGS": "ignore", **twice, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )


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
