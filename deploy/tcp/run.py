#!/usr/bin/env python3
"""Run one command on a Dask cluster of its own: scheduler and workers as separate processes that talk TCP.

    deploy/tcp/run.py --workers 4 -- zds stats /data/array.zarr --scheduler {scheduler}

`{scheduler}` becomes the scheduler's address. When the command ends, so does the cluster, and its exit code is the
command's. Ctrl-C and SIGTERM go to the command first, which gives up its work in order.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_START_S = 60.0
_STOP_S = 10.0
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
ADVICE = "activate the environment that has zarr-dask-stream"


class StartError(Exception):
    """A part of the cluster did not come up."""


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM when the process that started this one is killed, which can't do so itself."""
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def part(name: str, command: Sequence[str], logs: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a part of the cluster; ask it to end with the block, and insist after a while.

    It gets a session of its own: Ctrl-C is for the command alone, and nothing that it started outlives it.
    """
    with (logs / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
            preexec_fn=end_with_parent,  # noqa: PLW1509  # it takes no lock
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment(tls: Path | None) -> dict[str, str]:
    """Return the environment of cluster and command: with certificates, Dask finds its settings beside them."""
    return {**os.environ, **({} if tls is None else {"DASK_CONFIG": str(tls.resolve())})}


def wait_for(file: Path, name: str, process: subprocess.Popen[bytes], logs: Path) -> None:
    """Wait until the log or file of a part says that it is ready."""
    end = time.monotonic() + _START_S
    while not (file.exists() and file.read_text(errors="replace").rstrip().endswith("}")):
        if process.poll() is not None or time.monotonic() > end:
            tail = (logs / f"{name}.log").read_text(errors="replace")[-2000:]
            raise StartError(f"the {name} did not start; its log ends with:\n{tail}")
        time.sleep(0.05)


@contextmanager
def cluster(options: argparse.Namespace, logs: Path) -> Iterator[str]:
    """Run a scheduler and workers; the value is the scheduler's address."""
    file = logs / "scheduler.json"
    file.unlink(missing_ok=True)
    place = ["--host", options.host, "--port", str(options.port), "--scheduler-file", str(file)]
    place += ["--protocol", "tcp" if options.tls is None else "tls", "--dashboard-address", options.dashboard]
    with ExitStack() as stack:
        env = environment(options.tls)
        scheduler = stack.enter_context(part("scheduler", ["dask", "scheduler", *place], logs, env))
        wait_for(file, "scheduler", scheduler, logs)
        address = str(json.loads(file.read_text())["address"])
        for number in range(1, options.workers + 1):
            name = f"worker-{number}"
            command = ["dask", "worker", address, "--name", name, "--host", options.host]
            command += ["--nthreads", str(options.threads), "--memory-limit", options.memory, "--no-dashboard"]
            # Without an address, what a worker says of itself over HTTP would be on all interfaces.
            command += ["--dashboard-address", "127.0.0.1:0"]
            stack.enter_context(part(name, [*command, "--local-directory", str(logs)], logs, env))
        yield address


def run(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run the command in the foreground and return its exit code."""
    job = subprocess.Popen(command, env=env, preexec_fn=end_with_parent)  # noqa: PLW1509  # it takes no lock
    # Ctrl-C reaches the command by itself, as it shares our terminal; SIGTERM is for us to pass on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    code = job.wait()
    return code if code >= 0 else 128 - code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker (default: 1)")
    parser.add_argument("--memory", default="auto", help="memory of each worker, such as 4GiB (default: auto)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="the scheduler's port (default: any free one)")
    parser.add_argument("--dashboard", default="127.0.0.1:0", help="address of the dashboard (default: any free port)")
    parser.add_argument("--tls", type=Path, metavar="FOLDER", help="what certificates.py made (default: no TLS)")
    parser.add_argument("--logs", type=Path, help="folder in which the logs stay (default: none)")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="with {scheduler} for the scheduler's address")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"a cluster needs at least one worker, got {options.workers}")
    if options.tls is not None and not (options.tls / "dask.yaml").exists():
        parser.error(f"--tls takes a folder that certificates.py has made, and {options.tls} is none")
    return options


def main() -> int:
    """Start the cluster, run the command, end the cluster."""
    options = parse(sys.argv[1:])
    # Until the command runs, either signal ends the cluster the way any error would.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
        logs = options.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zds-cluster-")))
        try:
            address = stack.enter_context(cluster(options, logs.resolve()))
            print(f"scheduler at {address}, {options.workers} worker(s) starting", file=sys.stderr)
            words = [word.replace("{scheduler}", address) for word in options.command]
            return run(words, environment(options.tls))
        except FileNotFoundError as error:
            print(f"run.py: there is no command {error.filename} here: {ADVICE}", file=sys.stderr)
            return 3
        except StartError as error:
            print(f"run.py: {error}", file=sys.stderr)
            return 3
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
