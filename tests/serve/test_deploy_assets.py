"""Container, Kubernetes and Slurm files: rendered as recorded, and in agreement with what they start."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from puzzle_trtllm.serve.triton.contract import MODEL_NAME, render_config
from puzzle_trtllm.serve.triton.metrics import _GAUGES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serve" / "deploy"
GOLDEN = ROOT / "tests" / "data" / "golden" / "kubernetes"
OVERLAYS = ("one-gpu", "eight-gpus")
PORTS = {8000, 8001, 8002}


def rendered(overlay):
    return {item["kind"]: item for item in yaml.safe_load_all((GOLDEN / f"{overlay}.yaml").read_text())}


def container_of(overlay):
    (container,) = rendered(overlay)["Deployment"]["spec"]["template"]["spec"]["containers"]
    return container


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl renders the overlays")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_render_as_recorded(overlay):
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == (GOLDEN / f"{overlay}.yaml").read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
class TestKubernetes:
    def test_names_fit_together(self, overlay):
        items = rendered(overlay)
        labels = items["Deployment"]["spec"]["template"]["metadata"]["labels"]
        assert items["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert items["Service"]["spec"]["selector"].items() <= labels.items()
        pod = items["Deployment"]["spec"]["template"]["spec"]
        mounted = {mount["name"] for mount in container_of(overlay)["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        assert {port["containerPort"] for port in container_of(overlay)["ports"]} == PORTS
        names = {port["name"] for port in container_of(overlay)["ports"]}
        assert {port["targetPort"] for port in items["Service"]["spec"]["ports"]} == names

    def test_gpus_engine_and_shared_memory(self, overlay):
        gpus, engine = {"one-gpu": (1, "child-1gpu"), "eight-gpus": (8, "child-8gpu")}[overlay]
        container = container_of(overlay)
        assert container["resources"]["limits"] == {"nvidia.com/gpu": gpus}
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert mounts["/engine"]["subPath"] == engine and mounts["/engine"]["readOnly"] is True
        assert "/dev/shm" in mounts

    def test_one_token_proves_life_and_a_full_queue_does_not_kill(self, overlay):
        probe = container_of(overlay)["livenessProbe"]
        command = probe["exec"]["command"]
        assert command[-1].endswith(f"/v2/models/{MODEL_NAME}/generate")
        request = json.loads(command[command.index("-d") + 1])
        assert request["sampling_param_max_tokens"] == 1
        assert all(f'name: "{name}"' in render_config() for name in request)
        assert not {"-f", "--fail", "-sf"} & set(command)
        assert probe["timeoutSeconds"] > int(command[command.index("-m") + 1])

    def test_loading_may_take_half_an_hour(self, overlay):
        probe = container_of(overlay)["startupProbe"]
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800


def test_only_one_gpu_pods_are_scaled_by_a_metric_that_exists():
    assert "HorizontalPodAutoscaler" not in rendered("eight-gpus")
    (metric,) = rendered("one-gpu")["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] in _GAUGES


def test_compose_opens_ports_to_this_machine_only():
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["triton"]
    assert sorted(service["ports"]) == [f"127.0.0.1:{port}:{port}" for port in sorted(PORTS)]
    assert service["volumes"] == ["${ENGINE:?the engine folder}:/engine:ro"]


def test_the_image_starts_what_build_writes():
    text = (DEPLOY / "Dockerfile").read_text()
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1]) == ["/engine/launch/tritonserver.sh"]
    assert {int(port) for port in re.search(r"^EXPOSE (.*)$", text, re.MULTILINE)[1].split()} == PORTS


def test_the_slurm_script_is_a_shell_script_that_starts_a_launch_script():
    subprocess.run(["bash", "-n", str(DEPLOY / "slurm.sbatch")], check=True)
    assert "trtllm-llmapi-launch /engine/launch/trtllm-serve.sh" in (DEPLOY / "slurm.sbatch").read_text()
