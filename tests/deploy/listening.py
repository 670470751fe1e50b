"""A client of a cluster that says on which addresses its scheduler and its workers listen.

As a script, it takes the scheduler's address and the number of workers to wait for, and prints JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from distributed import Client

SCRIPT = str(Path(__file__).resolve())


def addresses() -> list[str]:
    """Return the addresses on which this process listens."""
    import psutil  # noqa: PLC0415  # the function travels to the workers, and takes its imports along

    return sorted({one.laddr.ip for one in psutil.Process().net_connections("tcp") if one.status == "LISTEN"})


def main(scheduler: str, workers: str) -> None:
    """Ask everybody, and print what they said."""
    with Client(scheduler) as client:  # type: ignore[no-untyped-call]  # distributed has no types for it
        client.wait_for_workers(int(workers), timeout=60)
        said = client.run(addresses) | {"scheduler": client.run_on_scheduler(addresses)}
        print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:3])
