"""A run as a figure of matplotlib, which is imported when one is asked for."""

from __future__ import annotations

import importlib
import math
from typing import Any

import numpy as np

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.watch.account import Account, human_bytes, human_seconds
from zarr_dask_stream.watch.charts import INK, PHASE_COLOURS, nice_axis
from zarr_dask_stream.watch.chunkmap import COLOURS, OUTSIDE, STATES, ChunkMap, Picture
from zarr_dask_stream.watch.history import History

__all__ = ["figure_of"]

_PHASES_SHOWN = ("fetch", "decode", "compute", "transfer")


def figure_of(account: Account, history: History, chunkmap: ChunkMap) -> Any:
    """Draw a run.

    Parameters
    ----------
    account : Account
        Its sums.
    history : History
        How it went.
    chunkmap : ChunkMap
        Its grid.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UsageError
        If matplotlib is not installed.
    """
    try:
        figure_module = importlib.import_module("matplotlib.figure")
        ticker = importlib.import_module("matplotlib.ticker")
    except ImportError as error:
        raise UsageError(
            "plot() needs matplotlib, which is not installed: pip install 'zarr-dask-stream[notebook]'. "
            "to_html(path) needs nothing"
        ) from error
    figure = figure_module.Figure(figsize=(10.5, 7.2), layout="constrained", facecolor=INK["light"]["ground"])
    places = figure.subplot_mosaic(
        [["map", "rate"], ["map", "flight"], ["latency", "time"]], width_ratios=[1.15, 1], height_ratios=[1, 1, 1.15]
    )
    figure.suptitle(_title(account), x=0.01, ha="left", fontsize=12, fontweight="bold")
    _draw_map(places["map"], chunkmap.picture())
    _draw_series(places["rate"], history, "chunks", "Chunks per second", None)
    _draw_series(places["flight"], history, "in_flight_bytes", "Bytes in flight", ticker.FuncFormatter(_bytes))
    _draw_latency(places["latency"], history, ticker.FuncFormatter(_seconds))
    _draw_time(places["time"], account)
    return figure


def _title(account: Account) -> str:
    name = account.url.rstrip("/").rpartition("/")[2] or "a stream"
    done = account.settled - account.cancelled
    return (
        f"{name}: {account.outcome}, {done:,} chunks in {human_seconds(account.wall_s)}, "
        f"{account.dead_lettered:,} dead letters"
    )


def _bytes(value: float, _: int) -> str:
    return human_bytes(value).replace(".0 ", " ")


def _seconds(power: float, _: int) -> str:
    seconds = 10.0**power
    return f"{seconds * 1e6:g} us" if seconds < 1e-3 else human_seconds(seconds)


def _tidy(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK["light"]["quiet"])


def _draw_map(axes: Any, picture: Picture) -> None:
    rows, columns = picture.layout.shape
    axes.set_title("Chunk map", loc="left", fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if not rows * columns:
        axes.text(0.5, 0.5, "no chunks", ha="center", va="center", color=INK["light"]["quiet"])
        return
    # A cell of several chunks darkens as they end.
    palette = np.array([_rgb(COLOURS["light"][state]) for state in STATES] + [(1.0, 1.0, 1.0)])
    cells = palette[picture.states]
    done = picture.states == STATES.index("done")
    share = np.where(done, 0.35 + 0.65 * picture.done_share, 1.0)[..., None]
    axes.imshow(1 - (1 - cells) * share, aspect="auto", interpolation="nearest")
    if rows * columns <= 2500:
        axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=0.8)
        axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=0.8)
    for state, sign in (("dead", "x"), ("retried", "o")):
        down, across = np.nonzero(picture.states == STATES.index(state))
        if 0 < len(down) <= 400 and max(rows, columns) <= 64:
            axes.scatter(across, down, marker=sign, s=max(3000 / max(rows, columns) ** 1.6, 2), color="white", lw=0.8)
    held = {state: count for state, count in picture.totals.items() if count}
    lines = [
        axes.plot([], [], "s", color=COLOURS["light"][state], label=f"{state} {held[state]:,}")[0] for state in held
    ]
    if lines and (picture.states < OUTSIDE).any():
        axes.legend(
            handles=lines, loc="upper left", bbox_to_anchor=(0, -0.01), ncols=4, frameon=False, fontsize=8,
            handletextpad=0.2, columnspacing=1.0, borderaxespad=0.2,
        )  # fmt: skip


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))


def _draw_series(axes: Any, history: History, name: str, title: str, formatter: Any) -> None:
    times, values = history.series(name)
    end = max(history.duration_s, float(times[-1]))
    scale, unit = next(((s, u) for s, u in ((3600.0, "h"), (60.0, "min")) if end >= 3 * s), (1.0, "s"))
    times = np.concatenate([[0.0], times, [end]]) / scale
    values = np.concatenate([values[:1], values, values[-1:]])
    axes.fill_between(times, values, color=INK["light"]["accent"], alpha=0.18, linewidth=0)
    axes.plot(times, values, color=INK["light"]["accent"], linewidth=1.4)
    axes.set_xlim(0, max(float(times[-1]), 1e-9))
    top, step = nice_axis(float(values.max()), 1000 if formatter is None else 1024, 0.0 if formatter is None else 1.0)
    axes.set_ylim(0, top * 1.03)
    axes.set_yticks(np.arange(0, top + step / 2, step))
    axes.set_xlabel(unit, fontsize=8, color=INK["light"]["quiet"])
    if formatter is not None:
        axes.yaxis.set_major_formatter(formatter)
    _tidy(axes, title)


def _draw_latency(axes: Any, history: History, formatter: Any) -> None:
    drawn = False
    for name in _PHASES_SHOWN:
        edges, counts = history.latency(name)
        if counts.size:
            axes.stairs(counts / counts.sum(), np.log10(edges), color=PHASE_COLOURS[name][0], label=name, linewidth=1.4)
            drawn = True
    _tidy(axes, "Time of a chunk by phase (share of chunks)")
    if not drawn:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing measured", ha="center", va="center", color=INK["light"]["quiet"])
        return
    axes.xaxis.set_major_formatter(formatter)
    low, high = axes.get_xlim()
    axes.set_xticks(range(math.ceil(low), math.floor(high) + 1, max(1, math.ceil((high - low) / 6))))
    axes.legend(frameon=False, fontsize=8)


def _draw_time(axes: Any, account: Account) -> None:
    names = [name for name in PHASE_COLOURS if name in account.time][::-1]
    seconds = [account.time[name] for name in names]
    bars = axes.barh(names, seconds, color=[PHASE_COLOURS[name][0] for name in names], height=0.7)
    axes.bar_label(bars, [human_seconds(one) for one in seconds], padding=3, fontsize=8)
    axes.set_xlim(0, max(*seconds, 1e-9) * 1.2)
    axes.xaxis.set_visible(False)
    _tidy(axes, "Where the time went (all threads and tasks together)")
    axes.spines["bottom"].set_visible(False)
