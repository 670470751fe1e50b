"""A run as one self-contained page, and as a picture in a notebook: plain text in, HTML out.

Nothing is asked for from elsewhere and no script runs; a policy within the page forbids both. All that comes from
outside (addresses, messages of errors, names of workers) is escaped here, at the one place where text becomes HTML.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from zarr_dask_stream.watch import charts
from zarr_dask_stream.watch.account import Account, human_bytes, human_seconds
from zarr_dask_stream.watch.advice import advise
from zarr_dask_stream.watch.causes import Cause
from zarr_dask_stream.watch.charts import Band
from zarr_dask_stream.watch.chunkmap import ChunkMap, Layout
from zarr_dask_stream.watch.history import LATENCIES, History

__all__ = ["notebook_page", "whole_page"]

_WORKERS, _CAUSES, _LETTERS, _LETTERS_IN_NOTEBOOK = 64, 32, 200, 20
_LONG = 600  # characters of a message

_OUTCOMES = {
    "done": "Done: every chunk that was planned has reached its end.",
    "running": "Running: what is shown is the state at this moment.",
    "stopped early": "Stopped early: the rest was called back.",
    "failed": "Failed.",
    "not started": "Not started yet.",
}

_RULES = """
.zds{--edge:var(--grid);background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
.zds h1{font-size:1.7rem;line-height:1.25;margin:0 0 .25rem}
.zds h2{font-size:1.2rem;margin:0 0 .75rem}
.zds h3{font-size:1rem;font-weight:600;margin:0 0 .5rem}
.zds section>h3{font-size:1.15rem}
.zds p{margin:.25rem 0 .75rem}
.zds .quiet{color:var(--quiet);font-size:.9rem}
.zds .url{color:var(--quiet);overflow-wrap:anywhere;margin:0 0 1rem}
.zds .outcome{display:inline-block;border:2px solid var(--accent);color:var(--accent);border-radius:1rem;
padding:.05rem .75rem;font-weight:600;margin:0 0 .5rem}
.zds .outcome.bad{border-color:var(--bad);color:var(--bad)}
.zds .outcome.warn{border-color:var(--warn);color:var(--warn)}
.zds section{background:var(--card);border:1px solid var(--edge);border-radius:.6rem;padding:1.1rem 1.25rem;
margin:0 0 1.1rem}
.zds .tiles{padding:0;display:grid;grid-template-columns:repeat(4,1fr);gap:.75rem;margin:0 0 1rem}
.zds .tiles div{background:var(--ground);border:1px solid var(--edge);border-radius:.5rem;padding:.6rem .8rem}
.zds .tiles dt{float:none;clear:none;width:auto;margin:0;font-weight:400;color:var(--quiet);font-size:.85rem}
.zds .tiles dd{margin:0;font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.3;
white-space:nowrap}
.zds .tiles dd small{display:block;white-space:normal;font-size:.8rem;font-weight:400;color:var(--quiet)}
@media (max-width:44rem){.zds .tiles{grid-template-columns:repeat(2,1fr)}}
.zds .pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:1.25rem}
.zds svg.wide{max-width:100%!important}
.zds .scroll>svg.tall{min-width:34rem}
.zds section>:last-child{margin-bottom:0}
.zds .legend{display:flex;flex-wrap:wrap;gap:.35rem 1.1rem;list-style:none;margin:.9rem 0 0;padding:0}
.zds .legend li{display:flex;align-items:center;gap:.4rem;margin:0}
.zds .legend svg{width:16px;height:16px;flex:none}
.zds .swatch{display:inline-block;width:.8rem;height:.8rem;border-radius:.15rem;margin-right:.5rem;
vertical-align:-.08rem}
.zds .scroll{overflow-x:auto}
.zds table{border-collapse:collapse;table-layout:auto;border:0;width:100%;font-size:.9rem;margin:0;color:inherit}
.zds caption{text-align:left;color:var(--quiet);padding:0 0 .5rem}
.zds caption span{display:inline-block;max-width:min(58rem,calc(100vw - 4.5rem))}
.zds thead{border:0}
.zds tr,.zds tbody tr:nth-child(n){background:none;text-align:left}
.zds th,.zds td{text-align:left;vertical-align:top;padding:.4rem .9rem .4rem 0;border:0;
border-top:1px solid var(--edge);background:none;white-space:normal}
.zds thead th{border-top:0;color:var(--quiet);font-weight:600;white-space:nowrap}
.zds tbody th{font-weight:600}
.zds td.n,.zds th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.zds td.k,.zds th.k{white-space:nowrap}
.zds th small{display:block;font-weight:400;color:var(--quiet)}
.zds .bar{display:block;height:.3rem;border-radius:.15rem;margin:.25rem 0 0 auto}
.zds td.m{overflow-wrap:anywhere;min-width:12rem}
.zds .advice{margin:0;padding:0;list-style:none}
.zds .advice li{border-left:4px solid var(--warn);padding:.1rem 0 .1rem .9rem;margin:0 0 .9rem}
.zds .advice li:last-child{margin:0}
.zds .advice p{margin:0}
.zds summary{cursor:pointer}
@media print{.zds section,.zds tr,.zds .tiles div{break-inside:avoid}.zds .scroll{overflow:visible}}
"""

# Each class twice: so it outweighs what notebooks and their viewers say of tables and lists in outputs.
_STYLE = _RULES.replace(".zds", ".zds.zds")

_FRAME = """
html{background:var(--ground)}
body{margin:0}
main{max-width:62rem;margin:0 auto;padding:2rem 1.25rem 3rem;box-sizing:border-box}
@media print{main{max-width:none;padding:0}}
@media (max-width:32rem){main{padding:1rem .75rem 2rem}.zds.zds section{padding:.9rem .85rem}}
"""


def whole_page(account: Account, history: History, chunkmap: ChunkMap) -> str:
    """Return a run as a whole HTML document, readable without scripts, style sheets or a network.

    Parameters
    ----------
    account : Account
        Its sums.
    history : History
        How it went.
    chunkmap : ChunkMap
        Its grid.
    """
    name = account.url.rstrip("/").rpartition("/")[2] or "a stream"
    sections = [
        _section("Advice", _advice(account, history)),
        _section("Chunk map", _map(chunkmap)),
        _section("Over time", _over_time(history)),
        _section("Where the time went", _time(account)),
        _section("Latency", _latency(history)),
        _section("Workers", _workers(history)),
        _section("Errors by cause", _causes(history)),
        _section("Dead letters", _letters(account, _LETTERS)),
        _section("Account", _account(account)),
    ]
    return (
        '<!doctype html>\n<html lang="en" class="zds"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>Stream report: {_text(name)}</title>"
        f"<style>{charts.style('.zds')}{_STYLE}{_FRAME}</style></head>"
        f"<body><main><header><h1>Stream report</h1>{_head(account)}</header>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def notebook_page(account: Account, history: History, chunkmap: ChunkMap) -> str:
    """Return a run as a piece of HTML for a notebook: what matters most, the rest folded."""
    parts = [_head(account), _part("Chunk map", _map(chunkmap)), _part("Over time", _over_time(history))]
    parts.append(_part("Where the time went", _time(account, table=False)))
    if advise(account, history):
        parts.append(_part("Advice", _advice(account, history)))
    if history.causes:
        parts.append(_part("Errors by cause", _causes(history)))
    if account.dead_letters:
        shown = _letters(account, _LETTERS_IN_NOTEBOOK)
        parts.append(f"<details><summary>Dead letters ({account.dead_lettered:,})</summary>{shown}</details>")
    parts.append(f"<details><summary>Account</summary>{_account(account)}</details>")
    return (
        f'<div class="zds" style="padding:12px 4px;max-width:60rem"><style>{charts.style(".zds")}{_STYLE}</style>'
        f"{''.join(parts)}</div>"
    )


# -- the parts --------------------------------------------------------------------------------------


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, body: str) -> str:
    mark = title.lower().replace(" ", "-")
    return f'<section aria-labelledby="{mark}"><h2 id="{mark}">{title}</h2>{body}</section>'


def _part(title: str, body: str) -> str:
    return f"<section><h3>{title}</h3>{body}</section>"


def _said(account: Account) -> str:
    """Return in a sentence how the run ended; not as if all were well where chunks were given up."""
    said = _OUTCOMES.get(account.outcome, account.outcome)
    if account.outcome == "done" and account.cancelled:
        said = "Done: all that was asked for has reached its end."
    if account.outcome == "done" and account.dead_lettered:
        chunks = "1 chunk, which was" if account.dead_lettered == 1 else f"{account.dead_lettered:,} chunks, which were"
        said = f"Done but for {chunks} given up: see the dead letters."
    return said


def _head(account: Account) -> str:
    kind = {"failed": " bad", "stopped early": " warn"}.get(account.outcome, " warn" if account.dead_lettered else "")
    said = _said(account)
    error = f"<p>{_message(account.error)}</p>" if account.error else ""
    total = account.total
    share = "" if not total else f"{min((account.settled - account.cancelled) / total, 1):.0%} of {total:,} planned"
    decoded = f"{human_bytes(account.bytes_decoded / account.wall_s)}/s" if account.wall_s else ""
    tiles = [
        ("chunks", f"{account.settled - account.cancelled:,}", share or "none planned yet"),
        ("time", human_seconds(account.wall_s), ""),
        ("rate", f"{_rate(account.chunks_per_s)}/s", "chunks"),
        ("read", human_bytes(account.bytes_stored), "as stored"),
        ("decoded", human_bytes(account.bytes_decoded), decoded),
        ("in flight at most", human_bytes(account.peak_bytes_in_flight), f"{account.peak_chunks_in_flight:,} chunks"),
        ("retries", f"{account.retries:,}", f"{account.hedges:,} hedges" if account.hedges else ""),
        ("dead letters", f"{account.dead_lettered:,}", ""),
    ]
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{value}{f'<small>{more}</small>' if more else ''}</dd></div>"
        for name, value, more in tiles
    )
    return (
        f'<p class="url">{_text(account.url)}</p><p class="outcome{kind}">{_text(said)}</p>{error}'
        f'<dl class="tiles">{shown}</dl>'
    )


def _advice(account: Account, history: History) -> str:
    found = advise(account, history)
    if not found:
        return '<p class="quiet">Nothing stands out, or the run was too short to tell.</p>'
    items = "".join(f"<li><p><b>{_text(one.title)}</b></p><p>{_text(one.text)}</p></li>" for one in found)
    return f'<ul class="advice">{items}</ul>'


def _map(chunkmap: ChunkMap) -> str:
    picture = chunkmap.picture()
    about = _about_layout(picture.layout)
    return f'{charts.map_chart(picture)}{charts.legend(picture)}<p class="quiet">{about}</p>'


def _about_layout(layout: Layout) -> str:
    grid = " x ".join(f"{n:,}" for n in layout.grid_shape) or "one chunk"
    if layout.kind == "empty":
        return ""
    if layout.kind == "point":
        return f"Grid: {grid}."
    per = math.prod(layout.merge) * math.prod(
        n for axis, n in enumerate(layout.grid_shape) if axis not in layout.axes
    )  # fmt: skip
    each = "Each cell is one chunk." if per == 1 else f"Each cell is up to {per:,} chunks, and fills up as they end."
    if layout.kind == "line":
        return f"Grid: {grid}. Cells go along axis {layout.axes[0]}, row by row. {each}"
    return f"Grid: {grid}. Axis {layout.axes[0]} goes down, axis {layout.axes[1]} across. {each}"


def _over_time(history: History) -> str:
    end = history.duration_s
    if not end:
        return '<p class="quiet">Nothing has happened yet.</p>'
    drawn = []
    for name, title, unit, base, least, bound, bound_name in (
        ("chunks", "Chunks per second", lambda value: f"{_rate(value)}/s", 1000, 0, 0.0, ""),
        ("decoded", "Decoded bytes per second", lambda value: f"{_bytes(value)}/s", 1024, 1, 0.0, ""),
        ("in_flight", "Chunks in flight", _rate, 1000, 1, float(history.max_chunks or 0), "concurrency"),
        ("in_flight_bytes", "Bytes in flight", _bytes, 1024, 1, float(history.max_nbytes), "max_bytes"),
    ):
        times, values = history.series(name)
        chart = charts.line_chart(
            times.tolist(), [Band(title, values.tolist())], title=title, unit=unit, until=end, base=base, least=least,
            bound=bound, bound_name=bound_name,
        )  # fmt: skip
        drawn.append(f"<div><h3>{title}</h3>{chart}</div>")
    return f'<div class="pair">{"".join(drawn)}</div>'


_TIMES = {
    "schedule": "what Dask took for tasks beyond their work, and threads that were busy for other clients",
    "fetch": "workers waiting for the store",
    "decode": "from stored bytes to numbers",
    "compute": "your functions, reductions and sinks",
    "transfer": "results on their way to this process",
    "consumer": "this process waiting for whoever takes the chunks",
}


def _time(account: Account, *, table: bool = True) -> str:
    parts = list(account.spent.items())
    bar = charts.split_bar(parts, title="Where the time went, by phase")
    whole = sum(account.spent.values())
    if not whole or not table:
        return bar + charts.phase_legend(parts)
    done = max(account.settled - account.cancelled, 1)
    rows = [
        f'<tr><th scope="row"><span class="swatch f-p-{name}" style="background-color:'
        f'{charts.PHASE_COLOURS[name][0]}"></span>{name}'
        f'<small>{_TIMES[name]}</small></th><td class="n">{_short_time(seconds)}</td>'
        f'<td class="n">{seconds / whole:.1%}</td><td class="n">{_short_time(seconds / done)}</td></tr>'
        for name, seconds in parts
    ]
    caption = (
        "Seconds are added up over all threads and tasks, so they come to more than the run took. What tasks waited "
        f"while others of this run had all threads is not in it: {_short_time(account.time.get('queue', 0.0))}, which "
        "cost nothing."
    )
    head = ("phase", "time|n", "share|n", "a chunk|n")
    return bar + '<div style="height:.9rem"></div>' + _table(caption, head, rows)


_LATENCY_NAMES = {"chunk": "read"}


def _latency(history: History) -> str:
    rows = []
    for name in LATENCIES:
        edges, counts = history.latency(name)
        if counts.size:
            low, high = (_short_time(history.quantile(name, q)) for q in (0.5, 0.99))
            rows.append((_LATENCY_NAMES.get(name, name), edges, counts, f"half in {low}, 99 % in {high}"))
    chart = charts.histograms(rows, title="Distributions of durations by phase", unit=_short_time)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Distributions of durations">{chart}</div>'
        '<p class="quiet" style="margin-top:.75rem">Of a chunk, on a logarithmic scale: read is fetching and decoding '
        "it, the phases are means over its task. A task is from its submission to its result.</p>"
    )


def _workers(history: History) -> str:
    pasts = sorted(history.workers.items(), key=lambda item: -item[1].chunks)
    if not pasts:
        return '<p class="quiet">No worker has finished a task yet.</p>'
    most = max(past.chunks for _, past in pasts) or 1
    rows = []
    for name, past in pasts[:_WORKERS]:
        bar = (
            f'<span class="bar f-accent" aria-hidden="true" style="background-color:#0b62b8;'
            f'width:{100 * past.chunks / most:.0f}%"></span>'
        )
        phases = (_share(spent, past.wall_s) for spent in (past.fetch_s, past.decode_s, past.compute_s))
        rows.append(
            f'<tr><th scope="row">{_text(name or "this process")}</th><td class="n">{past.chunks:,}{bar}</td>'
            f'<td class="n">{past.batches:,}</td><td class="n">{_rate(past.chunks_per_busy_s)}</td>'
            f'<td class="n">{human_bytes(past.bytes_stored)}</td><td class="n">{human_seconds(past.wall_s)}</td>'
            f'<td class="n">{" / ".join(phases)}</td><td class="n">{past.failures:,}</td></tr>'
        )
    head = ("worker", "chunks|n", "tasks|n", "a busy s|n", "read|n", "busy|n", "fetch / decode / compute|n", "failed|n")
    caption = (
        f"{len(pasts):,} worker{'' if len(pasts) == 1 else 's'}, the one with most chunks first. A busy second is one "
        "that a thread of it was at work."
    )
    return _table(caption, head, rows, hidden=len(pasts) - len(rows), of=len(head))


def _causes(history: History) -> str:
    causes = history.causes
    if not causes:
        return '<p class="quiet">No attempt has failed.</p>'
    head = ("error", "what it says", "failures|n", "given up|n", "first and last", "an example", "workers|n")
    rows = [_cause(cause) for cause in causes[:_CAUSES]]
    caption = "Numbers, names and addresses are left out of messages, so that failures of one kind come together"
    return _table(caption, head, rows, hidden=len(causes) - len(rows), of=len(head))


def _cause(cause: Cause) -> str:
    when = human_seconds(cause.first_s)
    if cause.count > 1:
        when += f" to {human_seconds(cause.last_s)}"
    example = f"chunk {cause.sample}" if cause.sample else ""
    return (
        f'<tr><th scope="row">{_text(cause.error_type)}</th><td class="m">{_message(cause.message)}</td>'
        f'<td class="n">{cause.count:,}</td><td class="n">{cause.dead:,}</td><td>{when}</td>'
        f'<td class="k">{_text(example)}</td><td class="n">{len(cause.workers):,}</td></tr>'
    )


def _letters(account: Account, most: int) -> str:
    letters = account.dead_letters
    if not letters:
        return '<p class="quiet">No chunk was given up.</p>'
    rows = [
        f'<tr><th scope="row" class="k">{_text(x.index)}</th><td class="n">{x.attempts}</td>'
        f"<td>{_text(x.error_type)}</td>"
        f'<td class="m">{_message(x.message)}</td><td>{_text(x.reason)}</td><td>{_text(x.worker)}</td></tr>'
        for x in letters[:most]
    ]
    head = ("chunk", "attempts|n", "error", "message", "why it was given up", "worker")
    hidden = len(letters) - len(rows)
    caption = f"{len(letters):,} chunk{'' if len(letters) == 1 else 's'} given up"
    return _table(caption, head, rows, hidden=hidden, of=len(head), where=" in .dead_letters")


def _account(account: Account) -> str:
    rows = [f'<tr><th scope="row">{_text(name)}</th><td class="m">{_text(text)}</td></tr>'
            for name, text in account.rows()]  # fmt: skip
    return _table("Each chunk that was planned ends exactly once", ("what", "how much"), rows)


def _table(
    caption: str, head: Sequence[str], rows: Iterable[str], *, hidden: int = 0, of: int = 1, where: str = ""
) -> str:
    cells = "".join(
        f'<th scope="col"{" class=" + chr(34) + kind + chr(34) if kind else ""}>{name}</th>'
        for name, _, kind in (text.partition("|") for text in head)
    )
    more = f'<tr><td colspan="{of}">... and {hidden:,} more{where}</td></tr>' if hidden > 0 else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<caption><span>{_text(caption)}</span></caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(rows)}{more}</tbody></table></div>"
    )


# -- words ------------------------------------------------------------------------------------------


def _message(text: str) -> str:
    return _text(text if len(text) <= _LONG else text[: _LONG - 3] + "...")


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else ""


def _rate(value: float) -> str:
    """Return a number with about three digits that mean something.

    Examples
    --------
    >>> _rate(0.1234), _rate(12.34), _rate(1234.5)
    ('0.12', '12.3', '1,234')
    """
    if value == int(value) or value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _bytes(value: float) -> str:
    return human_bytes(value).replace(".0 ", " ")


def _short_time(seconds: float) -> str:
    """Return a duration, down to nanoseconds.

    Examples
    --------
    >>> _short_time(2e-6), _short_time(0.0015), _short_time(0.25), _short_time(1000)
    ('2 us', '1.5 ms', '250 ms', '16 min 40 s')
    """
    if not seconds < 1e-3:
        return human_seconds(seconds) if seconds >= 0.0095 or not seconds else f"{seconds * 1e3:.2g} ms"
    return f"{seconds * 1e6:.3g} us" if seconds >= 1e-6 else f"{seconds * 1e9:.3g} ns"
