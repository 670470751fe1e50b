#!/usr/bin/env python3
"""Run one command on the processes of an MPI job.

    mpirun -n 10 deploy/mpi/run.py -- zds stats s3://bucket/array.zarr --scheduler {scheduler}

Process 0 is the scheduler, process 1 runs the command, all others are workers: three at least. `{scheduler}` becomes
the scheduler's address. The exit code is the command's.
"""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
from collections.abc import Sequence

import dask
from dask_mpi import initialize, send_close_signal

ADVICE = "activate the environment that has zarr-dask-stream"


def run(command: Sequence[str]) -> int:
    """Run the command in the foreground and return its exit code."""
    job = subprocess.Popen(command)
    # mpirun passes signals on to every process; this one has to see the command out.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    code = job.wait()
    return code if code >= 0 else 128 - code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker (default: 1)")
    parser.add_argument("--memory", default="auto", help="memory of each worker, such as 4GiB (default: auto)")
    parser.add_argument("--interface", help="network interface, such as ib0 (default: the one with the host's address)")
    parser.add_argument("--protocol", choices=["tcp", "tls"], default="tcp", help="how they talk (default: tcp)")
    parser.add_argument("--scratch", help="folder for what workers spill (default: Dask's)")
    parser.add_argument("--dashboard", default="127.0.0.1:0", help="address of the dashboard (default: any free port)")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="with {scheduler} for the scheduler's address")
    return parser.parse_args(arguments)


def main() -> int:
    """Be the scheduler or a worker until the command has ended, or run the command."""
    options = parse(sys.argv[1:])
    # At the end each side is surprised that the other one is gone, and tells of it at length.
    logging.getLogger("distributed").setLevel(logging.WARNING)
    ours = initialize(
        interface=options.interface,
        protocol=options.protocol,
        nthreads=options.threads,
        memory_limit=options.memory,
        local_directory=options.scratch,
        dashboard_address=options.dashboard,
        # What a worker says of itself over HTTP stays on its host.
        worker_options={"dashboard_address": "127.0.0.1:0"},
        exit=False,
    )
    if not ours:
        return 0
    try:
        address = str(dask.config.get("scheduler-address"))
        print(f"scheduler at {address}", file=sys.stderr)
        return run([word.replace("{scheduler}", address) for word in options.command])
    except FileNotFoundError as error:
        print(f"run.py: there is no command {error.filename} here: {ADVICE}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 3
    finally:
        send_close_signal()


if __name__ == "__main__":
    sys.exit(main())
