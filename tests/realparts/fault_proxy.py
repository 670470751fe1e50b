"""An HTTP proxy that breaks requests on purpose, repeatably.

It stands between a client and one HTTP server. The Host header goes through unchanged, so requests signed for the
proxy's address stay valid. What it breaks is decided before the server is asked, in this order: the faults ordered
with `inject` (exactly so many), then those drawn from the seeded generator with the probabilities of `Faults`.

- slow_down: 503 with S3's SlowDown document; the server is not asked
- reset:     the connection is reset (RST); the server is not asked
- hang:      no answer ever; the server is not asked
- truncate:  the true answer's head, half of its body, then the end of the connection
- expired:   400 with S3's ExpiredToken document; the server is not asked
"""

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

_KINDS = ("slow_down", "reset", "hang", "truncate", "expired")


def _refusal(status: str, code: str, message: str) -> tuple[bytes, bytes]:
    """Return the head and the body of an error as S3 words it."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
    ).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    return head, body


_REFUSALS = {
    "slow_down": _refusal("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "expired": _refusal("400 Bad Request", "ExpiredToken", "The provided token has expired."),
}
_LINGER_ZERO = struct.pack("ii", 1, 0)  # closing a socket with this option sends RST in place of FIN
_HEAD_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What may happen to a request: a delay in seconds, and probabilities that add up to at most 1."""

    latency_s: float = 0.0
    jitter_s: float = 0.0
    slow_down: float = 0.0
    reset: float = 0.0
    hang: float = 0.0
    truncate: float = 0.0
    expired: float = 0.0
    #: Regular expression that a request's "METHOD target" must contain to be eligible.
    match: str = ""

    def draw(self, rng: random.Random) -> tuple[str, float]:
        """Return the fault ("" for none) and the delay in seconds of one request."""
        point, delay_s = rng.random(), self.latency_s + rng.random() * self.jitter_s
        for kind in _KINDS:
            point -= getattr(self, kind)
            if point < 0:
                return kind, delay_s
        return "", delay_s


class Head(NamedTuple):
    """The first line and the header lines of a request or an answer."""

    first: str
    lines: list[str]

    def get(self, name: str) -> str:
        """Return a header's value in lower case, "" where it is absent."""
        for line in self.lines:
            key, _, value = line.partition(":")
            if key.strip().lower() == name:
                return value.strip().lower()
        return ""

    def encode(self) -> bytes:
        """Return the head as it goes over the wire, without Expect: the proxy has answered that itself."""
        kept = [line for line in self.lines if not line.lower().startswith("expect:")]
        return "\r\n".join([self.first, *kept, "", ""]).encode("latin-1")


async def _read_head(reader: asyncio.StreamReader) -> Head:
    text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = text[:-4].split("\r\n")
    return Head(first, lines)


async def _read_body(reader: asyncio.StreamReader, head: Head) -> bytes:
    """Return a body's bytes as sent, chunk framing included."""
    if head.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(head.get("content-length") or 0))
    raw = bytearray()
    while True:
        size_line = await reader.readline()
        size = int(size_line.split(b";")[0], 16)
        raw += size_line + await reader.readexactly(size)
        if size == 0:
            while (line := await reader.readline()).strip():
                raw += line
            return bytes(raw + line)
        raw += await reader.readexactly(2)


class FaultProxy:
    """The control object: `url` to connect to, `set` and `inject` to break things, counters to look at."""

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._rng = random.Random(seed)
        self._faults = Faults()
        self._ordered: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        self._port = 0
        self._in_flight = 0
        #: How often each fault happened; "ok" counts requests that went through whole.
        self.counts: Counter[str] = Counter()
        #: ("METHOD target", fault or "ok") of every request, in order of decision.
        self.requests: list[tuple[str, str]] = []
        self.bytes_out = 0
        self.peak_in_flight = 0

    @property
    def url(self) -> str:
        """The address clients use in place of the server's."""
        return f"http://127.0.0.1:{self._port}"

    def set(self, faults: Faults) -> None:
        """From now on, draw faults so; `set(Faults())` heals the road."""
        with self._lock:
            self._faults = faults

    def inject(self, kind: str, *, times: int = 1, match: str = "") -> None:
        """Let the next `times` requests whose "METHOD target" contains regular expression `match` suffer `kind`."""
        if kind not in _KINDS:
            raise ValueError(f"fault must be one of {', '.join(_KINDS)}; got {kind!r}")
        with self._lock:
            self._ordered += [(kind, match)] * times

    def clear(self) -> None:
        """Forget ordered faults, probabilities and counts; the generator goes on."""
        with self._lock:
            self._faults = Faults()
            self._ordered.clear()
            self.counts.clear()
            self.requests.clear()
            self.bytes_out = self.peak_in_flight = 0

    def _decide(self, request: str) -> tuple[str, float]:
        with self._lock:
            faults = self._faults
            kind, delay_s = faults.draw(self._rng) if re.search(faults.match, request) else ("", 0.0)
            for position, (ordered, match) in enumerate(self._ordered):
                if re.search(match, request):
                    del self._ordered[position]
                    kind = ordered
                    break
            self.counts[kind or "ok"] += 1
            self.requests.append((request, kind or "ok"))
            return kind, delay_s

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Handle one client connection: one request after the other over one connection to the server."""
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while True:
                head = await _read_head(reader)
                upstream = upstream or await asyncio.open_connection(*self._upstream, limit=_HEAD_LIMIT)
                self._in_flight += 1
                self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
                try:
                    if not await self._exchange(head, reader, writer, *upstream):
                        return
                finally:
                    self._in_flight -= 1
        except (OSError, EOFError):
            pass  # either side hung up, which ends the conversation
        finally:
            writer.close()
            if upstream is not None:
                upstream[1].close()

    async def _exchange(
        self,
        head: Head,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        """Answer one request; return whether the connection may be used again."""
        if head.get("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await _read_body(reader, head)
        method, target, _ = head.first.split(" ", 2)
        kind, delay_s = self._decide(f"{method} {target}")
        await asyncio.sleep(delay_s)
        match kind:
            case "reset":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
                writer.transport.abort()
                return False
            case "hang":
                await reader.read()  # until the client gives up
                return False
            case "slow_down" | "expired":
                answer_head, answer_body = _REFUSALS[kind]
                return await self._send(writer, answer_head + (b"" if method == "HEAD" else answer_body))
        to_server.write(head.encode() + body)
        await to_server.drain()
        answer = await _read_head(from_server)
        bodiless = method == "HEAD" or answer.first.split(" ")[1] in {"204", "304"}
        payload = b"" if bodiless else await _read_body(from_server, answer)
        if kind == "truncate":
            await self._send(writer, answer.encode() + payload[: len(payload) // 2])
            return False
        return await self._send(writer, answer.encode() + payload) and answer.get("connection") != "close"

    async def _send(self, writer: asyncio.StreamWriter, data: bytes) -> bool:
        self.bytes_out += len(data)
        writer.write(data)
        await writer.drain()
        return True

    async def _main(self, ready: threading.Event, stop: asyncio.Event) -> None:
        conversations: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._serve(reader, writer))
            conversations.add(task)
            task.add_done_callback(conversations.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=_HEAD_LIMIT, backlog=512)
        self._port = server.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        server.close()
        for task in conversations:
            task.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)


@contextmanager
def run_proxy(upstream: str, *, seed: int = 0) -> Iterator[FaultProxy]:
    """Run a proxy before the server at URL `upstream` in a thread of its own until the block ends."""
    proxy = FaultProxy(upstream, seed=seed)
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    def work() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(proxy._main(ready, stop))
        loop.close()

    thread = threading.Thread(target=work, name="realparts-proxy", daemon=True)
    thread.start()
    if not ready.wait(10):
        raise RuntimeError("the fault proxy did not start within 10 s")
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
