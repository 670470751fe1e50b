"""A worker whose network goes away in mid-run: no connection is closed, packets just vanish."""

from __future__ import annotations

import json
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from distributed import Client

import zarr_dask_stream as zds
from chaos.scene import assemble_rows, assert_all_there, assert_no_keys, within, write_rows
from cluster.streaming import slowly
from realparts.leaks import LeakCheck
from realparts.namespaces import Host, run_network, why_not
from realparts.process import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(240)]

COUNT = 800
#: Dask's own default is 30 s; it refuses less than 10 s.
SOON = {"DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s"}


@dataclass(frozen=True)
class Site:
    """A scheduler and two workers, each a host of its own."""

    hosts: dict[str, Host]
    address: str
    client: Client


@contextmanager
def run_site(folder: Path, *others: str) -> Iterator[Site]:
    with ExitStack() as stack:
        hosts = stack.enter_context(run_network(["scheduler", "near", "far", *others]))
        place = ["--host", hosts["scheduler"].address, "--port", "8786"]
        quiet = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        scheduler = hosts["scheduler"].start("scheduler", ["scheduler", *place, *quiet], folder=folder, env=SOON)
        stack.callback(scheduler.end)
        address = f"tcp://{hosts['scheduler'].address}:8786"
        for name in ("near", "far"):
            own = ["--host", hosts[name].address, "--name", name, "--nthreads", "1", "--no-dashboard", "--no-nanny"]
            command = ["worker", address, *own, "--local-directory", str(folder)]
            stack.callback(hosts[name].start(name, command, folder=folder, env=SOON).end)
        client = stack.enter_context(Client(address, set_as_default=False, timeout=60))
        client.wait_for_workers(2, timeout=60)
        yield Site(hosts, address, client)


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def place(tmp_path: Path) -> tuple[str, np.ndarray]:
    url = str(tmp_path / "rows.zarr")
    return url, write_rows(url, COUNT)


@pytest.mark.parametrize("ordered", [pytest.param(True, marks=pytest.mark.sample), False])
def test_a_worker_that_is_cut_off_costs_no_chunk(
    leak_check: LeakCheck, tmp_path: Path, place: tuple[str, np.ndarray], ordered: bool
) -> None:
    url, data = place
    with run_site(tmp_path) as site:
        stream = zds.stream_chunks(url, client=site.client, ordered=ordered).map(slowly(0.02))

        def cut_when_due(count: int) -> None:
            if count == 100:
                site.hosts["far"].unplug()

        with within(120):
            out = assemble_rows(stream, data, cut_when_due)
        assert_all_there(stream.report, out, data)
        assert stream.report.batches_lost > 0
        assert [worker["name"] for worker in site.client.scheduler_info(n_workers=-1)["workers"].values()] == ["near"]
        assert_no_keys(site.client)


def test_a_short_cut_costs_nothing(leak_check: LeakCheck, tmp_path: Path, place: tuple[str, np.ndarray]) -> None:
    url, data = place
    with run_site(tmp_path) as site:
        stream = zds.stream_chunks(url, client=site.client, ordered=False).map(slowly(0.02))
        healers: list[threading.Timer] = []

        def cut_when_due(count: int) -> None:
            if count in {100, 400}:
                site.hosts["far"].unplug()
                healers.append(threading.Timer(3.0, site.hosts["far"].plug))
                healers[-1].start()

        with within(90):
            out = assemble_rows(stream, data, cut_when_due)
        for healer in healers:
            healer.join()
        assert_all_there(stream.report, out, data)
        assert stream.report.batches_lost == 0
        assert len(stream.report.workers) == 2
        assert_no_keys(site.client)


CLIENT = """
    import json
    import sys
    import numpy as np
    from distributed import Client
    import zarr_dask_stream as zds
    from chaos.scene import assemble_rows, assert_all_there
    from cluster.streaming import slowly

    if __name__ == "__main__":
        address, url, ordered, count, width = sys.argv[1:]
        data = np.arange(int(count) * int(width), dtype="i4").reshape(int(count), int(width))
        with Client(address, timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            stream = zds.stream_chunks(url, client=client, ordered=ordered == "True").map(slowly(0.02))
            out = assemble_rows(stream, data, lambda done: print("done:", done, flush=True))
            assert_all_there(stream.report, out, data)
        print("all there", json.dumps({"lost": stream.report.batches_lost}), flush=True)
"""


@pytest.mark.parametrize(
    ("seconds", "ordered"),
    [(3, True), (20, True), (20, False)],
    ids=["short", "long", "long, as completed"],
)
def test_a_client_that_is_cut_off_goes_on_when_it_is_back(
    tmp_path: Path, place: tuple[str, np.ndarray], seconds: float, ordered: bool
) -> None:
    url, data = place
    script = tmp_path / "client.py"
    script.write_text(textwrap.dedent(CLIENT))
    with run_site(tmp_path, "user") as site, within(150):
        words = [str(script), site.address, url, str(ordered), str(COUNT), str(data.shape[1])]
        user = site.hosts["user"].start("user", words, folder=tmp_path, env=SOON, module=None)
        try:
            wait_until(lambda: "done: 100" in user.tail(), what="100 chunks", timeout_s=60)
            site.hosts["user"].unplug()
            time.sleep(seconds)
            site.hosts["user"].plug()
            wait_until(lambda: not user.alive, what="the stream to end", timeout_s=90)
            last = user.tail().splitlines()[-1]
            assert last.startswith("all there"), user.tail()
            lost = json.loads(last.removeprefix("all there"))["lost"]
            # Within its time-out TCP sends again what was lost. Later the scheduler has forgotten the client.
            assert (lost > 0) == (seconds > 12)
        finally:
            user.end()
        assert_no_keys(site.client)
