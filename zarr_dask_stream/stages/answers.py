"""What a reduction has come to on the client, and which of its answers can be handed out.

Partials come in from the workers, in any order; answers go out: at the end, when a window is complete, or when
a trigger fires. Nothing here waits and nothing reads a clock.

Rules
-----
1. A window is complete when the plan has passed its last chunk and none of its chunks is out: each was folded,
   filtered, skipped or given up. A chunk that was given up completes its windows too, and they say so.
2. A window is done when the consumer comes back after its answer. Until then its partials are kept, so that a
   run that begins where another was stopped hands it out again; after that it never comes again.
3. Only the panes of windows that are not done are held.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.grid import Index, Region
from zarr_dask_stream.source.selection import ChunkPlan
from zarr_dask_stream.stages.batch import nbytes_of
from zarr_dask_stream.stages.combine import Fold, Partials, Reducer, merge_partials
from zarr_dask_stream.stages.windows import Along, Every, Pane

__all__ = ["Answers", "Ending", "WindowResult", "answers_of"]

Ending = Literal["folded", "filtered", "skipped", "dead"]


class WindowResult(Chunk):
    """The answer for one window of a reduction, and what it is made of.

    Attributes
    ----------
    index : int or tuple
        Number of the window, one for each axis where it lies along several; with ``group_by`` ``(key, number)``.
    region : tuple of slice
        Box of the window in array coordinates; empty for a trigger.
    data : Any
        The reducer's answer.
    trigger : {"complete", "every", "seconds", "end"}
        Why it comes now.
    folded, filtered, skipped, dead : int
        Chunks that are in it; that a filter dropped; that are not stored, with ``missing="skip"``; that were
        given up.
    missing : bool
        True where no chunk is in it.

    Examples
    --------
    >>> WindowResult(2, (slice(8, 12),), 6.5, "complete", folded=4)
    WindowResult(index=2, region=[8:12], data=6.5, complete, 4 chunks)
    """

    __slots__ = ("dead", "filtered", "folded", "skipped", "trigger")

    def __init__(
        self,
        index: Any,
        region: Region,
        data: Any,
        trigger: str,
        *,
        folded: int = 0,
        filtered: int = 0,
        skipped: int = 0,
        dead: int = 0,
    ) -> None:
        super().__init__(index, region, data, missing=not folded)
        self.trigger = trigger
        self.folded = folded
        self.filtered = filtered
        self.skipped = skipped
        self.dead = dead

    def __reduce__(self) -> tuple[Any, ...]:
        counts = (self.folded, self.filtered, self.skipped, self.dead)
        return _rebuild, (self.index, self.region, self.data, self.trigger, counts)

    def __repr__(self) -> str:
        counts = ((self.filtered, "filtered"), (self.skipped, "not stored"), (self.dead, "dead"))
        words = [self.trigger, f"{self.folded:,} chunks", *(f"{count:,} {what}" for count, what in counts if count)]
        return f"WindowResult{super().__repr__()[5:-1].replace(', missing', '')}, {', '.join(words)})"


def _rebuild(index: Any, region: Region, data: Any, trigger: str, counts: tuple[int, int, int, int]) -> WindowResult:
    folded, filtered, skipped, dead = counts
    return WindowResult(index, region, data, trigger, folded=folded, filtered=filtered, skipped=skipped, dead=dead)


class Answers(Protocol):
    """What the loop needs to know of a reduction."""

    nbytes: int  # of partials that are held for windows that are not done

    def merge(self, partials: Partials) -> None:
        """Take in what a batch was folded into."""
        ...

    def sent(self, numbers: Sequence[int]) -> None:
        """Hear of chunks that went out for the first time."""
        ...

    def settled(self, numbers: Sequence[int], how: Ending) -> None:
        """Hear of chunks that have reached their end."""
        ...

    def passed(self, number: int | None) -> None:
        """Hear that all chunks that the plan has before this one went out; None: all."""
        ...

    def end(self) -> None:
        """Hear that nothing more will come."""
        ...

    def take(self, now: float) -> Chunk | None:
        """Return the next answer that can be handed out, or None."""
        ...

    def acknowledge(self, now: float) -> Iterable[int]:
        """Hear that the consumer came back; return dead chunks that need not be tried by a later run."""
        ...

    @property
    def deadline(self) -> float | None:
        """When to look again, though nothing happens; None where that makes no difference."""
        ...

    def dump(self) -> dict[Any, Any]:
        """Return what a later run needs, as plain values."""
        ...

    def load(self, state: dict[Any, Any]) -> None:
        """Take up what an earlier run left."""
        ...


def answers_of(fold: Fold, plan: ChunkPlan, *, ordered: bool = True) -> Answers:
    """Return the way in which a reduction answers."""
    if isinstance(fold.window, Along):
        return _InWindows(fold.reducer, fold.window, plan, grouped=fold.key is not None, ordered=ordered)
    if isinstance(fold.window, Every):
        return _OnTriggers(fold.reducer, fold.window, grouped=fold.key is not None)
    return _AtTheEnd(fold.reducer, grouped=fold.key is not None)


class _AtTheEnd:
    """One answer for each key, at the end."""

    nbytes = 0
    deadline = None

    def __init__(self, reducer: Reducer, *, grouped: bool) -> None:
        self._reducer = reducer
        self._grouped = grouped
        self._partials: Partials = {}
        self._left: Iterator[tuple[Hashable, Any]] = iter(())

    def merge(self, partials: Partials) -> None:
        merge_partials(self._reducer, self._partials, partials)

    def sent(self, numbers: Sequence[int]) -> None:
        """Of no interest."""

    def settled(self, numbers: Sequence[int], how: Ending) -> None:
        """Of no interest."""

    def passed(self, number: int | None) -> None:
        """Of no interest."""

    def end(self) -> None:
        if not self._grouped and not self._partials:
            self._partials[()] = self._reducer.create()
        self._left = iter(self._partials.items())

    def take(self, now: float) -> Chunk | None:  # noqa: ARG002  # the others look at the time
        for key, partial in self._left:
            return Chunk(key, (), self._reducer.finish(partial))
        return None

    def acknowledge(self, now: float) -> Iterable[int]:  # noqa: ARG002  # others of its kind need it
        return ()

    def dump(self) -> dict[Any, Any]:
        return self._partials

    def load(self, state: dict[Any, Any]) -> None:
        self._partials = state


# -- windows ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Account:
    """What has become of the chunks of a window so far; `out`: sent and not settled."""

    out: int = 0
    folded: int = 0
    filtered: int = 0
    dead: int = 0


class _Done:
    """A set of windows that fills up from below: a number, and the few above it."""

    def __init__(self, below: int = 0, above: Iterable[int] = ()) -> None:
        self.below = below
        self.above = set(above)

    def __contains__(self, number: int) -> bool:
        return number < self.below or number in self.above

    def add(self, number: int) -> None:
        self.above.add(number)
        while self.below in self.above:
            self.above.remove(self.below)
            self.below += 1


class _InWindows:
    """Answers as windows along axes become complete."""

    deadline = None

    def __init__(self, reducer: Reducer, along: Along, plan: ChunkPlan, *, grouped: bool, ordered: bool) -> None:
        self._reducer = reducer
        self._along = along
        self._plan = plan
        self._grouped = grouped
        self._ordered = ordered
        self._panes: dict[Pane, Partials] = {}
        self._uses: dict[Pane, int] = {}  # windows not done that need a pane
        self._open: dict[int, _Account] = {}
        self._handed: dict[int, _Account] = {}  # complete, and not done
        self._dead: dict[int, int] = {}  # windows not done that lack a chunk
        self._done = _Done()
        self._told: dict[int, list[Hashable]] = {}  # of windows not done, the keys that are
        self._next = 0
        self._position: Index | None = (-1,) * len(along.axes)
        self._ready: deque[tuple[int, Hashable, WindowResult]] = deque()
        self._at_consumer: tuple[int, Hashable] | None = None
        self._look = True
        self.nbytes = 0

    # -- what comes in ------------------------------------------------------------------------------

    def merge(self, partials: Partials) -> None:
        for where, partial in partials.items():
            pane, key = cast("tuple[Pane, Hashable]", where)
            if pane not in self._uses:
                self._uses[pane] = sum(window not in self._done for window in self._along.windows_of(pane))
            if not self._uses[pane]:
                continue  # a chunk that an earlier run gave up: its windows were handed out without it
            held = self._panes.setdefault(pane, {})
            if key in held:
                self.nbytes -= nbytes_of(held[key])
            merge_partials(self._reducer, held, {key: partial})
            self.nbytes += nbytes_of(held[key])

    def sent(self, numbers: Sequence[int]) -> None:
        for window, count in self._windows(numbers):
            self._open.setdefault(window, _Account()).out += count

    def settled(self, numbers: Sequence[int], how: Ending) -> None:
        self._look = True
        for window, count in self._windows(numbers):
            account = self._open[window]
            account.out -= count
            if how != "skipped":  # these are what is left of the plan
                setattr(account, how, getattr(account, how) + count)
        if how == "dead":
            for number in numbers:
                self._dead[number] = sum(1 for _ in self._windows([number]))

    def _windows(self, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
        for window, count in self._along.counted(numbers).items():
            if window not in self._done:
                yield window, count

    def passed(self, number: int | None) -> None:
        position = None if number is None else self._along.position(number)
        if position != self._position:
            self._position = position
            self._look = True

    def end(self) -> None:
        """Windows that are not complete now are for a later run."""

    # -- what goes out ------------------------------------------------------------------------------

    def take(self, now: float) -> Chunk | None:  # noqa: ARG002  # others of its kind need it
        if not self._ready and self._look:
            self._find()
        if not self._ready:
            return None
        window, key, answer = self._ready.popleft()
        self._at_consumer = window, key
        return answer

    def _find(self) -> None:
        """Close the next window that is complete; in order, or whichever it is."""
        self._look = False
        while self._next < len(self._along) and not self._ready:
            if not self._is_complete(self._next):
                break
            self._next += 1
            self._close(self._next - 1)
        if not self._ordered and not self._ready:
            for window in list(self._open):
                if self._is_complete(window):
                    self._close(window)
                    break
        self._look = bool(self._ready)  # there may be more where this one came from

    def _is_complete(self, window: int) -> bool:
        if window in self._done or window in self._handed:
            return True
        account = self._open.get(window)
        return (account is None or not account.out) and self._along.behind(window, self._position)

    def _close(self, window: int) -> None:
        if window in self._done or window in self._handed:
            return
        account = self._handed[window] = self._open.pop(window, _Account())
        planned = self._along.planned(self._plan, window)
        skipped = planned - account.folded - account.filtered - account.dead
        partials = self._join(window) if planned else {}
        if planned and not partials and not self._grouped:
            partials[()] = self._reducer.create()
        number, region = self._along.index(window), self._along.region(window)
        for key in self._told.get(window, ()):
            partials.pop(key, None)
        for key, partial in partials.items():
            answer = WindowResult(
                (key, number) if self._grouped else number,
                region,
                self._reducer.finish(partial),
                "complete",
                folded=account.folded,
                filtered=account.filtered,
                skipped=skipped,
                dead=account.dead,
            )
            self._ready.append((window, key, answer))
        if not partials:
            self._finish(window)

    def _join(self, window: int) -> Partials:
        """Merge copies of a window's panes: they stay as they are until it is done."""
        joined: Partials = {}
        for pane in self._along.panes(window):
            if pane in self._panes:
                merge_partials(self._reducer, joined, copy.deepcopy(self._panes[pane]))
        return joined

    def acknowledge(self, now: float) -> Iterable[int]:  # noqa: ARG002  # others of its kind need it
        if self._at_consumer is None:
            return ()
        window, key = self._at_consumer
        self._at_consumer = None
        if self._ready and self._ready[0][0] == window:
            self._told.setdefault(window, []).append(key)
            return ()  # there is an answer for another key
        return self._finish(window)

    def _finish(self, window: int) -> list[int]:
        """Forget what no window needs any more; return the dead chunks among it."""
        self._done.add(window)
        self._told.pop(window, None)
        self._look = True
        account = self._handed.pop(window)
        for pane in self._along.panes(window):
            if pane in self._uses:
                self._uses[pane] -= 1
                if not self._uses[pane]:
                    del self._uses[pane]
                    self.nbytes -= sum(map(nbytes_of, self._panes.pop(pane, {}).values()))
        return self._bury(window) if account.dead else []

    def _bury(self, window: int) -> list[int]:
        over = []
        for number in list(self._dead):
            if window in self._along.windows_at(self._along.position(number)):
                self._dead[number] -= 1
                if self._dead[number] <= 0:
                    del self._dead[number]
                    over.append(number)
        return over

    # -- for a later run ------------------------------------------------------------------------------

    def dump(self) -> dict[Any, Any]:
        accounts = {k: (a.folded, a.filtered) for k, a in (*self._open.items(), *self._handed.items())}
        return {
            "panes": self._panes,
            "accounts": accounts,
            "done": (self._done.below, sorted(self._done.above)),
            "told": self._told,
        }

    def load(self, state: dict[Any, Any]) -> None:
        if not state:
            return
        self._done = _Done(*state["done"])
        self._told = state["told"]
        self._next = self._done.below
        self._open = {
            k: _Account(folded=folded, filtered=filtered) for k, (folded, filtered) in state["accounts"].items()
        }
        for pane, partials in state["panes"].items():
            self.merge({(pane, key): partial for key, partial in partials.items()})


# -- triggers -----------------------------------------------------------------------------------------


class _OnTriggers:
    """Answers to what was folded so far, every so many chunks or seconds, and at the end."""

    def __init__(self, reducer: Reducer, every: Every, *, grouped: bool) -> None:
        self._reducer = reducer
        self._every = every
        self._grouped = grouped
        self._partials: Partials = {}
        self._counts = dict.fromkeys(("folded", "filtered", "skipped", "dead"), 0)
        self._since = 0  # chunks folded since the last answer
        self._number = 0
        self._last = 0.0
        self._ended = False
        self._ready: deque[tuple[Hashable, WindowResult]] = deque()
        self._at_consumer: tuple[Hashable, ...] = ()
        self.nbytes = 0

    def merge(self, partials: Partials) -> None:
        merge_partials(self._reducer, self._partials, partials)

    def sent(self, numbers: Sequence[int]) -> None:
        """Of no interest."""

    def settled(self, numbers: Sequence[int], how: Ending) -> None:
        self._counts[how] += len(numbers)
        self._since += len(numbers) * (how == "folded")

    def passed(self, number: int | None) -> None:
        """Of no interest."""

    def end(self) -> None:
        self._ended = True

    @property
    def deadline(self) -> float | None:
        return None if self._every.seconds is None or not self._since else self._last + self._every.seconds

    def take(self, now: float) -> Chunk | None:
        if not self._ready:
            trigger = self._trigger(now)
            if trigger:
                self._fire(trigger)
        if not self._ready:
            return None
        key, answer = self._ready.popleft()
        self._at_consumer = (key,)
        return answer

    def _trigger(self, now: float) -> str:
        every = self._every
        if every.chunks is not None and self._since >= every.chunks:
            return "every"
        if every.seconds is not None and self._since and now >= self._last + every.seconds:
            return "seconds"
        return "end" if self._ended and (self._since or not self._number) else ""

    def _fire(self, trigger: str) -> None:
        if not self._grouped and not self._partials:
            self._partials[()] = self._reducer.create()
        for key, partial in self._partials.items():
            index = (key, self._number) if self._grouped else self._number
            answer = self._reducer.finish(copy.deepcopy(partial))
            self._ready.append((key, WindowResult(index, (), answer, trigger, **self._counts)))
        if not self._ready:
            self._advance()

    def acknowledge(self, now: float) -> Iterable[int]:
        self._last = now
        for key in self._at_consumer:
            if self._every.reset:
                del self._partials[key]
            if not self._ready:
                self._advance()
        self._at_consumer = ()
        return ()

    def _advance(self) -> None:
        self._number += 1
        self._since = 0
        if self._every.reset:
            self._counts = dict.fromkeys(self._counts, 0)

    def dump(self) -> dict[Any, Any]:
        counts = {name: count for name, count in self._counts.items() if name != "dead"}  # these are tried again
        return {"partials": self._partials, "counts": counts, "since": self._since, "number": self._number}

    def load(self, state: dict[Any, Any]) -> None:
        if state:
            self._partials = state["partials"]
            self._counts.update(state["counts"])
            self._since, self._number = state["since"], state["number"]
