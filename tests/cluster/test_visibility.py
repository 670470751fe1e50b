"""What the client sees and a worker does not: a store, another array, the package, a module. Never fill values."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from zarr.storage import FsspecStore, MemoryStore

import zarr_dask_stream as zds
from cluster.streaming import CHUNKS, SHAPE, assemble, pattern, slowly, write_array
from realparts.cluster import TcpCluster
from zarr_dask_stream import errors

pytestmark = pytest.mark.cluster

StartCluster = Callable[..., TcpCluster]


def expect_not_visible(stream: zds.ChunkStream, data: np.ndarray, *words: str) -> str:
    """Require a StoreNotVisibleError that comes soon and says where, and not one wrong value before it."""

    def consume() -> None:
        for chunk in stream:
            np.testing.assert_array_equal(chunk.data, data[chunk.region])
            assert not chunk.missing

    begin = time.monotonic()
    with pytest.raises(errors.StoreNotVisibleError) as caught:
        consume()
    message = str(caught.value)
    assert time.monotonic() - begin < 20
    for word in (*words, socket.gethostname()):
        assert word in message
    assert stream.report.outcome == "failed"
    return message


# -- stores that live in one process ------------------------------------------------------------------------


def dict_store() -> Any:
    return {}


def memory_store() -> Any:
    return MemoryStore()


def memory_url() -> Any:
    return f"memory://{uuid.uuid4().hex}"


@pytest.mark.parametrize("make", [dict_store, memory_store, memory_url])
def test_memory_of_the_client_is_not_visible_to_other_processes(client: Client, make: Callable[[], Any]) -> None:
    store = make()
    data = write_array(store)
    expect_not_visible(zds.stream_chunks(store), data, "memory://", "another process")


def test_an_array_in_memory_is_not_visible_to_other_processes(client: Client) -> None:
    store = MemoryStore()
    data = write_array(store)
    expect_not_visible(zds.stream_chunks(zarr.open_array(store)), data, "memory://")


def test_a_file_system_in_memory_is_not_visible_to_other_processes(client: Client) -> None:
    name = uuid.uuid4().hex
    data = write_array(f"memory://{name}")
    store = FsspecStore.from_url(f"memory://{name}")
    expect_not_visible(zds.stream_chunks(store), data, "memory://")


# -- paths that mean something else on the worker ---------------------------------------------------------------


@pytest.fixture(scope="session")
def unshare() -> str:
    """Return the command that gives a process mounts of its own."""
    for command in ("unshare --mount", "unshare --user --map-root-user --mount"):
        trial = [*shlex.split(command), "mount", "-t", "tmpfs", "none", "/mnt"]
        if subprocess.run(trial, check=False, capture_output=True).returncode == 0:
            return command
    pytest.skip("this host gives no mount namespaces: neither root nor user namespaces")


class Mounts:
    """Makes interpreters that see something else at a path than everybody else does."""

    def __init__(self, unshare: str, folder: Path) -> None:
        self.unshare, self.folder = unshare, folder

    def python(self, mount: str) -> str:
        """Return an interpreter that runs `mount` in a namespace of its own first."""
        script = self.folder / f"python-{uuid.uuid4().hex}"
        inner = f'{mount} && exec {shlex.quote(sys.executable)} "$@"'
        script.write_text(f'#!/bin/sh\nexec {self.unshare} sh -c {shlex.quote(inner)} sh "$@"\n')
        script.chmod(0o755)
        return str(script)


@pytest.fixture
def mounts(unshare: str, tmp_path: Path) -> Mounts:
    return Mounts(unshare, tmp_path)


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    """Return a folder for an array; workers may be made not to see it."""
    folder = tmp_path / "only here" / "array.zarr"
    folder.parent.mkdir()
    return folder


@pytest.mark.root
@pytest.mark.parametrize("depth", ["the array", "the folder above"])
def test_a_path_that_only_the_client_sees(
    start_tcp_cluster: StartCluster, mounts: Mounts, hidden: Path, depth: str
) -> None:
    data = write_array(str(hidden))
    over = hidden if depth == "the array" else hidden.parent
    cluster = start_tcp_cluster(workers=1, python=mounts.python(f"mount -t tmpfs none {shlex.quote(str(over))}"))
    with Client(cluster.address, set_as_default=False) as client:
        expect_not_visible(zds.stream_chunks(str(hidden), client=client), data, str(hidden))


@pytest.mark.root
def test_a_path_that_one_of_two_workers_does_not_see(
    start_tcp_cluster: StartCluster, mounts: Mounts, hidden: Path
) -> None:
    data = write_array(str(hidden))
    cluster = start_tcp_cluster(workers=1)
    cluster.python = mounts.python(f"mount -t tmpfs none {shlex.quote(str(hidden))}")
    cluster.add_worker()
    cluster.wait(2)
    with Client(cluster.address, set_as_default=False) as client:
        stream = zds.stream_chunks(str(hidden), client=client, on_error="skip").map(slowly(0.02))
        expect_not_visible(stream, data, str(hidden))
        assert stream.report.dead_lettered == 0


@pytest.mark.root
def test_another_array_at_the_same_path(start_tcp_cluster: StartCluster, mounts: Mounts, hidden: Path) -> None:
    data = write_array(str(hidden))
    other = hidden.parent.parent / "other.zarr"
    zarr.create_array(str(other), shape=SHAPE, chunks=CHUNKS, dtype="i4", fill_value=0)
    bind = f"mount --bind {shlex.quote(str(other))} {shlex.quote(str(hidden))}"
    cluster = start_tcp_cluster(workers=1, python=mounts.python(bind))
    with Client(cluster.address, set_as_default=False) as client:
        message = expect_not_visible(zds.stream_chunks(str(hidden), client=client), data, str(hidden))
    assert "fill_value is 0, expected -1" in message


def test_a_folder_that_vanishes_in_mid_stream_is_not_read_as_fill_values(client: Client, tmp_path: Path) -> None:
    place = tmp_path / "array.zarr"
    data = write_array(str(place))
    stream = zds.stream_chunks(str(place), concurrency=8).map(slowly(0.02))

    def consume() -> None:
        for count, chunk in enumerate(stream):
            np.testing.assert_array_equal(chunk.data, data[chunk.region])
            if count == 20:
                place.rename(tmp_path / "elsewhere")

    with pytest.raises(zds.ZdsError, match=r"array\.zarr"):
        consume()


# -- what the workers lack ----------------------------------------------------------------------------------------


WITHOUT_PACKAGE = """
    import sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "zarr_dask_stream":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Hidden())
"""

OTHER_VERSION = """
    import importlib.metadata

    real = importlib.metadata.version
    importlib.metadata.version = lambda name: "9.9.9" if name == "zarr-dask-stream" else real(name)
"""


def environment(folder: Path, program: str) -> dict[str, str]:
    """Return an environment in which every interpreter runs `program` first."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(program))
    return {"PYTHONPATH": str(folder)}


def test_workers_without_the_package(start_tcp_cluster: StartCluster, tmp_path: Path) -> None:
    write_array(str(tmp_path / "array.zarr"))
    cluster = start_tcp_cluster(workers=1, env=environment(tmp_path / "without", WITHOUT_PACKAGE))
    with Client(cluster.address, set_as_default=False) as client:
        with pytest.raises(zds.ClusterError, match="not installed on the workers") as caught:
            list(zds.stream_chunks(str(tmp_path / "array.zarr"), client=client))
        for graph in zds.stream_chunks(str(tmp_path / "array.zarr"), client=client).take(1).to_delayed():
            with pytest.raises(ModuleNotFoundError, match="zarr_dask_stream"):
                client.compute(graph).result()
    assert "pip install zarr-dask-stream" in str(caught.value)
    assert "PipInstall" in str(caught.value)
    assert cluster.worker_pids, "the worker died of a task that it could not unpack"


def test_a_scheduler_does_not_need_the_package(start_tcp_cluster: StartCluster, tmp_path: Path) -> None:
    data = write_array(str(tmp_path / "array.zarr"))
    cluster = start_tcp_cluster(workers=0, env=environment(tmp_path / "without", WITHOUT_PACKAGE))
    cluster.env = {}
    cluster.add_worker()
    cluster.wait(1)
    with Client(cluster.address, set_as_default=False) as client:
        np.testing.assert_array_equal(assemble(zds.stream_chunks(str(tmp_path / "array.zarr"), client=client)), data)


def test_workers_with_another_version_of_the_package(start_tcp_cluster: StartCluster, tmp_path: Path) -> None:
    write_array(str(tmp_path / "array.zarr"))
    cluster = start_tcp_cluster(workers=1, env=environment(tmp_path / "other", OTHER_VERSION))
    with (
        Client(cluster.address, set_as_default=False) as client,
        pytest.raises(zds.ClusterError, match=r"has zarr_dask_stream 9\.9\.9, the client has \d") as caught,
    ):
        list(zds.stream_chunks(str(tmp_path / "array.zarr"), client=client))
    assert "worker tcp://" in str(caught.value)


def test_a_function_whose_module_the_workers_lack(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_on_the_client.py").write_text("def double(chunk):\n    return chunk.data * 2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_on_the_client  # type: ignore[import-not-found]  # noqa: PLC0415  # made two lines above

    write_array(str(tmp_path / "array.zarr"))
    with pytest.raises(zds.ClusterError, match="only_on_the_client"):
        list(zds.stream_chunks(str(tmp_path / "array.zarr")).map(only_on_the_client.double))


# -- targets ---------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("stale", [False, True], ids=["nothing there", "the same array there"])
def test_a_disk_of_the_workers_own_is_refused(
    start_tcp_cluster: StartCluster, mounts: Mounts, tmp_path: Path, stale: bool
) -> None:
    """Under the name of the target the worker has a disk of its own, perhaps with the same array on it."""
    write_array(tmp_path / "source")
    shared, other = tmp_path / "shared", tmp_path / "other"
    shared.mkdir()
    other.mkdir()
    if stale:
        zds.stream_chunks(tmp_path / "source", concurrency=1).to_zarr(other / "target").run()
    mount = f"mount --bind {shlex.quote(str(other))} {shlex.quote(str(shared))}"
    cluster = start_tcp_cluster(workers=1, python=mounts.python(mount))
    with Client(cluster.address, set_as_default=False) as client:
        stream = zds.stream_chunks(tmp_path / "source", client=client).to_zarr(shared / "target")
        with pytest.raises(errors.StoreNotVisibleError, match="is not the target that" if stale else "is not what the"):
            stream.run()
    if stale:
        assert (np.asarray(zarr.open_array(other / "target")[:]) == pattern()).all()
