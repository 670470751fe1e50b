"""What it costs to decode a chunk where memory goes back to the system at once, as in the workers that Dask starts.

Processor time of one thread, in a process with Dask's own ``MALLOC_TRIM_THRESHOLD_``: decoded into new memory each
time, and as the stream does it. Both take turns in one run. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numcodecs
import numpy as np
from numcodecs import blosc
from numcodecs import zstd as large_zstd

from zarr_dask_stream.source.inflate import Size, build_step
from zarr_dask_stream.source.memory import settle_allocator

_SIZES = (2**16, 2**18, 2**20, 2**22)
_BYTES = 2**24  # decoded in each measurement


def measure(codec: str, nbytes: int, rounds: int, *, settle: bool) -> list[float]:
    """Return the microseconds of a chunk, a measurement a round."""
    data = (np.random.default_rng(0).normal(size=nbytes // 4) * 8).round().astype("f4") / 8
    encoder = numcodecs.Blosc("lz4") if codec == "blosc" else numcodecs.Zstd(1)
    stored = bytes(encoder.encode(data))
    library = blosc.decompress if codec == "blosc" else large_zstd.decompress
    decode: Callable[[bytes], object] = build_step(codec, {}, Size(nbytes, exact=True))
    if settle:
        settle_allocator()
    count = max(_BYTES // nbytes, 4)
    taken = []
    for _ in range(rounds):
        begin = time.thread_time()
        for _ in range(count):
            if settle:
                decode(stored)
            else:
                library(stored, np.empty(nbytes, "u1"))
        taken.append((time.thread_time() - begin) / count * 1e6)
    return taken


def child(codec: str, nbytes: int, rounds: int, *, settle: bool) -> list[float]:
    """Measure in a process of its own, whose environment is that of a worker, in a thread that is not the main one."""
    words = [sys.executable, __file__, "--measure", codec, str(nbytes), str(rounds), str(int(settle))]
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    taken: list[float] = json.loads(done.stdout)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        codec, nbytes, rounds, settle = options.measure
        found: list[float] = []
        thread = threading.Thread(
            target=lambda: found.extend(measure(codec, int(nbytes), int(rounds), settle=settle == "1"))
        )
        thread.start()
        thread.join()
        print(json.dumps(found))
        return
    rows = []
    for codec in ("blosc", "zstd"):
        for nbytes in _SIZES:
            pairs = [
                [child(codec, nbytes, 3, settle=settle) for settle in (False, True)] for _ in range(options.rounds)
            ]
            new, again = ([statistics.median(pair[side]) for pair in pairs] for side in (0, 1))
            ratio = statistics.median(a / b for a, b in zip(new, again, strict=True))
            us = {"new_us": statistics.median(new), "again_us": statistics.median(again)}
            rows.append({"codec": codec, "nbytes": nbytes, **us, "times": ratio})
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
