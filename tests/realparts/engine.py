"""Images built and containers run by Debian's buildah and podman, on a base that is made here; for root only.

No daemon and no registry: the base image is a Debian with Python instead of the one that the Containerfile names, and
what pip installs lies in a folder that is downloaded once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from realparts.packages import absent, cache, need_debian

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILE = ROOT / "deploy" / "container" / "Containerfile"
DEBIAN = ("buildah", "podman", "runc", "mmdebstrap")

_SUITE, _PYTHON = "bookworm", "3.11"
_BASE = "python:local"
#: Inside the base, pip sees the folder that is mounted there, and no index.
_PIP = "[global]\nno-index = true\nfind-links = /wheels\nbreak-system-packages = true\n"
#: What each container is denied, as in the compose file. Limits are no higher than those of whoever runs the tests.
CONFINED = [
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096"),
]


def _do(what: str, command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{what}: {(done.stderr or done.stdout).strip()[-3000:]}")
    return done.stdout.strip()


def _base() -> Path:
    """Return an archive of a small Debian with Python and pip, made once for each environment of the tests."""
    archive = cache() / f"{_SUITE}.tar"
    with FileLock(cache() / f"{archive.name}.lock"):
        if not archive.exists():
            unfinished = archive.with_suffix(".unfinished.tar")
            packages = "--include=python3-minimal,python3-venv,python3-pip,ca-certificates"
            try:
                _do("mmdebstrap", ["mmdebstrap", "--quiet", "--variant=apt", packages, _SUITE, str(unfinished)])
            except RuntimeError as error:
                absent(str(error))
            unfinished.rename(archive)
    return archive


def _wheels(*requirements: str) -> Path:
    """Return a folder with the wheels of these requirements for the Python of the base, downloaded once."""
    pins = (ROOT / "constraints.txt").read_text() + (ROOT / "pyproject.toml").read_text() + repr(requirements)
    folder = cache() / f"wheels-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
    with FileLock(cache() / f"{folder.name}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--python-version", _PYTHON, "--only-binary", ":all:", "--dest", str(unfinished)]
            try:
                _do("pip", [*command, "--constraint", str(ROOT / "constraints.txt"), *requirements])
            except RuntimeError as error:
                absent(str(error))
            unfinished.rename(folder)
    return folder


@dataclass(frozen=True)
class Engine:
    """Images and containers in a folder of their own."""

    folder: Path
    driver: str

    def _with(self, program: str) -> list[str]:
        place = ["--root", str(self.folder / "store"), "--runroot", str(self.folder / "run")]
        command = [program, *place, "--storage-driver", self.driver]
        if program == "podman":
            command += ["--tmpdir", str(self.folder / "tmp"), "--runtime", shutil.which("runc") or "runc"]
            command += ["--cgroup-manager", "cgroupfs", "--events-backend", "none"]
        return command

    def buildah(self, *words: str) -> str:
        """Run one command of buildah and return what it prints."""
        return _do(f"buildah {words[0]}", [*self._with("buildah"), *words])

    def podman(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run one command of podman."""
        return subprocess.run([*self._with("podman"), *words], capture_output=True, text=True, check=False)

    def make_base(self) -> None:
        """Make what stands in for the official image of Python."""
        settings = self.folder / "pip.conf"
        settings.write_text(_PIP)
        container = self.buildah("from", "scratch")
        self.buildah("add", "--quiet", container, str(_base()), "/")
        self.buildah("copy", "--quiet", container, str(settings), "/etc/pip.conf")
        self.buildah("run", "--isolation", "chroot", container, "--", "ln", "-s", "python3", "/usr/bin/python")
        # The official image has it, and the Containerfile puts a folder before it.
        self.buildah("config", "--env", "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", container)
        self.buildah("commit", "--quiet", "--rm", container, _BASE)

    def build(self, target: str, tag: str, *requirements: str) -> None:
        """Build a stage of the Containerfile, each of its steps, on that base."""
        where = ["--file", str(CONTAINERFILE), "--ignorefile", f"{CONTAINERFILE}.dockerignore", "--format", "docker"]
        base = ["--build-arg", f"PYTHON={_BASE.partition(':')[2]}", "--pull-never", "--isolation", "chroot"]
        wheels = ["--volume", f"{_wheels(*requirements)}:/wheels:ro"]
        self.buildah("bud", "--layers", *where, *base, *wheels, "--target", target, "--tag", tag, str(ROOT))


@contextmanager
def run_engine() -> Iterator[Engine]:
    """Have an engine until the block ends; its containers and images go with it."""
    need_debian(*DEBIAN)
    # Podman refuses long paths, such as those of folders of tests.
    folder = Path(tempfile.mkdtemp(prefix="zds-"))
    engine = Engine(folder, "overlay")
    if engine.podman("info").returncode != 0:
        engine = Engine(folder, "vfs")
    try:
        if (asked := engine.podman("info")).returncode != 0:
            absent(f"podman does not run here: {asked.stderr.strip()[-500:]}")
        yield engine
    finally:
        engine.podman("rm", "--all", "--force", "--time", "0")
        engine.podman("rmi", "--all", "--force")
        # The layers of overlays stay mounted where a container did not end in order.
        with Path("/proc/mounts").open(encoding="utf-8") as mounts:
            left = [line.split()[1] for line in mounts if line.split()[1].startswith(f"{folder}{os.sep}")]
        for place in reversed(left):
            subprocess.run(["umount", "--lazy", place], check=False)
        shutil.rmtree(folder, ignore_errors=True)
