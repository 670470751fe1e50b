"""What failures have in common: the same error, the same message but for what differs from chunk to chunk."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Cause", "normalised"]

_MOST_NAMED = 32  # workers named with a cause
_LONGEST = 240


@dataclass(slots=True)
class Cause:
    """Failures of one kind: the same error, the same message but for numbers and names in it.

    Attributes
    ----------
    error_type, message : str
        Class of the error, and its message with `#` for numbers and `...` for what is quoted.
    category : str
        Kind of failure, as retries are decided by.
    tries, dead : int
        Failed attempts that were followed by another; chunks that were given up.
    first_s, last_s : float
        When it was seen first and last, seconds since the run began.
    sample : tuple of int
        Grid index of a chunk that failed so, as an example.
    sample_message : str
        What its error said in full.
    workers : dict of str to int
        Failures by worker, of as many workers as are kept.
    """

    error_type: str
    message: str
    category: str = ""
    tries: int = 0
    dead: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    sample: tuple[int, ...] = ()
    sample_message: str = ""
    workers: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: tuple[str, str], message: str, category: str, at: float) -> Cause:
        """Begin a cause with the first failure of its kind: class of the error and message without what differs."""
        return cls(*kind, category=category, first_s=at, sample_message=message[: 2 * _LONGEST])

    def blame(self, worker: str) -> None:
        """Count a failure there, where the worker is one of those that are kept."""
        if worker in self.workers or len(self.workers) < _MOST_NAMED:
            self.workers[worker] = self.workers.get(worker, 0) + 1

    @property
    def count(self) -> int:
        """Attempts that failed."""
        return self.tries + self.dead

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "error_type": self.error_type,
            "message": self.message,
            "category": self.category,
            "tries": self.tries,
            "dead": self.dead,
            "first_s": self.first_s,
            "last_s": self.last_s,
            "sample": list(self.sample),
            "sample_message": self.sample_message,
            "workers": dict(self.workers),
        }


_QUOTED = re.compile(r"""(?<!\w)(?:'[^']*'|"[^"]*"|`[^`]*`)""")
_URL = re.compile(r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{0,15}://[^\s,;)\]}]*[^\s,;:.)\]}]", re.IGNORECASE)
_PATH = re.compile(r"(?<![\w.])(?:/[^\s/:,;'\"()]+){2,}")
_HEX = re.compile(r"\b(?:0x[0-9a-f]+|(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{6,})\b", re.IGNORECASE)
_NUMBER = re.compile(r"(?<!\w)[-+]?\d[\d_,]*(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)
_ROW = re.compile(r"#(?:[\s,/:.x-]*#)+")


def normalised(message: str) -> str:
    """Return a message without what differs from one failure of a kind to the next.

    Examples
    --------
    >>> normalised("chunk (3, 17): got 40 bytes, expected 65536")
    'chunk (#): got # bytes, expected #'
    >>> normalised("can't open '/data/c/1/2' at 0x7f32ac10")
    "can't open '...' at #"
    """
    text = " ".join(message[: 4 * _LONGEST].split())
    text = _QUOTED.sub(lambda match: f"{match[0][0]}...{match[0][0]}", text)
    text = _URL.sub("...", text)
    text = _PATH.sub("...", text)
    text = _HEX.sub("#", text)
    text = _NUMBER.sub("#", text)
    text = _ROW.sub("#", text)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
