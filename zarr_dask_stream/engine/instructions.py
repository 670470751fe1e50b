"""What the supervisor may ask for: plain data, carried out by the loop and compared by the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zarr_dask_stream.engine.events import Batch, Notice
from zarr_dask_stream.errors import ZdsError

__all__ = ["Abort", "Cancel", "Fold", "Instruction", "Notify", "Restart", "Submit"]


@dataclass(frozen=True, slots=True)
class Submit:
    """Send these batches to the workers."""

    batches: tuple[Batch, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Call these batches back; what still comes of them is ignored."""

    batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Merge a partial of the reduction into what there is."""

    partial: Any


@dataclass(frozen=True, slots=True)
class Notify:
    """Tell the observers."""

    notice: Notice


@dataclass(frozen=True, slots=True)
class Abort:
    """Stop the run with this error: nothing that follows could be right."""

    error: ZdsError


@dataclass(frozen=True, slots=True)
class Restart:
    """Restart this worker: its threads hang in chunks that were given up."""

    worker: str


Instruction = Submit | Cancel | Fold | Notify | Abort | Restart
