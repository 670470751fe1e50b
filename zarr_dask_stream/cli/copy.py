"""``zds copy``: an array, or a group with all that is in it, into another codec, layout or format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.text import Text

from zarr_dask_stream.cli.copies import Job, Wish, layouts, parse_lengths
from zarr_dask_stream.cli.options import (
    StreamRequest,
    checkpoint_option,
    collect_options,
    output_options,
    report_option,
    stream_options,
)
from zarr_dask_stream.cli.present import exit_code, facts, print_json, printable, report_facts, screen, show, warn
from zarr_dask_stream.errors import StoreNotFoundError
from zarr_dask_stream.source.array import open_array
from zarr_dask_stream.source.hierarchy import Hierarchy, walk_hierarchy
from zarr_dask_stream.source.metadata import join
from zarr_dask_stream.source.store import StoreSpec, store_errors
from zarr_dask_stream.source.target import find_place
from zarr_dask_stream.watch.report import human_bytes

__all__ = ["copy"]


@click.command(short_help="Copy an array or a group: other codec, chunks, shards, format.")
@stream_options
@click.argument("target")
@click.option("--target-path", default="", metavar="PATH", help="Path of the copy inside the target.")
@click.option(
    "--target-option",
    "target_options",
    multiple=True,
    metavar="K=V",
    callback=collect_options,
    help="Option for the file system of the target. Default: where both URLs begin alike, those of the source.",
)
@click.option("--chunks", metavar="N,N,...", help="Chunk shape; -1 for a whole axis.")
@click.option("--shards", metavar="N,N,...", help="Shape of shards, whole multiples of chunks; 'none' for no shards.")
@click.option(
    "--codec",
    metavar="NAME[:LEVEL]",
    help="Compression: zstd, gzip, blosc (with lz4), blosc-zstd (or another of its own), none. Default: as in the "
    "source, or the nearest that the format has.",
)
@click.option("--format", "zarr_format", type=click.Choice(["2", "3"]), help="Zarr format. Default: the source's.")
@click.option("--overwrite", is_flag=True, help="Replace what is at the target: an array, or a group with all in it.")
@click.option("--verify", is_flag=True, help="Afterwards, read both again on the workers and compare them to the bit.")
@checkpoint_option
@report_option
@output_options
def copy(
    request: StreamRequest,
    *,
    target: str,
    target_path: str,
    target_options: Mapping[str, Any],
    chunks: str | None,
    shards: str | None,
    codec: str | None,
    zarr_format: str | None,
    overwrite: bool,
    verify: bool,
    checkpoint: str | None,
    page: str | None,
    as_json: bool,
    debug: bool,  # noqa: ARG001  # main reads it
) -> int:
    """Copy an array, or a group with all that is in it, to TARGET: on the workers, in bounded memory.

    What is not asked for stays as it is: codecs, chunks, shards, fill values, attributes, names of dimensions, and
    consolidated metadata where the source has them. Chunks that are not stored stay so. In a group, --chunks and
    --shards are for the arrays with so many axes. Chunks of source and copy need not fit one another.

    With --checkpoint the same command goes on where it was stopped; for a group it names a folder, of ledgers. Exit
    code 1: some chunks were not copied, or --verify found a difference.
    """
    wish = Wish(
        chunks=parse_lengths("--chunks", chunks),
        shards=parse_lengths("--shards", shards),
        unsharded=shards is not None and shards.strip() == "none",
        codec=codec,
        zarr_format=None if zarr_format is None else int(zarr_format),
    )
    scheme, remote, _ = target.partition("://")
    alike = bool(remote) and request.url.startswith(f"{scheme}://")
    with store_errors():
        place = find_place(target, target_path, target_options or (request.storage_options if alike else None))
        job = Job(request, _find(request), place, wish, overwrite=overwrite, checkpoint=checkpoint, page=page)
        job.check()
    with job.workers() as client, store_errors():
        job.run(client)
        if verify and not job.stopped:
            job.verify(client)
    verified = verify and not job.stopped
    if as_json:
        print_json(_account(job, verified=verified))
    else:
        _show(job, verified=verified)
    return exit_code(job.total, interrupted=job.stopped) or int(bool(job.different))


def _find(request: StreamRequest) -> Hierarchy:
    spec = StoreSpec.parse(request.url, request.storage_options)
    found = walk_hierarchy(spec, request.path.strip("/"))
    if found is None:
        # The way to an array says best what is there instead.
        open_array(request.url, path=request.path, storage_options=request.storage_options)
        raise StoreNotFoundError(f"there is no Zarr array or group at {join(spec.url, request.path)}")
    return found


def _account(job: Job, *, verified: bool) -> dict[str, Any]:
    arrays = []
    for one in job.arrays:
        if one.report is not None:
            made = open_array(job.place.store, path=join(job.place.path, one.path))
            arrays.append({**layouts(one, made), "report": one.report.to_dict()})
    return {
        "source": join(job.source.store.url, job.source.path),
        "target": job.place.url,
        "arrays": arrays,
        "consolidated": job.source.consolidated,
        "verified": verified,
        "different": [{"path": path, "index": index} for path, index in job.different],
        "report": job.total.to_dict(),
    }


def _show(job: Job, *, verified: bool) -> None:
    console, total = screen(), job.total
    done = [one for one in job.arrays if one.report is not None]
    what = "" if job.single else f"{len(done):,} of {len(job.arrays):,} arrays of "
    line = Text(printable(f"{what}{join(job.source.store.url, job.source.path)} to {job.place.url}"), style="bold")
    console.print(line, soft_wrap=True)
    if not job.single:
        for one in done:
            assert one.report is not None
            sizes = f"{human_bytes(one.report.bytes_stored)} to {human_bytes(one.report.bytes_written)}"
            console.print(f"  {one.path}: {sizes}", soft_wrap=True, markup=False)
    show(console, "")
    # Tasks and what was in flight are those of each array alone.
    show(console, facts([row for row in report_facts(total) if row[0] not in ("tasks", "in flight")]))
    if verified:
        verdict = "they differ" if job.different else "every stored chunk holds the same, to the bit"
        console.print(Text(f"compared: {verdict}", style="bold red" if job.different else "bold green"), soft_wrap=True)
    for path, index in job.different[:10]:
        warn(f"{path or 'the array'} differs in box {index}")
    for letter in total.dead_letters[:10]:
        warn(f"not copied: {letter.index}: {letter.error_type}: {letter.message}")
