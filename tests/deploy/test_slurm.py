"""The Slurm deployment on a real Slurm: its script, its batch job, jobs that are cancelled in mid-run."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chaos.scene import write_rows
from deploy.listening import SCRIPT
from deploy.midrun import COUNT, RATE, answer_in, has_progress, stats, wait_for_progress
from realparts.packages import need_debian, python_with
from realparts.process import Process, wait_until
from realparts.slurm import DEBIAN, Slurm, run_slurm

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
WORKERS = ["--interface", "lo", "--memory", "1GB"]

pytestmark = [pytest.mark.cluster, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass(frozen=True)
class Login:
    """A place to submit jobs from."""

    slurm: Slurm
    python: str
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """With `zds` of the tests, and the Python that has dask-jobqueue before it."""
        places = [str(Path(self.python).parent), str(Path(sys.executable).parent), os.environ["PATH"]]
        # A worker that is lost is missed after 15 s unless this says otherwise.
        soon = {"DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "1s"}
        return {"PATH": os.pathsep.join(places), "PYTHONWARNINGS": "ignore", **soon, **self.slurm.env}

    def start(self, name: str, *words: str) -> Process:
        """Run the deployment's script in the foreground."""
        script = [self.python, str(DEPLOY / "slurm" / "run.py"), *WORKERS]
        return Process.start(name, [*script, *words], folder=self.folder, env=self.env)

    def submit(self, url: Path, ledger: Path, *words: str) -> str:
        """Submit the deployment's batch job and return its number."""
        options = ["--parsable", "--mem=500M", f"--output={self.folder}/batch.out", f"--error={self.folder}/batch.err"]
        own = {"DEPLOY": str(DEPLOY), "WORKERS": " ".join([*WORKERS, "--jobs", "2"])}
        command = ["sbatch", *options, str(DEPLOY / "slurm" / "stats.sbatch"), str(url), str(ledger), *words]
        return self.slurm.ask(*command, env={**self.env, **own}, cwd=self.folder)

    def end_of(self, job: str) -> tuple[str, dict[str, Any]]:
        """Wait until a batch job has ended, and return its state and what it printed last."""
        ended = {"PENDING", "RUNNING", "COMPLETING"}.isdisjoint
        wait_until(lambda: ended({self.slurm.state_of(job)}), what="the end of the job", timeout_s=120)
        said = (self.folder / "batch.out").read_text()
        assert said, (self.folder / "batch.err").read_text()
        return self.slurm.state_of(job), answer_in(said[said.rindex("\n{") if "\n{" in said else 0 :])


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    need_debian(*DEBIAN, "openssl")
    with run_slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture
def login(slurm: Slurm, tmp_path: Path) -> Iterator[Login]:
    yield Login(slurm, python_with(DEPLOY / "slurm" / "requirements.txt"), tmp_path)
    wait_until(lambda: not slurm.jobs(), what="all workers to be given back", timeout_s=30)
    assert not list(tmp_path.glob(".zds-slurm-*"))  # the keys of the run


@pytest.mark.sample
def test_the_batch_job(login: Login) -> None:
    url, ledger = login.folder / "rows.zarr", login.folder / "stats.ledger"
    data = write_rows(str(url), COUNT)
    state, answer = login.end_of(login.submit(url, ledger))
    assert state == "COMPLETED"
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
    assert all(worker.startswith("tls://127.0.0.1:") for worker in answer["report"]["workers"])


def test_a_batch_job_out_of_time_goes_on_when_it_is_submitted_again(login: Login) -> None:
    url, ledger = login.folder / "rows.zarr", login.folder / "stats.ledger"
    data = write_rows(str(url), COUNT)
    slowly = ["--rate-limit", f"{RATE}/s"]
    job = login.submit(url, ledger, *slowly)
    wait_until(lambda: has_progress(ledger), what="chunks in the ledger", timeout_s=90)
    login.slurm.ask("scancel", "--batch", "--signal=TERM", job)  # as Slurm does, two minutes before the time is up
    state, answer = login.end_of(job)
    assert state == "FAILED"  # exit code 143: what depends on `afternotok` comes now
    assert 0 < answer["report"]["emitted"] < COUNT
    state, answer = login.end_of(login.submit(url, ledger, *slowly))
    assert state == "COMPLETED"
    assert 0 < answer["report"]["resumed"] < COUNT
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())


def test_a_worker_job_that_is_cancelled_is_replaced(login: Login) -> None:
    url, ledger = login.folder / "rows.zarr", login.folder / "stats.ledger"
    data = write_rows(str(url), COUNT)
    run = login.start("run", "--jobs", "2", "--", "zds", *stats(url, ledger, "{scheduler}"))
    try:
        wait_until(lambda: len(login.slurm.running("dask-worker")) == 2, what="two workers", timeout_s=60)
        wait_for_progress(run, ledger)
        first = login.slurm.running("dask-worker")
        login.slurm.ask("scancel", first[0])
        wait_until(
            lambda: not run.alive or bool({*login.slurm.running("dask-worker")} - {*first}),
            what="another worker",
            timeout_s=60,
        )
        assert run.alive, run.tail()
        wait_until(lambda: not run.alive, what="the end of the run", timeout_s=90)
        assert run.popen.returncode == 0, run.tail()
        answer = answer_in(run.log.read_text())
    finally:
        run.end(grace_s=20)
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
    assert answer["report"]["emitted"] == COUNT


def test_a_client_that_dies_leaves_no_workers(login: Login) -> None:
    url, ledger = login.folder / "rows.zarr", login.folder / "stats.ledger"
    write_rows(str(url), COUNT)
    run = login.start("run", "--jobs", "2", "--", "zds", *stats(url, ledger, "{scheduler}"))
    try:
        wait_for_progress(run, ledger)
    finally:
        run.kill()
    wait_until(lambda: not login.slurm.jobs(), what="the workers to end by themselves", timeout_s=90)
    (keys,) = login.folder.glob(".zds-slurm-*")
    assert keys.stat().st_mode & 0o077 == 0
    shutil.rmtree(keys)


def test_everybody_listens_where_asked_alone(login: Login) -> None:
    asked = login.start("asked", "--jobs", "2", "--", sys.executable, SCRIPT, "{scheduler}", "2")
    try:
        wait_until(lambda: not asked.alive, what="the end of the run", timeout_s=90)
        assert asked.popen.returncode == 0, asked.tail()
        said = next(json.loads(line) for line in asked.log.read_text().splitlines() if line.startswith("{"))
    finally:
        asked.end(grace_s=20)
    assert len(said) == 3
    assert {address for one in said.values() for address in one["all"]} == {"127.0.0.1"}


def test_what_slurm_refuses_is_said_at_once(login: Login) -> None:
    wrong = login.start("wrong", "--partition", "nowhere", "--", "true")
    try:
        wait_until(lambda: not wrong.alive, what="the end of the run", timeout_s=30)
        assert wrong.popen.returncode == 3
        assert "Slurm would refuse the jobs of the workers" in wrong.tail()
        assert "nowhere" in wrong.tail() or "partition" in wrong.tail()
        assert "sinfo --long" in wrong.tail()  # where to see what there is
    finally:
        wrong.end(grace_s=20)
