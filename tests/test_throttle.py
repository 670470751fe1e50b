"""The token bucket and its brakes, on a clock of our own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.engine.throttle import RateLimit, Throttle


@given(rate=st.floats(1, 10_000), step=st.floats(0.001, 0.5), take=st.floats(0.1, 1.0))
def test_never_faster_than_the_rate(rate: float, step: float, take: float) -> None:
    throttle, sent, now = Throttle(RateLimit(requests=rate), 100), 0, 5.0
    throttle.room(now)
    for _ in range(200):
        now += step
        ask = math.ceil(throttle.room(now) * take)
        throttle.spend(ask)
        sent += ask
    # Nothing over the rate but what the bucket holds at the beginning.
    assert sent <= rate * 200 * step + max(rate * 0.25, 1) + 1e-6


@given(rate=st.floats(2, 1000))
def test_reaches_the_rate(rate: float) -> None:
    throttle, sent, now = Throttle(RateLimit(requests=rate), 100), 0, 0.0
    while now < 10:
        room = throttle.room(now)
        throttle.spend(room)
        sent += room
        now += max(throttle.wait(), 1e-3)
    assert sent >= 0.9 * rate * 10 - 1


def test_bytes_follow_what_is_really_read() -> None:
    throttle, now, nbytes = Throttle(RateLimit(bytes=1000), request_nbytes=1), 0.0, 0
    for _ in range(400):
        now += 0.05
        room = min(throttle.room(now), 5)
        throttle.spend(room)
        throttle.settle(room, room * 50, now)
        nbytes += room * 50
    assert 0.8 * 1000 * now <= nbytes <= 1.1 * 1000 * now


def test_a_request_larger_than_the_bucket_passes() -> None:
    throttle = Throttle(RateLimit(bytes=100), request_nbytes=10_000)
    assert throttle.room(100.0) == 1
    throttle.spend(1)
    assert throttle.room(100.1) == 0
    assert throttle.room(201.0) == 1


def test_without_a_limit_nothing_is_bounded() -> None:
    throttle = Throttle(None, 100)
    assert throttle.idle
    assert throttle.room(0.0) > 10**9
    assert throttle.wait() == 0


def test_slow_down_halves_and_climbs_back() -> None:
    throttle = Throttle(None, 100)
    for tick in range(10):
        throttle.settle(100, 100 * 100, tick * 0.25)  # 400 requests a second
    assert throttle.slow_down(3.0)
    assert throttle.requests_per_s == pytest.approx(200, rel=0.2)
    assert not throttle.slow_down(3.1), "one burst of complaints counts once"
    throttle.room(8.0)
    at_eight = throttle.requests_per_s
    throttle.room(13.0)
    assert 200 < at_eight < throttle.requests_per_s
    throttle.room(60.0)
    assert throttle.idle, "no complaint for long: as fast as the store lets us again"


def test_slow_down_never_stops_and_never_passes_the_users_limit() -> None:
    throttle = Throttle(RateLimit(requests=8), 100)
    for tick in range(20):
        throttle.slow_down(tick * 2.0)
    assert throttle.requests_per_s >= 1
    throttle.room(1000.0)
    assert throttle.requests_per_s == 8


def test_change_while_running() -> None:
    throttle = Throttle(RateLimit(requests=4), 100)
    throttle.change(RateLimit(requests=400), 10.0)
    assert throttle.requests_per_s == 400
    throttle.change(None, 11.0)
    assert throttle.idle


@pytest.mark.parametrize(
    "options", [{}, {"requests": 0}, {"bytes": -1}, {"requests": math.inf}, {"requests": 1, "per": 0}]
)
def test_bad_limits(options: dict[str, float]) -> None:
    with pytest.raises(zds.UsageError, match="RateLimit"):
        RateLimit(**options)
