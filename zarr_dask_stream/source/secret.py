"""Keeping credentials out of sight: display forms of URLs, sealed values, redacted errors.

What leaves `source/` as text (a repr, a log line, an error, a graph key) has been through here.
Errors of client libraries are rebuilt as builtin OSErrors: those pickle, can be classified by type
and errno, and carry no request object with an ``Authorization`` header inside.
"""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit, urlunsplit

__all__ = ["Sealed", "builtin_error", "digest", "display_url", "redact", "secrets_in", "service_code"]

_HIDDEN = "***"
# Option names whose values are no secret, so that they may stay readable in error messages.
_HARMLESS = frozenset({
    "account_name", "addressing_style", "allow_http", "anon", "asynchronous", "aws_region", "bucket",
    "bucket_name", "cache_storage", "container_name", "default_block_size", "default_cache_type",
    "endpoint", "endpoint_url", "fo", "host", "path", "port", "project", "protocol", "region",
    "region_name", "remote_protocol", "scheme", "signature_version", "skip_signature",
    "target_protocol", "use_ssl", "username", "virtual_hosted_style_request",
})  # fmt: skip
_USERINFO = re.compile(r"(?<=://)[^/@\s'\"]+@")
_STATUS = re.compile(r"\bstatus(?: code)?:? (\d{3})\b")
_TIMED_OUT = re.compile(r"\btime(?:d )?out\b", re.IGNORECASE)
# What S3 answers with instead of an object; obstore quotes it whole.
_DOCUMENT = re.compile(r"<Error>.*?<Code>(\w+)</Code>.*?<Message>(.*?)</Message>", re.DOTALL)
# Codes that mean "not with these credentials", whatever HTTP status they come with.
_REFUSED = frozenset({
    "AccessDenied", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "InvalidToken", "RequestExpired",
    "SignatureDoesNotMatch", "TokenRefreshRequired",
})  # fmt: skip
_DEBUG = "\n\nDebug source:"  # obstore's inner structures follow: nothing for people, and words that mean nothing
_QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\")>]*")


class Sealed:
    """A value that travels by pickle and never shows itself.

    Examples
    --------
    >>> Sealed({"key": "AKIA"})
    <sealed>
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "<sealed>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Sealed, (self.value,)


def display_url(url: str) -> str:
    """Return `url` without user information, query and fragment.

    Examples
    --------
    >>> display_url("https://me:pw@host/data.zarr?X-Amz-Signature=abc")
    'https://host/data.zarr'
    """
    if "://" not in url:
        return url
    chain, separator, last = url.rpartition("::")
    parts = urlsplit(last)
    netloc = parts.netloc.rpartition("@")[2]
    if parts.scheme not in {"http", "https"}:
        # A '?' or '#' is an ordinary character in the keys of an object store.
        return f"{chain}{separator}{_USERINFO.sub('', last)}"
    return f"{chain}{separator}{urlunsplit((parts.scheme, netloc, parts.path, '', ''))}"


def secrets_in(url: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Collect what must not be shown: the longest first, so that no part of one survives."""
    found = set(_option_secrets(options, secret=False))
    if "://" in url:
        parts = urlsplit(url.rpartition("::")[2])
        found.update(piece for piece in (parts.username, parts.password) if piece)
        if parts.scheme in {"http", "https"} and parts.query:
            found.add(parts.query)
            found.update(pair.partition("=")[2] for pair in parts.query.split("&"))
    return tuple(sorted((text for text in found if len(text) >= 3), key=lambda text: (-len(text), text)))


def _option_secrets(value: Any, *, secret: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            nested = isinstance(item, Mapping | list | tuple)
            yield from _option_secrets(item, secret=not nested and str(name) not in _HARMLESS)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _option_secrets(item, secret=True)
    elif isinstance(value, bytes):
        yield value.decode("latin-1")
    elif isinstance(value, str):
        if secret:
            yield value
        elif "://" in value:
            yield from (p for p in (urlsplit(value).username, urlsplit(value).password) if p)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """Blank out `secrets`, user information and query strings of URLs in `text`.

    Examples
    --------
    >>> redact("GET https://u:pw@host/a?sig=1 with AKIA", ["AKIA"])
    'GET https://***@host/a?*** with ***'
    """
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return _QUERY.sub(rf"\1?{_HIDDEN}", _USERINFO.sub(f"{_HIDDEN}@", text))


@lru_cache(maxsize=256)
def digest(public: bytes, private: bytes = b"") -> str:
    """Return a short stable digest; `private` goes through a slow hash, so that guessing it is slow too."""
    if private:
        private = hashlib.pbkdf2_hmac("sha256", private, public, 20_000)
    return hashlib.blake2b(public + private, digest_size=12).hexdigest()


def builtin_error(error: BaseException, what: str, secrets: Iterable[str]) -> OSError:
    """Rebuild any error of a storage client as the nearest builtin OSError, without secrets.

    Parameters
    ----------
    error : BaseException
        What the client library raised.
    what : str
        What was tried, to begin the message with ("reading zarr.json of s3://bucket/a").
    secrets : iterable of str
        Texts to blank out.

    Returns
    -------
    OSError
        PermissionError, TimeoutError, ConnectionError or a plain OSError with an errno that tells
        transient (EBUSY, EREMOTEIO, ECONNRESET) from permanent. It has no cause and no context.
    """
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # fsspec says "not found" for whatever happened, and hides that here
    code = service_code(error)
    said = str(error).partition(_DEBUG)[0]
    document = _DOCUMENT.search(said) if code is None else None
    told = said if document is None else document[2]
    code = code if document is None else document[1]
    name = type(error).__name__ if code is None else f"{type(error).__name__} {code}"
    text = redact(f"{what}: {name}: {told}", secrets)
    if code in _REFUSED:
        return PermissionError(errno.EACCES, text)
    for kind, number in (
        (TimeoutError, errno.ETIMEDOUT),
        (PermissionError, errno.EACCES),
        (FileNotFoundError, errno.ENOENT),
        (ConnectionResetError, errno.ECONNRESET),
        (ConnectionRefusedError, errno.ECONNREFUSED),
    ):
        if isinstance(error, kind):
            return kind(number, text)
    if isinstance(error, OSError) and error.errno is not None:
        # OSError picks its own subclass from the number where there is one.
        return OSError(error.errno, text)
    return _from_status(_status(error, said), said, type(error), text)


def service_code(error: BaseException) -> str | None:
    """Return the code that an AWS-like service gave for an error, such as ``NoSuchKey``."""
    for link in (error, error.__cause__):
        response = getattr(link, "response", None)
        if isinstance(response, Mapping):
            code = response.get("Error", {}).get("Code")
            return None if code is None else str(code)
    return None


def _status(error: BaseException, said: str) -> int | None:
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int):
            return value
    # Only where it is named so: ports, sizes and durations have the same digits.
    match = _STATUS.search(said)
    return None if match is None else int(match[1])


def _from_status(status: int | None, message: str, kind: type, text: str) -> OSError:
    names = " ".join(base.__name__ for base in kind.__mro__)
    if status in {401, 403} or "PermissionDenied" in names or "Unauthenticated" in names:
        return PermissionError(errno.EACCES, text)
    if status == 416 or "InvalidRange" in message:
        return OSError(errno.EINVAL, text)
    if status in {429, 503} or "SlowDown" in message:
        return OSError(errno.EBUSY, text)
    if status == 408 or "Timeout" in names or _TIMED_OUT.search(message):
        return TimeoutError(errno.ETIMEDOUT, text)
    if "Payload" in names or "Disconnected" in names or "Connection" in names or "IncompleteRead" in names:
        return ConnectionResetError(errno.ECONNRESET, text)
    if (status is not None and status >= 500) or "Generic" in names:
        return OSError(errno.EREMOTEIO, text)
    return OSError(errno.EIO, text)
