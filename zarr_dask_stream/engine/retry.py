"""Whether a failure is worth another try, and when. Pure: no clock, no global randomness.

`classify` runs where the error is (on the worker) and names its kind; `RetryPolicy.decide` runs
where the attempts are counted (on the client) and says what to do.
"""

from __future__ import annotations

import errno
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zarr_dask_stream.engine.events import Category, Failure
from zarr_dask_stream.errors import (
    CorruptChunkError,
    MissingChunkError,
    StoreError,
    StoreNotVisibleError,
    UsageError,
)
from zarr_dask_stream.scalars import as_real, as_whole

__all__ = ["Breaker", "GiveUp", "RetryAfter", "RetryPolicy", "classify"]

_TRANSIENT_ERRNO = frozenset(
    {
        errno.EAGAIN, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET,
        errno.EHOSTUNREACH, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENETDOWN, errno.ENETRESET,
        errno.ENETUNREACH, errno.ENFILE, errno.ENOBUFS, errno.EPIPE, errno.EREMOTEIO, errno.ESTALE,
        errno.ETIMEDOUT,
    }
)  # fmt: skip
_TRANSIENT_STATUS = frozenset({408, 425, 500, 502, 504})
_THROTTLED_STATUS = frozenset({429, 503})
_CREDENTIAL_CODES = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "RequestExpired",
     "TokenRefreshRequired"}
)  # fmt: skip
_TRANSIENT_CODES = frozenset({"RequestTimeout", "InternalError"})
_THROTTLED_CODES = frozenset(
    {"SlowDown", "Throttling", "ThrottlingException", "ServiceUnavailable", "RequestLimitExceeded",
     "BandwidthLimitExceeded", "TooManyRequests", "503"}
)  # fmt: skip
# Client libraries that are not imported here: their classes are known by name, in any module.
_TRANSIENT_NAMES = frozenset(
    {"ClientConnectionError", "ClientOSError", "ClientPayloadError", "ConnectTimeoutError",
     "ConnectionClosedError", "EndpointConnectionError", "FSTimeoutError", "GenericError",
     "HTTPClientError", "IncompleteRead", "IncompleteReadError", "ReadTimeoutError",
     "ResponseStreamingError", "ServerDisconnectedError", "ServerTimeoutError"}
)  # fmt: skip
_FINAL_NAMES = frozenset({"SSLCertVerificationError"})
_EAI_AGAIN = -3  # the name server is busy; the constant is in `socket`, which the pure core stays away from


def classify(error: BaseException, *, in_function: bool = False) -> Category:
    """Name the kind of a failure by type, errno, HTTP status and service code.

    Parameters
    ----------
    error : BaseException
        What was raised; its causes are looked at too.
    in_function : bool
        Whether a user's function raised it: then it is the function's, whatever its type.

    Examples
    --------
    >>> classify(ConnectionResetError(104, "reset"))
    <Category.TRANSIENT: 'transient'>
    >>> classify(PermissionError(13, "denied"))
    <Category.PERMANENT: 'permanent'>
    >>> classify(ValueError("mine"), in_function=True)
    <Category.FUNCTION: 'function'>
    """
    if in_function:
        return Category.FUNCTION
    if isinstance(error, StoreNotVisibleError):
        return Category.NOT_VISIBLE
    if isinstance(error, MissingChunkError):
        return Category.MISSING
    if isinstance(error, CorruptChunkError):
        return Category.CORRUPT
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        category = _classify_one(link)
        if category is not None:
            return category
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return Category.PERMANENT


def _classify_one(error: BaseException) -> Category | None:
    code = _service_code(error)
    # The name of a missing file may be anything: its words are no message of a service.
    text = "" if isinstance(error, FileNotFoundError) else _text(error)
    if code in _CREDENTIAL_CODES or any(word in text for word in _CREDENTIAL_CODES):
        return Category.CREDENTIALS
    if isinstance(error, TimeoutError):
        return Category.TIMEOUT
    if code in _THROTTLED_CODES or "SlowDown" in text:
        return Category.THROTTLED
    if code in _TRANSIENT_CODES:
        return Category.TRANSIENT
    status = _status(error)
    if status is not None:
        if status in _THROTTLED_STATUS:
            return Category.THROTTLED
        return Category.TRANSIENT if status in _TRANSIENT_STATUS else Category.PERMANENT
    return _classify_builtin(error)


def _classify_builtin(error: BaseException) -> Category | None:
    """Judge what no service has spoken of: by type, errno and name."""
    if isinstance(error, (FileNotFoundError, PermissionError, StoreError)):
        return None
    if isinstance(error, (ConnectionError, EOFError)):
        return Category.TRANSIENT
    if isinstance(error, OSError) and error.errno == errno.EBUSY:
        return Category.THROTTLED  # what s3fs makes of a 503
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return Category.TRANSIENT
    names = {cls.__name__ for cls in type(error).__mro__}
    if "gaierror" in names and getattr(error, "errno", None) == _EAI_AGAIN:
        return Category.TRANSIENT
    if names & _TRANSIENT_NAMES and not names & _FINAL_NAMES:
        return Category.TRANSIENT
    return None


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001  # an exception class of a user may do anything here
        return ""


def _service_code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str((response.get("Error") or {}).get("Code", ""))
    return ""


def _status(error: BaseException) -> int | None:
    status = getattr(error, "status", None)
    if status is None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode")
    return status if isinstance(status, int) and not isinstance(status, bool) else None


@dataclass(frozen=True, slots=True)
class RetryAfter:
    """Try the chunk again after so many seconds."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Don't try again; `why` ends the sentence "given up because ..."."""

    why: str


_BOUNDS: tuple[tuple[str, float, float, str], ...] = (
    ("wait_initial", 0, math.inf, "is seconds >= 0"),
    ("wait_max", 0, math.inf, "is seconds >= 0"),
    ("wait_exp_base", 1, math.inf, "must be at least 1"),
    ("wait_jitter", 0, 1, "is a share from 0 to 1"),
    ("timeout", 0, math.inf, "is seconds >= 0, or None"),
    ("breaker", 1e-9, 1, "is a share greater than 0 and at most 1, or None"),
)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How often a chunk is tried, and how long to wait in between.

    The words are those of the stamina library. Waiting is exponential with full jitter (Brooker,
    "Exponential backoff and jitter", 2015): a uniform draw between zero and
    ``min(wait_max, wait_initial * wait_exp_base ** (attempt - 1))`` seconds.

    Parameters
    ----------
    attempts : int
        Tries of one chunk in all, the first included.
    timeout : float or None
        No new try once so many seconds have gone since the chunk's first failure.
    wait_initial, wait_max : float
        Bounds of the wait, seconds.
    wait_exp_base : float
        Growth of the wait from one attempt to the next.
    wait_jitter : float
        Share of the wait that is drawn at random: 1 is full jitter, 0 none.
    corrupt_attempts : int
        Tries of a chunk that was read and can't be decoded: a truncated body heals by reading it
        again, a damaged file does not.
    on : exception class, tuple of these, or callable(error) -> bool, optional
        Errors of *your own functions* to try again, which otherwise count as final. Runs on the
        worker.
    budget : int or None
        Retries of the whole stream, all chunks together; past it failures are final.
    breaker : float or None
        The stream stops with one error once this share of the last hundred attempts has failed for
        reasons outside the chunks (network, store, credentials); None: never.
    worker_budget : int
        Workers that chunks under suspicion of killing them may cost before the stream stops.

    Raises
    ------
    UsageError
        If a number is out of range or `on` is of another kind.

    Examples
    --------
    >>> policy = RetryPolicy(attempts=3, wait_initial=1.0, wait_jitter=0.0)
    >>> failure = Failure(7, Category.TRANSIENT, "OSError", "reset")
    >>> policy.decide(failure, 1, 0.0, random.Random(0)), policy.decide(failure, 2, 0.0, random.Random(0))
    (RetryAfter(delay_s=1.0), RetryAfter(delay_s=2.0))
    >>> policy.decide(failure, 3, 0.0, random.Random(0))
    GiveUp(why='all 3 attempts failed')
    """

    attempts: int = 5
    timeout: float | None = None
    wait_initial: float = 0.1
    wait_max: float = 30.0
    wait_exp_base: float = 2.0
    wait_jitter: float = 1.0
    corrupt_attempts: int = 3
    on: type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool] | None = None
    budget: int | None = None
    breaker: float | None = 0.95
    worker_budget: int = 32

    def __post_init__(self) -> None:
        for name in ("attempts", "corrupt_attempts", "worker_budget"):
            value = getattr(self, name)
            count = as_whole(value)
            if count is None or count < 1:
                raise UsageError(f"RetryPolicy: {name} must be an integer of at least 1, got {value!r}")
            object.__setattr__(self, name, count)
        for name, least, most, what in _BOUNDS:
            number: Any = getattr(self, name)
            if number is None and name in ("timeout", "breaker"):
                continue
            real = as_real(number)
            if real is None or not least <= real <= most:
                raise UsageError(f"RetryPolicy: {name} {what}, got {number!r}")
            object.__setattr__(self, name, real)
        budget = as_whole(self.budget)
        if self.budget is not None and (budget is None or budget < 0):
            raise UsageError(f"RetryPolicy: budget is a number of retries >= 0, or None, got {self.budget!r}")
        object.__setattr__(self, "budget", budget)
        if not self._on_is_usable:
            raise UsageError(f"RetryPolicy: on must be exception classes or a predicate, got {self.on!r}")

    @property
    def _on_is_usable(self) -> bool:
        on: Any = self.on
        if isinstance(on, (type, tuple)):
            classes = on if isinstance(on, tuple) else (on,)
            return all(isinstance(one, type) and issubclass(one, BaseException) for one in classes)
        return on is None or callable(on)

    def wants(self, error: BaseException) -> bool:
        """Whether `on` names this error of a user's function as worth another try."""
        if self.on is None:
            return False
        if isinstance(self.on, (type, tuple)):
            return isinstance(error, self.on)
        return bool(self.on(error))

    def backoff(self, attempt: int, rng: random.Random) -> float:
        """Seconds to wait after failed `attempt` (1 for the first); never overflows."""
        exponent = min(attempt - 1, 1000 / max(math.log2(self.wait_exp_base), 1))
        wait = min(self.wait_max, self.wait_initial * self.wait_exp_base**exponent)
        return float(wait * (1 - self.wait_jitter * rng.random()))

    def decide(
        self, failure: Failure, attempt: int, elapsed_s: float, rng: random.Random, spent: int = 0
    ) -> RetryAfter | GiveUp:
        """Judge one failure.

        Parameters
        ----------
        failure : Failure
            What happened.
        attempt : int
            Which attempt failed, from 1.
        elapsed_s : float
            Seconds since the chunk's first failure.
        rng : random.Random
            Source of the jitter.
        spent : int
            Retries the stream has made so far.
        """
        final = self._final(failure)
        if final:
            return GiveUp(final)
        allowed = self.attempts
        if failure.category is Category.CORRUPT:
            allowed = min(allowed, self.corrupt_attempts)
        if attempt >= allowed:
            return GiveUp("the only attempt failed" if allowed == 1 else f"all {allowed} attempts failed")
        if self.budget is not None and spent >= self.budget:
            return GiveUp(f"the stream's budget of {self.budget} retries is spent")
        delay = self.backoff(attempt, rng)
        if self.timeout is not None and elapsed_s + delay > self.timeout:
            return GiveUp(f"retrying took longer than {self.timeout} s")
        return RetryAfter(delay)

    def _final(self, failure: Failure) -> str:
        if failure.category is Category.FUNCTION and not failure.retryable:
            return "errors of functions are final unless RetryPolicy(on=...) names them"
        if failure.category is Category.MISSING:
            return "a missing chunk does not come back"
        if failure.category is Category.PERMANENT and not failure.retryable:
            return "the error is permanent"
        return ""


_OUTSIDE = frozenset({Category.TRANSIENT, Category.THROTTLED, Category.TIMEOUT, Category.CREDENTIALS})


class Breaker:
    """Notices when nearly everything has failed for a while, for reasons that lie outside the chunks.

    Parameters
    ----------
    share : float or None
        Share of failures among recent attempts at which it opens; None: never.
    memory : int
        Attempts that count as recent.
    patience_s : float
        How long things have to go wrong: a burst of failures is what backoff is for.

    Examples
    --------
    >>> breaker = Breaker(0.9)
    >>> breaker.observe(good=5, failures=[], now=0.0)
    >>> breaker.observe(good=0, failures=[Category.TRANSIENT] * 100, now=2.0)
    >>> breaker.is_open(3.0), breaker.is_open(30.0)
    (False, True)
    """

    def __init__(self, share: float | None, *, memory: int = 100, patience_s: float = 10.0) -> None:
        self._share = share
        self._memory = memory
        self._patience_s = patience_s
        self._good = 0.0
        self._bad = 0.0
        self._wrong_since: float | None = None

    def observe(self, *, good: int, failures: Sequence[Category], now: float) -> None:
        """Add attempts; older ones fade as newer ones come."""
        bad = sum(category in _OUTSIDE for category in failures)
        old = self._good + self._bad
        keep = min(max(self._memory - good - bad, 0) / old, 1.0) if old else 0.0
        self._good = self._good * keep + good
        self._bad = self._bad * keep + bad
        if not self._too_many:
            self._wrong_since = None
        elif self._wrong_since is None:
            self._wrong_since = now

    @property
    def _too_many(self) -> bool:
        attempts = self._good + self._bad
        return self._share is not None and attempts >= self._memory - 1e-6 and self._bad >= self._share * attempts

    def is_open(self, now: float) -> bool:
        """Whether it is time to stop."""
        return self._wrong_since is not None and now - self._wrong_since >= self._patience_s
