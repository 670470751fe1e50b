"""Eight streams at once, round after round, and what the processes of their cluster hold after each round.

    python -m chaos.soak JOB.json OUT.jsonl

is the client's process; `test_soak.py` starts it beside a cluster, an S3 server and a proxy that breaks requests. Each
line of OUT tells of one round: how many chunks, and for each process its memory, file descriptors and threads.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from distributed import Client

import zarr_dask_stream as zds

Job = Mapping[str, Any]

#: As in the other chaos tests: so many tries that a chunk met by a fault in one of ten does not run out of them.
PATIENT = zds.RetryPolicy(attempts=12, corrupt_attempts=12, wait_initial=0.02, wait_max=0.5)


def _ordered(stream: zds.ChunkStream, _: Path) -> None:
    for row, chunk in enumerate(stream):
        assert int(chunk.data[0, 0]) == row * chunk.data.shape[1]


def _left_early(stream: zds.ChunkStream, _: Path) -> None:
    for count, _chunk in enumerate(stream):
        if count == len(stream) // 2:
            break


def _reduced(stream: zds.ChunkStream, _: Path) -> None:
    rows, width = stream.spec.shape
    assert int(stream.reduce(zds.reducers.max()).compute()) == rows * width - 1


def _resumed(stream: zds.ChunkStream, folder: Path) -> None:
    ledger = folder / f"{threading.get_ident()}.ledger"
    again = zds.stream_chunks(stream.spec, **_options(stream), checkpoint=ledger)
    _left_early(again, folder)
    assert again.run().outcome == "done"
    ledger.unlink()
    for beside in folder.glob(f"{ledger.name}*"):
        beside.unlink()


def _options(stream: zds.ChunkStream) -> dict[str, Any]:
    options = stream._options
    return {"client": options.client, "retry": options.retry, "timeout": options.timeout}


def _asked(stream: zds.ChunkStream, _: Path) -> None:
    with stream.producer() as producer:
        assert len(producer.ask(20)) == 20


def _failing(stream: zds.ChunkStream, _: Path) -> None:
    def picky(chunk: zds.Chunk) -> int:
        if chunk.index[0] % 7 == 0:
            raise ValueError("not this one")
        return int(chunk.data.sum())

    tolerant = zds.stream_chunks(stream.spec, **_options(stream), on_error="skip").map(picky)
    report = tolerant.run()
    assert report.dead_lettered == -(-len(stream) // 7), report


def _copied(stream: zds.ChunkStream, folder: Path) -> None:
    target = folder / f"copy-{threading.get_ident()}.zarr"
    assert stream.to_zarr(target, overwrite=True).run().outcome == "done"


def _batched(stream: zds.ChunkStream, _: Path) -> None:
    sizes = [len(batch) for batch in stream.map(lambda chunk: float(chunk.data.mean())).batch(size=16)]
    assert sum(sizes) == len(stream)


KINDS: Sequence[Callable[[zds.ChunkStream, Path], None]] = (
    _ordered, _left_early, _reduced, _resumed, _asked, _failing, _copied, _batched,
)  # fmt: skip


def one_round(client: Client, job: Job, folder: Path, ordered: bool) -> int:
    """Run all kinds at once, each in a thread; return how many chunks were planned."""
    errors: list[BaseException] = []
    streams = [
        zds.stream_chunks(
            job["url"],
            storage_options=job["storage_options"],
            client=client,
            ordered=ordered or kind is _ordered,
            retry=PATIENT,
            timeout=5.0,
            hedge=zds.Hedge(min_s=0.3),
            max_bytes="16 MiB",
        )
        for kind in KINDS
    ]

    def work(kind: Callable[[zds.ChunkStream, Path], None], stream: zds.ChunkStream) -> None:
        try:
            kind(stream, folder)
        except BaseException as error:  # noqa: BLE001  # raised below, by the process's own thread
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=pair, name=f"soak-{pair[0].__name__}")
        for pair in zip(KINDS, streams, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise ExceptionGroup("streams failed", errors)  # type: ignore[type-var]  # BaseException among them is welcome
    return sum(map(len, streams))


def trim() -> None:
    """Give freed memory back to the system, so that what is held can be told from what was held once."""
    gc.collect()
    trim_heap = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim_heap is not None:
        trim_heap(0)


def look(processes: Mapping[str, psutil.Process]) -> dict[str, dict[str, int]]:
    """Return what each process holds: bytes of its own, file descriptors, threads."""
    return {
        name: {"bytes": process.memory_full_info().uss, "files": process.num_fds(), "threads": process.num_threads()}
        for name, process in processes.items()
    }


def named_threads() -> dict[str, int]:
    """Return how many threads there are by what they are called, numbers aside; the system's own names for theirs."""
    names = ((task / "comm").read_text() for task in Path("/proc/self/task").iterdir())
    own = (thread.name for thread in threading.enumerate())
    return dict(Counter(re.sub(r"[\d-]+", "", name).strip() for name in (*names, *own)))


def main(job_path: str, out_path: str) -> None:
    """Go round until the time is over, and say after each round what is held."""
    job = json.loads(Path(job_path).read_text())
    folder = Path(job["folder"])
    processes = {"client": psutil.Process(), **{name: psutil.Process(pid) for name, pid in job["pids"].items()}}
    rng = np.random.default_rng(job["seed"])
    with Path(out_path).open("w", encoding="utf-8") as out, Client(job["address"], set_as_default=False) as client:
        begin, rounds = time.monotonic(), 0
        while rounds < job["least"] or time.monotonic() - begin < job["seconds"]:
            chunks = one_round(client, job, folder, ordered=bool(rng.integers(2)))
            rounds += 1
            client.run(trim, on_error="ignore")  # one of them may be dying
            client.run_on_scheduler(trim)
            trim()
            line = {"round": rounds, "at_s": time.monotonic() - begin, "chunks": chunks, "held": look(processes)}
            print(json.dumps(line), file=out, flush=True)
        print("threads of the workers:", client.run(named_threads, on_error="ignore"))


if __name__ == "__main__":
    main(*sys.argv[1:])
