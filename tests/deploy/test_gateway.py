"""The dask-gateway deployment on a real gateway: server, proxy, clusters that it starts, keys that it makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from chaos.scene import write_rows
from deploy.midrun import COUNT, RATE, answer_in, wait_for_progress
from realparts.cluster import importable_tests
from realparts.packages import python_with
from realparts.process import Process, free_ports

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
PASSWORD = "correct horse"

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(240)]


@dataclass(frozen=True)
class Gateway:
    """A running gateway."""

    python: Path
    address: str
    process: Process
    folder: Path

    def script(self, folder: Path, password: str, *command: str) -> list[str]:
        """Return the deployment's script with what it takes to run a command on a cluster of this gateway."""
        secret = folder / "password"
        secret.write_text(password)
        script = [str(self.python), str(DEPLOY / "gateway" / "run.py"), "--gateway", self.address]
        return [*script, "--password-file", str(secret), "--workers", "2", "--", *command]

    def run(self, folder: Path, password: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Run it."""
        words = self.script(folder, password, *command)
        env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=150)


@contextmanager
def run_gateway(python: Path, folder: Path) -> Iterator[Gateway]:
    public, private = (f"127.0.0.1:{port}" for port in free_ports(2))
    env = {"GATEWAY_PUBLIC": public, "GATEWAY_PRIVATE": private, "GATEWAY_PASSWORD": PASSWORD}
    paths = os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [str(python), "-m", "dask_gateway_server", "--config", str(DEPLOY / "gateway" / "gateway_config.py")]
    own = {"PATH": paths, "PYTHONPATH": importable_tests(), "PYTHONWARNINGS": "ignore", "TMPDIR": str(folder)}
    process = Process.start("gateway", command, folder=folder, env={**own, **env})
    try:
        process.wait_ready(lambda: "Dask-Gateway server started" in process.tail(10_000), timeout_s=60)
        yield Gateway(python, f"http://{public}", process, folder)
    finally:
        process.end(grace_s=30)  # it ends its clusters


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    python = Path(python_with(DEPLOY / "gateway" / "requirements.txt"))
    with run_gateway(python, tmp_path_factory.mktemp("gateway")) as gateway:
        yield gateway


def test_stats_on_a_cluster_of_a_gateway(gateway: Gateway, tmp_path: Path) -> None:
    data = write_rows(str(tmp_path / "rows.zarr"), 50)
    job = ["stats", str(tmp_path / "rows.zarr"), "--checkpoint", str(tmp_path / "stats.ledger"), "--json"]
    done = gateway.run(tmp_path, PASSWORD, *job)
    assert done.returncode == 0, done.stderr + gateway.process.tail()
    answer = json.loads(done.stdout)
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
    assert all(worker.startswith("tls://") for worker in answer["report"]["workers"])
    again = gateway.run(tmp_path, PASSWORD, *job)
    assert json.loads(again.stdout)["report"]["resumed"] == 50, again.stderr


def test_exit_codes(gateway: Gateway, tmp_path: Path) -> None:
    done = gateway.run(tmp_path, PASSWORD, "stats", str(tmp_path / "nowhere.zarr"))
    assert done.returncode == 3, done.stderr
    assert "nowhere.zarr" in done.stderr
    refused = gateway.run(tmp_path, "wrong", "stats", str(tmp_path / "nowhere.zarr"))
    assert refused.returncode == 3, refused.stderr
    assert "run.py:" in refused.stderr


def test_killed_without_warning_it_goes_on_from_its_ledger(gateway: Gateway, tmp_path: Path) -> None:
    url, ledger = tmp_path / "rows.zarr", tmp_path / "stats.ledger"
    data = write_rows(str(url), COUNT)
    job = ["stats", str(url), "--checkpoint", str(ledger), "--rate-limit", f"{RATE}/s", "--json"]
    words = gateway.script(tmp_path, PASSWORD, *job)
    first = Process.start("first", words, folder=tmp_path, env={"PYTHONWARNINGS": "ignore"})
    try:
        wait_for_progress(first, ledger)
    finally:
        first.kill()
    done = gateway.run(tmp_path, PASSWORD, *job)  # on a cluster of its own
    assert done.returncode == 0, done.stderr
    answer = answer_in(done.stdout)
    assert 0 < answer["report"]["resumed"] < COUNT
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
