"""Chunks that wait to be run again, in the order in which they fall due. Pure: times come in."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

__all__ = ["Again", "WaitingRoom"]

_GROUP = 64  # chunks that fall due together share a task, up to so many


@dataclass(frozen=True, slots=True)
class Again:
    """Run these chunks again once `due` has come; `alone`: apart from all others."""

    numbers: tuple[int, ...]
    due: float
    alone: bool = False
    suspect: bool = False


class WaitingRoom:
    """Holds what waits for its backoff, and gives out what is due.

    Examples
    --------
    >>> room = WaitingRoom()
    >>> for number, due in [(7, 2.0), (3, 1.0), (5, 1.0), (9, 8.0)]: room.add(Again((number,), due))
    >>> room.chunks, room.next_due, [again.numbers for again in room.take_due(2.0)], room.next_due
    (4, 1.0, [(3, 5, 7)], 8.0)
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Again]] = []
        self._serial = 0
        self.chunks = 0

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._heap)

    @property
    def next_due(self) -> float:
        """When the first falls due; inf where nothing waits."""
        return self._heap[0][0] if self._heap else math.inf

    def add(self, again: Again) -> None:
        """Let chunks wait."""
        if again.numbers:
            self._serial += 1
            heapq.heappush(self._heap, (again.due, self._serial, again))
            self.chunks += len(again.numbers)

    def take_due(self, now: float, allowed: Callable[[], bool] = lambda: True) -> Iterator[Again]:
        """Give out what is due, as long as it is allowed; single chunks that fall due together as one."""
        group: list[int] = []
        while self._heap and self._heap[0][0] <= now and allowed():
            _, _, again = heapq.heappop(self._heap)
            self.chunks -= len(again.numbers)
            if again.alone:
                yield again
                continue
            group.extend(again.numbers)
            if len(group) >= _GROUP:
                yield Again(tuple(group), now)
                group = []
        if group:
            yield Again(tuple(group), now)

    def clear(self) -> None:
        """Forget all."""
        self._heap.clear()
        self.chunks = 0
