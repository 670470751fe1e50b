"""How fast the whole cluster may ask the store, and how it slows down when the store says so.

All submissions pass through one client, so one token bucket there bounds the whole cluster. A batch
spends its tokens when it is submitted, and no batch is larger than the bucket, so the rate holds over
any stretch longer than the quarter of a second that the bucket holds.

When a store answers 503 or SlowDown, the allowed rate is halved at once and then climbs back
steadily: additive increase, multiplicative decrease (Chiu and Jain, "Analysis of the increase and
decrease algorithms", 1989). Pure: `now` comes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.scalars import as_real

__all__ = ["RateLimit", "Throttle"]

_BUCKET_S = 0.25  # the bucket holds what the rate allows in so many seconds
_CUT = 0.5  # what is left of the rate after a SlowDown
_CUT_EVERY_S = 1.0  # complaints about one and the same burst count once
_CLIMB_S = 20.0  # from a cut, the rate is back at what it was after so many seconds
_LOWEST = 1.0  # requests per second that are always allowed


@dataclass(frozen=True, kw_only=True)
class RateLimit:
    """Bound on requests and bytes, all workers together.

    Parameters
    ----------
    requests : float or None
        Chunk reads per `per` seconds.
    bytes : float or None
        Stored bytes per `per` seconds.
    per : float
        Seconds.

    Raises
    ------
    UsageError
        If a number is not greater than 0, or neither bound is given.

    Examples
    --------
    >>> RateLimit(requests=600, per=60).requests_per_s
    10.0
    """

    requests: float | None = None
    bytes: float | None = None
    per: float = 1.0

    def __post_init__(self) -> None:
        if self.requests is None and self.bytes is None:
            raise UsageError("RateLimit needs requests=, bytes= or both")
        for name in ("requests", "bytes", "per"):
            value = getattr(self, name)
            if value is None:
                continue
            number = as_real(value)
            if number is None or not 0 < number < math.inf:
                raise UsageError(f"RateLimit: {name} must be a number greater than 0, got {value!r}")
            if not isinstance(value, (int, float)):  # NumPy's: a plain one goes into reports and over the network
                object.__setattr__(self, name, number)

    @property
    def requests_per_s(self) -> float:
        """Requests per second, infinite where there is no bound."""
        return math.inf if self.requests is None else self.requests / self.per

    @property
    def bytes_per_s(self) -> float:
        """Bytes per second, infinite where there is no bound."""
        return math.inf if self.bytes is None else self.bytes / self.per


class _Bucket:
    """Tokens that flow in at a rate; may be overdrawn, and then takes its time."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.tokens = 0.0
        self.at = 0.0

    @property
    def size(self) -> float:
        return max(self.rate * _BUCKET_S, 1.0)

    def fill(self, now: float) -> None:
        if math.isinf(self.rate):
            return
        self.tokens = min(self.size, self.tokens + self.rate * max(now - self.at, 0.0))
        self.at = max(now, self.at)

    def room(self) -> float:
        return math.inf if math.isinf(self.rate) else self.tokens

    def wait(self, wanted: float) -> float:
        """Seconds until so many tokens are there."""
        if math.isinf(self.rate):
            return 0.0
        return max(min(wanted, self.size) - self.tokens, 0.0) / self.rate


class Throttle:
    """Says how many requests may go out now, or when the next one may.

    Parameters
    ----------
    limit : RateLimit or None
        What the user asked for; None: as fast as the store lets us.
    request_nbytes : float
        First guess at the stored bytes of one request; corrected by what is read.

    Examples
    --------
    >>> throttle = Throttle(RateLimit(requests=40), request_nbytes=100)
    >>> throttle.room(10.0)
    10
    >>> throttle.spend(10); throttle.room(10.0), throttle.wait()
    (0, 0.025)
    """

    def __init__(self, limit: RateLimit | None, request_nbytes: float) -> None:
        self._nbytes = max(request_nbytes, 1.0)
        self._bytes = _Bucket(math.inf)
        self._requests = _Bucket(math.inf)
        self._limit_requests = math.inf
        self._cut_at = -math.inf
        self._cut_rate = math.inf
        self._before_cut = math.inf
        self._seen_rate = 0.0
        self._seen_at: float | None = None
        self._seen = 0
        self.change(limit, 0.0)

    @property
    def idle(self) -> bool:
        """Whether nothing is bounded at the moment."""
        return math.isinf(self._requests.rate) and math.isinf(self._bytes.rate)

    @property
    def requests_per_s(self) -> float:
        """Allowed requests per second now, infinite where nothing bounds them."""
        return self._requests.rate

    def change(self, limit: RateLimit | None, now: float) -> None:
        """Take another bound from now on."""
        self._requests.fill(now)
        self._bytes.fill(now)
        self._limit_requests = math.inf if limit is None else limit.requests_per_s
        self._set_rate(self._bytes, math.inf if limit is None else limit.bytes_per_s, now)
        self._set_rate(self._requests, min(self._limit_requests, self._cut_rate), now)

    def room(self, now: float) -> int:
        """Return how many requests may go out now."""
        self._climb(now)
        self._requests.fill(now)
        self._bytes.fill(now)
        room = min(self._requests.room(), self._bytes.room() / self._nbytes)
        if math.isinf(room):
            return 2**62
        # One request larger than the whole bucket passes when the bucket is full.
        if room < 1 and self._requests.room() >= 1 and self._bytes.room() >= self._bytes.size:
            return 1
        return max(int(room + 1e-9), 0)

    def wait(self) -> float:
        """Seconds until the next request may go out."""
        return max(self._requests.wait(1.0), self._bytes.wait(self._nbytes))

    def spend(self, requests: int) -> None:
        """Take tokens for requests that go out."""
        self._requests.tokens -= requests
        self._bytes.tokens -= requests * self._nbytes

    def settle(self, requests: int, nbytes: int, now: float) -> None:
        """Learn what requests that came back have really read."""
        if requests < 1:
            return
        if not math.isinf(self._bytes.rate):
            self._bytes.tokens += requests * self._nbytes - nbytes
        self._nbytes += 0.3 * (max(nbytes / requests, 1.0) - self._nbytes)
        self._seen += requests
        if self._seen_at is None:
            self._seen_at, self._seen = now, 0
        elif now - self._seen_at >= 0.5:
            rate = self._seen / (now - self._seen_at)
            self._seen_rate = max(rate, 0.8 * self._seen_rate)
            self._seen_at, self._seen = now, 0

    def slow_down(self, now: float) -> bool:
        """Hear a complaint of the store; return whether the rate was cut."""
        if now - self._cut_at < _CUT_EVERY_S:
            return False
        current = min(self._requests.rate, self._seen_rate or 100.0)
        if math.isinf(self._cut_rate):
            self._before_cut = current
        self._cut_at = now
        self._cut_rate = max(current * _CUT, _LOWEST)
        self._set_rate(self._requests, min(self._limit_requests, self._cut_rate), now)
        return True

    def _climb(self, now: float) -> None:
        if math.isinf(self._cut_rate):
            return
        gone = now - self._cut_at
        rate = self._cut_rate + self._before_cut * gone / _CLIMB_S
        if rate >= 2 * self._before_cut:
            self._cut_rate = math.inf  # well above what the store complained about, and no complaint
            rate = math.inf
        self._set_rate(self._requests, min(self._limit_requests, rate), now)

    def _set_rate(self, bucket: _Bucket, rate: float, now: float) -> None:
        if rate == bucket.rate:
            return
        bucket.fill(now)
        was_open = math.isinf(bucket.rate)
        bucket.rate = rate
        bucket.at = now
        if was_open:
            bucket.tokens = bucket.size
        bucket.tokens = min(bucket.tokens, bucket.size)
