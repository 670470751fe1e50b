"""The durable ledger: which chunks are done, so that a killed job goes on where it stopped.

A ledger is one JSON document at any fsspec URL. It holds a fingerprint of the plan, one bit for each
planned chunk (packed and deflated) and, for a reduction, the partials that those chunks were folded
into. It is replaced as a whole, so a reader finds the old state or the new one and never half of
each; chunks and partials are saved in the same stroke, so none is counted twice.

Nothing in a ledger is ever unpickled or evaluated: a partial is rebuilt from plain JSON values,
arrays from their bytes. A ledger belongs to one run at a time: a local one is held by a file lock
that dies with its process, any other by a name and a heartbeat in the document itself.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import socket
import stat
import types
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import filelock
import fsspec
import numpy as np
import numpy.typing as npt

from zarr_dask_stream.errors import LedgerInUseError, StoreError, UsageError
from zarr_dask_stream.scalars import as_real, as_whole
from zarr_dask_stream.source.secret import builtin_error, display_url, redact, secrets_in
from zarr_dask_stream.source.selection import ChunkPlan, encode_numbers

__all__ = ["Checkpoint", "Completed", "Ledger", "decode_value", "encode_value", "fingerprint", "identity"]

_FORMAT = "zarr_dask_stream ledger"
_VERSION = 1
_STALE_S = 90.0  # a heartbeat older than this belongs to a run that is no more
_PIECE = 65536


# -- which chunks are done ------------------------------------------------------------------------------


class Completed:
    """A set of planned chunks, one bit each.

    Examples
    --------
    >>> from zarr_dask_stream.source.grid import ChunkGrid
    >>> plan = ChunkPlan(ChunkGrid((9,), (1,)), (slice(2, 8),))
    >>> done = Completed(plan)
    >>> done.add([3, 4, 6]); len(done), 4 in done, 5 in done
    (3, True, False)
    >>> list(done.missing_from(plan.runs())), [piece.tolist() for piece in done.numbers()]
    ([range(2, 3), range(5, 8, 2)], [[3, 4, 6]])
    """

    def __init__(self, plan: ChunkPlan, bits: npt.NDArray[np.bool_] | None = None) -> None:
        self._plan = plan
        self._box = tuple(b - a for a, b in zip(plan.start, plan.stop, strict=True))
        self._bits = np.zeros(plan.box_size, np.bool_) if bits is None else bits
        self._count = int(np.count_nonzero(self._bits))

    def __len__(self) -> int:
        return self._count

    def __contains__(self, number: int) -> bool:
        return bool(self._bits[self._positions(np.array([number]))[0]])

    def add(self, numbers: Iterable[int]) -> None:
        """Mark chunks as done."""
        array = np.fromiter(numbers, np.int64)
        if not array.size:
            return
        positions = np.unique(self._positions(array))
        self._count += int(np.count_nonzero(~self._bits[positions]))
        self._bits[positions] = True

    def missing_from(self, runs: Iterable[range]) -> Iterator[range]:
        """Walk runs of planned numbers and leave out what is done."""
        for run in runs:
            if not run:
                yield run
            for at in range(0, len(run), _PIECE):
                piece = run[at : at + _PIECE]
                numbers = np.arange(piece.start, piece.stop, piece.step, dtype=np.int64)
                left = numbers[~self._bits[self._positions(numbers)]]
                if len(left) == len(piece):
                    yield piece
                else:
                    yield from encode_numbers(left.tolist())

    def _positions(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._plan.whole or not self._box:
            return numbers
        index = np.unravel_index(numbers, self._plan.grid.grid_shape)
        inside = tuple(i - a for i, a in zip(index, self._plan.start, strict=True))
        return np.asarray(np.ravel_multi_index(inside, self._box), dtype=np.int64)

    def numbers(self) -> Iterator[npt.NDArray[np.int64]]:
        """Walk the numbers of the chunks in ascending order, some at a time."""
        for at in range(0, len(self._bits), _PIECE):
            positions = np.flatnonzero(self._bits[at : at + _PIECE]) + at
            if positions.size:
                yield self._numbers_at(positions)

    def _numbers_at(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if self._plan.whole or not self._box:
            return positions
        inside = np.unravel_index(positions, self._box)
        index = tuple(i + a for i, a in zip(inside, self._plan.start, strict=True))
        return np.asarray(np.ravel_multi_index(index, self._plan.grid.grid_shape), dtype=np.int64)

    def pack(self) -> str:
        """Return the bits as text: packed eight to a byte, deflated, base64."""
        return base64.b64encode(zlib.compress(np.packbits(self._bits).tobytes(), 6)).decode("ascii")

    @classmethod
    def unpack(cls, plan: ChunkPlan, text: str) -> Completed:
        """Rebuild the set; raises StoreError where the text does not fit the plan."""
        expected = -(-plan.box_size // 8)
        try:
            inflate = zlib.decompressobj()
            raw = inflate.decompress(base64.b64decode(text, validate=True), expected + 1)
        except (binascii.Error, zlib.error, ValueError, TypeError) as error:
            raise StoreError(f"the ledger's list of finished chunks can't be read: {error}") from error
        if len(raw) != expected:
            raise StoreError(f"the ledger lists {len(raw)} bytes of finished chunks, the plan has {expected}")
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=plan.box_size).astype(np.bool_)
        return cls(plan, bits)


# -- values as plain JSON -------------------------------------------------------------------------------


def encode_value(value: Any) -> Any:
    """Turn a partial into plain JSON: numbers, text, lists, dicts, tuples, sets, bytes, NumPy values.

    Raises
    ------
    UsageError
        If it holds anything else; a ledger never contains pickles.

    Examples
    --------
    >>> decode_value(encode_value({(0, 1): [np.float32(1.5), float("nan")]}))
    {(0, 1): [np.float32(1.5), nan]}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode_array(value)
    if isinstance(value, int):
        return value if -(2**53) < value < 2**53 else {"int": str(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list):
        return [encode_value(one) for one in value]
    if type(value) in (tuple, set, frozenset):
        return {type(value).__name__: [encode_value(one) for one in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode_value(k), encode_value(v)] for k, v in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    raise UsageError(
        f"a checkpointed reduction keeps its partials as JSON, and {type(value).__name__} has no place there: "
        "use numbers, text, lists, tuples, dicts, sets, bytes and NumPy arrays"
    )


def _encode_array(value: np.ndarray[Any, Any] | np.generic) -> Any:
    array = np.asarray(value)
    if array.dtype.hasobject:
        raise UsageError(f"a checkpointed partial can't hold arrays of {array.dtype}")
    raw = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    kind = "scalar" if isinstance(value, np.generic) else "array"
    dtype = array.dtype.descr if array.dtype.names else array.dtype.str
    return {kind: [dtype, list(array.shape), raw]}


def decode_value(value: Any) -> Any:
    """Rebuild what `encode_value` wrote; raises StoreError for anything else."""
    if isinstance(value, list):
        return [decode_value(one) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise StoreError("the ledger holds a value of an unknown kind")
    ((kind, content),) = value.items()
    decode = _DECODERS.get(kind)
    if decode is None:
        raise StoreError(f"the ledger holds a value of an unknown kind: {_cut(kind)}")
    try:
        return decode(content)
    except _UNREADABLE as error:
        raise StoreError(f"the ledger holds a damaged value of kind {kind!r}: {_cut(error)}") from error


#: What is raised by the functions below for anything but what `encode_value` wrote.
_UNREADABLE = (
    ArithmeticError, AttributeError, binascii.Error, LookupError, MemoryError, RecursionError, SyntaxError, TypeError,
    ValueError,
)  # fmt: skip


def _cut(said: Any) -> str:
    """Return something out of a file as a piece of a sentence: it may be of any length."""
    text = str(said) if isinstance(said, Exception) else repr(said)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _checksum(document: Mapping[str, Any]) -> str:
    """Return a digest of what a ledger remembers; not of who holds it, and since when."""
    held = [document.get(part) for part in ("done", "partials", "notes")]
    return hashlib.blake2b(json.dumps(held).encode(), digest_size=16).hexdigest()


def _decode_array(content: Any) -> Any:
    dtype, shape, raw = content
    kind = np.dtype([tuple(one) for one in dtype] if isinstance(dtype, list) else str(dtype))
    if kind.hasobject:
        raise ValueError("arrays of objects are not read from a ledger")
    return np.frombuffer(base64.b64decode(raw, validate=True), kind).reshape(shape).copy()


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "float": float,
    "complex": lambda c: complex(float(c[0]), float(c[1])),
    "bytes": lambda c: base64.b64decode(c, validate=True),
    "tuple": lambda c: tuple(decode_value(one) for one in c),
    "set": lambda c: {decode_value(one) for one in c},
    "frozenset": lambda c: frozenset(decode_value(one) for one in c),
    "dict": lambda c: {decode_value(k): decode_value(v) for k, v in c},
    "array": _decode_array,
    "scalar": lambda c: _decode_array(c)[()],
}


# -- whose ledger it is -----------------------------------------------------------------------------------


def identity(part: Any, _within: tuple[int, ...] = ()) -> Any:
    """Describe a stage, function or reducer so that the same code gives the same description.

    Functions are told apart by module, name, byte code, constants and what they close over; objects
    by class and attributes. Plain data, to be hashed into a plan's fingerprint.
    """
    if part is None or isinstance(part, (bool, int, float, str, bytes, complex)):
        return repr(part)
    if id(part) in _within:
        return "itself"
    within = (*_within, id(part))
    if isinstance(part, types.FunctionType):
        cells = [_cell(cell, within) for cell in part.__closure__ or ()]
        defaults = identity(part.__defaults__, within)
        return [part.__module__, part.__qualname__, _code(part.__code__), cells, defaults]
    if isinstance(part, types.MethodType):
        return [identity(part.__func__, within), identity(part.__self__, within)]
    if isinstance(part, type):
        return [part.__module__, part.__qualname__]
    if isinstance(part, (np.ndarray, np.generic)):
        array = np.asarray(part)
        raw = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
        return [str(array.dtype), array.shape, hashlib.sha256(raw).hexdigest()]
    if isinstance(part, (list, tuple)):
        return [identity(one, within) for one in part]
    if isinstance(part, (set, frozenset)):
        return sorted(repr(identity(one, within)) for one in part)
    if isinstance(part, Mapping):
        return [[identity(k, within), identity(v, within)] for k, v in part.items()]
    name = [type(part).__module__, type(part).__qualname__]
    return [name, [[key, identity(value, within)] for key, value in _state(part).items()]]


def _state(part: Any) -> dict[str, Any]:
    """Return the attributes of an object, wherever it keeps them."""
    if isinstance(part, functools.partial):
        return {"func": part.func, "args": part.args, "keywords": part.keywords}
    slots = [s for kind in type(part).__mro__ for s in getattr(kind, "__slots__", ()) if hasattr(part, s)]
    own = {**getattr(part, "__dict__", {}), **{slot: getattr(part, slot) for slot in slots}}
    # What it has worked out meanwhile and kept does not make it another one.
    return {k: v for k, v in own.items() if not isinstance(getattr(type(part), k, None), functools.cached_property)}


def _cell(cell: Any, within: tuple[int, ...]) -> Any:
    try:
        return identity(cell.cell_contents, within)
    except ValueError:
        return "empty"


def _code(code: types.CodeType) -> Any:
    constants = [_code(c) if isinstance(c, types.CodeType) else identity(c) for c in code.co_consts]
    return [hashlib.sha256(code.co_code).hexdigest(), list(code.co_names), constants]


# -- the document -----------------------------------------------------------------------------------------


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
        return hashlib.blake2b(os.fspath(self.url).encode(), digest_size=6).hexdigest()

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
        return self._call(lambda: bytes(self._fs.cat_file(self._path)), "reading")

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
                f"{url} is a ledger of version {_cut(document.get('version'))}, this package reads version {_VERSION}"
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
        said = [f"{name} was {_cut(about.get(name))} and is {self._about[name]!r}" for name in names]
        return "; ".join(said) or "its functions were others"

    def _check_owner(self, document: dict[str, Any], wall_s: float) -> None:
        owner = document.get("owner")
        if self._place.exclusive or not owner or owner == self._owner:
            return
        beat = document.get("heartbeat")
        fresh = isinstance(beat, (int, float)) and beat > wall_s - _STALE_S
        if fresh and not _is_dead(str(owner)):
            raise LedgerInUseError(
                f"another run ({_cut(owner)}) is using the ledger {self._checkpoint.shown}: wait for it, or give this "
                f"run a ledger of its own. If that run was killed, its hold ends {_STALE_S:.0f} s after its last save"
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


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Digest of what makes a stream: array, region, predicate, stages."""
    text = json.dumps(identity(dict(parts)), sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()
