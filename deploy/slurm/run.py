#!/usr/bin/env python3
"""Run one command on Dask workers that Slurm starts, and give them back when it ends.

    deploy/slurm/run.py --jobs 4 --cores 8 --memory 32GB -- zds stats s3://bucket/array.zarr --scheduler {scheduler}

`{scheduler}` becomes the scheduler's address; the scheduler runs in this process. Each Slurm job is one `dask worker`
command. One that Slurm ends is replaced. All talk TLS with certificates made for this run alone, as the nodes belong to
many users. The exit code is the command's; Ctrl-C and SIGTERM go to the command first.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from dask_jobqueue import SLURMCluster
from distributed import Security

ADVICE = "activate the environment that has zarr-dask-stream, and run this where sbatch is"
CERTIFICATES = Path(__file__).resolve().parents[1] / "tcp" / "certificates.py"


def refuse_if_slurm_would(script: str) -> None:
    """Ask Slurm what it thinks of a worker's job: refused later, it would leave the command waiting for workers."""
    asked = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        said = asked.stderr.strip()
        advice = "ask for what a node has (--cores, --memory, --time, --partition); sinfo --long shows it"
        raise RuntimeError(f"Slurm would refuse the jobs of the workers: {said}; {advice}")


@contextmanager
def cluster(options: argparse.Namespace, folder: Path) -> Iterator[SLURMCluster]:
    """Run a scheduler here and let Slurm run the workers; all their files are in a folder that every node sees."""
    subprocess.run([sys.executable, str(CERTIFICATES), str(folder / "tls")], check=True)
    dask.config.update(dask.config.config, dask.config.collect([str(folder / "tls")], env={}))
    limits: dict[str, Any] = {"cores": options.cores, "memory": options.memory, "walltime": options.time}
    place = {"queue": options.partition, "account": options.account, "interface": options.interface}
    with SLURMCluster(
        **limits,
        **place,
        processes=options.processes or options.cores,
        security=Security(),
        protocol="tls://",
        log_directory=str(options.logs.resolve()) if options.logs else str(folder),
        local_directory=options.scratch,
        # What a worker says of itself over HTTP stays on its node; settings of the site that say otherwise come later.
        worker_extra_args=["--dashboard-address", "127.0.0.1:0", *dask.config.get("jobqueue.slurm.worker-extra-args")],
        job_extra_directives=options.directive,
        scheduler_options={"dashboard_address": options.dashboard},
    ) as started:
        refuse_if_slurm_would(started.job_script())
        # A worker that Slurm has ended is missed and asked for again; `scale` would ask once.
        started.adapt(minimum_jobs=options.jobs, maximum_jobs=max(options.jobs, options.max_jobs))
        yield started


def run(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run the command in the foreground and return its exit code."""
    job = subprocess.Popen(command, env=env)
    # Ctrl-C reaches the command by itself, as it shares our terminal; SIGTERM is for us to pass on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    code = job.wait()
    return code if code >= 0 else 128 - code


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="Slurm jobs to hold all the time (default: 1)")
    parser.add_argument("--max-jobs", type=int, default=0, help="jobs to have while there is work (default: as --jobs)")
    parser.add_argument("--cores", type=int, default=1, help="cores of each job (default: 1)")
    parser.add_argument("--processes", type=int, help="worker processes of each job (default: one for each core)")
    parser.add_argument("--memory", default="4GB", help="memory of each job, all processes together (default: 4GB)")
    parser.add_argument("--time", default="01:00:00", help="time limit of each job (default: 01:00:00)")
    parser.add_argument("--partition", help="partition of the jobs (default: Slurm's)")
    parser.add_argument("--account", help="account that the jobs are charged to (default: Slurm's)")
    parser.add_argument(
        "--directive", action="append", default=[], help="another #SBATCH line, as in --constraint=fast"
    )
    parser.add_argument("--interface", help="network interface, such as ib0 (default: the one with the host's address)")
    parser.add_argument("--shared", type=Path, default=Path(), help="folder that all nodes see (default: this one)")
    parser.add_argument("--scratch", help="folder on the nodes for what workers spill (default: Dask's)")
    parser.add_argument("--logs", type=Path, help="folder in which the logs of the jobs stay (default: none)")
    parser.add_argument("--dashboard", default="127.0.0.1:0", help="address of the dashboard (default: any free port)")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="with {scheduler} for the scheduler's address")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"a cluster needs at least one job, got {options.jobs}")
    return options


def main() -> int:
    """Start the cluster, run the command, end the cluster."""
    options = parse(sys.argv[1:])
    # Until the command runs, either signal ends the cluster the way any error would.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix=".zds-slurm-", dir=options.shared.resolve()) as folder:
        try:
            with cluster(options, Path(folder)) as started:
                print(f"scheduler at {started.scheduler_address}, Slurm asked for workers", file=sys.stderr)
                words = [word.replace("{scheduler}", started.scheduler_address) for word in options.command]
                return run(words, {**os.environ, "DASK_CONFIG": str(Path(folder) / "tls")})
        except KeyboardInterrupt:
            return 130
        except FileNotFoundError as error:
            print(f"run.py: there is no command {error.filename} on this host: {ADVICE}", file=sys.stderr)
            return 3
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"run.py: {error}", file=sys.stderr)
            return 3


if __name__ == "__main__":
    sys.exit(main())
