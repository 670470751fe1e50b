"""Arrays one after the other into another codec, layout or format, and compared with what they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numcodecs
import numpy as np
import numpy.typing as npt
import zarr.codecs

from zarr_dask_stream.cli.interrupt import cluster
from zarr_dask_stream.cli.options import StreamRequest
from zarr_dask_stream.cli.present import page_of
from zarr_dask_stream.engine.checkpoint import Checkpoint
from zarr_dask_stream.engine.cluster import close_cluster, embedded_cluster
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.source.array import ArraySpec, check_visible, open_array
from zarr_dask_stream.source.assemble import read_blocks
from zarr_dask_stream.source.blocks import Blocks
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import Index
from zarr_dask_stream.source.hierarchy import Hierarchy, consolidate, group_documents
from zarr_dask_stream.source.metadata import join
from zarr_dask_stream.source.selection import ChunkPlan, parse_region
from zarr_dask_stream.source.store import store_errors
from zarr_dask_stream.source.target import DOCUMENTS, Place, find_place
from zarr_dask_stream.stages.layout import choose_boxes
from zarr_dask_stream.stream import ChunkStream
from zarr_dask_stream.watch.report import Report

__all__ = ["Copied", "Job", "Same", "Wish", "parse_lengths"]

_BLOSC = ("blosclz", "lz4", "lz4hc", "zlib", "zstd")
_ADDED = (
    "total", "emitted", "skipped_missing", "dead_lettered", "cancelled", "resumed", "retries", "hedges",
    "bytes_stored", "bytes_decoded", "bytes_written", "wall_s",
)  # fmt: skip


# -- what is wished -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What shall be different in the copy."""

    chunks: tuple[int, ...] | None = None
    shards: tuple[int, ...] | None = None
    unsharded: bool = False
    codec: str | None = None
    zarr_format: int | None = None

    def options(self, spec: ArraySpec, *, alone: bool) -> dict[str, Any]:
        """Return the create options for the copy of one array; `alone`: lengths that don't fit it are an error."""
        version = self.zarr_format or spec.zarr_format
        options: dict[str, Any] = {"zarr_format": version}
        for name, lengths in (("chunks", self.chunks), ("shards", self.shards)):
            if lengths is not None and len(lengths) == len(spec.shape):
                pairs = zip(lengths, spec.shape, strict=True)
                options[name] = tuple(max(n, 1) if length == -1 else length for length, n in pairs)
            elif lengths is not None and alone:
                raise UsageError(f"--{name} has {len(lengths)} lengths, and {spec.url} has {len(spec.shape)} axes")
        if self.unsharded:
            options["shards"] = None
        if self.codec is not None:
            options["compressors"] = parse_codec(self.codec, version)
        return options


def parse_lengths(name: str, text: str | None) -> tuple[int, ...] | None:
    """Read lengths along axes; None where nothing, or "none", is said.

    Examples
    --------
    >>> parse_lengths("--chunks", "100, -1")
    (100, -1)
    """
    if text is None or text.strip() == "none":
        return None
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or not all(length == -1 or length > 0 for length in lengths):
        raise UsageError(f"{name} is lengths along the axes with commas between them, such as 100,-1, got {text!r}")
    return lengths


def parse_codec(text: str, version: int) -> Any:
    """Make the compressor that a word names, for one format.

    Examples
    --------
    >>> parse_codec("zstd:3", 3), parse_codec("blosc-zstd:5", 2), parse_codec("none", 3)
    (ZstdCodec(level=3, checksum=False), Blosc(cname='zstd', clevel=5, shuffle=SHUFFLE, blocksize=0), None)
    """
    name, colon, level = text.strip().partition(":")
    kind, dash, cname = name.partition("-")
    try:
        settings: dict[str, Any] = {"level": int(level)} if colon else {}
        if name == "none" and not colon:
            return None
        if name == "zstd":
            return zarr.codecs.ZstdCodec(**settings) if version == 3 else numcodecs.Zstd(**settings)
        if name == "gzip":
            return zarr.codecs.GzipCodec(**settings) if version == 3 else numcodecs.GZip(**settings)
        if kind == "blosc" and (not dash or cname in _BLOSC):
            blosc: dict[str, Any] = {"cname": cname or "lz4", "clevel": settings.get("level", 5)}
            return zarr.codecs.BloscCodec(**blosc) if version == 3 else numcodecs.Blosc(**blosc)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--codec {text}: {error}") from error
    names = ", ".join(["none", "zstd", "gzip", "blosc", *(f"blosc-{one}" for one in _BLOSC)])
    raise UsageError(f"--codec is NAME or NAME:LEVEL with one of {names}; got {text!r}")


# -- the job --------------------------------------------------------------------------------------


@dataclass
class Copied:
    """One array on its way: where it is in the group, what it is, and what became of it."""

    path: str
    source: ArraySpec
    request: StreamRequest
    options: dict[str, Any]
    ledger: Checkpoint | None
    report: Report | None = None


@dataclass
class Job:
    """A copy of an array, or of all that is in a group: checked whole, then done array by array."""

    request: StreamRequest
    source: Hierarchy
    place: Place
    wish: Wish
    overwrite: bool = False
    checkpoint: str | None = None
    page: str | None = None
    arrays: list[Copied] = field(default_factory=list)
    different: list[tuple[str, Index]] = field(default_factory=list)
    stopped: bool = False

    @property
    def single(self) -> bool:
        """Whether it is one array rather than a group."""
        return self.source.arrays == [""]

    @property
    def version(self) -> int:
        """Format of the copy."""
        return self.wish.zarr_format or self.source.zarr_format

    @property
    def total(self) -> Report:
        """The account of all arrays together."""
        total = Report(total=0, outcome="stopped early" if self.stopped else "done")
        for report in (one.report for one in self.arrays):
            if report is not None:
                for name in _ADDED:
                    setattr(total, name, (getattr(total, name) or 0) + (getattr(report, name) or 0))
                total.dead_letters += report.dead_letters
        return total

    def check(self) -> None:
        """Find out before any work what can't be copied so, and whether there is room for it.

        Raises
        ------
        UsageError
            If an option does not fit, or something else is at the target.
        """
        if not self.single and self.page is not None:
            raise UsageError("--report is of one array, and this is a group: name an array in it with --path")
        if not self.single and self.request.region is not None:
            raise UsageError("--region is a part of one array, and this is a group: name an array in it with --path")
        if Place(self.source.store, self.source.path).meets(self.place):
            raise UsageError(f"the target {self.place.url} is the source, or one lies inside the other: choose another")
        self.arrays = [self._describe(path) for path in self.source.arrays]
        if self.single:
            self._stream(self.arrays[0], None, self.place)
        else:
            self._check_root()
            for one in self.arrays:
                self._stream(one, None, find_place({}))  # its own place may have to be made free first

    def _check_root(self) -> None:
        node, strangers = self.place.node(), self.place.strangers()
        if node is None and strangers:
            raise UsageError(
                f"{self.place.url} is not empty and no Zarr group ({strangers[0]!r}): choose another place"
            )
        if node is not None and not self.overwrite and (node.is_array or self.checkpoint is None):
            raise UsageError(f"{self.place.url} exists: choose another place, or say --overwrite to replace all of it")

    def _describe(self, path: str) -> Copied:
        request = dataclasses.replace(self.request, path=join(self.source.path, path))
        with store_errors():
            spec = open_array(request.url, path=request.path, storage_options=request.storage_options)
        if request.where is not None:
            raise UsageError("--where speaks of stored chunks, and a copy is cut by its own: copy a --region")
        ledger = None
        if self.checkpoint is not None:
            ledger = request.ledger(self.checkpoint if self.single else f"{self.checkpoint.rstrip('/')}/{path}.ledger")
        return Copied(path, spec, request, self.wish.options(spec, alone=self.single), ledger)

    def _stream(self, one: Copied, client: Any, place: Place) -> ChunkStream:
        path = join(place.path, one.path)

        def written(missing: str) -> ChunkStream:
            stream = one.request.stream(client, ordered=False, missing=missing, checkpoint=one.ledger)
            return stream.to_zarr(place.store, path=path, overwrite=self.overwrite, **one.options)

        skipping = written("skip")
        # What is not stored may stay so where it reads as the same.
        same = skipping.target is not None and _equal(skipping.target.fill, one.source.fill)
        return skipping if same else written("fill")

    @contextmanager
    def workers(self) -> Iterator[Any]:
        """Lend a client for all arrays, or None where each run may look after itself."""
        with cluster(self.request.scheduler, self.request.workers) as lent:
            if lent is not None or len(self.arrays) < 2 or self.request.concurrency == 1:
                yield lent
                return
            client = embedded_cluster()
            try:
                yield client
            finally:
                close_cluster(client)

    def run(self, client: Any) -> None:
        """Copy groups, then array by array, and last what all documents are in."""
        if not self.single:
            self._put_groups()
        for one in self.arrays:
            stream = self._stream(one, client, self.place)
            with one.request.drain.over(stream), page_of(stream, self.page):
                one.report = stream.run()
            self.stopped |= one.request.drain.asked
            if self.stopped:
                return
        if self.source.consolidated and not self.single:
            store = self.place.store.open()
            store.put(*consolidate(self.version, self.place.path, self._documents()))

    def _put_groups(self) -> None:
        store = self.place.store.open()
        if self.overwrite and not any(_is_there(one.ledger) for one in self.arrays) and self.place.node() is not None:
            store.clear(self.place.path, DOCUMENTS)
        for path, attributes in self.source.groups.items():
            for key, document in group_documents(self.version, join(self.place.path, path), attributes):
                store.put(key, document)

    def _documents(self) -> Iterator[tuple[str, bytes]]:
        """Read what was written of the group and all that is below it."""
        store = self.place.store.open()
        names = ("zarr.json",) if self.version == 3 else (".zgroup", ".zarray", ".zattrs")
        for path in [*self.source.groups, *self.source.arrays]:
            for name in names:
                key = join(self.place.path, path, name)
                document = store.get(key)
                if document is not None:
                    yield key, document

    def verify(self, client: Any) -> None:
        """Read source and copy again, on the workers, and note where they differ."""
        for one in self.arrays:
            made = open_array(self.place.store, path=join(self.place.path, one.path))
            stream = one.request.stream(client, ordered=False, missing="skip")
            start = tuple(part.start for part in parse_region(one.request.region, one.source.shape))
            boxes = choose_boxes(made.grid.shard_grid.chunks, one.source.chunks, made.shape, made.item_nbytes)
            compared = stream.rechunk(boxes).map(Same(made, start))
            with one.request.drain.over(compared):
                bad = [item.index for item in compared if not item.data]
            bad += [letter.index for letter in compared.report.dead_letters]
            self.different += [(one.path, index) for index in bad]
            self.stopped |= one.request.drain.asked
            if self.stopped:
                return


def _is_there(ledger: Checkpoint | None) -> bool:
    if ledger is None:
        return False
    fs, path = fsspec.core.url_to_fs(str(ledger.url), **ledger.storage_options)
    return bool(fs.exists(path))


class Same:
    """Whether a chunk holds the same as its place in another array, to the bit; travels.

    Parameters
    ----------
    spec : ArraySpec
        The other array.
    start : tuple of int
        Where it begins in the chunk's coordinates.
    """

    def __init__(self, spec: ArraySpec, start: Index) -> None:
        self.spec, self.start = spec, start

    def __call__(self, chunk: Chunk) -> bool:
        """Read the place and compare."""
        check_visible(self.spec)
        region = tuple(slice(r.start - s, r.stop - s) for r, s in zip(chunk.region, self.start, strict=True))
        lengths, begin = [part.stop - part.start for part in region], tuple(part.start for part in region)
        blocks = Blocks.of(self.spec, lengths, origin=begin if any(begin) else None)
        (read,) = read_blocks(blocks, ChunkPlan(blocks.grid, region), [0])
        if read.error is not None:
            raise read.error
        return _equal(np.asarray(chunk.data), np.asarray(read.data))


def _equal(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> bool:
    """Whether arrays are the same to the bit, NaN and signs of zero included."""
    if left.dtype.hasobject or left.dtype.kind == "T":
        return bool(np.array_equal(left, right))
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


def layouts(one: Copied, made: ArraySpec) -> Mapping[str, Any]:
    """Return what an array was and what its copy is, for a person and for JSON."""
    return {
        "path": one.path,
        "shape": made.shape,
        "chunks": [one.source.chunks, made.chunks],
        "shards": [one.source.shards, made.shards],
        "zarr_format": [one.source.zarr_format, made.zarr_format],
    }
