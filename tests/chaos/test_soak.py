"""Many streams for a while, with faults: what is held after each round does not grow.

A leak shows as a slope that stays, a cache that fills as one that goes away. So the growth over the second half of the
rounds is what counts, and it is compared with that over the first half, and with how much values go up and down anyway.

By hand, for longer: ZDS_SOAK_S=1800 pytest --timeout 0 tests/chaos/test_soak.py, and with ZDS_SOAK_OUT=soak.json the
figures that the site shows.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from obstore.store import S3Store
from zarr.storage import ObjectStore

from chaos.scene import StartCluster, write_rows
from realparts.cluster import importable_tests
from realparts.fault_proxy import FaultProxy, Faults
from realparts.process import Process, wait_until
from realparts.s3 import S3Server

SECONDS = float(os.environ.get("ZDS_SOAK_S", "80"))
#: Rounds at least: fewer say nothing about a slope.
LEAST = 12
ROWS, WIDTH = 64, 2000
#: What may come and go between rounds: a connection more or less for each of the streams, a share of the memory.
SLACK = {"bytes": 0.03, "files": 8, "threads": 8}
#: Dask keeps a profile of each second and a record of each half for an hour: that grows all through, and is not ours.
DASK_FORGETS = {
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__LOG_LENGTH": "60",
    "DASK_DISTRIBUTED__ADMIN__LOG_LENGTH": "100",
}
#: A leak goes on as it began, a cache that fills slows down: growth of the second half over that of the first.
SLOWING = 0.6


def slope(values: Sequence[float]) -> float:
    """Return the growth from one round to the next: the median of the slopes of all pairs (Theil and Sen)."""
    pairs = itertools.combinations(enumerate(values), 2)
    return statistics.median((b - a) / (j - i) for (i, a), (j, b) in pairs)


def halves(values: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return the rounds up to the middle, and those from there on."""
    middle = len(values) // 2
    return values[:middle], values[middle:]


def growth(values: Sequence[float]) -> float:
    """Return by how much values grow over so many rounds."""
    return slope(values) * (len(values) - 1)


def unrest(values: Sequence[float]) -> float:
    """Return how far values usually are from the line that they follow."""
    step = slope(values)
    rest = [value - step * at for at, value in enumerate(values)]
    middle = statistics.median(rest)
    return statistics.median(abs(value - middle) for value in rest)


def allowed(kind: str, values: Sequence[float]) -> float:
    """Return the growth of the second half that is no leak."""
    first, second = halves(values)
    slack = SLACK[kind] * (statistics.median(second) if kind == "bytes" else 1)
    return max(slack, SLOWING * growth(first)) + 2 * unrest(second)


def leaks(kind: str, values: Sequence[float]) -> bool:
    """Whether the second half grows as only a leak does."""
    return growth(halves(values)[1]) > allowed(kind, values)


@pytest.mark.parametrize("kind", SLACK)
def test_a_leak_is_told_from_a_cache_that_fills_and_from_noise(kind: str) -> None:
    rng = np.random.default_rng(3)
    level, step = (1e8, 1e6) if kind == "bytes" else (60, 3)
    rounds = np.arange(40)
    noise = rng.normal(0, step, 40)
    filling = level + 20 * step * (1 - np.exp(-rounds / 4)) + noise
    flat = level + noise
    leaking = flat + step * 2 * rounds
    for values, leak in ((flat, False), (filling, False), (leaking, True), (filling + 2 * step * rounds, True)):
        assert leaks(kind, values.tolist()) == leak


def _summary(lines: Sequence[Any]) -> dict[str, Any]:
    about: dict[str, Any] = {
        "rounds": len(lines),
        "streams": 8 * len(lines),
        "chunks": sum(line["chunks"] for line in lines),
        "seconds": round(lines[-1]["at_s"]),
        "held": {},
    }
    for process, kind in itertools.product(lines[0]["held"], SLACK):
        values = [line["held"][process][kind] for line in lines]
        about["held"].setdefault(process, {})[kind] = {
            "first": values[0],
            "middle": values[len(values) // 2],
            "last": values[-1],
            "growth": [round(growth(half), 1) for half in halves(values)],
            "leaks": leaks(kind, values),
            "allowed": round(allowed(kind, values), 1),
        }
    return about


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.timeout(max(300, 3 * SECONDS))
def test_eight_streams_at_once_hold_no_more_at_the_end(
    s3_server: S3Server,
    fault_proxy: Callable[..., FaultProxy],
    start_tcp_cluster: StartCluster,
    tmp_path: Path,
) -> None:
    bucket = s3_server.make_bucket(f"soak-{uuid.uuid4().hex[:8]}")
    store = ObjectStore(S3Store(bucket, prefix="rows.zarr", **s3_server.obstore_options()))
    write_rows(store, ROWS, width=WIDTH)
    proxy = fault_proxy(s3_server.endpoint, seed=11)
    proxy.set(Faults(slow_down=0.004, reset=0.02, hang=0.002, truncate=0.02, latency_s=0.001, match=r"GET .*/c/"))
    cluster = start_tcp_cluster(workers=2, env=DASK_FORGETS)
    pids = {"scheduler": cluster.scheduler.pid} | {worker.name: worker.pid for worker in cluster.workers}
    job = {
        "address": cluster.address,
        "url": f"s3://{bucket}/rows.zarr",
        "storage_options": s3_server.options_at(proxy.url),
        "folder": str(tmp_path),
        "pids": pids,
        "seconds": SECONDS,
        "least": LEAST,
        "seed": 12,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    out = tmp_path / "held.jsonl"
    command = [sys.executable, "-m", "chaos.soak", str(tmp_path / "job.json"), str(out)]
    client = Process.start("soak", command, folder=tmp_path, env={"PYTHONPATH": importable_tests()})
    deaths = 0
    try:
        while client.alive:
            # A third worker comes and dies all the time; the other two live as long as the streams.
            victim = cluster.add_worker()
            with suppress(TimeoutError):
                wait_until(lambda: not client.alive, what="the end", timeout_s=4.0)
            deaths += client.alive
            victim.kill()
    finally:
        client.end()
    assert client.popen.returncode == 0, client.tail(4000)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    faults = {kind: proxy.counts[kind] for kind in ("slow_down", "reset", "hang", "truncate")}
    summary = _summary(lines) | {"deaths": deaths, "faults": faults}
    print(json.dumps(summary, indent=1), client.tail())
    if place := os.environ.get("ZDS_SOAK_OUT"):
        machine = {"cores": psutil.cpu_count(), "python": sys.version.split()[0], "at": time.strftime("%Y-%m-%d")}
        Path(place).write_text(json.dumps({"machine": machine, **summary}, indent=1) + "\n")
    assert deaths >= 2
    assert all(faults.values()), faults
    grown = [
        f"{process} {kind}: {found['first']} ... {found['last']}, {found['growth']}, {found['allowed']} allowed"
        for process, kinds in summary["held"].items()
        for kind, found in kinds.items()
        if found["leaks"]
    ]
    assert not grown
