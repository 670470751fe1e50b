"""Plans and windows of all kinds, for the tests of both the arithmetic and the answers."""

from __future__ import annotations

from hypothesis import strategies as st

from zarr_dask_stream.source.grid import ChunkGrid
from zarr_dask_stream.source.selection import ChunkPlan
from zarr_dask_stream.stages.windows import Along, parse_along


@st.composite
def plans(draw: st.DrawFn, max_dims: int = 3) -> ChunkPlan:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=max_dims)))
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    box = []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        box.append(slice(start, draw(st.integers(start + 1, n))))
    origin = tuple(draw(st.integers(0, part.start)) for part in box) if draw(st.booleans()) else None
    return ChunkPlan(ChunkGrid(shape, chunks, origin=origin), tuple(box))


@st.composite
def alongs(draw: st.DrawFn) -> tuple[ChunkPlan, Along]:
    plan = draw(plans())
    axes = tuple(sorted(draw(st.sets(st.integers(0, len(plan.box) - 1), min_size=1))))
    size = tuple(draw(st.integers(1, plan.box[a].stop - plan.box[a].start)) for a in axes)
    step = tuple(draw(st.integers(1, 10)) for _ in axes)
    return plan, parse_along(plan, None, axes, size, step)
