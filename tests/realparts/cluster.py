"""A Dask scheduler and workers as separate operating-system processes that talk TCP."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from distributed import Client

from realparts.process import Process, wait_until

_TESTS = Path(__file__).resolve().parent.parent


def importable_tests() -> str:
    """Return the test folders on sys.path: functions in test modules travel by name and must be importable there."""
    return os.pathsep.join(path for path in sys.path if path and Path(path).resolve().is_relative_to(_TESTS))


@dataclass
class TcpCluster:
    """A running cluster; `address` is what `distributed.Client` takes."""

    folder: Path
    env: Mapping[str, str]
    python: str
    stack: ExitStack
    workers: list[Process] = field(default_factory=list)
    _scheduler: Process | None = None
    _started: int = 0

    @property
    def scheduler(self) -> Process:
        """The scheduler's process."""
        assert self._scheduler is not None
        return self._scheduler

    @property
    def address(self) -> str:
        """The scheduler's address, `tcp://127.0.0.1:port`."""
        found = json.loads((self.folder / "scheduler.json").read_text())
        return str(found["address"])

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that still run, in order of start."""
        return [worker.pid for worker in self.workers if worker.alive]

    def _dask(self, name: str, *arguments: str) -> Process:
        # Started in a folder of its own: `python -m` puts the working directory on the path, and the source folder must
        # not come before the installed package.
        env = {"PYTHONPATH": importable_tests(), "PYTHONWARNINGS": "ignore", **self.env}
        process = Process.start(name, [self.python, "-m", "dask", *arguments], folder=self.folder, env=env)
        self.stack.callback(process.end)
        return process

    def start_scheduler(self, *arguments: str, port: str = "0") -> None:
        """Start the scheduler and wait until it listens."""
        file = self.folder / "scheduler.json"
        file.unlink(missing_ok=True)
        # The scheduler serves HTTP even without a dashboard, on port 8787 unless told otherwise.
        quiet = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
        place = ["--host", "127.0.0.1", "--port", port, "--scheduler-file", str(file)]
        self._scheduler = self._dask("scheduler", "scheduler", *place, *quiet, *arguments)
        self._scheduler.wait_ready(lambda: file.exists() and file.read_text().rstrip().endswith("}"))

    def restart_scheduler(self) -> None:
        """Start a scheduler in the place of one that was killed; workers do not come back by themselves."""
        assert not self.scheduler.alive
        self.start_scheduler(port=self.address.rpartition(":")[2])

    def add_worker(self, *arguments: str, nanny: bool = False) -> Process:
        """Start one more worker process with one thread; `wait` for it to join."""
        self._started += 1
        name = f"worker-{self._started}"
        process = self._dask(
            name,
            "worker",
            self.address,
            "--name",
            name,
            "--host",
            "127.0.0.1",
            "--nthreads",
            "1",
            "--no-dashboard",
            "--nanny" if nanny else "--no-nanny",
            "--local-directory",
            str(self.folder),
            *arguments,
        )
        self.workers.append(process)
        return process

    def wait(self, count: int, *, timeout_s: float = 60.0) -> None:
        """Wait until `count` workers have joined."""
        with Client(self.address, set_as_default=False) as client:

            def joined() -> bool:
                dead = [worker for worker in self.workers if not worker.alive]
                if dead and len(self.worker_pids) < count:
                    raise RuntimeError(f"{dead[0].name} ended before it joined:\n{dead[0].tail()}")
                return len(client.scheduler_info(n_workers=-1)["workers"]) >= count

            wait_until(joined, what=f"{count} workers to join", timeout_s=timeout_s)

    def kill(self, pid: int) -> None:
        """End one process of this cluster at once (SIGKILL), as the out-of-memory killer would."""
        for process in [*self.workers, self.scheduler]:
            if process.pid == pid:
                process.kill()
                return
        raise ValueError(f"{pid} is no process of this cluster; its workers are {self.worker_pids}")


@contextmanager
def run_cluster(
    folder: Path,
    *,
    workers: int = 2,
    env: Mapping[str, str] | None = None,
    python: str = sys.executable,
    scheduler_arguments: Sequence[str] = (),
    worker_arguments: Sequence[str] = (),
) -> Iterator[TcpCluster]:
    """Run a scheduler and `workers` workers, files in `folder`, until the block ends."""
    with ExitStack() as stack:
        cluster = TcpCluster(folder, env or {}, python, stack)
        cluster.start_scheduler(*scheduler_arguments)
        for _ in range(workers):
            cluster.add_worker(*worker_arguments)
        cluster.wait(workers)
        yield cluster
