"""The stream beside the limit of the machine and beside the tools people use today, measured in one run.

    python tests/benchmarks/bench_stream.py --out bench-results --quick
    python tests/benchmarks/bench_stream.py --out bench-results --rows small,s3 --rounds 5

Contenders take turns, round after round, on warm caches; what counts is the median of the ratios within a round.
Everything goes into `results.json`, from which the table and the plot are made.
"""

import argparse
import importlib.metadata
import json
import logging
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the folder `tests`, under which these modules and the real parts have their names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks import figures
from benchmarks.places import CORES, Bench
from benchmarks.rows import ROWS, Contender, Figure, Ratio, Row

QUICK = ("small", "large")
_PACKAGES = (
    "zarr-dask-stream", "dask", "distributed", "zarr", "numcodecs", "numpy", "zstandard", "s3fs", "tensorstore",
    "xarray",
)  # fmt: skip

Round = dict[str, dict[str, Any]]


def measure(row: Row, contender: Contender) -> dict[str, Any]:
    """Let one contender do the work once, and see that it was the right work."""
    begin = time.perf_counter()
    outcome = contender.run()
    elapsed = time.perf_counter() - begin
    seconds = elapsed if outcome.seconds is None else outcome.seconds
    if outcome.total is not None:
        expected = row.expected.setdefault(contender.work, outcome.total)
        if not math.isclose(outcome.total, expected, rel_tol=1e-4):
            raise RuntimeError(f"{contender.name} came to a sum of {outcome.total}, others to {expected}")
    return {"seconds": seconds, "chunks": outcome.chunks, "figures": dict(outcome.figures)}


def run_row(name: str, row: Row, rounds: int) -> dict[str, Any]:
    """Warm up, then let all contenders take turns."""
    if row.most_rounds is None:
        for contender in row.contenders:
            measure(row, contender)
    else:
        rounds = min(rounds, row.most_rounds)
    done: list[Round] = []
    for number in range(rounds):
        done.append({contender.name: measure(row, contender) for contender in row.contenders})
        print(f"  {name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    goals = [judge(goal, done) for goal in row.goals]
    return {
        "name": name,
        "work": row.work,
        "contenders": [contender.name for contender in row.contenders],
        "rounds": done,
        "goals": goals,
    }


def judge(goal: Ratio | Figure, rounds: list[Round]) -> dict[str, Any]:
    """Compare the median over the rounds with what was aimed at."""
    if isinstance(goal, Ratio):
        values = [figures.rate(round_[goal.of]) / figures.rate(round_[goal.to]) for round_ in rounds]
    else:
        values = [float(round_[goal.of]["figures"][goal.figure]) for round_ in rounds]
    least = goal.least
    most = goal.most if isinstance(goal, Figure) else None
    median = statistics.median(values)
    met = (least is None or median >= least) and (most is None or median <= most)
    return {"what": goal.what, "values": values, "median": median, "least": least, "most": most, "met": met}


def describe(bench: Bench, rounds: int) -> dict[str, Any]:
    """Say what everything ran on; nothing that names the machine or who ran it."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "machine": {
            "cores": CORES,
            "cpu": models[0] if models else platform.machine(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.system(),
            "load_at_start": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "seed": bench.seed,
        "scale": bench.scale,
        "rounds": rounds,
        "started": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description="The stream beside the limit and beside other tools.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, results.md and results.png")
    parser.add_argument("--rows", default="", help=f"comma-separated, of: {', '.join(ROWS)}; default: all")
    parser.add_argument("--rounds", type=int, default=0, help="default: 5, with --quick 3")
    parser.add_argument("--scale", type=float, default=0.0, help="amount of data; default: 1, with --quick 0.5")
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}, about a minute")
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--data", type=Path, help="folder in which the arrays stay for the next run")
    options = parser.parse_args()
    names = options.rows.split(",") if options.rows else list(QUICK if options.quick else ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    rounds = options.rounds or (3 if options.quick else 5)
    scale = options.scale or (0.5 if options.quick else 1.0)
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="zarr|numcodecs|distributed|dask")
    logging.getLogger("distributed").setLevel(logging.CRITICAL + 1)  # a closing cluster talks a lot
    with ExitStack() as stack:
        folder = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zds-bench-")))
        bench = Bench(folder.resolve(), options.seed, scale, stack)
        result = {**describe(bench, rounds), "rows": []}
        for name in names:
            print(f"{name}: making data", file=sys.stderr, flush=True)
            row = run_row(name, ROWS[name](bench), rounds)
            result["rows"].append(row)
            (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
            print("\n".join(figures.brief(row)), flush=True)
    figures.write_all(options.out / "results.json")
    print(f"\nresults.json, results.md and results.png are in {options.out}")


if __name__ == "__main__":
    main()
