"""What comes to a cluster's ports that nobody asked for."""

from __future__ import annotations

import ipaddress
import socket
import struct
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from distributed import Client

import zarr_dask_stream as zds
from cluster.streaming import assemble, slowly, write_array
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


#: What a peer may say that does not speak Dask: noise, another protocol, and frames of a length that nobody has.
NONSENSE = [
    bytes(range(256)) * 64,
    b"GET / HTTP/1.1\r\nHost: scheduler\r\n\r\n",
    struct.pack("<Q", 2**63) * 8,
    struct.pack("<QQQ", 16, 1, 2**62),
    struct.pack("<QQQ", 17, 1, 1) + b"\xc1",
    b"",
]


@pytest.mark.usefixtures("leak_check")
def test_nonsense_on_the_ports_of_a_cluster_disturbs_no_stream(client: Client, tmp_path: Path) -> None:
    data = write_array(str(tmp_path / "a.zarr"))
    workers = client.scheduler_info(n_workers=-1)["workers"]
    addresses = [client.scheduler_info(n_workers=0)["address"], *workers]
    with ExitStack() as stack:
        for address in addresses:
            host, _, port = address.removeprefix("tcp://").rpartition(":")
            for said in NONSENSE:
                connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
                with suppress(OSError):  # it hangs up on most of them
                    connection.sendall(said)
        stream = zds.stream_chunks(str(tmp_path / "a.zarr")).map(slowly(0.005))
        np.testing.assert_array_equal(assemble(stream), data)
        assert stream.report.retries == 0
    assert set(client.scheduler_info(n_workers=-1)["workers"]) == set(workers)
