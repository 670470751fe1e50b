"""Start, watch and end single operating-system processes."""

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# Below the range from which Linux hands out ports by itself, so that a connection of somebody else does not take
# a port between our look and the server's bind. SeaweedFS also listens 10,000 above each port it is given.
_PORTS = range(12_000, 22_000)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int, *, twin_offset: int = 0) -> list[int]:
    """Return `count` distinct free loopback ports; with `twin_offset`, each port's twin that far above is free too."""
    # Not seeded by the test: parallel test processes must not look at the same ports in the same order.
    candidates = random.SystemRandom().sample(_PORTS, len(_PORTS))
    found: list[int] = []
    for port in candidates:
        if _is_free(port) and (not twin_offset or _is_free(port + twin_offset)):
            found.append(port)
        if len(found) == count:
            return found
    msg = f"only {len(found)} of {count} free loopback ports between {_PORTS.start} and {_PORTS.stop}"
    raise RuntimeError(msg)


def wait_until(ready: Callable[[], bool], *, what: str, timeout_s: float, every_s: float = 0.05) -> None:
    """Poll `ready` until it holds; raise TimeoutError naming `what` otherwise."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            msg = f"waited {timeout_s:g} s in vain for {what}"
            raise TimeoutError(msg)
        time.sleep(every_s)


@dataclass(frozen=True)
class Process:
    """A child of ours in a process group of its own, with its output in a file."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, name: str, command: Sequence[str], *, folder: Path, env: Mapping[str, str] | None = None) -> Self:
        """Start `command` in `folder`; `env` is added to this process's environment."""
        log = folder / f"{name}.log"
        with log.open("wb") as out:
            popen = subprocess.Popen(
                list(command),
                cwd=folder,
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(name, popen, log)

    @property
    def pid(self) -> int:
        """The process id."""
        return self.popen.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.popen.poll() is None

    def wait_ready(self, ready: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
        """Wait until `ready` holds; a process that dies meanwhile is reported with the end of its output."""

        def ready_or_dead() -> bool:
            return not self.alive or ready()

        try:
            wait_until(ready_or_dead, what=f"{self.name} to be ready", timeout_s=timeout_s)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; its output ends with:\n{self.tail()}") from None
        if not self.alive:
            raise RuntimeError(f"{self.name} ended with code {self.popen.returncode}:\n{self.tail()}")

    def tail(self, length: int = 2000) -> str:
        """Return the end of the output."""
        return self.log.read_text(errors="replace")[-length:]

    def end(self, *, grace_s: float = 5.0) -> None:
        """Ask the process to end, insist after `grace_s`, and leave nothing of its group behind."""
        if self.alive:
            self.popen.terminate()
            try:
                self.popen.wait(grace_s)
            except subprocess.TimeoutExpired:
                self._kill_group()
        self._kill_group()
        self.popen.wait()

    def kill(self) -> None:
        """End the process and its children at once, as a crash of the host would."""
        self._kill_group()
        self.popen.wait()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):  # the whole group is gone already, which is what was wanted
            os.killpg(self.popen.pid, signal.SIGKILL)
