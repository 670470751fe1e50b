"""The streams of a whole cluster, as far as its scheduler has heard of them: bounded, and gone with their clients."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.watch.figures import Counts

__all__ = ["PAGE", "Board", "News", "Posted"]

PAGE = "zarr-streams"  # of the dashboard

_POSTED = 100
_TEXT = 200_000  # characters of a snapshot; they are made to stay below 100 KB
_WORD = 200
_KINDS = 64  # of a count
_VERSION = 1


@dataclass(frozen=True, slots=True)
class News:
    """What a client says of one of its runs.

    Attributes
    ----------
    run : str
        Which run; no two have the same.
    name : str
        Of the stream.
    whose : str
        Host and process of the client, for people.
    outcome : str
        "running", or how it ended.
    counts : dict
        All that `Figures` has counted since the run began.
    planned, in_flight, in_flight_bytes : float
        See `Figures`.
    snapshot : str
        What there is to see, as JSON; read when somebody looks.
    """

    run: str
    name: str
    whose: str
    outcome: str
    counts: Counts
    planned: float
    in_flight: float
    in_flight_bytes: float
    snapshot: str

    @classmethod
    def parse(cls, message: Any) -> News:
        """Check a message, which may come from anybody who reaches the scheduler.

        Raises
        ------
        UsageError
            If it is not what a client of this version sends.

        Examples
        --------
        >>> News.parse({"v": 1, "run": "a1", "outcome": "running"}).outcome
        'running'
        """
        if not isinstance(message, dict) or message.get("v") != _VERSION:
            raise UsageError(
                f"expected news of a stream in version {_VERSION}: install the same version of zarr_dask_stream where "
                "the client and the scheduler run"
            )
        words = {name: message.get(name, "") for name in ("run", "name", "whose", "outcome")}
        numbers = {name: message.get(name, 0) for name in ("planned", "in_flight", "in_flight_bytes")}
        counts, text = message.get("counts", {}), message.get("snapshot", "")
        right = (
            all(isinstance(word, str) and len(word) <= _WORD for word in words.values())
            and words["run"]
            and all(map(_is_number, numbers.values()))
            and isinstance(text, str)
            and len(text) <= _TEXT
            and isinstance(counts, dict)
            and len(counts) <= _KINDS
            and all(isinstance(what, str) and _are_counts(kinds) for what, kinds in counts.items())
        )
        if not right:
            raise UsageError("expected news of a stream, got something else: nothing of it was taken")
        return cls(**words, **numbers, counts=counts, snapshot=text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _are_counts(kinds: Any) -> bool:
    return (
        isinstance(kinds, dict)
        and len(kinds) <= _KINDS
        and all(isinstance(kind, str) and len(kind) <= _WORD and _is_number(n) for kind, n in kinds.items())
    )


@dataclass(slots=True)
class Posted:
    """A run as the board shows it.

    Attributes
    ----------
    news : News
        The latest.
    client : str
        The client it came from.
    began, heard : float
        When the first and the latest news came, seconds on the caller's clock.
    number : int
        Position among all runs that were ever posted.
    """

    news: News
    client: str
    began: float
    heard: float
    number: int
    gone: bool = False
    _read: tuple[str, dict[str, Any]] = field(default=("", {}), repr=False)

    @property
    def outcome(self) -> str:
        """Whether it is "running", how it ended, or "gone": its client left before it ended."""
        return "gone" if self.gone else self.news.outcome

    @property
    def running(self) -> bool:
        """Whether more news may come."""
        return self.outcome == "running"

    @property
    def snapshot(self) -> dict[str, Any]:
        """What there is to see, empty where it can't be read."""
        text = self.news.snapshot
        if self._read[0] != text:
            try:
                found = json.loads(text)
            except (ValueError, RecursionError):
                found = {}
            self._read = (text, found if isinstance(found, dict) else {})
        return self._read[1]


class Board:
    """The latest news of each stream of a cluster.

    Parameters
    ----------
    most : int
        Streams kept. One that begins takes the place of that which ended first; where all are under way, it is
        shown when one of them has ended.

    Examples
    --------
    >>> board = Board()
    >>> board.post("client-1", News.parse({"v": 1, "run": "a1", "name": "t2m", "outcome": "running"}), now=5.0)
    >>> [(posted.news.name, posted.outcome) for posted in board.posted]
    [('t2m', 'running')]
    >>> _ = board.left("client-1")
    >>> [(posted.news.name, posted.outcome) for posted in board.posted]
    [('t2m', 'gone')]
    """

    def __init__(self, most: int = _POSTED) -> None:
        self._most = most
        self._posted: dict[str, Posted] = {}
        self._count = 0
        self.version = 0

    @property
    def posted(self) -> list[Posted]:
        """All runs, those under way first, and of these the latest first."""
        return sorted(self._posted.values(), key=lambda one: (not one.running, -one.number))

    def get(self, run: str) -> Posted | None:
        """Return a run by its identity."""
        return self._posted.get(run)

    def post(self, client: str, news: News, now: float) -> None:
        """Take news; those of a run that another client has posted are not heard."""
        known = self._posted.get(news.run)
        if known is None:
            if self._make_room():
                self._count += 1
                self._posted[news.run] = Posted(news, client, now, now, self._count)
        elif known.client == client:
            known.news, known.heard, known.gone = news, now, False
        self.version += 1

    def left(self, client: str) -> list[Posted]:
        """Take the runs of a client that left as gone; return them."""
        gone = [posted for posted in self._posted.values() if posted.client == client and posted.running]
        for posted in gone:
            posted.gone = True
        self.version += bool(gone)
        return gone

    @property
    def full(self) -> bool:
        """Whether there may be streams under way that are not shown."""
        return len(self._posted) >= self._most and all(one.running for one in self._posted.values())

    def _make_room(self) -> bool:
        if self.full:
            return False
        if len(self._posted) >= self._most:
            ended = (one for one in self._posted.values() if not one.running)
            del self._posted[min(ended, key=lambda one: (one.heard, one.number)).news.run]
        return True
