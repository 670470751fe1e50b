"""What is built and installed: the wheel holds the package and nothing else, and works where there is no source folder.

`make matrix` does the same for each Python, each extra, and the oldest and newest dependencies.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import smoke
from pages import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.sample, pytest.mark.xdist_group("packaging")]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def _run(*command: str | Path, cwd: Path, **env: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=kept | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def uv() -> str:
    found = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        reason = "uv is not installed: pip install 'zarr-dask-stream[docs]'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory, uv: str) -> Path:
    """Return a folder with the source distribution, and the wheel that was built out of it."""
    folder = tmp_path_factory.mktemp("dist")
    _run(uv, "build", "--quiet", "--out-dir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    package = ROOT / "zarr_dask_stream"
    wanted = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {name for name in names if ".dist-info/" not in name} == {
        path.relative_to(ROOT).as_posix() for path in wanted
    }
    assert "zarr_dask_stream/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_its_metadata_say_what_the_project_says(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        (name,) = [name for name in file.namelist() if name.endswith(".dist-info/METADATA")]
        about = Parser().parsestr(file.read(name).decode())
    assert about["Name"] == PROJECT["name"]
    assert about["Requires-Python"] == PROJECT["requires-python"]
    assert set(about.get_all("Provides-Extra") or ()) == set(PROJECT["optional-dependencies"])
    named = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert named <= set(about.get_all("Classifier") or ())


def test_the_source_distribution_is_enough_to_work_with(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for needed in (
        "Makefile",
        "constraints.txt",
        "noxfile.py",
        "mkdocs.yml",
        "SECURITY.md",
        "docs/index.md",
        "tests/smoke.py",
    ):
        assert needed in names
    assert not [name for name in names if re.search(r"(^|/)(\.venv|\.git/|\.nox|site/|__pycache__)", name)]


def test_the_wheel_works_from_an_empty_folder(wheel: Path, uv: str, tmp_path: Path) -> None:
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    _run(uv, "venv", "--quiet", "--python", sys.executable, environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    _run(
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "--constraint",
        ROOT / "constraints.txt",
        wheel,
        cwd=tmp_path,
    )
    script = shutil.copy(ROOT / "tests" / "smoke.py", tmp_path)
    assert _run(python, "-P", script, cwd=empty).startswith("fine: ")


def test_each_extra_is_tried_or_known() -> None:
    """An extra that nobody tries is a promise that nobody keeps."""
    for_work = {"all", "bench", "dev", "docs", "test"}
    assert set(PROJECT["optional-dependencies"]) - for_work <= set(smoke.BRINGS)


def test_all_has_what_is_for_use() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    named = set(everything.partition("[")[2].rstrip("]").split(","))
    # PyTorch and JAX are larger than everything else together, and examples bring JAX.
    assert named == set(extras) - {"all", "bench", "dev", "docs", "examples", "jax", "test", "torch"}
