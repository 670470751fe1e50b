"""Arrays to measure on: made from a seed, the same values at every run, about twice as large decoded as stored."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numcodecs
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec

Floats = npt.NDArray[np.float32]
Layout = Literal["zstd", "blosc2", "shards", "empty"]


@dataclass(frozen=True)
class Stored:
    """A two-dimensional float32 array: where it is and how it is cut."""

    url: str
    grid: tuple[int, int]
    chunk: tuple[int, int]
    layout: Layout
    #: Chunks of one shard, along both axes.
    shard: tuple[int, int] = (1, 1)

    @property
    def shape(self) -> tuple[int, int]:
        """Elements along both axes."""
        return self.grid[0] * self.chunk[0], self.grid[1] * self.chunk[1]

    @property
    def chunks(self) -> int:
        """How many chunks the grid has."""
        return self.grid[0] * self.grid[1]

    @property
    def chunk_nbytes(self) -> int:
        """Decoded bytes of a chunk."""
        return 4 * self.chunk[0] * self.chunk[1]

    def key(self, number: int) -> str:
        """Return the key of a chunk that is an object of its own."""
        i, j = divmod(number, self.grid[1])
        return f"{i}.{j}" if self.layout == "blosc2" else f"c/{i}/{j}"

    def split(self, data: Floats) -> npt.NDArray[Any]:
        """Cut elements that start at a chunk's corner into chunks: an array of (row, column, *chunk)."""
        rows, columns = data.shape[0] // self.chunk[0], data.shape[1] // self.chunk[1]
        return data.reshape(rows, self.chunk[0], columns, self.chunk[1]).swapaxes(1, 2)


class Field:
    """Something like a map of temperatures: a wave along both axes, with noise, rounded to hundredths."""

    def __init__(self, stored: Stored, seed: int) -> None:
        self._stored = stored
        rng = np.random.default_rng(seed)
        height, width = stored.chunk[0] * stored.shard[0], stored.shape[1]
        wave = 8 * np.sin(np.linspace(0, 12, width))
        noise = rng.standard_normal((height, width), dtype=np.float32) / 2
        self._band = np.round(noise + wave.astype("f4"), 2)
        self._rng = rng

    def band(self) -> Floats:
        """Return the next band of the array, as high as a chunk or a shard: the same noise at another place."""
        band = np.roll(self._band, int(self._rng.integers(self._stored.shape[1])), axis=1)
        shifted: Floats = np.round(band + np.float32(self._rng.integers(10, 20)), 2)
        return shifted


def create(stored: Stored) -> zarr.Array[Any]:
    """Write the array's metadata."""
    shards = None
    if stored.layout == "shards":
        shards = (stored.chunk[0] * stored.shard[0], stored.chunk[1] * stored.shard[1])
    version2 = stored.layout == "blosc2"
    codec = numcodecs.Blosc("lz4", shuffle=numcodecs.Blosc.SHUFFLE) if version2 else ZstdCodec(level=1)
    return zarr.create_array(
        stored.url,
        shape=stored.shape,
        chunks=stored.chunk,
        shards=shards,
        dtype="f4",
        compressors=codec,
        zarr_format=2 if version2 else 3,
        dimension_names=None if version2 else ("y", "x"),
        fill_value=0,
    )


def make(folder: Path, name: str, stored: Stored, seed: int) -> Stored:
    """Write the whole array below `folder`, unless an earlier run has left it there.

    A group beside it would not be needed but by xarray, which only opens arrays inside of one.
    """
    target = folder / f"{name}-{stored.grid[0]}x{stored.grid[1]}-{seed}" / "group"
    stored = replace(stored, url=str(target / "a"))
    finished = target.parent / "finished"
    if finished.exists():
        return stored
    zarr.create_group(str(target), zarr_format=2 if stored.layout == "blosc2" else 3, overwrite=True)
    array = create(stored)
    if stored.layout != "empty":
        field = Field(stored, seed)
        height = stored.chunk[0] * stored.shard[0]
        for start in range(0, stored.shape[0], height):
            array[start : start + height] = field.band()
    finished.touch()
    return stored


def part(folder: Path, name: str, stored: Stored, seed: int, grid: tuple[int, int]) -> Stored:
    """Write a smaller array of the same kind, for those who would take minutes for the whole one."""
    grid = min(grid[0], stored.grid[0]), min(grid[1], stored.grid[1])
    return make(folder, f"{name}-part", replace(stored, grid=grid), seed)


def make_sparse(folder: Path, name: str, stored: Stored, seed: int, count: int) -> Stored:
    """Write `count` chunks, spread over the grid at random."""
    target = folder / f"{name}-{stored.grid[0]}x{stored.grid[1]}-{count}-{seed}"
    stored = replace(stored, url=str(target))
    finished = target / "finished"
    if finished.exists():
        return stored
    array = create(stored)
    rng = np.random.default_rng(seed)
    block = np.round(rng.standard_normal(stored.chunk, dtype=np.float32) + 9, 2)
    height, width = stored.chunk
    for number in rng.choice(stored.chunks, count, replace=False):
        i, j = divmod(int(number), stored.grid[1])
        array[i * height : (i + 1) * height, j * width : (j + 1) * width] = block
    finished.touch()
    return stored


def make_linked(folder: Path, name: str, stored: Stored, seed: int) -> Stored:
    """Write one chunk and let all the others be links to it: many logical bytes on little disk."""
    target = folder / f"{name}-{stored.grid[0]}x{stored.grid[1]}-{seed}"
    stored = replace(stored, url=str(target))
    finished = target / "finished"
    if finished.exists():
        return stored
    array = create(stored)
    array[: stored.chunk[0], : stored.chunk[1]] = Field(replace(stored, grid=(1, 1)), seed).band()
    first = target / stored.key(0)
    for number in range(1, stored.chunks):
        path = target / stored.key(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.hardlink_to(first)
    finished.touch()
    return stored
