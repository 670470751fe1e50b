"""What a cluster that a stream starts by itself lets in from outside: nothing."""

from __future__ import annotations

import ipaddress

import psutil
import pytest
from distributed import Client

from zarr_dask_stream.engine.cluster import close_cluster, embedded_cluster

pytestmark = pytest.mark.cluster


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    """Return where a process and its children take connections."""
    family = [process, *process.children(recursive=True)]
    found = [connection for one in family for connection in one.net_connections("inet")]
    return [(connection.laddr.ip, connection.laddr.port) for connection in found if connection.status == "LISTEN"]


@pytest.mark.parametrize("processes", [0, 2])
def test_clusters_of_our_own_listen_on_loopback_only(processes: int) -> None:
    process = psutil.Process()
    before = set(listening(process))
    client: Client = embedded_cluster(processes=processes)
    try:
        opened = set(listening(process)) - before
    finally:
        close_cluster(client)
    assert bool(opened) or not processes
    assert [place for place in opened if not ipaddress.ip_address(place[0]).is_loopback] == []
