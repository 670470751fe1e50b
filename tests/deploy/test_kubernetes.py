"""The Kubernetes manifests: valid by the schemas of Kubernetes and of the Dask operator, and their commands run."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from chaos.scene import write_rows
from realparts.packages import need_namespaces, python_with, unpacked
from realparts.process import wait_until
from realparts.stage import Stage, run_stage
from zarr_dask_stream.cli.command import zds

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
REQUIREMENT = (FOLDER / "requirements.txt").read_text().strip()
#: Before 1.31 the rules for failed pods were still in beta.
VERSIONS = ["1.31", "1.37"]

Document = dict[str, Any]


def read(*files: Path) -> list[Document]:
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


def resources(folder: Path) -> list[Document]:
    """Return what a folder holds, but for its kustomization and patches."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return read(*(folder / name for name in listed if name.endswith(".yaml")))


BASE = resources(FOLDER / "base")
OVERLAYS = {name: resources(FOLDER / "overlays" / name) for name in ("dev", "prod")}


# -- schemas ------------------------------------------------------------------------------------------


def closed(schema: Any) -> Any:
    """Return a schema that refuses unknown fields: the operator's own would drop them in silence."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        strict.setdefault("additionalProperties", False)
    return strict


@pytest.fixture(scope="module")
def operator() -> dict[str, Any]:
    """Return the strict schemas of the Dask operator's kinds."""
    folder = unpacked(REQUIREMENT) / "dask_kubernetes" / "operator" / "deployment" / "helm"
    found = {}
    for definition in read(*sorted((folder / "dask-kubernetes-operator" / "crds").glob("*.yaml"))):
        (version,) = definition["spec"]["versions"]
        schema = closed(version["schema"]["openAPIV3Schema"])
        schema["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {}}
        found[definition["spec"]["names"]["kind"]] = schema
    return found


def validate(document: Document, operator: Mapping[str, Any], version: str = VERSIONS[-1]) -> None:
    if document["apiVersion"] == "kubernetes.dask.org/v1":
        jsonschema.Draft202012Validator(operator[document["kind"]]).validate(document)
        for pod in pods(document):
            kubernetes_validate.validate(
                {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}, version, strict=True
            )
    else:
        kubernetes_validate.validate(document, version, strict=True)


def pods(document: Document) -> list[Document]:
    """Return the specifications of pods in a document."""
    spec = document.get("spec", {})
    if document["kind"] == "DaskCluster":
        return [spec[part]["spec"] for part in ("scheduler", "worker") if "spec" in spec.get(part, {})]
    if document["kind"] in {"Job", "Deployment"}:
        return [spec["template"]["spec"]]
    return []


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_is_valid(operator: dict[str, Any], version: str) -> None:
    for document in [*BASE, *OVERLAYS["dev"], *OVERLAYS["prod"]]:
        validate(document, operator, version)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("DaskCluster", ["spec", "worker"]),
        ("DaskCluster", ["spec", "scheduler", "service"]),
        ("DaskCluster", ["spec", "worker", "spec", "containers", 0, "livenessProbe"]),
        ("Job", ["spec", "podFailurePolicy", "rules", 1, "onExitCodes"]),
        ("NetworkPolicy", ["spec"]),
    ],
)
def test_a_misspelt_field_is_found(operator: dict[str, Any], kind: str, place: list[Any]) -> None:
    document = copy.deepcopy(next(document for document in BASE if document["kind"] == kind))
    validate(document, operator)
    inner: Any = document
    for step in place:
        inner = inner[step]
    inner["misspelt"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(document, operator)


def test_every_file_is_used() -> None:
    for folder in (FOLDER / "base", FOLDER / "overlays" / "dev", FOLDER / "overlays" / "prod"):
        plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
        used = {*plan["resources"], *(patch["path"] for patch in plan.get("patches", []))} - {"../../base"}
        assert used == {file.name for file in folder.iterdir()} - {"kustomization.yaml"}


# -- what they promise --------------------------------------------------------------------------------


def assert_restricted(pod: Document) -> None:
    """Require what the `restricted` level of Kubernetes' pod security asks for, and a root that is read-only."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 10000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all(set(volume) == {"name", "emptyDir"} and volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"])
    for container in pod["containers"]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])


def cluster_of(documents: Sequence[Document]) -> Document:
    (found,) = (document for document in documents if document["kind"] == "DaskCluster")
    return found


def job_of(documents: Sequence[Document]) -> Document:
    (found,) = (document for document in documents if document["kind"] == "Job")
    return found


def test_pods_are_restricted_and_probed() -> None:
    found = [pod for document in BASE for pod in pods(document)]
    assert len(found) == 3
    for pod in found:
        assert_restricted(pod)
    for pod in pods(cluster_of(BASE)):
        (container,) = pod["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["httpGet"] == {"path": "/health", "port": "http-dashboard"}
        address = container["args"][container["args"].index("--dashboard-address") + 1]
        assert address == f":{ports['http-dashboard']}"


def test_who_reaches_whom() -> None:
    """Selectors of policies and budgets are those of pods that the operator and the job make."""
    cluster, job = cluster_of(BASE)["metadata"]["name"], job_of(BASE)["spec"]["template"]["metadata"]["labels"]
    made = [{"dask.org/cluster-name": cluster, "dask.org/component": part} for part in ("scheduler", "worker")]

    def selected(selector: Document) -> int:
        wanted = selector.get("matchLabels", {}).items()
        return sum(wanted <= labels.items() for labels in [*made, job])

    for document in [*BASE, *OVERLAYS["prod"]]:
        if document["kind"] == "PodDisruptionBudget":
            assert selected(document["spec"]["selector"]) == 1, document["metadata"]["name"]
        if document["kind"] == "NetworkPolicy":
            assert selected(document["spec"]["podSelector"]) > 0, document["metadata"]["name"]
            for rule in document["spec"].get("ingress", []):
                for peer in rule["from"]:
                    assert "podSelector" not in peer or selected(peer["podSelector"]) > 0
    # Nothing is open that no rule names.
    assert any(document.get("spec") == {"podSelector": {}, "policyTypes": ["Ingress"]} for document in BASE)


def test_failures_that_would_come_again_end_the_job() -> None:
    fatal = job_of(BASE)["spec"]["podFailurePolicy"]["rules"][1]["onExitCodes"]
    from_help = re.findall(r"(\d+) [a-z]", zds.epilog or "")
    assert fatal["values"] == [1, 2]
    assert {"0", "1", "2", "3", "75", "130"} == set(from_help)


# -- overlays, built by kustomize itself --------------------------------------------------------------


@pytest.fixture(scope="module")
def build() -> Callable[[Path], list[Document]]:
    if kustomize := shutil.which("kustomize"):
        command = [kustomize, "build"]
    elif kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize"]
    else:
        # Neither Debian nor PyPI has a recent one: without it, under CI too, the overlays are checked file by file.
        pytest.skip("neither kustomize nor kubectl is installed")

    def build(folder: Path) -> list[Document]:
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return build


@pytest.fixture(scope="module")
def built(build: Callable[[Path], list[Document]]) -> dict[str, list[Document]]:
    return {name: build(FOLDER / "overlays" / name) for name in OVERLAYS}


@pytest.mark.parametrize("name", ["dev", "prod"])
def test_overlays_are_valid(built: dict[str, list[Document]], operator: dict[str, Any], name: str) -> None:
    version = importlib.metadata.version("zarr-dask-stream")
    assert len(built[name]) == len(BASE) + len(OVERLAYS[name])
    for document in built[name]:
        validate(document, operator)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == f"zds-{name}"
        for pod in pods(document):
            assert_restricted(pod)
            assert {container["image"] for container in pod["containers"]} == {f"zarr-dask-stream:{version}"}


def test_dev_is_small_and_goes_by_itself(built: dict[str, list[Document]]) -> None:
    spec = cluster_of(built["dev"])["spec"]
    assert spec["worker"]["replicas"] == 1
    assert spec["idleTimeout"] > 0


def test_what_the_readme_puts_into_an_overlay(build: Callable[[Path], list[Document]], tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path / "kubernetes")
    plan = tmp_path / "kubernetes" / "overlays" / "dev" / "kustomization.yaml"
    own = re.findall(r"^```yaml\n(.*?)^```", (FOLDER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    plan.write_text(yaml.safe_dump(yaml.safe_load(plan.read_text()) | yaml.safe_load("".join(own))))
    made = build(plan.parent)
    images = {container["image"] for document in made for pod in pods(document) for container in pod["containers"]}
    assert images == {"registry.example.org/me/zarr-dask-stream:0.1.0"}
    (job,) = pods(job_of(made))[0]["containers"]
    told = {entry["name"]: entry["value"] for entry in job["env"]}
    assert told == {"ARRAY": "s3://bucket/array.zarr", "LEDGER": "s3://bucket/ledgers/stats.ledger"}
    assert cluster_of(made)["spec"]["worker"]["replicas"] == 1  # what the overlay had is still there


def test_prod_puts_workers_on_spot_nodes_and_the_rest_on_others(built: dict[str, list[Document]]) -> None:
    scheduler, worker = pods(cluster_of(built["prod"]))
    (job,) = pods(job_of(built["prod"]))
    ((key, spot),) = worker["nodeSelector"].items()
    assert spot == "spot"
    assert worker["tolerations"][0]["key"] == key
    assert scheduler["nodeSelector"] == job["nodeSelector"]
    assert scheduler["nodeSelector"][key] != spot
    (autoscaler,) = (document["spec"] for document in built["prod"] if document["kind"] == "DaskAutoscaler")
    assert autoscaler["cluster"] == cluster_of(built["prod"])["metadata"]["name"]
    assert 0 < autoscaler["minimum"] < autoscaler["maximum"]


# -- what the operator makes of them ------------------------------------------------------------------

MAKE = """
import json, sys
from dask_kubernetes.operator.controller import controller
cluster = json.load(sys.stdin)
name, spec = cluster["metadata"]["name"], cluster["spec"]
parts = [
    controller.build_scheduler_deployment_spec(name, spec["scheduler"]["spec"], {}, {}),
    controller.build_scheduler_service_spec(name, spec["scheduler"]["service"], {}, {}),
    controller.build_worker_deployment_spec(f"{name}-default", "zds", name, "0", spec["worker"]["spec"], {}, {}),
]
json.dump(parts, sys.stdout)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_the_operator_makes_is_valid(operator: dict[str, Any]) -> None:
    python = python_with(FOLDER / "requirements.txt")
    cluster = json.dumps(cluster_of(BASE))
    done = subprocess.run([python, "-c", MAKE], input=cluster, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    scheduler, service, worker = json.loads(done.stdout)
    for document in (scheduler, service, worker):
        validate(document, operator)
    assert service["metadata"]["name"] in scheduler_address()
    assert service["spec"]["selector"].items() <= scheduler["spec"]["template"]["metadata"]["labels"].items()
    names = {entry["name"] for entry in worker["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert {"DASK_WORKER_NAME", "DASK_SCHEDULER_ADDRESS"} <= names


def scheduler_address() -> str:
    (pod,) = pods(job_of(BASE))
    args = pod["containers"][0]["args"]
    return str(args[args.index("--scheduler") + 1])


# -- their commands, run ------------------------------------------------------------------------------


def filled(container: Document, **values: str) -> tuple[list[str], dict[str, str]]:
    """Return the command and environment of a container, its variables put in as Kubernetes does."""
    env = {entry["name"]: entry["value"] for entry in container.get("env", [])} | values
    return [re.sub(r"\$\((\w+)\)", lambda found: env[found[1]], word) for word in container["args"]], env


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    need_namespaces()
    service = ["zds-scheduler", "zds-scheduler.zds.svc.cluster.local"]
    with run_stage(tmp_path, {"scheduler": service, "worker": ["worker"], "job": ["job"]}) as stage:
        yield stage


def probe(stage: Stage, role: str, container: Document) -> int:
    """Ask as the kubelet would, from outside the pod."""
    asked = container["readinessProbe"]["httpGet"]
    port = next(port["containerPort"] for port in container["ports"] if port["name"] == asked["port"])
    return ask(stage, role, port, asked["path"])[0]


def ask(stage: Stage, role: str, port: int, path: str, body: bytes | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://{stage.hosts[role].address}:{port}{path}", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.status, response.read()
    except OSError:
        return 0, b""


@pytest.mark.cluster
@pytest.mark.root
@pytest.mark.slow
@pytest.mark.sample
def test_the_commands_run_together(stage: Stage) -> None:
    (scheduler,), (worker,) = (pod["containers"] for pod in pods(cluster_of(BASE)))
    (job,) = pods(job_of(BASE))[0]["containers"]
    command, env = filled(scheduler)
    running = stage.start("scheduler", command, env)
    running.wait_ready(lambda: probe(stage, "scheduler", scheduler) == 200, timeout_s=60)

    address = "tcp://zds-scheduler.zds.svc.cluster.local:8786"  # as the operator writes it
    command, env = filled(worker, DASK_WORKER_NAME="zds-default-worker-0", DASK_SCHEDULER_ADDRESS=address)
    working = stage.start("worker", [word.replace("/tmp", str(stage.folder)) for word in command], env)
    working.wait_ready(lambda: probe(stage, "worker", worker) == 200, timeout_s=60)

    url, ledger = str(stage.folder / "rows.zarr"), str(stage.folder / "stats.ledger")
    data = write_rows(url, 50)
    command, env = filled(job, ARRAY=url, LEDGER=ledger)
    done = stage.run("job", command, env)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["count"], answer["mean"]) == (data.size, data.mean())
    again = stage.run("job", command, env)
    assert json.loads(again.stdout)["report"]["resumed"] == 50

    # What the operator asks for when it scales.
    status, body = ask(stage, "scheduler", 8787, "/api/v1/adaptive_target")
    assert (status, set(json.loads(body))) == (200, {"workers"})
    status, body = ask(stage, "scheduler", 8787, "/api/v1/retire_workers", json.dumps({"n": 1}).encode())
    assert status == 200
    assert [retired["name"] for retired in json.loads(body).values()] == ["zds-default-worker-0"]
    wait_until(lambda: not working.alive, what="the worker to be retired", timeout_s=30)
