"""All rows, by name."""

from collections.abc import Callable

from benchmarks.contest import Row
from benchmarks.guarded_rows import supervise
from benchmarks.loaded_rows import dataset, loader
from benchmarks.local_rows import client_processes, client_threads, large, ordered, sharded, small, small_v2
from benchmarks.places import Bench
from benchmarks.planned_rows import engine, latency, memory, scale, sparse
from benchmarks.reduced_rows import reduce
from benchmarks.s3_rows import s3, s3_large, tail
from benchmarks.written_rows import copy

ROWS: dict[str, Callable[[Bench], Row]] = {
    "small": small,
    "small-v2": small_v2,
    "large": large,
    "sharded": sharded,
    "client": client_threads,
    "client-processes": client_processes,
    "s3": s3,
    "s3-large": s3_large,
    "tail": tail,
    "sparse": sparse,
    "scale": scale,
    "engine": engine,
    "latency": latency,
    "ordered": ordered,
    "memory": memory,
    "supervise": supervise,
    "reduce": reduce,
    "copy": copy,
    "loader": loader,
    "dataset": dataset,
}

#: How much data each row has in `make bench`: as little as still keeps everybody busy for more than a second.
SMALLER = {
    **dict.fromkeys(ROWS, 0.5),
    "small": 1.0,
    "small-v2": 1.25,
    "large": 1.0,
    "sharded": 1.0,
    "client": 2.0,
    "s3": 1.0,
    "scale": 0.1,
    "latency": 1.0,
    "ordered": 1.0,
    "memory": 0.25,
    "reduce": 0.1,
}
