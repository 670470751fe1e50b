"""When something takes so long that a second copy of it is worth starting. Pure: times come in.

It serves two levels: single requests to a remote store on a worker, and whole batches on the cluster. A
copy is started once the first has been out for longer than a multiple of the usual time, where the usual
time is a quantile of recent ones (Dean and Barroso, "The tail at scale", 2013). The first answer wins,
the other copy is called back. A budget keeps copies rare, so that a store or a cluster which is slow as a
whole is not loaded further.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_real

__all__ = ["Hedge", "Stragglers"]

_MEMORY = 128  # recent times that the usual one is taken from
_ENOUGH = 8  # so many before there is a usual one
_REFRESH = 16  # it is worked out anew after so many more


@dataclass(frozen=True, kw_only=True)
class Hedge:
    """When to start a second copy of a straggling read.

    Parameters
    ----------
    quantile : float
        The usual time: this quantile of recent ones, between 0 and 1.
    factor : float
        A copy is started after so many times the usual time.
    min_s : float
        And never before so many seconds.
    budget : float
        Share of reads that may be started twice.

    Raises
    ------
    UsageError
        If a number is out of range.

    Examples
    --------
    >>> Hedge(quantile=0.99, budget=0.02)
    Hedge(quantile=0.99, factor=2.0, min_s=0.1, budget=0.02)
    """

    quantile: float = 0.95
    factor: float = 2.0
    min_s: float = 0.1
    budget: float = 0.05

    def __post_init__(self) -> None:
        for name in ("quantile", "factor", "min_s", "budget"):
            value = as_real(getattr(self, name))
            if value is None:
                raise UsageError(f"Hedge: {name} is a number, got {getattr(self, name)!r}")
            object.__setattr__(self, name, value)
        if not 0 < self.quantile < 1:
            raise UsageError(f"Hedge: quantile lies between 0 and 1, got {self.quantile!r}")
        if not self.factor >= 1:
            raise UsageError(f"Hedge: factor must be at least 1, got {self.factor!r}")
        if not 0 <= self.min_s < math.inf:
            raise UsageError(f"Hedge: min_s is seconds >= 0, got {self.min_s!r}")
        if not 0 < self.budget <= 1:
            raise UsageError(f"Hedge: budget is a share greater than 0 and at most 1, got {self.budget!r}")


class Stragglers:
    """Knows how long batches usually take, and how many copies the budget still allows.

    Examples
    --------
    >>> stragglers = Stragglers(Hedge(quantile=0.5, factor=3.0, min_s=0.0, budget=0.5))
    >>> for _ in range(10): stragglers.observe(elapsed_s=1.0, chunks=8)
    >>> stragglers.patience(chunks=8), stragglers.patience(chunks=16)
    (3.0, 6.0)
    """

    def __init__(self, hedge: Hedge | None) -> None:
        self._hedge = hedge
        self._per_chunk: deque[float] = deque(maxlen=_MEMORY)
        self._usual: float | None = None
        self._news = 0
        self._started = 0
        self._copied = 0

    @property
    def on(self) -> bool:
        """Whether copies may be started at all."""
        return self._hedge is not None

    def observe(self, *, elapsed_s: float, chunks: int) -> None:
        """Learn from one that came back."""
        self._per_chunk.append(elapsed_s / max(chunks, 1))
        self._news += 1

    def started(self, chunks: int) -> None:
        """Count chunks that were submitted: the budget is a share of them."""
        self._started += chunks

    def patience(self, *, chunks: int) -> float:
        """Return how long a batch of so many chunks may be out before a copy is started; inf for ever."""
        if self._hedge is None or len(self._per_chunk) < _ENOUGH:
            return math.inf
        if self._usual is None or self._news >= min(_REFRESH, len(self._per_chunk)):
            ordered = sorted(self._per_chunk)
            self._usual = ordered[min(int(self._hedge.quantile * len(ordered)), len(ordered) - 1)]
            self._news = 0
        return max(self._hedge.factor * self._usual * chunks, self._hedge.min_s)

    def afford(self, chunks: int) -> bool:
        """Take a copy of so many chunks out of the budget, if it is in there."""
        # The first copy is always affordable, or a short stream could never start one.
        if self._hedge is None or (self._copied and self._copied + chunks > self._hedge.budget * self._started):
            return False
        self._copied += chunks
        return True
