"""Which failures are worth another try, and when: a table, limits, and bounds that nothing overflows."""

from __future__ import annotations

import errno
import http.client
import math
import random
import socket
import ssl
import urllib.error
from email.message import Message
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec.exceptions
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.engine.events import Category, Failure
from zarr_dask_stream.engine.retry import Breaker, GiveUp, RetryAfter, RetryPolicy, classify
from zarr_dask_stream.errors import (
    CorruptChunkError,
    MetadataError,
    MissingChunkError,
    StoreError,
    StoreNotFoundError,
    StoreNotVisibleError,
    UsageError,
)


def service(code: str, status: int | None = None) -> Exception:
    response: dict[str, Any] = {"Error": {"Code": code}}
    if status is not None:
        response["ResponseMetadata"] = {"HTTPStatusCode": status}
    return botocore.exceptions.ClientError(response, "GetObject")  # type: ignore[no-any-return]  # untyped library


def answered(status: int) -> Exception:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]  # the request is not looked at


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class DisguisedError(ConnectionError):
    """A subclass with a name of its own."""


class Hostile(Exception):  # noqa: N818  # the name of an exception class that misbehaves
    def __str__(self) -> str:
        raise RuntimeError("no text")


TRANSIENT = [
    *(
        OSError(getattr(errno, name), name)
        for name in ("EIO", "ECONNRESET", "EPIPE", "EMFILE", "ESTALE", "EREMOTEIO", "ENETUNREACH", "EINTR")
    ),
    ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
    BrokenPipeError(),
    DisguisedError("subclass"),
    EOFError("end"),
    http.client.RemoteDisconnected("gone"),
    http.client.IncompleteRead(b"ab", 10),
    answered(500),
    answered(502),
    answered(504),
    answered(408),
    service("InternalError", 500),
    service("RequestTimeout", 400),
    urllib.error.HTTPError("http://x", 502, "bad gateway", Message(), None),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("cut off"),
    aiohttp.ClientOSError(errno.ECONNRESET, "reset"),
    aiohttp.ClientConnectorDNSError(None, OSError(-2, "no name")),  # type: ignore[arg-type]  # the key is not looked at
    socket.gaierror(socket.EAI_AGAIN, "temporary failure in name resolution"),
    botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"),
    botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="http://x"),
    caused(RuntimeError("wrapped"), ConnectionResetError("reset")),
    caused(StoreError("can't list"), OSError(errno.EIO, "io")),
]
THROTTLED = [
    answered(429),
    answered(503),
    service("SlowDown", 503),
    service("Throttling", 400),
    OSError(errno.EBUSY, "Please reduce your request rate"),
    OSError("SlowDown: reduce your request rate"),
]
TIMEOUT = [
    TimeoutError("late"),
    TimeoutError(errno.ETIMEDOUT, "late"),
    aiohttp.ServerTimeoutError(),
    fsspec.exceptions.FSTimeoutError(),
]
CREDENTIALS = [
    service("ExpiredToken", 400),
    service("RequestExpired", 403),
    PermissionError("The provided token has expired: ExpiredToken"),
    caused(PermissionError("denied"), service("ExpiredToken", 400)),
]
PERMANENT = [
    FileNotFoundError(errno.ENOENT, "no such file", "/data/a"),
    FileNotFoundError(errno.ENOENT, "no such file", "/data/SlowDown/ExpiredToken"),
    PermissionError(errno.EACCES, "denied"),
    IsADirectoryError(errno.EISDIR, "directory"),
    OSError(errno.ENOSPC, "full"),
    OSError("no errno"),
    StoreError("no"),
    MetadataError("no"),
    StoreNotFoundError("no"),
    answered(403),
    answered(404),
    service("AccessDenied", 403),
    service("NoSuchKey"),
    ssl.SSLCertVerificationError(1, "self-signed"),
    socket.gaierror(socket.EAI_FAIL, "no recovery"),
    MemoryError(),
    ValueError("bad"),
    Hostile(),
]
TABLE = [
    *((error, Category.TRANSIENT) for error in TRANSIENT),
    *((error, Category.THROTTLED) for error in THROTTLED),
    *((error, Category.TIMEOUT) for error in TIMEOUT),
    *((error, Category.CREDENTIALS) for error in CREDENTIALS),
    *((error, Category.PERMANENT) for error in PERMANENT),
    (StoreNotVisibleError("not here"), Category.NOT_VISIBLE),
    (MissingChunkError("none"), Category.MISSING),
    (CorruptChunkError("bad"), Category.CORRUPT),
    (caused(CorruptChunkError("bad"), EOFError()), Category.CORRUPT),
]


@pytest.mark.parametrize(
    ("error", "category"), TABLE, ids=lambda x: x.value if isinstance(x, Category) else type(x).__name__
)
def test_errors_are_of_the_right_kind(error: BaseException, category: Category) -> None:
    assert classify(error) is category
    assert classify(error, in_function=True) is Category.FUNCTION


def test_a_certificate_that_is_wrong_stays_wrong() -> None:
    class CertificateError(aiohttp.ClientOSError, ssl.SSLCertVerificationError):
        pass

    assert classify(CertificateError(1, "self-signed")) is Category.PERMANENT


def _reset() -> None:
    raise ConnectionResetError("reset")


def test_a_context_that_was_suppressed_does_not_count() -> None:
    def hidden() -> None:
        try:
            _reset()
        except ConnectionResetError:
            raise ValueError("own") from None

    def shown() -> None:
        try:
            _reset()
        except ConnectionResetError:
            raise ValueError("own")  # noqa: B904  # the context is what is tested

    with pytest.raises(ValueError, match="own") as quiet:
        hidden()
    with pytest.raises(ValueError, match="own") as loud:
        shown()
    assert classify(quiet.value) is Category.PERMANENT
    assert classify(loud.value) is Category.TRANSIENT


def test_a_ring_of_causes_is_walked_once() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert classify(first) is Category.PERMANENT


@pytest.mark.parametrize("response", [{}, {"Error": None}, {"ResponseMetadata": None}, "text", None])
def test_odd_answers_of_services_do_not_confuse(response: Any) -> None:
    error = OSError(errno.EIO, "io")
    error.response = response  # type: ignore[attr-defined]  # as client libraries do
    assert classify(error) is Category.TRANSIENT


# -- decisions --------------------------------------------------------------------------------------


def failure(category: Category = Category.TRANSIENT, *, retryable: bool = False) -> Failure:
    return Failure(0, category, "OSError", "no", retryable)


def decide(
    policy: RetryPolicy, attempt: int, category: Category = Category.TRANSIENT, **kw: Any
) -> RetryAfter | GiveUp:
    retryable, elapsed = kw.get("retryable", False), kw.get("elapsed", 0.0)
    return policy.decide(failure(category, retryable=retryable), attempt, elapsed, random.Random(0), kw.get("spent", 0))


@pytest.mark.parametrize("category", list(Category))
def test_each_kind_has_its_limit(category: Category) -> None:
    policy = RetryPolicy(attempts=5, corrupt_attempts=3)
    tries = next(n for n in range(1, 10) if isinstance(decide(policy, n, category), GiveUp))
    never = {Category.FUNCTION, Category.MISSING, Category.PERMANENT}
    assert tries == (1 if category in never else 3 if category is Category.CORRUPT else 5)


def test_functions_are_tried_again_where_the_worker_said_so() -> None:
    assert isinstance(decide(RetryPolicy(), 1, Category.FUNCTION, retryable=True), RetryAfter)
    assert isinstance(decide(RetryPolicy(attempts=1), 1, Category.FUNCTION, retryable=True), GiveUp)


def test_the_reason_reads_well() -> None:
    assert decide(RetryPolicy(attempts=1), 1) == GiveUp("the only attempt failed")
    assert decide(RetryPolicy(attempts=2), 2) == GiveUp("all 2 attempts failed")
    assert "budget of 3" in decide(RetryPolicy(budget=3), 1, spent=3).why  # type: ignore[union-attr]  # it gives up
    assert isinstance(decide(RetryPolicy(budget=3), 1, spent=2), RetryAfter)


def test_no_try_begins_after_the_timeout() -> None:
    policy = RetryPolicy(attempts=99, timeout=10.0, wait_initial=1.0, wait_max=1.0, wait_jitter=0.0)
    assert isinstance(decide(policy, 1, elapsed=9.0), RetryAfter)
    assert isinstance(decide(policy, 1, elapsed=9.001), GiveUp)


policies = st.builds(
    RetryPolicy,
    attempts=st.just(10**7),
    wait_initial=st.floats(0, 1e300) | st.integers(0, 10**6),
    wait_max=st.floats(0, 1e300) | st.integers(0, 10**6),
    wait_exp_base=st.floats(1, 1e308) | st.integers(1, 10**6),
    wait_jitter=st.floats(0, 1),
)


@given(policies, st.integers(1, 10**6), st.randoms(use_true_random=False))
def test_the_wait_is_between_zero_and_its_bound(policy: RetryPolicy, attempt: int, rng: random.Random) -> None:
    wait = policy.backoff(attempt, rng)
    assert isinstance(wait, float)
    assert 0 <= wait <= policy.wait_max
    if policy.wait_initial == 0:
        assert wait == 0


@given(policies, st.integers(1, 2000))
def test_without_jitter_the_wait_never_shrinks(policy: RetryPolicy, attempt: int) -> None:
    steady = RetryPolicy(
        wait_initial=policy.wait_initial, wait_max=policy.wait_max, wait_exp_base=policy.wait_exp_base, wait_jitter=0
    )
    rng = random.Random(0)
    assert steady.backoff(attempt, rng) <= steady.backoff(attempt + 1, rng)


def test_the_wait_doubles_up_to_its_bound() -> None:
    policy = RetryPolicy(wait_initial=0.1, wait_max=1.0, wait_jitter=0)
    assert [policy.backoff(n, random.Random(0)) for n in (1, 2, 3, 4, 5, 10**6)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_full_jitter_fills_the_whole_range() -> None:
    policy, rng = RetryPolicy(wait_initial=1.0), random.Random(5)
    waits = [policy.backoff(1, rng) for _ in range(1000)]
    assert min(waits) < 0.01
    assert max(waits) > 0.99
    assert abs(sum(waits) / len(waits) - 0.5) < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"attempts": 0},
        {"attempts": 1.5},
        {"attempts": True},
        {"corrupt_attempts": 0},
        {"wait_initial": -1},
        {"wait_initial": "1 s"},
        {"wait_max": math.nan},
        {"wait_exp_base": 0.9},
        {"wait_jitter": 1.1},
        {"timeout": -1},
        {"timeout": "10"},
        {"timeout": math.nan},
        {"budget": -1},
        {"budget": 1.5},
        {"breaker": 0},
        {"breaker": 2},
        {"on": "OSError"},
        {"on": int},
        {"on": (OSError, 3)},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"RetryPolicy: {next(iter(options))}"):
        RetryPolicy(**options)


def test_on_names_classes_or_asks() -> None:
    assert not RetryPolicy().wants(OSError())
    assert RetryPolicy(on=OSError).wants(ConnectionError())
    assert not RetryPolicy(on=(OSError, KeyError)).wants(ValueError())
    assert RetryPolicy(on=lambda error: "again" in str(error)).wants(ValueError("again"))


# -- the breaker ------------------------------------------------------------------------------------


def test_the_breaker_opens_only_after_its_patience() -> None:
    breaker = Breaker(0.9, memory=10, patience_s=10)
    breaker.observe(good=0, failures=[Category.TRANSIENT] * 10, now=5.0)
    assert not breaker.is_open(14.9)
    assert breaker.is_open(15.0)
    breaker.observe(good=10, failures=[], now=16.0)
    assert not breaker.is_open(100.0)


def test_the_breaker_ignores_what_lies_in_the_chunks() -> None:
    breaker = Breaker(0.5, memory=10)
    breaker.observe(good=0, failures=[Category.CORRUPT, Category.FUNCTION] * 50, now=0.0)
    assert not breaker.is_open(1000.0)


def test_the_breaker_needs_enough_attempts_and_may_be_off() -> None:
    few, off = Breaker(0.5), Breaker(None)
    few.observe(good=0, failures=[Category.TRANSIENT] * 50, now=0.0)
    off.observe(good=0, failures=[Category.TRANSIENT] * 5000, now=0.0)
    assert not few.is_open(1000.0)
    assert not off.is_open(1000.0)


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=30))
def test_the_breaker_stays_shut_where_most_attempts_succeed(batches: list[tuple[int, int]]) -> None:
    breaker = Breaker(0.6)
    for now, (good, bad) in enumerate(batches):
        breaker.observe(good=good + bad, failures=[Category.TIMEOUT] * bad, now=float(now))
        assert not breaker.is_open(now + 1e9)
