"""``zds info``: what an array is, or which arrays a group holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
from rich import box
from rich.table import Table
from rich.text import Text

from zarr_dask_stream.cli.options import StoreRequest, output_options, store_options
from zarr_dask_stream.cli.present import facts, one_line, print_json, printable, screen, show
from zarr_dask_stream.errors import StoreError, UsageError
from zarr_dask_stream.source.array import ArraySpec, ArraySummary, list_arrays, locate, open_array
from zarr_dask_stream.source.metadata import join
from zarr_dask_stream.source.reader import stored_numbers
from zarr_dask_stream.source.store import StoreSpec, store_errors
from zarr_dask_stream.watch.report import human_bytes

__all__ = ["info"]

_AT_ONCE = 16  # metadata documents asked for together: a remote store answers each in its own time


@click.command(short_help="Say what an array is, or which arrays a group has.")
@store_options
@click.option("--stored", is_flag=True, help="Also count the chunks that are stored, by listing the store.")
@output_options
def info(request: StoreRequest, *, stored: bool, as_json: bool, debug: bool) -> int:  # noqa: ARG001  # main reads debug
    """Describe an array, or list the arrays of a group. Only metadata is read."""
    with store_errors():
        _, node = locate(StoreSpec.parse(request.url, request.storage_options), request.path.strip("/"))
        if node is None or not node.is_array:
            arrays = list_arrays(request.url, path=request.path, storage_options=request.storage_options)
            if arrays or node is not None:
                _show_group(request, arrays, stored=stored, as_json=as_json)
                return 0
        about = _describe(_open(request, request.path), stored=stored)
    if as_json:
        print_json(about)
    else:
        show(screen(), facts(_array_rows(about)))
    return 0


def _open(request: StoreRequest, path: str) -> ArraySpec:
    return open_array(request.url, path=path, storage_options=request.storage_options)


# -- one array ------------------------------------------------------------------------------------


def _describe(spec: ArraySpec, *, stored: bool) -> dict[str, Any]:
    document = json.loads(spec.metadata)
    about = {
        "url": spec.store.url,
        "path": spec.path,
        "kind": "array",
        "zarr_format": spec.zarr_format,
        "shape": spec.shape,
        "dimension_names": spec.dimension_names,
        "dtype": str(spec.stored_dtype),
        "chunk_shape": spec.chunks,
        "shard_shape": spec.shards,
        "sharded": spec.shards is not None,
        "consolidated": _from_above(spec),
        "codecs": [_codec_name(codec) for codec in _chain(spec)],
        "fill_value": document.get("fill_value"),  # as JSON has it: NaN is the text "NaN" there
        "chunks": len(spec.grid),
        "grid_shape": spec.grid.grid_shape,
        "chunk_nbytes": spec.chunk_nbytes,
        "nbytes": spec.nbytes,
    }
    if stored:
        about["chunks_stored"] = sum(1 for _ in stored_numbers(spec))
    return about


def _from_above(spec: ArraySpec) -> bool:
    """Whether the metadata came from a group's consolidated copy."""
    return spec.metadata_key not in {join(spec.path, "zarr.json"), join(spec.path, ".zarray")}


def _chain(spec: ArraySpec) -> list[dict[str, Any]]:
    """Return the codecs that a chunk goes through; those inside the shards where there are any."""
    codecs = list(spec.codecs)
    if spec.shards is not None and len(codecs) == 1:
        inside = codecs[0].get("configuration", {}).get("codecs", ())
        codecs += [{"name": codec} if isinstance(codec, str) else codec for codec in inside]
    return codecs


def _codec_name(codec: dict[str, Any]) -> str:
    """Name a codec with the setting that people ask for."""
    name = str(codec.get("name", codec.get("id", "?")))
    settings = codec.get("configuration", codec)
    inner, level = settings.get("cname"), settings.get("level", settings.get("clevel"))
    return name + (f":{inner}" if inner else "") + (f"({level})" if level is not None else "")


def _array_rows(about: dict[str, Any]) -> Iterable[tuple[str, str]]:
    names = about["dimension_names"]
    yield "array", join(about["url"], about["path"])
    yield "format", f"Zarr version {about['zarr_format']}{', consolidated metadata' * about['consolidated']}"
    yield "shape", _shape(about["shape"]) or "one element, no axes"
    if names:
        yield "dimensions", ", ".join(name or "(unnamed)" for name in names)
    yield "dtype", about["dtype"]
    yield "chunk shape", f"{_shape(about['chunk_shape'])} ({human_bytes(about['chunk_nbytes'])} decoded)"
    yield "shard shape", _shape(about["shard_shape"]) if about["sharded"] else "not sharded"
    yield "codecs", ", ".join(about["codecs"]) or "none: stored as it is"
    yield "fill value", json.dumps(about["fill_value"])
    grid = f" in a grid of {_shape(about['grid_shape'])}" if len(about["grid_shape"]) > 1 else ""
    yield "chunks", f"{about['chunks']:,}{grid}"
    if "chunks_stored" in about:
        inside = " at most: every chunk of a stored shard is counted" if about["sharded"] else ""
        yield "stored", f"{about['chunks_stored']:,} chunks{inside}"
    yield "decoded size", human_bytes(about["nbytes"])


def _shape(lengths: Iterable[int] | None) -> str:
    return " x ".join(str(length) for length in lengths or ())


# -- a group --------------------------------------------------------------------------------------


def _show_group(request: StoreRequest, arrays: list[ArraySummary], *, stored: bool, as_json: bool) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(lambda summary: _describe_or_blame(request, summary, stored=stored), arrays))
    url = join(StoreSpec.parse(request.url, request.storage_options).url, request.path.strip("/"))
    if as_json:
        print_json({"url": url, "kind": "group", "arrays": found})
        return
    total = sum(about.get("nbytes", 0) for about in found)
    count = f"{len(found)} array{'' if len(found) == 1 else 's'}"
    console = screen()
    console.print(Text(f"{url}: a group with {count}, {human_bytes(total)} decoded" if found else f"{url}: no arrays"))
    if found:
        show(console, _group_table(found, stored=stored))


def _describe_or_blame(request: StoreRequest, summary: ArraySummary, *, stored: bool) -> dict[str, Any]:
    """Describe one array of a group; a damaged one must not hide the others."""
    try:
        return _describe(_open(request, summary.path), stored=stored)
    except (StoreError, UsageError, OSError) as error:  # a name that leads out of the store is wrong usage
        return {"path": summary.path, "error": one_line(error)}


def _group_table(found: list[dict[str, Any]], *, stored: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("array", overflow="fold", style="bold")
    for title in ("shape", "chunks of", "dtype", "codecs"):
        table.add_column(title, overflow="fold")
    for title in ("chunks", "decoded", *(["stored"] if stored else [])):
        table.add_column(title, justify="right", overflow="fold")
    for about in found:
        if "error" in about:
            table.add_row(Text(printable(about["path"])), Text(about["error"], style="red"))
            continue
        shards = f" in {_shape(about['shard_shape'])}" if about["sharded"] else ""
        cells = [
            about["path"] or "/",
            _shape(about["shape"]),
            _shape(about["chunk_shape"]) + shards,
            about["dtype"],
            ", ".join(about["codecs"]),
            f"{about['chunks']:,}",
            human_bytes(about["nbytes"]),
        ]
        cells += [f"{about['chunks_stored']:,}"] if stored else []
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table
