"""Hosts that are network namespaces on one bridge, whose cables can be pulled; for root only."""

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from realparts.cluster import importable_tests
from realparts.process import Process


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def why_not() -> str:
    """Say what keeps this machine from making namespaces, "" where nothing does."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    try:
        with run_network(["probe"]):
            return ""
    except OSError as error:
        return f"network namespaces can't be made here: {error}"


@dataclass(frozen=True)
class Host:
    """A namespace with an address of its own and one cable."""

    name: str
    namespace: str
    cable: str
    address: str

    def start(
        self, name: str, arguments: Sequence[str], *, folder: Path, env: Mapping[str, str], module: str | None = "dask"
    ) -> Process:
        """Run a `dask` command in the namespace; without a `module`, a script."""
        run = [] if module is None else ["-m", module]
        command = ["ip", "netns", "exec", self.namespace, sys.executable, *run, *arguments]
        paths = {"PYTHONPATH": importable_tests(), "PYTHONWARNINGS": "ignore"}
        return Process.start(name, command, folder=folder, env={**paths, **env})

    def unplug(self) -> None:
        """Pull the cable: packets vanish, and nobody is told."""
        _ip("link", "set", self.cable, "down")

    def plug(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self.cable, "up")


@contextmanager
def run_network(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Connect one host for each name, and this process's own namespace, until the block ends."""
    mark = secrets.token_hex(3)
    # The range set aside for tests of network devices: nobody's real addresses.
    subnet = f"198.18.{secrets.randbelow(256)}"
    bridge = f"zds{mark}b"
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        hosts = {}
        for number, name in enumerate(names, 2):
            host = Host(name, f"zds{mark}n{number}", f"zds{mark}v{number}", f"{subnet}.{number}")
            _ip("netns", "add", host.namespace)
            # With the namespace goes its end of the cable, and with one end the other.
            stack.callback(_ip, "netns", "del", host.namespace)
            _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.cable, "master", bridge, "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            hosts[name] = host
        yield hosts
