"""Where benchmarks run: one cluster, bare processes, an S3 server behind a slow road. Started when first asked for."""

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import s3fs
from distributed import Client, LocalCluster

from benchmarks.data import Stored
from benchmarks.limit import BareProcesses
from realparts.fault_proxy import Faults, run_proxy
from realparts.s3 import S3Server, serve_s3

CORES = os.cpu_count() or 1
_SPAWN = multiprocessing.get_context("spawn")


@contextmanager
def run_local_cluster(*, processes: bool) -> Iterator[Client]:
    """Run a cluster with as many task threads as cores: in one process each, or all inside this one."""
    with (
        LocalCluster(
            n_workers=CORES if processes else 1,
            threads_per_worker=1 if processes else CORES,
            processes=processes,
            memory_limit=0,
            dashboard_address="127.0.0.1:0",
            scheduler_kwargs={"dashboard": False},
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


class SlowRoad:
    """A proxy before a server, in a process of its own so that it does not share the client's interpreter lock."""

    def __init__(self, upstream: str, latency_s: float) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve_road, args=(upstream, latency_s, theirs), daemon=True)
        self._process.start()
        #: The address to use in place of the server's.
        self.url = str(self._pipe.recv())

    def take_counts(self) -> dict[str, float]:
        """Return what went over the road since the last time."""
        self._pipe.send("counts")
        counts: dict[str, float] = self._pipe.recv()
        return counts

    def close(self) -> None:
        """End the process."""
        self._pipe.send("end")
        self._process.join(10)


def _serve_road(upstream: str, latency_s: float, pipe: "Connection[Any, Any]") -> None:
    with run_proxy(upstream) as proxy:
        proxy.set(Faults(latency_s=latency_s))
        pipe.send(proxy.url)
        while pipe.recv() == "counts":
            pipe.send({"requests": len(proxy.requests), "in_flight": proxy.peak_in_flight})
            proxy.clear()
            proxy.set(Faults(latency_s=latency_s))


@dataclass
class Bench:
    """What a row may ask for."""

    folder: Path
    seed: int = 20260101
    scale: float = 1.0
    stack: ExitStack = field(default_factory=ExitStack)

    def sized(self, count: int, *, least: int = 2) -> int:
        """Return how many of something this run makes, an even number."""
        return max(round(count * self.scale / 2) * 2, least)

    @cached_property
    def bare(self) -> BareProcesses:
        """As many waiting processes as cores."""
        bare = BareProcesses(CORES)
        self.stack.callback(bare.close)
        return bare

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """As many threads of this process as cores."""
        return self.stack.enter_context(ThreadPoolExecutor(CORES))

    @cached_property
    def client(self) -> Client:
        """A cluster of as many worker processes as cores, with one thread each."""
        return self.stack.enter_context(run_local_cluster(processes=True))

    @cached_property
    def embedded(self) -> Client:
        """A cluster inside this process with as many threads as cores."""
        return self.stack.enter_context(run_local_cluster(processes=False))

    @cached_property
    def s3(self) -> S3Server:
        """A real S3 server."""
        folder = self.folder / "s3-server"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return self.stack.enter_context(serve_s3(folder))

    def slow_road(self, latency_s: float) -> SlowRoad:
        """Put a proxy before the S3 server that holds each request back for so long."""
        road = SlowRoad(self.s3.endpoint, latency_s)
        self.stack.callback(road.close)
        return road

    def upload(self, stored: Stored, bucket: str) -> str:
        """Copy an array from disk to the S3 server and return its URL."""
        self.s3.make_bucket(bucket)
        fs = s3fs.S3FileSystem(skip_instance_cache=True, **self.s3.storage_options)
        fs.put(f"{stored.url}/", f"{bucket}/a/", recursive=True)
        return f"s3://{bucket}/a"
