"""A slow road to a server: every request is held back for a while, some of them for long, in a process of its own.

It passes bytes on and looks into them as little as it can, because on a small machine what it costs is taken from those
who are measured: where a request ends, where its answer ends, and nothing else.
"""

import asyncio
import multiprocessing
import random
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import urlsplit

_SPAWN = multiprocessing.get_context("spawn")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


@dataclass(frozen=True)
class Delays:
    """What happens to requests: all wait for `latency_s`, and one of `hang_every` for `hang_s` more."""

    latency_s: float
    hang_every: int = 0
    hang_s: float = 0.0


@dataclass
class Traffic:
    """What went over the road since it was last asked."""

    requests: int = 0
    hung: int = 0
    peak: int = 0
    in_flight: int = 0
    #: Requests in flight, summed over time: over the seconds of it, the number that was usual.
    area: float = 0.0
    changed_at: float = 0.0

    def change(self, by: int, now: float) -> None:
        """Note that a request came or was answered."""
        self.area += self.in_flight * (now - self.changed_at)
        self.changed_at = now
        self.in_flight += by
        self.peak = max(self.peak, self.in_flight)

    def taken(self) -> dict[str, float]:
        """Return the figures and begin anew."""
        mean_s = self.area / self.requests if self.requests else 0.0
        found = {"requests": self.requests, "hung": self.hung, "peak_requests": self.peak, "answer_s": mean_s}
        self.requests = self.hung = 0
        self.peak, self.area = self.in_flight, 0.0
        return found


class _Road:
    """What the conversations share."""

    def __init__(self, upstream: tuple[str, int], delays: Delays) -> None:
        self.upstream = upstream
        self.delays = delays
        self.traffic = Traffic()
        self.loop = asyncio.get_running_loop()
        self._rng = random.Random(0)
        self._left, self._unlucky = 0, -1

    def delay_s(self) -> float:
        """Return for how long the next request is held back: exactly one of so many is unlucky, nobody knows which."""
        delays = self.delays
        if not delays.hang_every:
            return delays.latency_s
        if not self._left:
            self._left, self._unlucky = delays.hang_every, self._rng.randrange(delays.hang_every)
        self._left -= 1
        if self._left != self._unlucky:
            return delays.latency_s
        self.traffic.hung += 1
        return delays.latency_s + delays.hang_s


class _Server(asyncio.Protocol):
    """The side that looks at the server: answers go to the client as they come."""

    def __init__(self, client: "_Client") -> None:
        self._client = client
        self._left = 0
        self._head = b""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._client.connected(transport)

    def data_received(self, data: bytes) -> None:
        self._client.transport.write(data)
        if self._left:
            self._left -= len(data)
        else:
            self._head += data
            end = self._head.find(_HEAD_END)
            if end < 0:
                return
            length = _LENGTH.search(self._head, 0, end + 2)
            size = int(length[1]) if length and not self._client.bodiless else 0
            self._left = size - (len(self._head) - end - 4)
            self._head = b""
        if self._left <= 0:
            self._left = 0
            self._client.answered()

    def pause_writing(self) -> None:
        self._client.transport.pause_reading()

    def resume_writing(self) -> None:
        self._client.transport.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        self._client.transport.close()


class _Client(asyncio.Protocol):
    """The side that looks at the client: whole requests are held back, then sent."""

    transport: asyncio.Transport

    def __init__(self, road: _Road) -> None:
        self._road = road
        self._server: asyncio.Transport | None = None
        self._connecting: asyncio.Task[Any] | None = None
        self._pending: list[bytes] = []
        self._head = b""
        self._busy = False
        self.bodiless = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        host, port = self._road.upstream
        self._connecting = self._road.loop.create_task(
            self._road.loop.create_connection(lambda: _Server(self), host, port)
        )

    def connected(self, server: asyncio.Transport) -> None:
        self._server = server
        for data in self._pending:
            server.write(data)
        self._pending.clear()

    def data_received(self, data: bytes) -> None:
        # Requests that are measured have no body, and a connection has one request at a time.
        self._head += data
        if not self._head.endswith(_HEAD_END):
            return
        request, self._head = self._head, b""
        self._busy = True
        self.bodiless = request.startswith(b"HEAD ")
        road = self._road
        road.traffic.requests += 1
        road.traffic.change(+1, road.loop.time())
        road.loop.call_later(road.delay_s(), self._send, request)

    def _send(self, request: bytes) -> None:
        if self._server is None:
            self._pending.append(request)
        else:
            self._server.write(request)

    def answered(self) -> None:
        if self._busy:
            self._busy = False
            self._road.traffic.change(-1, self._road.loop.time())

    def pause_writing(self) -> None:
        if self._server is not None:
            self._server.pause_reading()

    def resume_writing(self) -> None:
        if self._server is not None:
            self._server.resume_reading()

    def connection_lost(self, _: Exception | None) -> None:
        self.answered()  # by hanging up, which is an answer too
        if self._server is not None:
            self._server.close()


class SlowRoad:
    """A road in front of a server; `url` is the address to use in place of the server's."""

    def __init__(self, upstream: str, delays: Delays) -> None:
        self._pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(upstream, delays, theirs), daemon=True)
        self._process.start()
        self.url = str(self._pipe.recv())

    @property
    def pid(self) -> int:
        """The process, for those who want to know what it costs."""
        assert self._process.pid is not None
        return self._process.pid

    def set(self, delays: Delays) -> None:
        """Hold requests back like this from now on."""
        self._ask(delays)

    def take_traffic(self) -> dict[str, float]:
        """Return what went over the road since the last time: requests, the most at once, seconds to an answer."""
        traffic: dict[str, float] = self._ask("traffic")
        return traffic

    def _ask(self, question: Any) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(10)


def _serve(upstream: str, delays: Delays, pipe: "Connection[Any, Any]") -> None:
    asyncio.run(_main(upstream, delays, pipe))


async def _main(upstream: str, delays: Delays, pipe: "Connection[Any, Any]") -> None:
    parts = urlsplit(upstream)
    road = _Road((parts.hostname or "", parts.port or 80), delays)
    server = await road.loop.create_server(lambda: _Client(road), "127.0.0.1", 0, backlog=512)
    end = road.loop.create_future()
    road.loop.add_reader(pipe.fileno(), _answer, road, pipe, end.cancel)
    pipe.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    with suppress(asyncio.CancelledError):
        await end


def _answer(road: _Road, pipe: "Connection[Any, Any]", end: Callable[[], object]) -> None:
    try:
        question = pipe.recv()
    except EOFError:
        end()
        return
    if isinstance(question, Delays):
        road.delays = question
        pipe.send(None)
    else:
        pipe.send(road.traffic.taken())
