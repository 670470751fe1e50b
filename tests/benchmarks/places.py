"""Where benchmarks run: one cluster, bare processes, an S3 server behind a slow road. Started when first asked for."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import s3fs
from distributed import Client, LocalCluster

from benchmarks.data import Stored
from benchmarks.limit import BareProcesses
from benchmarks.road import Delays, SlowRoad
from realparts.s3 import S3Server, serve_s3

CORES = os.cpu_count() or 1
#: What the slow road adds to each request.
LATENCY_S = 0.030
# The server keeps small objects at hand: it is not what is measured, and takes the processor from those who are.
_QUICK_SERVER = ("-s3.cacheCapacityMB=512", "-filer.saveToFilerLimit=262144")


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
        return self.stack.enter_context(serve_s3(folder, arguments=_QUICK_SERVER))

    @cached_property
    def road(self) -> SlowRoad:
        """A slow road to the S3 server."""
        road = SlowRoad(self.s3.endpoint, Delays(LATENCY_S))
        self.stack.callback(road.close)
        return road

    def upload(self, stored: Stored, bucket: str) -> str:
        """Copy an array from disk to the S3 server and return its URL."""
        self.s3.make_bucket(bucket)
        fs = s3fs.S3FileSystem(skip_instance_cache=True, **self.s3.storage_options)
        fs.put(f"{stored.url}/", f"{bucket}/a/", recursive=True)
        return f"s3://{bucket}/a"
