"""Sinks that are no arrays: a database on the client, files that functions write on the workers."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import zarr_dask_stream as zds
from copying import array_in

MEANS = "CREATE TABLE means (row INTEGER, col INTEGER, mean REAL, PRIMARY KEY (row, col))"


@pytest.fixture
def data(tmp_path: Path) -> Any:
    data = np.arange(600.0).reshape(30, 20)
    array_in(tmp_path / "array", data, chunks=(5, 4))
    return data


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "means.db")) as database:
        database.execute(MEANS)
        yield database


def mean(chunk: zds.Chunk) -> float:
    return float(chunk.data.mean())


def expected(data: Any) -> list[tuple[int, int, float]]:
    blocks = data.reshape(6, 5, 5, 4).mean(axis=(1, 3))
    return [(row, col, float(blocks[row, col])) for row in range(6) for col in range(5)]


def rows(database: sqlite3.Connection) -> list[tuple[int, int, float]]:
    return database.execute("SELECT row, col, mean FROM means ORDER BY row, col").fetchall()


def test_a_database_that_fails_in_the_middle_is_gone_on_with(
    client: Client, tmp_path: Path, data: Any, database: sqlite3.Connection
) -> None:
    stream = zds.stream_chunks(tmp_path / "array", client=client, checkpoint=tmp_path / "ledger").map(mean)

    def insert(batch: zds.Batch, *, fail: bool = False) -> None:
        with database:
            values = [(*chunk.index, chunk.data) for chunk in batch]
            database.executemany("INSERT OR REPLACE INTO means VALUES (?, ?, ?)", values)
            if fail:
                raise sqlite3.OperationalError("the disk is full")

    def drain() -> None:
        for count, batch in enumerate(stream.batch(size=7)):
            insert(batch, fail=count == 2)

    with pytest.raises(sqlite3.OperationalError):
        drain()
    assert len(rows(database)) == 14  # what was in the transaction that failed is not there
    for batch in stream.batch(size=7):
        insert(batch)
    assert rows(database) == expected(data)


def test_a_database_as_one_sink_of_several(tmp_path: Path, data: Any, database: sqlite3.Connection) -> None:
    big: list[Any] = []

    def insert(chunk: zds.Chunk) -> None:
        with database:
            database.execute("INSERT OR REPLACE INTO means VALUES (?, ?, ?)", (*chunk.index, chunk.data))

    stream = zds.stream_chunks(tmp_path / "array", concurrency=1).map(mean)
    stream.route(lambda chunk: chunk.data < 300, {True: insert, False: big.append}).run()
    assert rows(database) == [row for row in expected(data) if row[2] < 300]
    assert len(big) == len([row for row in expected(data) if row[2] >= 300])


def test_functions_on_the_workers_write_files_of_their_own(client: Client, tmp_path: Path, data: Any) -> None:
    folder = tmp_path / "files"
    folder.mkdir()

    def save(chunk: zds.Chunk) -> str:
        name = "-".join(map(str, chunk.index)) + ".npy"
        part = folder / f".{name}"
        with part.open("wb") as file:
            np.save(file, chunk.data)
        part.replace(folder / name)  # whole or not at all, and as often as it is done
        return name

    report = zds.stream_chunks(tmp_path / "array", client=client).map(save).run()
    assert report.emitted == 30
    out = np.block([[np.load(folder / f"{i}-{j}.npy") for j in range(5)] for i in range(6)])
    np.testing.assert_array_equal(out, data)
