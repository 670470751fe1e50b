"""What a test leaves behind: threads, child processes, temporary files, keys on a scheduler."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from distributed import Client

# Threads that libraries start once for a process and keep. Those of a running cluster or client ("IO loop",
# "Dask-Default-Threads", "AsyncProcess") are not here: after `close` they are gone, or somebody forgot to close.
_KEPT_FOR_GOOD = (
    "zarr_io",  # zarr's one event loop
    "zarr_pool",  # zarr's one thread pool
    "fsspecIO",  # fsspec's one event loop
    "asyncio_",  # the default executors of those event loops
    "Dask-Offload",  # distributed's pool for (de)serialization
    "Dask-Callback",  # distributed's pool for callbacks of futures
    "TCP-Executor",  # distributed's pool for connections
    "realparts-",  # the parts of this folder
)
_HTTP_HANDLER = "(process_request_thread)"  # http.server's, for as long as a client keeps its connection
# Dask makes this folder once in the temporary directory and leaves it, empty of live workers.
_KEPT_FILES = ("dask-scratch-space",)


class LeakCheck:
    """Compare what is there with what was there when the check began."""

    def __init__(self, temporary: Path) -> None:
        self.temporary = temporary
        self._clients: list[Client] = []
        self._threads = set(threading.enumerate())
        self._children = set(psutil.Process().children(recursive=True))

    def watch(self, client: Client) -> None:
        """Also require that no future of `client` and no key on its scheduler is left."""
        self._clients.append(client)

    def assert_clean(self, timeout_s: float = 5.0) -> None:
        """Fail with a list of what is left once `timeout_s` have passed."""
        deadline = time.monotonic() + timeout_s
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left, f"still there after {timeout_s:g} s: {'; '.join(left)}"

    def left(self) -> list[str]:
        """Name everything that is left at this moment."""
        looks: list[Callable[[], list[str]]] = [self._threads_left, self._children_left, self._files_left]
        return [finding for look in looks for finding in look()] + [
            finding for client in self._clients for finding in keys_left(client)
        ]

    def _threads_left(self) -> list[str]:
        new = set(threading.enumerate()) - self._threads
        return [f"thread {thread.name}" for thread in new if not _is_kept(thread.name)]

    def _children_left(self) -> list[str]:
        new = set(psutil.Process().children(recursive=True)) - self._children
        return [f"process {process.pid}" for process in new if not _is_helper(process)]

    def _files_left(self) -> list[str]:
        return [f"file {path}" for path in self.temporary.iterdir() if not path.name.startswith(_KEPT_FILES)]


def _is_kept(name: str) -> bool:
    return name.startswith(_KEPT_FOR_GOOD) or name.endswith(_HTTP_HANDLER)


def _is_helper(process: psutil.Process) -> bool:
    """Whether this is multiprocessing's resource tracker, which lives as long as its parent, or gone already."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return True


def keys_left(client: Client) -> list[str]:
    """Name the futures of `client` and the keys on its scheduler; a client that is closed has none."""
    if client.status != "running":
        return []
    futures = [f"future {key}" for key in client.futures]
    keys = client.run_on_scheduler(_scheduler_keys)
    return futures + [f"scheduler key {key}" for key in keys]


def _scheduler_keys(dask_scheduler: Any) -> list[str]:
    return [str(key) for key in dask_scheduler.tasks]
