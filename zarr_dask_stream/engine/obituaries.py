"""Which workers died: one subscription for each client, told on to all of its streams."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary, WeakSet

__all__ = ["Mourner", "Obituaries"]


class Mourner(Protocol):
    """Who wants to know."""

    def worker_removed(self, worker: str, keys: Container[str], *, expected: bool) -> None:
        """Hear that a worker is gone, and which tasks it had."""
        ...


class Obituaries:
    """Hears of workers that died, through one subscription for each client, and tells its streams.

    A client has one handler for each topic: an earlier one of the user's is still called.
    """

    _known: ClassVar[WeakKeyDictionary[Any, Obituaries]] = WeakKeyDictionary()

    def __init__(self, client: Any) -> None:
        self.listeners: WeakSet[Mourner] = WeakSet()
        self.earlier = client._event_handlers.get("all")  # noqa: SLF001  # there is no public way to ask
        client.subscribe_topic("all", self._hear)

    @classmethod
    def tell(cls, client: Any, listener: Mourner) -> None:
        """Begin to tell a stream; to be called on the client's event loop."""
        known = cls._known.get(client)
        if known is None:
            known = cls._known[client] = cls(client)
        known.listeners.add(listener)

    @classmethod
    def forget(cls, client: Any, listener: Mourner) -> None:
        """Tell a stream no longer; with the last one the subscription ends, as it would outlive the client."""
        known = cls._known.get(client)
        if known is None:
            return
        known.listeners.discard(listener)
        if not known.listeners:
            del cls._known[client]
            if known.earlier is not None:
                client.subscribe_topic("all", known.earlier)
            else:
                client.unsubscribe_topic("all")
                # Dask leaves the handler in place, and the next one would take it for the user's.
                client._event_handlers.pop("all", None)  # noqa: SLF001  # there is no public way

    def _hear(self, event: tuple[float, Any]) -> Any:
        message = event[1]
        if isinstance(message, dict) and message.get("action") == "remove-worker":
            keys = frozenset(message.get("processing-tasks") or ())
            for listener in list(self.listeners):
                listener.worker_removed(message["worker"], keys, expected=bool(message.get("expected")))
        return self.earlier(event) if self.earlier is not None else None
