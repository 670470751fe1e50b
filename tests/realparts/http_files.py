"""A plain HTTP server over a folder: GET, HEAD, listings, and single byte ranges."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

_RANGE = re.compile(r"bytes=(\d*)-(\d*)$")


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Return (start, stop) in bytes for a single-range header; None where no byte of `size` is meant."""
    match = _RANGE.match(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
    return (start, stop) if start < stop else None


@dataclass(frozen=True)
class HttpStore:
    """A folder and the URL under which it is served."""

    url: str
    directory: Path
    #: (method, path, Range header or "") of every request so far, in order of arrival.
    requests: list[tuple[str, str, str]] = field(default_factory=list)


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive, as real servers do

    def __init__(self, *args: object, store_requests: list[tuple[str, str, str]], directory: str) -> None:
        self.store_requests = store_requests
        super().__init__(*args, directory=directory)  # type: ignore[arg-type]  # the server's own arguments, handed on

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the base class names it so
        """Stay silent: tests look at `HttpStore.requests`."""

    def send_head(self) -> BytesIO | BinaryIO | None:
        wanted = self.headers.get("Range", "")
        self.store_requests.append((self.command, self.path, wanted))
        file = Path(self.translate_path(self.path))
        if not wanted or not file.is_file():
            return super().send_head()
        size = file.stat().st_size
        bounds = parse_range(wanted, size)
        if bounds is None:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        return self._send_part(file, *bounds, size)

    def _send_part(self, file: Path, start: int, stop: int, size: int) -> BytesIO:
        with file.open("rb") as stream:
            stream.seek(start, os.SEEK_SET)
            part = stream.read(stop - start)
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return BytesIO(part)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client's idle keep-alive connection must not hold the test's end


@contextmanager
def serve_files(directory: Path) -> Iterator[HttpStore]:
    """Serve `directory` on a free loopback port until the block ends."""
    requests: list[tuple[str, str, str]] = []
    handler = partial(_Handler, store_requests=requests, directory=str(directory))
    with _Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="realparts-http", daemon=True)
        thread.start()
        try:
            yield HttpStore(f"http://127.0.0.1:{server.server_port}", directory, requests)
        finally:
            server.shutdown()
            thread.join()
