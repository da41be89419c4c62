"""Cluster files: accepted by the tools that read them as far as that shows offline, and in step with the project."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from longalign_ray.config_load import load_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CHECKOUT = "/mnt/longalign/longalign_ray/"


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{package} is not in constraints.txt"
    return found.group(1)


@pytest.fixture
def aws() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "aws.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def kuberay() -> dict[str, dict[str, Any]]:
    text = (CLUSTER / "kuberay" / "rayjob-train.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def test_aws_is_accepted_by_rays_validator(aws: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(aws))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0

    broken = copy.deepcopy(prepared)
    broken["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(Exception, match="min_worker"):
        validate_config(broken)


def test_aws_scales_gpu_workers_from_none_and_keeps_them_off_the_head(aws: dict[str, Any]) -> None:
    head, gpu = aws["available_node_types"]["head"], aws["available_node_types"]["gpu"]
    assert "GPU" not in head["resources"]
    assert gpu["resources"]["GPU"] > 0
    assert gpu["min_workers"] == 0 < gpu["max_workers"] <= aws["max_workers"]
    assert head["node_config"]["InstanceType"] != gpu["node_config"]["InstanceType"]


def test_aws_authenticates_by_token_on_every_machine(aws: dict[str, Any]) -> None:
    assert "-e RAY_AUTH_MODE=token" in aws["docker"]["run_options"]
    assert aws["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("--dashboard-host=127.0.0.1" in command for command in aws["head_start_ray_commands"])


def test_aws_installs_the_project_under_its_constraints_on_the_same_ray(aws: dict[str, Any]) -> None:
    [install] = aws["setup_commands"]
    [(target, source)] = [(target, source) for target, source in aws["file_mounts"].items() if source == "."]
    assert source == "."
    assert install == f"pip install -c {target}/constraints.txt -e {target}"
    for image in (aws["docker"]["head_image"], aws["docker"]["worker_image"]):
        assert re.fullmatch(rf"rayproject/ray:{re.escape(pinned('ray'))}-py311-(cpu|gpu)", image)
    assert aws["docker"]["worker_image"].endswith("-gpu")


@pytest.mark.parametrize("name", ["aws.yaml", "kuberay/rayjob-train.yaml"])
def test_head_comment_uses_files_that_exist(name: str) -> None:
    comment = [line for line in (CLUSTER / name).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    named = re.findall(r"\b(?:jobs|cluster)/[\w./-]+\.(?:py|yaml)", "\n".join(comment))
    assert named
    assert all((ROOT / path).is_file() for path in named), named


def containers(kuberay: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    cluster = kuberay["RayJob"]["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return {group["template"]["spec"]["containers"][0]["name"]: group["template"]["spec"] for group in groups}


def test_rayjob_runs_the_pinned_ray_with_a_token(kuberay: dict[str, dict[str, Any]]) -> None:
    job = kuberay["RayJob"]
    cluster = job["spec"]["rayClusterSpec"]
    assert job["apiVersion"] == "ray.io/v1"
    assert cluster["rayVersion"] == pinned("ray")
    assert cluster["authOptions"] == {"mode": "token"}
    for pod in containers(kuberay).values():
        image = pod["containers"][0]["image"]
        assert re.fullmatch(rf"rayproject/ray:{re.escape(pinned('ray'))}-py311-(cpu|gpu)", image)
        [install] = pod["containers"][0]["command"]
        assert "pip install -c /tmp/longalign_ray/constraints.txt /tmp/longalign_ray" in install


def test_rayjob_entrypoint_is_a_job_and_a_recipe_that_loads(kuberay: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    python, job, recipe, *overrides = kuberay["RayJob"]["spec"]["entrypoint"].split()
    assert python == "python"
    assert job.startswith(CHECKOUT)
    assert (ROOT / job.removeprefix(CHECKOUT)).is_file()
    config = load_config(ROOT / recipe.removeprefix(CHECKOUT), overrides)
    assert config.run_dir.startswith("/mnt/longalign/")  # on the volume that all pods share
    assert config.model.chat_template == "llama-2"
    gpus = int(containers(kuberay)["ray-worker"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    most = kuberay["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] * gpus
    assert config.train.use_gpu
    assert config.train.max_workers <= most
    cpus = int(containers(kuberay)["ray-worker"]["containers"][0]["resources"]["limits"]["cpu"])
    assert config.train.cpus_per_worker * min(config.train.max_workers, gpus) <= cpus


def test_rayjob_scales_gpu_pods_from_none_on_a_shared_volume(kuberay: dict[str, dict[str, Any]]) -> None:
    cluster = kuberay["RayJob"]["spec"]["rayClusterSpec"]
    [group] = cluster["workerGroupSpecs"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert (group["replicas"], group["minReplicas"]) == (0, 0)
    assert group["maxReplicas"] > 0
    claim = kuberay["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    pods = [*containers(kuberay).values(), kuberay["Pod"]["spec"]]
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        shared = volumes[mounts["/mnt/longalign"]]
        assert shared["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    for pod in containers(kuberay).values():
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"]  # else Ray counts what Kubernetes may take back
    assert "nvidia.com/gpu" not in containers(kuberay)["ray-head"]["containers"][0]["resources"]["limits"]
