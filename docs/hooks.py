"""What mkdocs does besides Markdown: the help of commands, and pictures and figures that have one place only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.plugins import event_priority

from zarr_dask_stream.cli.command import zds
from zarr_dask_stream.source.codec import _FILTERS
from zarr_dask_stream.source.inflate import BYTES_CODECS, COMPRESSORS

ROOT = Path(__file__).resolve().parent.parent
COMMANDS, SOAK, CODECS = "<!-- commands -->", "<!-- soak -->", "<!-- codecs -->"
BOOST = {"how-to": 4, "tutorial.md": 4, "explanation": 2}
LONG_NAME = re.compile(r"(?<=<code>)tests/[\w/]+\.py::\w+(?=</code>)")
PICTURE = re.compile(r"<!-- (\w+\.md): (.+) -->")


@event_priority(-100)  # after the plugins
def on_config(config: Any) -> Any:
    """Take what searching needs in a site of files from here, and not from the network."""
    config.extra["polyfills"] = ["javascripts/worker.js"]
    return config


def on_page_content(html: str, **_: Any) -> str:
    """Let the long names of tests wrap where their words end."""
    return LONG_NAME.sub(lambda found: re.sub(r"(::|[/_])", r"\1<wbr>", found[0]), html)


def on_page_markdown(markdown: str, page: Any = None, **_: Any) -> str:
    """Put these where a page has a place for them; let searches find pages about tasks before lists of names."""
    if page is not None:
        page.meta.setdefault("search", {"boost": BOOST.get(page.file.src_uri.partition("/")[0], 1)})
    markdown = PICTURE.sub(lambda found: picture(found[1], found[2]), markdown)
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    if CODECS in markdown:
        markdown = markdown.replace(CODECS, codecs())
    if SOAK in markdown:
        found = json.loads((ROOT / "tests/chaos/soak.json").read_text(encoding="utf-8"))
        markdown = markdown.replace(SOAK, soak(found))
    return markdown


def picture(name: str, heading: str) -> str:
    """Return the first block of text below a heading of a document of the source folder."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}$.*?^(```text\n.*?^```)$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"{name} has no block of text below the heading {heading!r}")
    return found[1]


def commands() -> str:
    """Return a section for each command, with its own help."""
    parent = click.Context(zds, info_name="zds", max_content_width=100, terminal_width=100)
    parts = []
    for name, command in zds.commands.items():
        context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
        parts.append(f"## zds {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def codecs() -> str:
    """Return the codecs that are compiled, by kind, as a table."""
    kinds = {
        "Compressors": COMPRESSORS,
        "Checksums and the like": BYTES_CODECS - COMPRESSORS,
        "Filters": _FILTERS,
        "Of format 3": {"bytes", "transpose", "sharding_indexed"},
    }
    rows = [f"| {kind} | {', '.join(f'`{name}`' for name in sorted(names))} |" for kind, names in kinds.items()]
    return "\n".join(["| Kind | Codecs |", "|---|---|", *rows])


def soak(found: dict[str, Any]) -> str:
    """Return what `tests/chaos/test_soak.py` has measured, as a table."""
    machine, faults = found["machine"], found["faults"]
    about = (
        f"{found['streams']:,} streams over {found['chunks']:,} chunks in {found['rounds']:,} rounds, "
        f"{found['seconds'] / 60:.1f} minutes on {machine['cores']} cores with Python {machine['python']} "
        f"({machine['at']}). {found['deaths']:,} workers were killed; {faults['reset']:,} requests were reset, "
        f"{faults['truncate']:,} answered by half, {faults['slow_down']:,} refused, {faults['hang']:,} never answered."
    )
    head = "| Process | | after the first round | half way | at the end | growth, first half | second half | allowed |"
    lines = [about, "", head, "|---|---|---:|---:|---:|---:|---:|---:|"]
    units = {"bytes": ("memory, MiB", 2**20, 1), "files": ("open files", 1, 0), "threads": ("threads", 1, 0)}
    for process, kinds in found["held"].items():
        for kind, (name, unit, digits) in units.items():
            values = [kinds[kind][column] for column in ("first", "middle", "last")]
            values += [*kinds[kind]["growth"], kinds[kind]["allowed"]]
            cells = " | ".join(f"{value / unit:,.{digits}f}" for value in values)
            lines.append(f"| {process} | {name} | {cells} |")
    return "\n".join(lines)
