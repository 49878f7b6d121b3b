"""The image, the compose file and the Kubernetes manifests say what README and the code assume."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
MANIFESTS = sorted((ROOT / "docker" / "kuberay").glob("ray*.yaml"))
SCHEMA = Draft202012Validator(json.loads((ROOT / "tests" / "kuberay_schema.json").read_text()))


def locked(package: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1] for line in lines if line.startswith(f"{package}=="))


def cluster_of(manifest: Path) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load(manifest.read_text())["spec"]
    return spec.get("rayClusterSpec", spec)


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    return loaded


def test_the_dockerfile_passes_hadolint():
    program = shutil.which("hadolint", path=Path(sys.executable).parent)

    checked = subprocess.run([program, DOCKERFILE], capture_output=True, text=True)

    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_dockerfile_starts_from_the_ray_that_is_locked():
    """Head, workers and client of different versions refuse each other."""
    assert f"ARG BASE_IMAGE=rayproject/ray:{locked('ray')}-py311" in DOCKERFILE.read_text()


def test_the_image_installs_what_pyproject_asks_for():
    # by path: a package called docker may be installed
    requirements = runpy.run_path(str(ROOT / "docker" / "requirements.py"))["requirements"]

    both = requirements(ROOT / "pyproject.toml", ["s3", "plot"])

    assert {"torch", "deepspeed", "s3fs", "matplotlib"} <= set(both)


def test_everything_that_the_dockerfile_copies_reaches_the_build():
    """`.dockerignore` lets through what it names: a forgotten file breaks the build only there."""
    allowed = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }

    assert {"pyproject.toml", "constraints.txt", "docker/requirements.py"} <= allowed
    assert {"jobs", "workers", "orchestrator", "README.md", "LICENSE"} <= allowed


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_has_only_fields_that_kuberay_knows(manifest: Path):
    errors = [
        f"{error.json_path}: {error.message}"
        for error in SCHEMA.iter_errors(yaml.safe_load(manifest.read_text()))
    ]

    assert errors == []


def test_the_schema_refuses_a_misspelt_field():
    manifest = yaml.safe_load(MANIFESTS[0].read_text())
    manifest["spec"]["backofLimit"] = 3

    assert list(SCHEMA.iter_errors(manifest))


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_a_cluster_asks_for_a_token_and_runs_without_root(manifest: Path):
    cluster = cluster_of(manifest)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]

    assert cluster["authOptions"] == {"mode": "token"}
    for group in groups:
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_one_image_by_digest_serves_the_whole_cluster_and_its_digest_reaches_the_rows(
    manifest: Path,
):
    cluster = cluster_of(manifest)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    containers = [one for group in groups for one in group["template"]["spec"]["containers"]]

    (image,) = {one["image"] for one in containers}
    for one in containers:
        environment = {pair["name"]: pair["value"] for pair in one["env"]}
        assert image.endswith("@" + environment["PRUNEFLEET_IMAGE_DIGEST"])
    assert cluster["rayVersion"] == locked("ray")


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.stem)
def test_only_gpu_workers_come_and_go(manifest: Path):
    """The driver of a sweep sits where the autoscaler and preemption do not reach it."""
    groups = {group["groupName"]: group for group in cluster_of(manifest)["workerGroupSpecs"]}

    assert cluster_of(manifest)["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert groups["drivers"]["minReplicas"] == groups["drivers"]["maxReplicas"] == 1
    assert "driver" in groups["drivers"]["rayStartParams"]["resources"]
    assert groups["gpus"]["minReplicas"] == 0


def test_a_ray_job_is_run_again_on_a_new_cluster_and_then_goes_away():
    spec = yaml.safe_load((ROOT / "docker" / "kuberay" / "rayjob.yaml").read_text())["spec"]

    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert json.loads(spec["entrypointResources"]) == {"driver": 1}


def test_compose_has_a_head_and_two_workers_behind_a_token_and_publishes_on_loopback_only():
    services = compose()["services"]

    assert {"head", "worker-1", "worker-2", "job"} == services.keys()
    for service in services.values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert "RAY_AUTH_TOKEN" not in service["environment"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["volumes"] == ["storage:/storage"]
