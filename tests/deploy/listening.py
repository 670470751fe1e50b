"""A client of a cluster that says on which addresses its scheduler and its workers listen.

As a script, it takes the scheduler's address and the number of workers to wait for, and prints JSON: for each of them
"http" and "all".
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from distributed import Client

SCRIPT = str(Path(__file__).resolve())


def addresses(dask_worker: Any = None, dask_scheduler: Any = None) -> dict[str, list[str]]:
    """Return the addresses on which this process listens, those of Dask's HTTP server also apart."""
    import psutil  # noqa: PLC0415  # the function travels to the workers, and takes its imports along

    every = {one.laddr.ip for one in psutil.Process().net_connections("tcp") if one.status == "LISTEN"}
    return {"http": [(dask_worker or dask_scheduler).http_server.address], "all": sorted(every)}


def main(scheduler: str, workers: str) -> None:
    """Ask everybody, and print what they said."""
    with Client(scheduler) as client:
        client.wait_for_workers(int(workers), timeout=60)
        said = client.run(addresses) | {"scheduler": client.run_on_scheduler(addresses)}
        print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:3])
