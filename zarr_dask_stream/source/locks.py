"""Locks that a forked child gets open.

A child that is forked has only the thread that forked it. A lock that another thread of its parent held at that moment
stays shut for ever in the child, unless it is made anew there.
"""

import os
import threading
import weakref
from types import TracebackType

__all__ = ["ForkedLock"]


class ForkedLock:
    """A reentrant lock for what a module keeps.

    Nothing that it guards may be left half done for longer than a few instructions: the child goes on with it as it
    was.

    Examples
    --------
    >>> lock = ForkedLock()
    >>> with lock:
    ...     with lock:
    ...         pass
    """

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self.renew()
        _all.add(self)

    def renew(self) -> None:
        """Make the lock anew, held by nobody."""
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()


_all: weakref.WeakSet[ForkedLock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in _all:
        lock.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
