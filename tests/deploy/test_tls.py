"""The plain cluster of deploy/tcp with certificates: hosts that are network namespaces, cables pulled, strangers."""

from __future__ import annotations

import json
import os
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chaos.scene import write_rows
from deploy.midrun import COUNT, answer_in, stats, wait_for_progress
from realparts.cluster import TcpCluster
from realparts.namespaces import Host, run_network
from realparts.packages import need_command, need_namespaces
from realparts.process import Process, wait_until

TCP = Path(__file__).resolve().parents[2] / "deploy" / "tcp"
#: Dask's own default is 30 s; it refuses less than 10 s.
SOON = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s"}


def make_certificates(folder: Path, *options: str) -> Path:
    need_command("openssl", "openssl")
    subprocess.run([sys.executable, str(TCP / "certificates.py"), str(folder), *options], check=True)
    return folder


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls") / "certificates")


def settings(certificates: Path, role: str) -> dict[str, str]:
    return {"DASK_CONFIG": str(certificates / role)}


# -- the certificates ---------------------------------------------------------------------------------


def test_keys_are_their_owners_alone_and_never_overwritten(certificates: Path) -> None:
    keys = list(certificates.rglob("key.pem"))
    assert len(keys) == 4
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert {stat.S_IMODE(key.parent.stat().st_mode) for key in keys} == {0o700}
    before = [key.read_bytes() for key in keys]
    script = [sys.executable, str(TCP / "certificates.py"), str(certificates)]
    again = subprocess.run(script, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "never overwritten" in again.stderr
    assert [key.read_bytes() for key in keys] == before


@pytest.mark.parametrize("role", ["scheduler", "worker", "client"])
def test_the_folder_of_a_role_is_all_that_its_hosts_need(certificates: Path, role: str) -> None:
    folder = certificates / role
    assert {file.name for file in folder.iterdir()} == {"ca.pem", "cert.pem", "key.pem", "dask.yaml"}
    context = ssl.create_default_context(cafile=folder / "ca.pem")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")  # refuses a key of another certificate
    subprocess.run(["openssl", "verify", "-CAfile", str(folder / "ca.pem"), str(folder / "cert.pem")], check=True)


def test_the_settings_can_name_another_place(tmp_path: Path) -> None:
    made = make_certificates(tmp_path / "made", "--place", "/etc/dask-tls")
    assert "cert: /etc/dask-tls/worker/cert.pem" in (made / "worker" / "dask.yaml").read_text()


# -- one host -----------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_run_with_tls(tmp_path: Path, certificates: Path) -> None:
    data = write_rows(str(tmp_path / "rows.zarr"), 20)
    command = [sys.executable, str(TCP / "run.py"), "--tls", str(certificates), "--"]
    job = [sys.executable, "-m", "zarr_dask_stream", "stats", str(tmp_path / "rows.zarr"), "--json"]
    path = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    command += [*job, "--scheduler", "{scheduler}"]
    done = subprocess.run(command, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["mean"] == data.mean()
    assert all(worker.startswith("tls://127.0.0.1:") for worker in answer["report"]["workers"])


@pytest.mark.cluster
def test_strangers_are_refused(tmp_path: Path, certificates: Path) -> None:
    url = str(tmp_path / "rows.zarr")
    write_rows(url, 20)
    others = make_certificates(tmp_path / "others")
    with ExitStack() as stack:
        cluster = TcpCluster(tmp_path, settings(certificates, "scheduler"), sys.executable, stack)
        cluster.start_scheduler("--protocol", "tls")
        address, plain = cluster.address, cluster.address.replace("tls://", "tcp://")
        assert address.startswith("tls://")
        clients = {
            "no certificate": (address, {}),
            "others' certificate": (address, settings(others, "client")),
            "no TLS": (plain, {}),
            "certificate but no TLS": (plain, settings(certificates, "client")),
        }
        started = {}
        for name, (place, env) in clients.items():
            words = ["-m", "zarr_dask_stream", "stats", url, "--scheduler", place]
            started[name] = Process.start(name, [sys.executable, *words], folder=tmp_path, env=env)
            stack.callback(started[name].end)
        # A worker of others gets no work either.
        words = ["-m", "dask", "worker", address, "--host", "127.0.0.1", "--no-dashboard", "--no-nanny"]
        words += ["--local-directory", str(tmp_path), "--death-timeout", "5"]
        worker = Process.start("worker", [sys.executable, *words], folder=tmp_path, env=settings(others, "worker"))
        stack.callback(worker.end)

        everybody = [worker, *started.values()]
        wait_until(lambda: not any(one.alive for one in everybody), what="strangers to give up", timeout_s=60)
        assert worker.popen.returncode != 0
        for name, client in started.items():
            assert client.popen.returncode == 3, (name, client.tail())
            assert "no Dask scheduler answers at" in client.tail(), name
        assert cluster.scheduler.alive
        assert "Register worker" not in cluster.scheduler.tail(20_000)


# -- several hosts ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A scheduler and two workers behind TLS, and a user, each a host of its own."""

    hosts: dict[str, Host]
    address: str
    scheduler: Process
    folder: Path
    certificates: Path

    def job(self, name: str, url: Path, ledger: Path) -> Process:
        """Start the statistics on the user's host."""
        env = {**SOON, **settings(self.certificates, "client")}
        words = stats(url, ledger, self.address)
        return self.hosts["user"].start(name, words, folder=self.folder, env=env, module="zarr_dask_stream")


@contextmanager
def run_site(folder: Path, certificates: Path) -> Iterator[Site]:
    need_namespaces()
    with ExitStack() as stack:
        hosts = stack.enter_context(run_network(["scheduler", "near", "far", "user"]))
        place = ["--protocol", "tls", "--host", hosts["scheduler"].address, "--port", "8786"]
        quiet = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        env = {**SOON, **settings(certificates, "scheduler")}
        scheduler = hosts["scheduler"].start("scheduler", ["scheduler", *place, *quiet], folder=folder, env=env)
        stack.callback(scheduler.end)
        address = f"tls://{hosts['scheduler'].address}:8786"
        for name in ("near", "far"):
            own = ["--host", hosts[name].address, "--name", name, "--nthreads", "1", "--no-dashboard", "--no-nanny"]
            command = ["worker", address, *own, "--local-directory", str(folder)]
            env = {**SOON, **settings(certificates, "worker")}
            stack.callback(hosts[name].start(name, command, folder=folder, env=env).end)
        scheduler.wait_ready(lambda: scheduler.tail(50_000).count("Register worker") >= 2, timeout_s=60)
        yield Site(hosts, address, scheduler, folder, certificates)


def answer_of(job: Process) -> dict[str, Any]:
    """Return what the job printed once it has ended well."""
    wait_until(lambda: not job.alive, what="the job to end", timeout_s=90)
    assert job.popen.returncode == 0, job.tail()
    return answer_in(job.log.read_text())


@pytest.mark.cluster
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_link_that_is_cut_costs_no_chunk(tmp_path: Path, certificates: Path) -> None:
    url, ledger = tmp_path / "rows.zarr", tmp_path / "stats.ledger"
    data = write_rows(str(url), COUNT)
    with run_site(tmp_path, certificates) as site:
        job = site.job("job", url, ledger)
        try:
            wait_for_progress(job, ledger)
            site.hosts["far"].unplug()
            answer = answer_of(job)
        finally:
            job.end()
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
    report = answer["report"]
    assert report["emitted"] == report["total"] == COUNT
    assert report["batches_lost"] > 0
    assert {worker.partition("://")[0] for worker in report["workers"]} == {"tls"}


@pytest.mark.cluster
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_job_whose_host_dies_goes_on_from_its_ledger(tmp_path: Path, certificates: Path) -> None:
    url, ledger = tmp_path / "rows.zarr", tmp_path / "stats.ledger"
    data = write_rows(str(url), COUNT)
    with run_site(tmp_path, certificates) as site:
        job = site.job("first", url, ledger)
        try:
            wait_for_progress(job, ledger)
        finally:
            site.hosts["user"].unplug()  # nobody hears of the death: the host is just gone
            job.kill()
        site.hosts["user"].plug()
        again = site.job("again", url, ledger)
        try:
            answer = answer_of(again)
        finally:
            again.end()
    assert 0 < answer["report"]["resumed"] < COUNT
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
