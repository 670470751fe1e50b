"""Advice: said where the figures say so, silent where they are few."""

from __future__ import annotations

import time
from typing import Any

import pytest
import zarr

import zarr_dask_stream as zds
from watched import came_back, given_up, lost, sent, tried_again
from zarr_dask_stream.engine.events import (
    Category,
    ChunksEmitted,
    ClusterChanged,
    RunFinished,
    RunStarted,
    SlowedDown,
)
from zarr_dask_stream.watch.advice import Advice, advise


def play(
    *,
    tasks: int = 100,
    chunks: int = 20,
    wall_s: float = 10.0,
    task_s: float = 0.38,
    threads: int = 4,
    fetch: float = 0.3,
    decode: float = 0.3,
    compute: float = 0.3,
    transfer_s: float = 0.001,
    consumer_s: float = 0.0,
    nbytes: int = 2**20,
    max_chunks: int | None = None,
    max_nbytes: int = 2**33,
    died: int = 0,
    slow: str = "",
    filled: int = 0,
    workers: int = 4,
    finish: bool = True,
) -> zds.Report:
    """Fold a run of equal tasks; shares of their time go to phases."""
    total = tasks * chunks
    report = zds.Report()
    report.handle(RunStarted(0.0, total, nbytes, (total,), "m", max_chunks=max_chunks, max_nbytes=max_nbytes))
    report.handle(ClusterChanged(0.0, workers, threads))
    flight = min(max_chunks or 10 * chunks, total)
    for n in range(tasks):
        at = wall_s * (n + 1) / tasks
        numbers = range(n * chunks, (n + 1) * chunks)
        report.handle(sent(at, numbers, flight, nbytes))
        worker = f"w{n % workers}"
        took = task_s * (3 if worker == slow else 1)
        report.handle(
            came_back(
                at, numbers, worker, elapsed_s=took + transfer_s, transfer_s=transfer_s, nbytes=nbytes,
                wall_s=took, fetch_s=fetch * took, decode_s=decode * took, compute_s=compute * took,
                bytes_stored=chunks * nbytes // 2, bytes_decoded=chunks * nbytes, filled=filled // tasks,
            )
        )  # fmt: skip
        report.handle(ChunksEmitted(at, tuple(numbers)))
    for n in range(died):
        report.handle(lost(wall_s, range(4 * n, 4 * n + 4), "the worker tcp://1.2.3.4:5 died"))
    if finish:
        report.handle(RunFinished(wall_s, "done", total, consumer_s, flight, flight * nbytes))
    return report


def kinds(report: zds.Report) -> list[str]:
    return [advice.kind for advice in advise(report, report.history)]


def only(report: zds.Report, kind: str) -> Advice:
    [advice] = [advice for advice in report.advice() if advice.kind == kind]
    return advice


def test_a_run_that_is_well_gets_no_advice() -> None:
    assert kinds(play()) == []


@pytest.mark.parametrize(
    ("kind", "run", "figures"),
    [
        ("fetch-bound", {"fetch": 0.8, "decode": 0.1, "compute": 0.05}, ["80%", "100.0 MiB/s", "requests="]),
        (
            "fetch-bound",
            {"fetch": 0.8, "decode": 0.1, "compute": 0.05, "max_chunks": 8},
            ["Raise concurrency", "concurrency=8"],
        ),
        ("decode-bound", {"decode": 0.7, "fetch": 0.1, "compute": 0.1}, ["70%", "13 ms a chunk"]),
        ("compute-bound", {"compute": 0.75, "fetch": 0.1, "decode": 0.1}, ["75%", ".map_batch(...)"]),
        ("consumer-bound", {"consumer_s": 8.0, "task_s": 0.05}, ["8.0 s of 10.0 s", ".map(...)"]),
        ("scheduler-bound", {"task_s": 0.01, "nbytes": 4096}, ["100 tasks of 10 ms", "4.0 KiB are small", "shard"]),
        ("scheduler-bound", {"task_s": 0.01}, ["larger concurrency"]),
        ("tiny-chunks", {"nbytes": 4096}, ["4.0 KiB", "2,000 chunks", "shards"]),
        ("memory-bound", {"max_nbytes": 2 * 2**20, "task_s": 0.1}, ["room for 2 of", "4 threads", "8.0 MiB"]),
        ("concurrency-bound", {"max_chunks": 2, "task_s": 0.1}, ["concurrency=2 on 4 threads", "concurrency=8"]),
        ("transfer-bound", {"transfer_s": 0.2}, ["20.0 s on their way", ".reduce(...)"]),
        ("slow-worker", {"slow": "w2"}, ["w2", "17.5 chunks", "52.6"]),
        ("workers-die", {"died": 20}, ["20 of 120 tasks", "worker ... died", "1.0 MiB decoded"]),
        ("mostly-missing", {"filled": 1500}, ["1,500 of 2,000", 'missing="skip"']),
    ],
)
def test_each_kind_of_trouble_is_named_with_its_figures(kind: str, run: dict[str, Any], figures: list[str]) -> None:
    advice = only(play(**run), kind)
    for figure in figures:
        assert figure in f"{advice.title} {advice.text}", advice.text


@pytest.mark.parametrize(
    "run",
    [
        {"fetch": 0.9, "decode": 0.0, "compute": 0.0},
        {"task_s": 0.001, "nbytes": 4096},
        {"consumer_s": 0.4},
        {"slow": "w2"},
        {"transfer_s": 0.2},
        {"max_nbytes": 2**20},
    ],
)
def test_a_short_run_proves_nothing(run: dict[str, Any]) -> None:
    assert kinds(play(**{"wall_s": 0.5, "tasks": 20, **run})) == []
    assert kinds(play(**{"tasks": 1, "chunks": 4, **run})) == []


def test_the_phase_is_not_blamed_where_the_consumer_is() -> None:
    assert kinds(play(fetch=0.9, decode=0.05, compute=0.0, consumer_s=9.0, task_s=0.05)) == ["consumer-bound"]


def fail(report: zds.Report, number: int, category: Category, worker: str = "w1", *, dead: bool = False) -> None:
    message = f"reset while reading c/{number}"
    if dead:
        told = given_up(5.0, number, message, worker, grid=(2000,), category=category.value, error_type="OSError")
        report.handle(told)
    else:
        report.handle(tried_again(5.0, number, message, worker, category=category))


def test_one_cause_of_nearly_all_errors_is_named() -> None:
    report = play(finish=False)
    for n in range(40):
        fail(report, n, Category.TRANSIENT)
    advice = only(report, "one-cause")
    assert "40 of 40 failures are OSError: reset while reading c/#" in advice.text
    assert "healed" in advice.text
    assert "on the worker w1" in advice.text
    assert "chunk (0,)" in advice.text
    assert [(one["tries"], one["message"]) for one in report.to_dict()["causes"]] == [(40, "reset while reading c/#")]
    assert advice.to_dict() in report.to_dict()["advice"]
    fail(report, 90, Category.TRANSIENT, "w2", dead=True)
    assert "1 chunk was given up" in only(report, "one-cause").text
    assert "All of them were on" not in only(report, "one-cause").text


def test_few_errors_or_many_kinds_are_left_to_the_table() -> None:
    report = play(finish=False)
    for n in range(9):
        fail(report, n, Category.TRANSIENT)
    assert kinds(report) == []
    for n in range(30):
        report.handle(tried_again(5.0, n, "late", "", category=Category.TIMEOUT, error_type=f"E{'abc'[n % 3]}"))
    assert kinds(report) == []


def test_a_store_that_throttles_is_named_at_once() -> None:
    report = play(tasks=1, chunks=2, wall_s=0.2)
    report.handle(SlowedDown(0.1, 80.0))
    report.handle(SlowedDown(0.2, 40.4))
    advice = only(report, "store-throttles")
    assert "2 times" in advice.text
    assert "RateLimit(requests=40)" in advice.text


def test_a_cluster_without_workers_is_named_while_it_lasts() -> None:
    report = play(tasks=1, chunks=2, wall_s=0.2, finish=False)
    report.handle(ClusterChanged(3.0, 0, 0, 2.0))
    assert kinds(report) == ["no-workers"]
    report.handle(ClusterChanged(9.0, 1, 2))
    assert kinds(report) == []


def test_advice_is_plain_data() -> None:
    assert Advice("k", "t", "x").to_dict() == {"kind": "k", "title": "t", "text": "x"}


def test_a_real_run_that_computes_is_compute_bound() -> None:
    array = zarr.create_array({}, shape=(60, 10), chunks=(1, 10), dtype="f8")
    array[:] = 1.0

    def doze(chunk: zds.Chunk) -> None:
        time.sleep(0.02)

    report = zds.stream_chunks(array, concurrency=1).map(doze).run()
    assert kinds(report) == ["compute-bound"]
    assert report.time["compute"] > 0.5 * report.wall_s
