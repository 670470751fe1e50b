"""Which workers died, and of what: one set of subscriptions for each client, told on to all of its streams.

Dask tells a client that a worker is gone, but not why. A nanny knows: it sees the exit code of its worker, and it
is the one that ends a worker for its memory. The second it tells by itself. For the first it is asked to
(`Obituaries.attend`), which streams do for the workers to which they bind a suspect.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import Callable, Collection
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary, WeakSet

__all__ = ["BEGINNINGS", "Mourner", "Obituaries", "describe_exit"]

BEGINNINGS = "zds-suspect-begins"  # where suspects say that they are at work
_EXITS = "zds-worker-exit"  # what nannies say there is about a worker process that ended
_MEMORY = "worker-restart-memory"  # the same of workers that they ended for their memory; the name is Dask's
_INQUEST_S = 3.0  # how long a nanny may take to tell of what its worker died
_KEPT = 256  # causes of death to remember


class Mourner(Protocol):
    """Who wants to know."""

    def worker_added(self, worker: str) -> None:
        """Hear that a worker has joined."""
        ...

    def suspect_begun(self, key: str, worker: str) -> None:
        """Hear that a suspect, and not what was before it in the queue, is at work."""
        ...

    def worker_removed(self, worker: str, keys: Collection[Any], *, expected: bool) -> None:
        """Hear that a worker is gone, and which tasks it had."""
        ...


class Obituaries:
    """Hears of workers that died. All of it runs on the client's event loop.

    A client has one handler for each topic: an earlier one of the user's is still called.
    """

    _known: ClassVar[WeakKeyDictionary[Any, Obituaries]] = WeakKeyDictionary()

    def __init__(self, client: Any) -> None:
        self.mourners: WeakSet[Mourner] = WeakSet()
        self._causes: dict[str, str] = {}
        self._attended: dict[str, int | None] = {}  # workers whose nanny will tell, and their memory limits
        self._unattended: set[str] = set()
        self._news = asyncio.Event()
        self._connection = client.scheduler_comm
        self._handlers = {
            "all": self._hear,
            _MEMORY: self._hear_memory,
            _EXITS: self._hear_exit,
            BEGINNINGS: self._hear_beginning,
        }
        known = client._event_handlers  # noqa: SLF001  # there is no public way to ask
        self._earlier = {topic: known[topic] for topic in self._handlers if known.get(topic, _deaf) is not _deaf}
        self._subscribe(client)

    # -- coming and going ---------------------------------------------------------------------------

    @classmethod
    def tell(cls, client: Any, mourner: Mourner) -> Obituaries:
        """Begin to tell a stream."""
        known = cls._known.get(client)
        if known is None:
            known = cls._known[client] = cls(client)
        known.mourners.add(mourner)
        return known

    @classmethod
    def forget(cls, client: Any, mourner: Mourner) -> None:
        """Tell a stream no longer; with the last one the subscriptions end, as they would outlive the client."""
        known = cls._known.get(client)
        if known is None:
            return
        known.mourners.discard(mourner)
        if not known.mourners:
            del cls._known[client]
            known.end(client)

    def renew(self, client: Any) -> None:
        """Subscribe again where the client has connected anew: a scheduler that restarted knows of nobody."""
        if client.scheduler_comm is not self._connection:
            self._connection = client.scheduler_comm
            self._attended.clear()
            self._subscribe(client)

    def _subscribe(self, client: Any) -> None:
        for topic, hear in self._handlers.items():
            client.subscribe_topic(topic, functools.partial(self._pass_on, topic, hear))

    def end(self, client: Any) -> None:
        """Hear no more."""
        for topic in self._handlers:
            if topic in self._earlier:
                client.subscribe_topic(topic, self._earlier[topic])
            else:
                client.unsubscribe_topic(topic)
                # What is on its way still finds a handler, or Dask would complain of each.
                client._event_handlers[topic] = _deaf  # noqa: SLF001  # there is no public way

    def _pass_on(self, topic: str, hear: Callable[[Any], None], event: tuple[float, Any]) -> Any:
        if isinstance(event[1], dict):
            hear(event[1])
        earlier = self._earlier.get(topic)
        return None if earlier is None else earlier(event)

    # -- what is heard ------------------------------------------------------------------------------

    def _hear(self, message: dict[str, Any]) -> None:
        if message.get("action") == "add-worker":
            for mourner in list(self.mourners):
                mourner.worker_added(message["worker"])
        if message.get("action") != "remove-worker":
            return
        worker = message["worker"]
        if str(message.get("stimulus_id")).startswith("check-worker-ttl"):
            self._learn(worker, "it had not answered the scheduler for too long (does a function hold the GIL?)")
        keys = frozenset(message.get("processing-tasks") or ())
        for mourner in list(self.mourners):
            mourner.worker_removed(worker, keys, expected=bool(message.get("expected")))

    def _hear_memory(self, message: dict[str, Any]) -> None:
        limit = self._attended.get(str(message.get("worker")))
        used = f" at {_mib(message['rss'])}" if "rss" in message else ""
        bound = f" of {_mib(limit)}" if limit else ""
        self._learn(message.get("worker"), f"its nanny ended it{used}, too near to its memory limit{bound}")

    def _hear_exit(self, message: dict[str, Any]) -> None:
        self._learn(message.get("worker"), describe_exit(message.get("code")))

    def _hear_beginning(self, message: dict[str, Any]) -> None:
        for mourner in list(self.mourners):
            mourner.suspect_begun(message["key"], message["worker"])

    def _learn(self, worker: Any, cause: str) -> None:
        # The first is the cause: who is ended for his memory has an exit code too.
        self._causes.setdefault(str(worker), cause)
        while len(self._causes) > _KEPT:
            del self._causes[next(iter(self._causes))]
        self._news.set()

    # -- inquests -----------------------------------------------------------------------------------

    async def attend(self, client: Any, worker: str) -> None:
        """Ask the nanny of a worker to tell how it ends, where there is a nanny."""
        if worker in self._attended or worker in self._unattended:
            return
        with contextlib.suppress(Exception):  # it is no more than a better message
            question = client.run(_watch(_EXITS), workers=[worker], nanny=True, on_error="ignore")
            answers = await asyncio.wait_for(question, _INQUEST_S)
            if answers:
                self._attended[worker] = answers[worker]
            else:
                self._unattended.add(worker)

    async def cause(self, worker: str) -> str:
        """Say of what a worker died, "" where nobody knows; wait a little where somebody does."""
        deadline = asyncio.get_running_loop().time() + _INQUEST_S
        while worker not in self._causes and worker in self._attended:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                break
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), left)
        self._attended.pop(worker, None)
        return self._causes.get(worker, "")


def describe_exit(code: Any) -> str:
    """Put the exit code of a process into words.

    Examples
    --------
    >>> describe_exit(3), describe_exit(-11)
    ('its process exited with code 3', 'its process was killed by SIGSEGV')
    >>> describe_exit(-9)
    'its process was killed by SIGKILL, which is also what the system does when memory runs out'
    """
    if not isinstance(code, int) or code == 255:
        return ""  # what Dask says when it could not learn it
    if code >= 0:
        return f"its process exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", which is also what the system does when memory runs out" if name == "SIGKILL" else ""
    return f"its process was killed by {name}{hint}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


def _deaf(_: Any) -> None:
    """Stand where a handler was."""


def _watch(topic: str) -> Callable[..., int | None]:
    """Return a function for nannies, which answers with the memory limit of the worker.

    It travels by value, so that they need not import this package.
    """

    def watch(dask_worker: Any) -> int | None:
        limit: int | None = dask_worker.memory_manager.memory_limit
        process = dask_worker.process
        if process is None or getattr(process, "zds_watched", False):
            return limit
        told = process.on_exit

        def tell(code: Any) -> None:
            try:
                dask_worker.log_event(topic, {"worker": process.worker_address, "code": code})
            finally:
                if told is not None:
                    told(code)

        process.on_exit, process.zds_watched = tell, True
        return limit

    return watch
