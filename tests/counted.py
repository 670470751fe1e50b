"""What tests count: the reads of a store, and the ends of chunks."""

from __future__ import annotations

import collections
from typing import Any

import zarr_dask_stream as zds


class Counting(dict[str, Any]):
    """A store that counts how often each key is read, after it was made."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: collections.Counter[str] = collections.Counter()

    def __getitem__(self, key: str) -> Any:
        self.asked[key] += 1
        return super().__getitem__(key)

    @property
    def chunks(self) -> dict[str, int]:
        """How often each chunk was read."""
        return {key: times for key, times in self.asked.items() if "c/" in key}


def balanced(report: zds.Report) -> bool:
    """Whether every planned chunk has one end, and every dead one its letter."""
    ends = report.emitted + report.filtered + report.skipped_missing + report.dead_lettered + report.cancelled
    return report.total == ends and report.dead_lettered == len(report.dead_letters)
