"""Bright spots in one resolution level of an OME-Zarr image, tile by tile.

$ python examples/microscopy.py image.ome.zarr 1
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import zarr
from scipy import ndimage

import zarr_dask_stream as zds


def levels(image: Any) -> tuple[list[str], list[str]]:
    """Return the names of the axes and the paths of the resolution levels, of versions 0.4 and 0.5."""
    attributes: Any = zarr.open_group(image, mode="r").attrs.asdict()
    (multiscale, *_) = attributes.get("ome", attributes)["multiscales"]
    return [axis["name"] for axis in multiscale["axes"]], [level["path"] for level in multiscale["datasets"]]


def spots(image: Any, level: int = 0, *, radius: int = 2, floor: int = 0, **options: Any) -> Iterator[tuple[int, ...]]:
    """Walk the pixels of a level that are brighter than `floor` and than all around them, up to `radius` away.

    Each tile comes with a margin, so that spots at its border are seen whole, and only those inside count.
    """
    axes, paths = levels(image)
    margin = {number: radius for number, name in enumerate(axes) if name in "zyx"}
    size = [2 * margin.get(number, 0) + 1 for number in range(len(axes))]

    def find(tile: zds.Chunk) -> Any:
        brightest = (ndimage.maximum_filter(tile.data, size, mode="nearest") == tile.data) & (tile.data > floor)
        return brightest[tile.core].nonzero()

    for tile in zds.stream_chunks(image, path=paths[level], **options).halo(margin, "nearest").map(find):
        starts = [part.start for part in tile.region]
        for place in zip(*tile.data, strict=True):
            yield tuple(int(at) + start for at, start in zip(place, starts, strict=True))


def main(image: str, level: str = "0") -> None:
    """Print where the spots are."""
    for place in spots(image, int(level)):
        print(*place)


if __name__ == "__main__":
    main(*sys.argv[1:])
