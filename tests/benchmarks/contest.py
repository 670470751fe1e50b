"""What a row of the benchmark is: some who do the same work, and what is aimed at."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

#: The limit of the machine, the stream in one of its settings, or another tool.
Kind = Literal["limit", "stream", "peer"]


@dataclass(frozen=True)
class Outcome:
    """What a contender did once: chunks, their sum, figures of its own, and the time where it knows better."""

    chunks: int
    total: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None


@dataclass(frozen=True)
class Contender:
    """One who does the work of a row; those that name the same `work` must come to the same total."""

    name: str
    run: Callable[[], Outcome]
    kind: Kind
    work: str = ""
    #: Under which name a plot puts peers of all rows together.
    family: str = ""


@dataclass(frozen=True)
class Ratio:
    """Throughput of one contender over that of another, round by round.

    `aim` says it in words. A `share` is of something that can hardly be passed; other ratios are speed-ups. The second
    throughput counts `factor` times: so many loops like that one would reach it. Without `least` it is only shown.
    """

    aim: str
    of: str
    to: str
    least: float | None
    share: bool = False
    factor: float = 1.0


@dataclass(frozen=True)
class Figure:
    """A contender's own figure, round by round: at least `least`, or at most `most`."""

    aim: str
    of: str
    figure: str
    least: float | None = None
    most: float | None = None


Goal = Ratio | Figure


@dataclass
class Row:
    """One line of the table."""

    work: str
    contenders: list[Contender]
    goals: list[Goal]
    #: The right total of each work, where somebody knows it before the start.
    expected: dict[str, float] = field(default_factory=dict)
    #: Fewer rounds than asked for, where one takes minutes.
    most_rounds: int | None = None
    #: Who should be here and is not, and why.
    absent: dict[str, str] = field(default_factory=dict)


def share(of: str, to: str, least: float, whose: str = "the limit") -> Ratio:
    """Aim at a share of another's throughput."""
    return Ratio(f"≥ {least:.2f} of {whose}", of, to, least, share=True)


def times(of: str, to: str, least: float, whose: str) -> Ratio:
    """Aim at a multiple of a peer's throughput."""
    aim = f"≥ {least:g}x {whose}" if least != 1.0 else f"ahead of {whose}"
    return Ratio(aim, of, to, least)


def is_installed(package: str) -> bool:
    """Whether a peer can take part."""
    return importlib.util.find_spec(package) is not None
