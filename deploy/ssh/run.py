#!/usr/bin/env python3
"""Run one command on a Dask cluster that is started over SSH, and end the cluster with it.

    deploy/ssh/run.py --tls ~/tls host1 host2 host3 -- zds stats s3://bucket/array.zarr --scheduler {scheduler}

The first host gets the scheduler, each host workers. `{scheduler}` becomes the scheduler's address. The exit code is
the command's; Ctrl-C and SIGTERM go to the command first.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dask
from distributed import SSHCluster

ADVICE = "activate the environment that has zarr-dask-stream"
# What runs on a host ends with its SSH connection, also where this process was killed and could not end it: standard
# input is then at its end, which `cat` waits for. The shell becomes Python, which so has the shell's process number.
WATCHED = """sh -c 'exec 3<&0; (cat <&3; kill $$) >/dev/null 2>&1 & exec "$0" "$@" 3<&-'"""
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def cluster(options: argparse.Namespace) -> Any:
    """Start scheduler and workers; the settings of this process travel to them, those of TLS among them."""
    protocol = "tcp://"
    if options.tls is not None:
        protocol = "tls://"
        dask.config.update(dask.config.global_config, dask.config.collect([str(options.tls)], env={}))
    # What is not given, asyncssh looks up where ssh does.
    connect = {"port": options.port, "username": options.user, "known_hosts": options.known_hosts}
    connect["client_keys"] = options.key
    worker = {"n_workers": options.workers, "nthreads": options.threads, "memory_limit": options.memory}
    # What a worker says of itself over HTTP stays on its host.
    worker["dashboard_address"] = "127.0.0.1:0"
    both = {"protocol": protocol, "interface": options.interface}
    return SSHCluster(
        [options.hosts[0], *options.hosts],
        connect_options={name: value for name, value in connect.items() if value is not None},
        worker_options={**worker, **both, "local_directory": options.scratch},
        scheduler_options={**both, "port": 0, "dashboard_address": options.dashboard},
        remote_python=f"{WATCHED} {options.python}",
    )


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM when the process that started this one is killed, which can't do so itself."""
    if PRCTL is not None:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGTERM)


def run(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run the command in the foreground and return its exit code."""
    job = subprocess.Popen(command, env=env, preexec_fn=end_with_parent)  # noqa: PLW1509  # it takes no lock
    # Ctrl-C reaches the command by itself, as it shares our terminal; SIGTERM is for us to pass on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    code = job.wait()
    return code if code >= 0 else 128 - code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line: hosts before the two dashes, the command after them."""
    cut = list(arguments).index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], usage="%(prog)s [options] HOST... -- COMMAND..."
    )
    parser.add_argument("hosts", nargs="+", metavar="HOST", help="hosts to work; the first has the scheduler too")
    secure = parser.add_mutually_exclusive_group(required=True)
    secure.add_argument("--tls", type=Path, metavar="FOLDER", help="what certificates.py made, at this path on all")
    secure.add_argument("--no-tls", action="store_true", help="whoever reaches the scheduler's port may run code")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of each host (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker (default: 1)")
    parser.add_argument("--memory", default="auto", help="memory of each worker, such as 4GiB (default: auto)")
    parser.add_argument("--interface", help="network interface of the hosts (default: the one with their address)")
    parser.add_argument("--port", type=int, help="port of the SSH servers (default: as in ~/.ssh/config)")
    parser.add_argument("--user", help="user on the hosts (default: as in ~/.ssh/config)")
    parser.add_argument("--key", help="file of the private key (default: as ssh)")
    parser.add_argument("--known-hosts", help="file of the hosts' keys (default: as ssh)")
    parser.add_argument("--python", default=sys.executable, help="Python on the hosts (default: the path of this one)")
    parser.add_argument("--scratch", help="folder on the hosts for what workers spill (default: Dask's)")
    parser.add_argument("--dashboard", default="127.0.0.1:0", help="address of the dashboard (default: any free port)")
    options = parser.parse_args(arguments[:cut])
    options.command = arguments[cut + 1 :]
    if options.tls is not None and not (options.tls / "dask.yaml").exists():
        parser.error(f"--tls takes a folder that certificates.py has made, and {options.tls} is none")
    if not options.command:
        parser.error("expected a command after two dashes, such as -- zds stats URL --scheduler {scheduler}")
    return options


def main() -> int:
    """Start the cluster, run the command, end the cluster."""
    options = parse(sys.argv[1:])
    # Until the command runs, either signal ends the cluster the way any error would.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with cluster(options) as started:
            print(f"scheduler at {started.scheduler_address}", file=sys.stderr)
            words = [word.replace("{scheduler}", started.scheduler_address) for word in options.command]
            tls = {} if options.tls is None else {"DASK_CONFIG": str(options.tls)}
            return run(words, {**os.environ, **tls})
    except KeyboardInterrupt:
        return 130
    except FileNotFoundError as error:
        print(f"run.py: there is no {error.filename} here: {ADVICE}", file=sys.stderr)
        return 3
    except (OSError, RuntimeError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
