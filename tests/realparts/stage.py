"""A stage on which the commands of a deployment's files run: hosts with the names that the files use, no containers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from realparts.namespaces import Host, run_network
from realparts.process import Process


@dataclass(frozen=True)
class Stage:
    """Hosts by role; what runs on them sees the others under their names."""

    hosts: Mapping[str, Host]
    folder: Path
    stack: ExitStack

    def _env(self, env: Mapping[str, str]) -> dict[str, str]:
        """What a container would have: the variables of its file, and the programs of the tests."""
        programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        return {"PATH": programs, "HOME": str(self.folder), "PYTHONWARNINGS": "ignore", **env}

    def start(self, role: str, command: Sequence[str], env: Mapping[str, str], name: str = "") -> Process:
        """Start a command on the host of a role; it ends with the stage."""
        words = ["ip", "netns", "exec", self.hosts[role].namespace, *command]
        process = Process.start(name or role, words, folder=self.folder, env=self._env(env))
        self.stack.callback(process.end)
        return process

    def run(self, role: str, command: Sequence[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a command on the host of a role to its end."""
        words = ["ip", "netns", "exec", self.hosts[role].namespace, *command]
        own = {**os.environ, **self._env(env)}
        return subprocess.run(words, cwd=self.folder, env=own, capture_output=True, text=True, check=False)

    def wait_healthy(self, role: str, probe: Sequence[str], process: Process, *, timeout_s: float = 60.0) -> None:
        """Wait until a probe on the host of a role ends with 0."""
        process.wait_ready(lambda: self.run(role, probe, {}).returncode == 0, timeout_s=timeout_s)


@contextmanager
def run_stage(folder: Path, names: Mapping[str, Sequence[str]]) -> Iterator[Stage]:
    """Make a host for each role, known to all others by its names, until the block ends."""
    with ExitStack() as stack:
        hosts = stack.enter_context(run_network(list(names)))
        lines = ["127.0.0.1 localhost", *(f"{hosts[role].address} {' '.join(own)}" for role, own in names.items())]
        for host in hosts.values():
            # `ip netns exec` puts what is in here over /etc.
            etc = Path("/etc/netns") / host.namespace
            etc.mkdir(parents=True)
            stack.callback(shutil.rmtree, etc)
            (etc / "hosts").write_text("\n".join(lines) + "\n")
        yield Stage(hosts, folder, stack)
