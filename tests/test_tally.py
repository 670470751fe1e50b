"""What a process has done for all streams together."""

import threading

from zarr_dask_stream.engine.events import BatchResult, BatchStats, Category, Failure
from zarr_dask_stream.engine.tally import Tally


def test_outcomes_failures_and_time_add_up() -> None:
    tally = Tally()
    stats = BatchStats(fetch_s=1.0, decode_s=0.5, bytes_stored=10, latency={-1: 2, 8: 1})
    failures = [Failure(7, Category.TRANSIENT, "OSError", "no"), Failure(8, Category.CORRUPT, "ValueError", "no")]
    tally.add(BatchResult(numbers=[0, 1], skipped=[2], failures=failures, unattempted=[9], apart=[10, 11], stats=stats))
    tally.add(BatchResult(failures=failures[:1]))
    counts = tally.copy()
    assert counts["chunks"] == {"done": 2, "filtered": 0, "skipped_missing": 1, "failed": 3, "unattempted": 3}
    assert counts["batches"] == {"": 2}
    assert counts["failures"] == {"transient": 2, "corrupt": 1}
    assert counts["bytes"] == {"stored": 10, "decoded": 0, "written": 0}
    assert counts["seconds"] == {"fetch": 1.0, "decode": 0.5, "compute": 0.0}
    assert counts["latency"] == {"0": 2, "2": 1}


def test_what_was_looked_at_does_not_change() -> None:
    tally = Tally()
    tally.add(BatchResult(numbers=[0]))
    before = tally.copy()
    tally.add(BatchResult(numbers=[1]))
    assert before["chunks"]["done"] == 1


def test_threads_lose_no_count() -> None:
    tally = Tally()

    def adding() -> None:
        for _ in range(500):
            tally.add(BatchResult(numbers=[0]))

    threads = [threading.Thread(target=adding) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.copy()["chunks"]["done"] == 2000
