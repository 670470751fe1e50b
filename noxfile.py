"""Where the wheel has to work: each Python, each extra, the oldest and the newest dependencies.

    nox                 all of it
    nox -l              what there is
    nox -s wheel-3.13   one of them

Each session builds on the one wheel that `build` makes out of the source distribution; no source folder is on the path
of what is tested.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tomllib
from pathlib import Path

import nox

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).resolve().parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13")
OLDEST, NEWEST = PYTHONS[0], PYTHONS[-1]
#: Extras for use; the others are for working on the package.
EXTRAS = [name for name in PROJECT["optional-dependencies"] if name not in {"test", "bench", "dev", "docs"}]
DIST = ROOT / ".nox" / "dist"

# pyenv's commands refuse to start a Python that is installed but not chosen; the interpreters themselves do start.
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
os.environ["PATH"] = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), *(str(found) for python in PYTHONS for found in PYENV.glob(f"{python}.*/bin"))]
)

#: Where uv takes PyTorch from: builds for processors alone, the others are gigabytes. UV_TORCH_BACKEND= (empty) leaves
#: it to the package index. Taken out of the environment, where uv would not have it empty.
TORCH = os.environ.pop("UV_TORCH_BACKEND", "cpu")

#: The part of the suite that needs no server and no cluster of processes, and what it needs beside the package.
QUICK = ("-m", "not cluster and not s3 and not slow and not torch and not root", "-n", "2", "--dist", "loadgroup")
TOOLS = (
    *("pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist", "hypothesis", "psutil", "boto3", "tensorstore"),
    *("cftime", "opentelemetry-sdk", "playwright"),
)
WITH = "all"
#: Test modules about the surroundings of the package, about its source, or about formats with large dependencies.
APART = (
    *("benchmarks", "browser", "deploy", "formats", "test_docs.py", "test_layers.py", "test_notebooks.py"),
    *("test_packaging.py", "test_readme.py"),
)


@nox.session
def build(session: nox.Session) -> None:
    """Make the source distribution, and the wheel out of it; remove the source that was unpacked for it."""
    shutil.rmtree(DIST, ignore_errors=True)
    session.install("build")
    session.run("python", "-m", "build", "--installer", "uv", "--outdir", str(DIST), str(ROOT))


def _wheel() -> Path:
    (wheel,) = DIST.glob("*.whl")
    return wheel


def _smoke(session: nox.Session, *extras: str) -> None:
    folder = Path(session.create_tmp()).resolve() / "empty"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = shutil.copy(ROOT / "tests" / "smoke.py", folder)
    session.chdir(folder)
    session.run("python", "-P", script, *extras)


@nox.session(python=PYTHONS, requires=["build"])
def wheel(session: nox.Session) -> None:
    """Install the wheel and nothing else, and use it from an empty folder."""
    session.install("--constraint", str(ROOT / "constraints.txt"), str(_wheel()))
    _smoke(session)


@nox.session(python=[OLDEST, NEWEST], requires=["build"])
@nox.parametrize("extra", EXTRAS)
def extra(session: nox.Session, extra: str) -> None:
    """Install the wheel with one extra, and use what it is for."""
    backend = {"UV_TORCH_BACKEND": TORCH or None} if extra == "torch" else None
    session.install("--constraint", str(ROOT / "constraints.txt"), f"{_wheel()}[{extra}]", env=backend)
    _smoke(session, extra)


def _suite(session: nox.Session, *options: str) -> None:
    """Run the quick part of the suite out of the source distribution, without the package's own source."""
    folder = Path(session.create_tmp()).resolve() / "suite"
    shutil.rmtree(folder, ignore_errors=True)
    (archive,) = DIST.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    shutil.rmtree(source / "zarr_dask_stream")
    session.chdir(source)
    ignored = [f"--ignore=tests/{name}" for name in APART]
    session.run("pytest", "-q", *QUICK, *options, *ignored, *(session.posargs or ["tests"]), env={"CI": ""})


@nox.session(python=PYTHONS, requires=["build"])
def pinned(session: nox.Session) -> None:
    """Run the suite's quick part with the pins of constraints.txt."""
    session.install("--constraint", str(ROOT / "constraints.txt"), f"{_wheel()}[{WITH}]", *TOOLS)
    _suite(session)


@nox.session(python=OLDEST, requires=["build"])
def oldest(session: nox.Session) -> None:
    """Run it with the lowest version of each dependency that pyproject.toml allows."""
    lowest = Path(session.create_tmp()).resolve() / "lowest.txt"
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-emit-index-url"]
    command += ["--resolution", "lowest-direct", "--python-version", OLDEST, "--extra", WITH]
    session.run(*command, "--output-file", str(lowest), str(ROOT / "pyproject.toml"), external=True)
    session.install("--constraint", str(lowest), f"{_wheel()}[{WITH}]", *TOOLS)
    _smoke(session)
    session.chdir(ROOT)
    # Old packages meet newer ones than they were made for.
    _suite(session, "-W", "ignore::DeprecationWarning")


@nox.session(python=NEWEST, requires=["build"])
def newest(session: nox.Session) -> None:
    """Run it with the newest version of each dependency that there is."""
    session.install("--upgrade", f"{_wheel()}[{WITH}]", *TOOLS)
    _smoke(session)
    session.chdir(ROOT)
    _suite(session)
