"""The SSH deployment on a real SSH server: its script starts a cluster over it, behind TLS, and ends it."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from chaos.scene import write_rows
from deploy.listening import SCRIPT
from deploy.midrun import COUNT, answer_in, stats, wait_for_progress
from realparts.packages import need_debian, python_with
from realparts.process import Process, free_ports, wait_until

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

pytestmark = [pytest.mark.cluster, pytest.mark.root, pytest.mark.slow]

_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/user.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PrintMotd no
"""


@dataclass(frozen=True)
class Server:
    """A running SSH server that lets in whoever has the key."""

    port: int
    key: Path
    known_hosts: Path


@contextmanager
def run_sshd(folder: Path) -> Iterator[Server]:
    for name in ("host", "user"):
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(make, check=True)
    (port,) = free_ports(1)
    (folder / "sshd_config").write_text(_CONFIG.format(port=port, folder=folder))
    known = folder / "known_hosts"
    known.write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    Path("/run/sshd").mkdir(exist_ok=True)  # where the server locks its children in; Debian's service makes it too
    command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(folder / "sshd_config")]
    process = Process.start("sshd", command, folder=folder)
    try:
        process.wait_ready(lambda: "Server listening" in process.tail())
        yield Server(port, folder / "user", known)
    finally:
        process.end()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need_debian("openssh-server", "openssh-client", "openssl")
    with run_sshd(tmp_path_factory.mktemp("ssh")) as server:
        yield server


def script(server: Server, *words: str) -> list[str]:
    python = python_with(DEPLOY / "ssh" / "requirements.txt")
    way = ["--port", str(server.port), "--user", getpass.getuser(), "--key", str(server.key)]
    return [python, str(DEPLOY / "ssh" / "run.py"), *way, "--known-hosts", str(server.known_hosts), *words]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore"}


def still_running(python: Path) -> list[int]:
    """Return the processes of clusters that were started over SSH by this interpreter."""
    lines = ((process.pid, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    return [pid for pid, words in lines if str(python) in words and "distributed.cli.dask_spec" in words]


@pytest.mark.sample
def test_stats_over_ssh(server: Server, tmp_path: Path) -> None:
    data = write_rows(str(tmp_path / "rows.zarr"), 50)
    tls = tmp_path / "tls"
    subprocess.run([sys.executable, str(DEPLOY / "tcp" / "certificates.py"), str(tls)], check=True)
    job = ["zds", "stats", str(tmp_path / "rows.zarr"), "--checkpoint", str(tmp_path / "stats.ledger"), "--json"]
    hosts = ["--tls", str(tls), "--interface", "lo", "--scratch", str(tmp_path), "127.0.0.1", "127.0.0.1", "--"]
    command = script(server, *hosts, *job, "--scheduler", "{scheduler}")
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
    assert all(worker.startswith("tls://127.0.0.1:") for worker in answer["report"]["workers"])
    wait_until(lambda: not still_running(Path(command[0])), what="the end of the remote processes", timeout_s=30)


def test_a_server_of_another_key_is_not_trusted(server: Server, tmp_path: Path) -> None:
    wrong = Path(tmp_path / "known_hosts")
    wrong.write_text(server.known_hosts.read_text().rpartition(" ")[0].replace("A", "B", 1) + "\n")
    command = script(Server(server.port, server.key, wrong), "--no-tls", "127.0.0.1", "--", "true")
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "not trusted" in done.stderr.lower()


def test_one_has_to_choose_between_tls_and_none(server: Server) -> None:
    command = script(server, "127.0.0.1", "--", "true")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--tls --no-tls" in done.stderr


def test_everybody_listens_where_asked_alone(server: Server, tmp_path: Path) -> None:
    hosts = ["--no-tls", "--interface", "lo", "--scratch", str(tmp_path), "127.0.0.1", "--"]
    command = script(server, *hosts, sys.executable, SCRIPT, "{scheduler}", "1")
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said: dict[str, dict[str, list[str]]] = json.loads(done.stdout)
    assert len(said) == 2
    assert {address for one in said.values() for address in one["all"]} == {"127.0.0.1"}


def test_a_folder_without_certificates_is_refused_at_once(server: Server, tmp_path: Path) -> None:
    command = script(server, "--tls", str(tmp_path), "127.0.0.1", "--", "true")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--tls takes a folder that certificates.py has made" in done.stderr


@pytest.mark.timeout(180)
def test_killed_without_warning_it_leaves_nothing_on_the_hosts_and_goes_on(server: Server, tmp_path: Path) -> None:
    url, ledger = tmp_path / "rows.zarr", tmp_path / "stats.ledger"
    data = write_rows(str(url), COUNT)
    hosts = ["--no-tls", "--interface", "lo", "--scratch", str(tmp_path), "127.0.0.1", "127.0.0.1", "--"]
    command = script(server, *hosts, "zds", *stats(url, ledger, "{scheduler}"))
    first = Process.start("first", command, folder=tmp_path, env=environment())
    try:
        wait_for_progress(first, ledger)
    finally:
        first.popen.kill()
        first.popen.wait()
    wait_until(lambda: not still_running(Path(command[0])), what="the end of the remote processes", timeout_s=30)
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = answer_in(done.stdout)
    assert 0 < answer["report"]["resumed"] < COUNT
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
