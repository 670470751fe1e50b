"""The durable ledger: which chunks are done, so that a killed job goes on where it stopped.

A ledger is one JSON document at any fsspec URL. It holds a fingerprint of the plan, one bit for each
planned chunk (packed and deflated) and, for a reduction, the partials that those chunks were folded
into. It is replaced as a whole, so a reader finds the old state or the new one and never half of
each; chunks and partials are saved in the same stroke, so none is counted twice.

Nothing in a ledger is ever unpickled or evaluated. A ledger belongs to one run at a time: a local one is held by a
file lock that dies with its process, any other by a name and a heartbeat in the document itself.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import stat
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import filelock
import fsspec

from zarr_dask_stream.engine.completed import Completed
from zarr_dask_stream.engine.partials import decode_value, encode_value, shortened
from zarr_dask_stream.errors import LedgerInUseError, StoreError, UsageError
from zarr_dask_stream.scalars import as_real, as_whole
from zarr_dask_stream.source.secret import builtin_error, digest, display_url, redact, secrets_in
from zarr_dask_stream.source.selection import ChunkPlan

__all__ = ["Checkpoint", "Ledger"]

_FORMAT = "zarr_dask_stream ledger"
_VERSION = 1
_STALE_S = 90.0  # a heartbeat older than this belongs to a run that is no more


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where and how often to save.

    Parameters
    ----------
    url : str or path
        Where the ledger is: a local path or any URL that fsspec writes to.
    every_chunks : int
        Save after so many more chunks are done, at the latest.
    every_s : float
        Save after so many seconds, at the latest.
    storage_options : mapping, optional
        Options for the file system of the URL.

    Examples
    --------
    >>> import tempfile, zarr
    >>> import zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i4")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ledger = Checkpoint(url=f"{folder}/job.ledger", every_s=1.0)
    ...     first = zds.stream_chunks(array, concurrency=1, checkpoint=ledger).run()
    ...     again = zds.stream_chunks(array, concurrency=1, checkpoint=ledger).run()
    >>> first.emitted, again.emitted, again.resumed
    (3, 0, 3)
    """

    url: str | os.PathLike[str] = field(repr=False)
    every_chunks: int = 100_000
    every_s: float = 5.0
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"Checkpoint(url={self.shown!r}, every_chunks={self.every_chunks!r}, every_s={self.every_s!r})"

    @property
    def shown(self) -> str:
        """The URL without credentials."""
        return display_url(os.fspath(self.url))

    @property
    def token(self) -> str:
        """A short name that is the same for the same place."""
        # It names folders that others see: no password may be guessed from it.
        url = os.fspath(self.url)
        return digest(f"ledger:{self.shown}".encode(), b"" if url == self.shown else url.encode())[:12]

    def __post_init__(self) -> None:
        # Callers need not be typed.
        if not isinstance(self.url, (str, os.PathLike)) or not os.fspath(self.url):  # type: ignore[redundant-expr]
            raise UsageError(f"checkpoint is the URL or path of a ledger, got {self.url!r}")
        try:
            _ = self.shown
        except ValueError as error:
            raise UsageError(f"checkpoint is the URL or path of a ledger, got a senseless URL: {error}") from None
        if (as_whole(self.every_chunks) or 0) < 1 or (as_real(self.every_s) or 0.0) <= 0:
            raise UsageError(
                "checkpoint: every_chunks is a number of chunks and every_s of seconds, both greater than 0, got "
                f"{self.every_chunks!r} and {self.every_s!r}"
            )
        if not isinstance(self.storage_options, Mapping):
            raise UsageError(f"checkpoint: storage_options is a mapping, got a {type(self.storage_options).__name__}")


class _Place(Protocol):
    """Where the document lies."""

    def hold(self) -> None: ...
    def read(self) -> bytes | None: ...
    def write(self, document: bytes) -> None: ...
    def release(self) -> None: ...


class _LocalPlace:
    """A file, replaced by rename; held by a lock that the kernel drops when the process dies."""

    exclusive = True

    def __init__(self, path: Path) -> None:
        self._path = path
        # The lock's file stays: removing it would let two later runs lock two different files.
        # Held by the run, not by one of the threads that share it.
        self._lock = filelock.FileLock(f"{path}.lock", blocking=False, thread_local=False)

    def hold(self) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if Path(f"{self._path}.lock").is_symlink():  # older file locks follow it, and empty what they find
                raise StoreError(f"the ledger {self._path} can't be used: its lock is a link; remove {self._path}.lock")
            self._lock.acquire()
        except filelock.Timeout:
            raise LedgerInUseError(
                f"another run is using the ledger {self._path}: wait for it, or give this run a ledger of its own"
            ) from None
        except OSError as error:
            raise StoreError(f"the ledger {self._path} can't be used: {error}") from error

    def read(self) -> bytes | None:
        try:
            # A pipe would wait for somebody who writes, and a device may have no end.
            fd = os.open(self._path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"the ledger {self._path} can't be read: {error}") from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise StoreError(
                    f"the ledger {self._path} can't be read: it is not a file; choose another place for it"
                )
            with os.fdopen(fd, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(fd)

    def write(self, document: bytes) -> None:
        # Always the same name, as whoever holds the lock writes alone: what a killed run leaves, the next one uses up.
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            # Made anew: what lies there may be a link that somebody else has left, to a file that is not theirs.
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:
                file.write(document)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def release(self) -> None:
        self._lock.release()


class _RemotePlace:
    """An object of a file system that replaces objects as a whole, as object stores do."""

    exclusive = False

    def __init__(self, url: str, storage_options: Mapping[str, Any]) -> None:
        self._url, self._secrets = display_url(url), secrets_in(url, storage_options)
        self._fs, self._path = fsspec.core.url_to_fs(url, **storage_options)

    def hold(self) -> None:
        """Nothing to hold: the owner's name is in the document."""

    def read(self) -> bytes | None:
        self._fs.invalidate_cache()
        raw: bytes | None = self._call(lambda: bytes(self._fs.cat_file(self._path)), "reading")
        return raw

    def write(self, document: bytes) -> None:
        self._call(lambda: self._fs.pipe_file(self._path, document), "writing")

    def _call(self, work: Callable[[], Any], what: str) -> Any:
        """Do something with the file system, whose errors may show all that it was opened with."""
        problem: OSError
        try:
            return work()
        except FileNotFoundError:
            if what == "reading":
                return None
            problem = OSError(errno.ENOENT, f"{what} {self._url}: there is no such place")
        except Exception as error:  # noqa: BLE001  # client libraries raise anything
            problem = builtin_error(error, f"{what} {self._url}", self._secrets)
        raise problem  # outside the handler: no context, which could hold credentials

    def release(self) -> None:
        """Nothing is held."""


class Ledger:
    """One run's hold on its ledger.

    Parameters
    ----------
    checkpoint : Checkpoint
        Where and how often.
    plan : ChunkPlan
        The planned chunks.
    fingerprint : str
        Digest of all that makes this stream what it is; a ledger with another one is refused.
    about : mapping
        Plain words for whoever reads the document: array, region and so on.

    Attributes
    ----------
    done : Completed
        The chunks that are done.
    partials, notes : dict
        What is saved with them: partials of a reduction, and what a run tells the one that goes on after it.
    """

    def __init__(self, checkpoint: Checkpoint, plan: ChunkPlan, fingerprint: str, about: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._fingerprint = fingerprint
        self._about = dict(about)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._place: Any = _place(checkpoint)
        self._saved_at = 0.0
        self._saved_count = 0
        self.done = Completed(plan)
        self.partials: dict[Any, Any] = {}
        self.notes: dict[str, str] = {}

    def open(self, now: float, wall_s: float) -> None:
        """Take hold of the ledger and read what an earlier run left.

        Parameters
        ----------
        now, wall_s : float
            Seconds on the run's clock; seconds since 1970, for the heartbeat.

        Raises
        ------
        UsageError
            If another run holds it, or it belongs to another stream.
        StoreError
            If it can't be read.
        """
        self._place.hold()
        try:
            raw = self._read()
            if raw is not None:
                self._load(raw, wall_s)
            self.save(now, wall_s)
        except BaseException:
            self._place.release()
            raise

    def _read(self) -> bytes | None:
        try:
            raw: bytes | None = self._place.read()
        except OSError as error:
            raise StoreError(f"the ledger {self._checkpoint.shown} can't be read: {error}") from error
        return raw

    def _load(self, raw: bytes, wall_s: float) -> None:
        url = self._checkpoint.shown
        try:
            document = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{url} is not a ledger: it is not JSON ({error})") from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise StoreError(f"{url} is not a ledger of zarr_dask_stream; choose another place for the checkpoint")
        if document.get("version") != _VERSION:
            raise StoreError(
                f"{url} is a ledger of version {shortened(document.get('version'))}, "
                f"this package reads version {_VERSION}"
            )
        if document.get("fingerprint") != self._fingerprint:
            raise UsageError(
                f"the ledger {url} belongs to another stream: {self._differences(document.get('about'))}. "
                "Start again with the array, options and stages it was made with, or give this stream a new ledger"
            )
        self._check_owner(document, wall_s)
        self.done = Completed.unpack(self._plan, document.get("done", ""))
        partials = decode_value(document.get("partials", {"dict": []}))
        self.partials = partials if isinstance(partials, dict) else {}
        notes = document.get("notes")
        self.notes = {str(k): str(v) for k, v in notes.items()} if isinstance(notes, dict) else {}
        if document.get("checksum") != _checksum(document):
            raise StoreError(
                f"the ledger {url} is damaged: what it holds does not fit its checksum. Bring back a copy of it, or "
                "begin again with a new one"
            )

    def _differences(self, about: Any) -> str:
        if not isinstance(about, dict):
            return "it does not say which"
        names = [name for name, value in self._about.items() if about.get(name) != value]
        said = [f"{name} was {shortened(about.get(name))} and is {self._about[name]!r}" for name in names]
        return "; ".join(said) or "its functions were others"

    def _check_owner(self, document: dict[str, Any], wall_s: float) -> None:
        owner = document.get("owner")
        if self._place.exclusive or not owner or owner == self._owner:
            return
        beat = document.get("heartbeat")
        fresh = isinstance(beat, (int, float)) and beat > wall_s - _STALE_S
        if fresh and not _is_dead(str(owner)):
            raise LedgerInUseError(
                f"another run ({shortened(owner)}) is using the ledger {self._checkpoint.shown}: wait for it, or give "
                f"this run a ledger of its own. If that run was killed, its hold ends {_STALE_S:.0f} s after its last "
                "save"
            )

    def acknowledge(self, numbers: Iterable[int]) -> None:
        """Mark chunks as done; they are saved with the next `save`."""
        self.done.add(numbers)

    def due(self, now: float, pending: int = 0) -> bool:
        """Whether it is time to save, with `pending` chunks done and not acknowledged yet."""
        if now - self._saved_at >= self._checkpoint.every_s:
            return True
        return len(self.done) + pending - self._saved_count >= self._checkpoint.every_chunks

    def save(self, now: float, wall_s: float, *, release: bool = False) -> None:
        """Write the document; the one before it stays until this one is whole.

        Raises
        ------
        StoreError
            If it can't be written (disk full, no permission): the ledger before it is untouched.
        UsageError
            If another run has taken the ledger over.
        """
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "about": self._about,
            "fingerprint": self._fingerprint,
            "owner": None if release else self._owner,
            "heartbeat": wall_s,
            "chunks": self._plan.box_size,
            "finished": len(self.done),
            "done": self.done.pack(),
            "partials": encode_value(self.partials),
            **({"notes": self.notes} if self.notes else {}),
        }
        document["checksum"] = _checksum(document)
        try:
            if not self._place.exclusive and self._saved_at:
                self._check_taken(wall_s)
            self._place.write(json.dumps(document, separators=(",", ":")).encode())
        except OSError as error:
            raise StoreError(
                f"the ledger {self._checkpoint.shown} can't be written: {error}. What was saved before is intact"
            ) from error
        self._saved_at = now
        self._saved_count = len(self.done)

    def _check_taken(self, wall_s: float) -> None:
        raw = self._place.read()
        if raw is not None:
            with contextlib.suppress(ValueError, RecursionError):
                document = json.loads(raw)
                if isinstance(document, dict):
                    self._check_owner(document, wall_s)

    def close(self, now: float, wall_s: float) -> None:
        """Save a last time and let go."""
        try:
            self.save(now, wall_s, release=True)
        finally:
            self._place.release()


def _checksum(document: Mapping[str, Any]) -> str:
    """Return a digest of what a ledger remembers; not of who holds it, and since when."""
    held = [document.get(part) for part in ("done", "partials", "notes")]
    return hashlib.blake2b(json.dumps(held).encode(), digest_size=16).hexdigest()


def _place(checkpoint: Checkpoint) -> _Place:
    url = os.fspath(checkpoint.url)
    if url.startswith("file://"):
        return _LocalPlace(Path(unquote(urlsplit(url).path)))
    if "://" not in url and "::" not in url:
        return _LocalPlace(Path(os.path.expanduser(url)))  # noqa: PTH111  # where there is no home, pathlib raises
    secrets = secrets_in(url, checkpoint.storage_options)
    problem: Exception
    try:
        return _RemotePlace(url, checkpoint.storage_options)
    except (ImportError, ValueError) as error:
        problem = UsageError(f"checkpoint: {redact(str(error), secrets)}")
    except Exception as error:  # noqa: BLE001  # client libraries raise anything; some connect at once
        shown = f"opening {checkpoint.shown}"
        problem = StoreError(f"the ledger can't be used: {builtin_error(error, shown, secrets)}")
    raise problem  # outside the handler: no context, which could hold credentials


def _is_dead(owner: str) -> bool:
    """Whether an owner on this host has certainly gone."""
    host, pid, *_ = [*owner.split(":"), "", ""]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
