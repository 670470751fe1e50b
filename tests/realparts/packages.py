"""Software that one deployment needs and nothing else does: Debian packages, Python packages beside ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest
from filelock import FileLock

from realparts.namespaces import why_not

_CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def absent(reason: str) -> NoReturn:
    """Skip the test for want of something; under CI nothing may be missing."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need_command(command: str, package: str) -> None:
    """Install the Debian package that brings a command, if the command is missing; skip where that can't be."""
    if shutil.which(command) is None:
        need_debian(package)


def need_namespaces() -> None:
    """Skip where this user can't make network namespaces; root can, and has to under CI."""
    need_command("ip", "iproute2")
    if reason := why_not():
        absent(reason) if os.geteuid() == 0 else pytest.skip(reason)


def cache() -> Path:
    """Return a folder that lives and goes with the environment of the tests."""
    folder = Path(sys.prefix) / "deployments"
    folder.mkdir(exist_ok=True)
    return folder


def _installed(package: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat", "${db:Status-Status}", package]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout == "installed"


def _apt(*arguments: str) -> None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(["apt-get", "-qq", *arguments], env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        absent(f"apt-get {' '.join(arguments)}: {done.stderr.strip()[-500:]}")


def need_debian(*packages: str) -> None:
    """Install what is missing of these Debian packages, without starting their services; skip where only root may."""
    if shutil.which("dpkg-query") is None:
        pytest.skip(f"no Debian to install {', '.join(packages)} on")
    with FileLock(cache() / "apt.lock"):
        missing = [package for package in packages if not _installed(package)]
        if not missing:
            return
        if os.geteuid() != 0:
            pytest.skip(f"only root may install what is missing: apt-get install {' '.join(missing)}")
        # Debian asks this file before it starts a service; one that is there has its reasons.
        policy = Path("/usr/sbin/policy-rc.d")
        ours = not policy.exists()
        if ours:
            policy.write_text("#!/bin/sh\nexit 101\n")
            policy.chmod(0o755)
        try:
            _apt("update")
            _apt("install", "--yes", "--no-install-recommends", *missing)
        finally:
            if ours:
                policy.unlink()


def unpacked(requirement: str) -> Path:
    """Return a folder with the files of one package, pinned as in `name==1.0`, and nothing that it depends on."""
    folder = cache() / f"{requirement.replace('==', '-')}-files"
    with FileLock(cache() / f"{folder.name}.lock"):
        if not folder.exists():
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            install(Path(sys.executable), ["--no-deps", "--no-compile", "--target", str(unfinished), requirement])
            unfinished.rename(folder)
    return folder


def python_with(requirements: Path) -> str:
    """Return an interpreter that has all of this one's packages, and beside them those of a file of requirements.

    It is made once for each content of the file. Nothing of this one's packages is replaced.
    """
    text = requirements.read_text(encoding="utf-8")
    mark = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder = cache() / f"{requirements.parent.name}-{mark}"
    python, ready = folder / "bin" / "python", folder / "ready"
    with FileLock(cache() / f"{folder.name}.lock"):
        if not ready.exists():
            venv.create(folder, clear=True, symlinks=True)
            _show_packages(python)
            install(python, ["--requirement", str(requirements), "--constraint", str(_CONSTRAINTS)])
            ready.touch()
    return str(python)


def _show_packages(python: Path) -> None:
    """Let another interpreter see this one's packages, those installed as links too, behind its own."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = [path for path in sys.path if path.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})" for path in site]
    target = python.parents[1] / "lib" / version / "site-packages" / "zz_tests.pth"
    target.write_text("\n".join(lines) + "\n")


def install(python: Path, arguments: Sequence[str]) -> None:
    """Install packages for an interpreter that sees pip; skip where there are none to be had."""
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        absent(f"pip install {' '.join(arguments)}: {done.stderr.strip()[-500:]}")
