"""Single chunks that are damaged, or that cost their worker its memory, among good ones."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from zarr.codecs import Crc32cCodec, ZstdCodec

import zarr_dask_stream as zds
from chaos.scene import (
    StartCluster,
    assemble_rows,
    assert_no_keys,
    assert_rest_there,
    connect,
    within,
    write_rows,
)
from counted import balanced
from realparts.leaks import LeakCheck

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

COUNT = 300
FAST = zds.RetryPolicy(wait_initial=0.01, wait_max=0.05)


def damage(array: Path, rng: random.Random) -> dict[int, str]:
    """Damage chunks in every way there is; return what was done to which."""
    rows = rng.sample(range(COUNT), 24)
    ways = ["bit", "bit", "bit", "cut", "cut", "empty", "longer", "shuffled"]
    done = {row: ways[n % len(ways)] for n, row in enumerate(rows)}
    for row, way in done.items():
        file = array / "c" / str(row) / "0"
        body = bytearray(file.read_bytes())
        if way == "bit":
            body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
        elif way == "cut":
            del body[rng.randrange(1, len(body)) :]
        elif way == "empty":
            body.clear()
        elif way == "longer":
            body += rng.randbytes(rng.randrange(1, 9))
        else:
            body[:] = body[1:] + body[:1]
        file.write_bytes(body)
    return done


@pytest.fixture(scope="module", params=[[Crc32cCodec()], [ZstdCodec(), Crc32cCodec()]], ids=["crc32c", "zstd+crc32c"])
def damaged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, np.ndarray, dict[int, str]]:
    path = tmp_path_factory.mktemp("damaged") / "rows.zarr"
    data = write_rows(str(path), COUNT, compressors=request.param)
    return str(path), data, damage(path, random.Random(7))


@pytest.mark.parametrize("ordered", [True, False])
def test_damaged_chunks_are_named_and_the_others_delivered(
    client: Client, leak_check: LeakCheck, damaged: tuple[str, np.ndarray, dict[int, str]], ordered: bool
) -> None:
    url, data, bad = damaged
    stream = zds.stream_chunks(url, client=client, ordered=ordered, on_error="skip", retry=FAST)
    with within(60):
        out = assemble_rows(stream, data)
    assert_rest_there(stream.report, out, data, set(bad))
    assert {letter.category for letter in stream.report.dead_letters} == {"corrupt"}
    assert {letter.attempts for letter in stream.report.dead_letters} == {FAST.corrupt_attempts}


def test_a_sum_over_damaged_chunks_leaves_out_those_and_no_other(
    client: Client, leak_check: LeakCheck, damaged: tuple[str, np.ndarray, dict[int, str]]
) -> None:
    url, data, bad = damaged
    stream = zds.stream_chunks(url, client=client, on_error="skip", retry=FAST).reduce(zds.reducers.sum())
    with within(60):
        answer = stream.compute()
    good = [row for row in range(COUNT) if row not in bad]
    assert int(answer) == int(data[good].sum(dtype="i8"))
    assert {letter.index[0] for letter in stream.report.dead_letters} == set(bad)
    assert balanced(stream.report)


def test_verify_names_the_damaged_chunks(
    *,
    client: Client,
    leak_check: LeakCheck,
    damaged: tuple[str, np.ndarray, dict[int, str]],
    tmp_path: Path,
) -> None:
    url, _, bad = damaged
    assert client.scheduler is not None
    letters = tmp_path / "letters.jsonl"
    command = ["verify", url, "--scheduler", str(client.scheduler.address), "--dead-letters", str(letters), "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "zarr_dask_stream", *command], check=False, capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1, ran.stderr
    answer = json.loads(ran.stdout)
    assert (answer["good"], answer["bad"], answer["not_stored"]) == (COUNT - len(bad), len(bad), 0)
    assert {json.loads(line)["index"][0] for line in letters.read_text().splitlines()} == set(bad)


# -- death ------------------------------------------------------------------------------------------------


def deadly(guilty: set[int]) -> Any:
    """Return a function of which a worker dies for some chunks; travels by value."""

    def die(chunk: zds.Chunk) -> Any:
        if chunk.index[0] in guilty:
            os._exit(3)
        time.sleep(0.01)
        return chunk.data

    return die


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 4])
def test_of_many_chunks_that_kill_each_is_named_and_no_other(
    leak_check: LeakCheck, start_tcp_cluster: StartCluster, tmp_path: Path, threads: int
) -> None:
    url, guilty = str(tmp_path / "rows.zarr"), {3, 4, 60, 130}
    data = write_rows(url, COUNT)
    cluster = start_tcp_cluster(workers=2, worker_arguments=["--nanny", "--nthreads", str(threads)])
    with connect(cluster) as client, within(220):
        policy = zds.RetryPolicy(worker_budget=100)
        stream = zds.stream_chunks(url, client=client, ordered=False, on_error="skip", retry=policy)
        stream = stream.map(deadly(guilty))
        out = assemble_rows(stream, data)
        assert_rest_there(stream.report, out, data, guilty)
        assert any("its process exited with code 3" in letter.message for letter in stream.report.dead_letters)
        assert_no_keys(client)


# -- memory -----------------------------------------------------------------------------------------------


def greedy(guilty: set[int], nbytes: int) -> Any:
    """Return a function that takes far too much memory for some chunks; travels by value."""

    def take(chunk: zds.Chunk) -> Any:
        if chunk.index[0] in guilty:
            hoard: list[bytearray] = []
            while 20_000_000 * len(hoard) < nbytes:
                hoard.append(bytearray(b"x") * 20_000_000)
                time.sleep(0.02)
            time.sleep(1)
        return chunk.data

    return take


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [pytest.param(True, marks=pytest.mark.sample), False])
def test_a_chunk_that_takes_too_much_memory_is_given_up_alone(
    leak_check: LeakCheck, start_tcp_cluster: StartCluster, tmp_path: Path, ordered: bool
) -> None:
    url, guilty = str(tmp_path / "rows.zarr"), {137}
    data = write_rows(url, COUNT)
    cluster = start_tcp_cluster(workers=2, worker_arguments=["--nanny", "--memory-limit", "600MB"])
    with connect(cluster) as client, within(120):
        stream = zds.stream_chunks(url, client=client, ordered=ordered, on_error="skip")
        stream = stream.map(greedy(guilty, 1_500_000_000))
        out = assemble_rows(stream, data)
        assert_rest_there(stream.report, out, data, guilty)
        (letter,) = stream.report.dead_letters
        assert letter.category == "cluster"
        assert "MiB, too near to its memory limit" in letter.message
        assert_no_keys(client)


@pytest.mark.slow
def test_a_function_that_always_takes_too_much_memory_ends_in_one_clear_error(
    leak_check: LeakCheck, start_tcp_cluster: StartCluster, tmp_path: Path
) -> None:
    url = str(tmp_path / "rows.zarr")
    write_rows(url, 50)
    cluster = start_tcp_cluster(workers=2, worker_arguments=["--nanny", "--memory-limit", "600MB"])
    with connect(cluster) as client, within(150):
        stream = zds.stream_chunks(url, client=client, on_error="skip", retry=zds.RetryPolicy(worker_budget=4))
        stream = stream.map(greedy(set(range(50)), 1_500_000_000))
        with pytest.raises(zds.ClusterError, match=r"have cost the cluster \d+ workers.*out of memory"):
            stream.run()
        assert stream.report.outcome == "failed"
        assert balanced(stream.report)
        assert_no_keys(client)
