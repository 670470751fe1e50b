"""The real parts do what the tests that lean on them believe."""

import os
import random
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import IncompleteRead, RemoteDisconnected
from pathlib import Path

import pytest
import s3fs
from distributed import Client, LocalCluster

from realparts.cluster import TcpCluster
from realparts.fault_proxy import FaultProxy, Faults
from realparts.http_files import HttpStore, parse_range
from realparts.leaks import LeakCheck
from realparts.process import Process, free_ports, wait_until
from realparts.s3 import S3Server

StartProxy = Callable[..., FaultProxy]


def fetch(url: str, *, timeout_s: float = 5.0, **headers: str) -> bytes:
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return bytes(answer.read())


@pytest.fixture
def served(http_store: HttpStore) -> HttpStore:
    (http_store.directory / "data").write_bytes(bytes(range(100)))
    return http_store


def test_free_ports_are_distinct_and_unused() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20


def test_wait_until_says_what_it_waited_for() -> None:
    with pytest.raises(TimeoutError, match="a miracle"):
        wait_until(lambda: False, what="a miracle", timeout_s=0.05, every_s=0.01)


def test_process_that_dies_early_is_reported_with_its_output(tmp_path: Path) -> None:
    process = Process.start("sad", ["sh", "-c", "echo no luck; exit 3"], folder=tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)code 3.*no luck"):
        process.wait_ready(lambda: False)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-9", (0, 10)),
        ("bytes=90-", (90, 100)),
        ("bytes=-5", (95, 100)),
        ("bytes=-500", (0, 100)),
        ("bytes=95-500", (95, 100)),
        ("bytes=100-", None),
        ("bytes=-0", None),
        ("bytes=-", None),
        ("lines=1-2", None),
    ],
)
def test_ranges(header: str, expected: tuple[int, int] | None) -> None:
    assert parse_range(header, 100) == expected


def test_http_store_serves_files_and_ranges(served: HttpStore) -> None:
    whole = bytes(range(100))
    assert fetch(f"{served.url}/data") == whole
    assert fetch(f"{served.url}/data", Range="bytes=10-19") == whole[10:20]
    assert fetch(f"{served.url}/data", Range="bytes=-5") == whole[-5:]
    assert served.requests[1] == ("GET", "/data", "bytes=10-19")


@pytest.mark.parametrize(("path", "code"), [("data", 416), ("nothing", 404)])
def test_http_store_refuses(served: HttpStore, path: str, code: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(f"{served.url}/{path}", Range="bytes=100-200")
    with caught.value:
        assert caught.value.code == code


def test_proxy_passes_through_what_it_does_not_break(served: HttpStore, fault_proxy: StartProxy) -> None:
    proxy = fault_proxy(served.url)
    assert fetch(f"{proxy.url}/data") == bytes(range(100))
    assert proxy.requests == [("GET /data", "ok")]
    assert proxy.bytes_out > 100


def test_proxy_slows_down(served: HttpStore, fault_proxy: StartProxy) -> None:
    proxy = fault_proxy(served.url)
    proxy.inject("slow_down")
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(f"{proxy.url}/data")
    with caught.value as answer:
        assert answer.code == 503
        assert b"<Code>SlowDown</Code>" in answer.read()
    assert fetch(f"{proxy.url}/data") == bytes(range(100))
    assert proxy.counts == {"slow_down": 1, "ok": 1}


def test_proxy_resets(served: HttpStore, fault_proxy: StartProxy) -> None:
    proxy = fault_proxy(served.url)
    proxy.inject("reset")
    with pytest.raises((ConnectionResetError, urllib.error.URLError)) as caught:
        fetch(f"{proxy.url}/data")
    cause = getattr(caught.value, "reason", caught.value)
    assert isinstance(cause, ConnectionResetError)
    assert not isinstance(cause, RemoteDisconnected), "a plain close is not a reset"


def test_proxy_hangs(served: HttpStore, fault_proxy: StartProxy) -> None:
    proxy = fault_proxy(served.url)
    proxy.inject("hang")
    with pytest.raises(TimeoutError):
        fetch(f"{proxy.url}/data", timeout_s=0.3)
    assert fetch(f"{proxy.url}/data") == bytes(range(100))


def test_proxy_truncates(served: HttpStore, fault_proxy: StartProxy) -> None:
    proxy = fault_proxy(served.url)
    proxy.inject("truncate")
    with pytest.raises(IncompleteRead) as caught:
        fetch(f"{proxy.url}/data")
    assert caught.value.partial == bytes(range(50))


def test_proxy_breaks_only_what_matches(served: HttpStore, fault_proxy: StartProxy) -> None:
    proxy = fault_proxy(served.url)
    proxy.inject("slow_down", match="/other$")
    proxy.set(Faults(slow_down=1.0, match="/never"))
    assert fetch(f"{proxy.url}/data") == bytes(range(100))
    with pytest.raises(ValueError, match="got 'explode'"):
        proxy.inject("explode")


def test_proxy_adds_latency(served: HttpStore, fault_proxy: StartProxy) -> None:
    proxy = fault_proxy(served.url)
    proxy.set(Faults(latency_s=0.2))
    start = time.monotonic()
    fetch(f"{proxy.url}/data")
    assert time.monotonic() - start >= 0.2


def test_proxy_draws_the_same_faults_from_the_same_seed() -> None:
    faults = Faults(slow_down=0.2, reset=0.2, hang=0.2, truncate=0.2, jitter_s=1.0)
    one, other = random.Random(7), random.Random(7)
    drawn = [faults.draw(one) for _ in range(200)]
    assert drawn == [faults.draw(other) for _ in range(200)]
    assert {kind for kind, _ in drawn} == {"", "slow_down", "reset", "hang", "truncate"}
    assert all(0 <= delay_s < 1 for _, delay_s in drawn)


def test_s3_round_trip_through_s3fs(s3_server: S3Server) -> None:
    bucket = s3_server.make_bucket("round-trip")
    fs = s3fs.S3FileSystem(**s3_server.storage_options, skip_instance_cache=True)
    payload = os.urandom(100_000)
    fs.pipe_file(f"{bucket}/folder/object", payload)
    assert fs.cat_file(f"{bucket}/folder/object") == payload
    assert fs.cat_file(f"{bucket}/folder/object", start=10, end=20) == payload[10:20]
    assert fs.ls(f"{bucket}/folder") == [f"{bucket}/folder/object"]


def test_s3_refuses_a_wrong_secret(s3_server: S3Server) -> None:
    options = {**s3_server.storage_options, "secret": "wrong"}
    fs = s3fs.S3FileSystem(**options, skip_instance_cache=True)
    with pytest.raises(PermissionError):
        fs.ls(s3_server.make_bucket("locked"))


def test_s3_signatures_survive_the_proxy(s3_server: S3Server, fault_proxy: StartProxy) -> None:
    bucket = s3_server.make_bucket("through-proxy")
    proxy = fault_proxy(s3_server.endpoint)
    fs = s3fs.S3FileSystem(**s3_server.options_at(proxy.url), skip_instance_cache=True)
    payload = os.urandom(3 << 20)
    fs.pipe_file(f"{bucket}/object", payload)
    proxy.inject("slow_down", match="^GET .*/object")
    assert fs.cat_file(f"{bucket}/object") == payload
    assert proxy.counts["slow_down"] == 1


def test_local_cluster_is_two_other_processes(client: Client) -> None:
    pids = set(client.run(os.getpid).values())
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_tcp_cluster_runs_a_task_and_survives_the_loss_of_a_worker(tcp_cluster: TcpCluster) -> None:
    assert tcp_cluster.address.startswith("tcp://127.0.0.1:")
    first, second = tcp_cluster.worker_pids
    with Client(tcp_cluster.address) as client:
        assert set(client.run(os.getpid).values()) == {first, second}
        tcp_cluster.kill(first)
        wait_until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 1, what="one worker", timeout_s=30)
        assert client.submit(os.getpid).result(timeout=30) == second
    assert tcp_cluster.worker_pids == [second]


def test_tcp_workers_import_test_modules(tcp_cluster: TcpCluster) -> None:
    with Client(tcp_cluster.address) as client:
        assert client.submit(parse_range, "bytes=0-9", 100).result(timeout=30) == (0, 10)


def test_leak_check_is_content_with_a_tidy_test(client: Client, leak_check: LeakCheck) -> None:
    assert client.submit(sum, [1, 2]).result(timeout=30) == 3
    with tempfile.TemporaryFile():
        pass
    leak_check.assert_clean()


def test_leak_check_is_content_with_an_embedded_cluster_once_closed(leak_check: LeakCheck) -> None:
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        assert client.submit(sum, [1, 2]).result(timeout=30) == 3
        assert any("IO loop" in finding for finding in leak_check.left())
    leak_check.assert_clean()


def test_leak_check_names_what_is_left(client: Client, leak_check: LeakCheck) -> None:
    future = client.submit(sum, [1, 2], key="left-future")
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="left-thread")
    thread.start()
    handle, path = tempfile.mkstemp(prefix="left-file")
    os.close(handle)
    try:
        with pytest.raises(AssertionError) as caught:
            leak_check.assert_clean(timeout_s=0.1)
    finally:
        release.set()
        thread.join()
        Path(path).unlink()
        future.release()
    for name in ("future left-future", "thread left-thread", "left-file"):
        assert name in str(caught.value)
