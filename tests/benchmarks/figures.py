"""Tables and plots of the results of a benchmark, made from its JSON file and the notes beside this module alone.

    python tests/benchmarks/figures.py bench-results/results.json
    python tests/benchmarks/figures.py bench-results/results.json --publish

The second also puts the JSON file, the tables and the plots into the source folder and the plots with a few words into
the README.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import plots

Json = Mapping[str, Any]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
#: Between these lines of the README is what `publish` writes.
BEGIN, END = "<!-- benchmarks: begin, written by `make bench-publish` -->", "<!-- benchmarks: end -->"
PLOTS = "plots"


def rate(run: Json) -> float:
    """Chunks per second of one run."""
    return float(run["chunks"] / run["seconds"])


def rates(row: Json, contender: str) -> list[float]:
    """Chunks per second of one contender, round by round."""
    return [rate(round_[contender]) for round_ in row["rounds"]]


def relative(row: Json, contender: str, to: str) -> list[float]:
    """Throughput over that of another contender, round by round."""
    return [mine / theirs for mine, theirs in zip(rates(row, contender), rates(row, to), strict=True)]


def notes() -> dict[str, str]:
    """Return what stands in the way of rows that fall short, by name; written by hand."""
    found: dict[str, str] = tomllib.loads((HERE / "notes.toml").read_text(encoding="utf-8"))["falls_short"]
    return {name: " ".join(text.split()) for name, text in found.items()}


# -- words --------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Write a number as short as its use allows."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) < 2 else f"{value:.3g}"


def reached(goal: Json) -> str:
    """Write what a goal came to, with the spread of its rounds."""
    unit = "x" if goal["kind"] == "times" else ""
    spread = f"{number(goal['lowest'])} - {number(goal['highest'])}"
    return f"{number(goal['median'])}{unit} [{spread}]"


def _verdict(goal: Json) -> str:
    return {True: "met", False: "missed", None: ""}[goal["met"]]


def brief(row: Json) -> list[str]:
    """A row for the terminal."""
    lines = [f"\n{row['name']}: {row['work']}"]
    for contender in row["contenders"]:
        values = rates(row, contender["name"])
        spread = f"{min(values):,.1f} - {max(values):,.1f}"
        lines.append(f"  {statistics.median(values):>12,.1f} chunks/s  {contender['name']}  [{spread}]")
    lines += [f"  {_verdict(goal):>6}  {goal['aim']}: {reached(goal)}" for goal in row["goals"]]
    return lines + [f"  absent  {name}: {why}" for name, why in row["absent"].items()]


# -- tables -------------------------------------------------------------------------------------------


def table(result: Json) -> str:
    """All rows with all contenders, as a Markdown document."""
    lines = ["# Benchmarks", "", machine(result), "", versions(result), "", *_summary(result)]
    for row in result["rows"]:
        lines += ["", *_section(row)]
    return "\n".join(lines) + "\n"


def _summary(result: Json) -> list[str]:
    lines = ["## All rows", "", "| row | work | aimed at | reached |", "|---|---|---|---|"]
    lines += map(_line, result["rows"])
    if ahead := _ahead(result):
        lines += ["", f"Peers that are ahead (the stream's throughput over theirs): {ahead}."]
    return lines


def machine(result: Json) -> str:
    """Say on what and how the figures came about."""
    about = result["machine"]
    return (
        f"{about['cores']} cores of {about['cpu']}, {about['memory_gib']} GiB, {about['system']}; seed "
        f"{result['seed']}. All contenders of a row take turns, round after round, on warm caches; a figure is the "
        "median of the rounds, in brackets the lowest and the highest, and ratios are taken within a round. A number "
        "of chunks behind a contender's name: it did an array of the same kind with so many chunks only."
    )


def versions(result: Json) -> str:
    """Say with which versions."""
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items())


def _section(row: Json) -> list[str]:
    first = row["contenders"][0]["name"]
    measured = row["measured"]
    lines = [
        f"## {row['name']}",
        "",
        f"{row['work']}.",
        "",
        f"| | chunks/s | µs a chunk | of processors | of {first} |",
    ]
    lines += ["|---|---:|---:|---:|---:|"]
    for contender in row["contenders"]:
        values, share = rates(row, contender["name"]), relative(row, contender["name"], first)
        middle = statistics.median(values)
        spread = f"[{number(min(values))} - {number(max(values))}]"
        costs = f"{number(1e6 / middle)} | {_processor(row, contender)} | {number(statistics.median(share))}"
        lines.append(f"| {contender['name']} | {number(middle)} {spread} | {costs} |")
    lines += ["", "| aimed at | reached | |", "|---|---:|---|"]
    lines += [f"| {goal['aim']} | {reached(goal)} | {_verdict(goal)} |" for goal in row["goals"]]
    if note := _note(row):
        lines += ["", f"What stands in the way: {note}"]
    if row["absent"]:
        lines += ["", "Not here: " + "; ".join(f"{name} ({why})" for name, why in row["absent"].items()) + "."]
    state = f", at {measured['commit']}" if measured["commit"] else ""
    lines += ["", f"{len(row['rounds'])} rounds at scale {row['scale']:g}, {measured['at']} UTC{state}."]
    return lines


def _processor(row: Json, contender: Json) -> str:
    """Return the processor time of a chunk in µs, all processes together, where it was measured."""
    runs = [round_[contender["name"]] for round_ in row["rounds"]]
    if any("cpu_s" not in run for run in runs):
        return "-"
    return number(statistics.median(1e6 * run["cpu_s"] / run["chunks"] for run in runs))


def _note(row: Json) -> str:
    short = any(goal["met"] is False for goal in row["goals"])
    return notes().get(row["name"], "") if short else ""


def readme(result: Json) -> str:
    """What the README shows: both plots, what was aimed at and missed, and who is ahead."""
    about, python = result["machine"], result["versions"]["python"]
    folder = HERE.relative_to(ROOT).as_posix()
    judged = [goal for row in result["rows"] for goal in row["goals"] if goal["met"] is not None]
    missed = [f"*{row['name']}* ({short})" for row in result["rows"] if (short := _missed(row))]
    words = f"Of {len(judged)} targets {sum(goal['met'] for goal in judged)} are met."
    if missed:
        words += f" Missed: {'; '.join(missed)}. What stands in the way is in the table of the row."
    parts = [
        _wrapped(
            f"Measured on {about['cores']} cores with Python {python}, all contenders of a row taking turns in one "
            "run. The limit is what bare loops in as many processes reach, without Dask: they read and decode with the "
            "fastest library call, keep their memory for the next chunk and apply the same function."
        ),
        _picture("limit", "Shares of the limit and other shares that are aimed at, row by row, with their targets"),
        "How many times as fast as other tools the stream is, on the same cluster or on as many cores:",
        _picture("peers", "Speed-up of the stream over each peer, row by row, on a logarithmic scale"),
        _wrapped(words),
    ]
    if ahead := _ahead(result):
        parts.append(_wrapped(f"Peers that are ahead (the stream's throughput over theirs): {ahead}."))
    parts.append(
        _wrapped(
            f"[results.md]({folder}/results.md) has every row and contender, [results.json]({folder}/results.json) "
            "every round. `make bench` measures all rows with less data in about 40 minutes, `make bench-all` at full "
            "size, and `zds bench URL` compares on a store of your own."
        )
    )
    return "\n\n".join(parts)


def _missed(row: Json) -> str:
    return "; ".join(f"{goal['aim']}: {reached(goal)}" for goal in row["goals"] if goal["met"] is False)


def _wrapped(text: str) -> str:
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False, subsequent_indent=indent)


def _ahead(result: Json) -> str:
    """Name the peers that are faster than the stream."""
    found = []
    for row in result["rows"]:
        stream = next((c["name"] for c in row["contenders"] if c["kind"] == "stream"), "")
        slower = {
            c["name"].partition(" (")[0]: statistics.median(relative(row, stream, c["name"]))
            for c in row["contenders"]
            if c["kind"] == "peer"
        }
        words = [f"{name} {ratio:.2f}x" for name, ratio in slower.items() if ratio < 1]
        found += [f"in *{row['name']}* {', '.join(words)}"] if words else []
    return "; ".join(found)


def _picture(name: str, alt: str) -> str:
    folder = f"{HERE.relative_to(ROOT).as_posix()}/{PLOTS}"
    lines = [
        "<picture>",
        f'  <source media="(prefers-color-scheme: dark)" srcset="{folder}/{name}-dark.svg">',
        f'  <img alt="{alt}" src="{folder}/{name}-light.svg">',
        "</picture>",
    ]
    return "\n".join(lines)


def _line(row: Json) -> str:
    judged = [goal for goal in row["goals"] if goal["met"] is not None]
    aims = "<br>".join(goal["aim"] for goal in judged)
    values = "<br>".join(reached(goal) + ("" if goal["met"] else " **missed**") for goal in judged)
    return f"| {row['name']} | {row['work'].partition(';')[0]} | {aims} | {values} |"


# -- files --------------------------------------------------------------------------------------------


def write_all(source: Path) -> None:
    """Write tables and plots beside the JSON file."""
    result = json.loads(source.read_text(encoding="utf-8"))
    source.with_suffix(".md").write_text(table(result), encoding="utf-8")
    (source.parent / "readme.md").write_text(readme(result) + "\n", encoding="utf-8")
    plots.write(result, source.parent / PLOTS)


def publish(source: Path) -> None:
    """Put what was measured into the source folder and its short table into the README."""
    for name in (source.name, source.with_suffix(".md").name):
        shutil.copy(source.parent / name, HERE / name)
    (HERE / PLOTS).mkdir(exist_ok=True)
    for path in (source.parent / PLOTS).glob("*.svg"):
        shutil.copy(path, HERE / PLOTS / path.name)
    path = ROOT / "README.md"
    short = (source.parent / "readme.md").read_text(encoding="utf-8")
    path.write_text(inserted(path.read_text(encoding="utf-8"), short), encoding="utf-8")


def inserted(text: str, short: str) -> str:
    """Return the README's text with another table in its place."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the README has no lines {BEGIN!r} and {END!r} to write between")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{short}\n{END}", text)


def main() -> None:
    """Parse, write."""
    parser = argparse.ArgumentParser(description="Tables and plots of a benchmark's results.")
    parser.add_argument("results", type=Path, help="results.json")
    parser.add_argument("--publish", action="store_true", help="put them into the source folder and the README, too")
    options = parser.parse_args()
    write_all(options.results)
    if options.publish:
        publish(options.results)


if __name__ == "__main__":
    main()
