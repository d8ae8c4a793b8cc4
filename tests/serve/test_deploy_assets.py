"""Container, Kubernetes and Slurm files: rendered as recorded, and in agreement with what they start."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from puzzle_trtllm.serve.triton.contract import MODEL_NAME, render_config
from puzzle_trtllm.serve.triton.metrics import _GAUGES

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serve" / "deploy"
GOLDEN = ROOT / "tests" / "data" / "golden" / "kubernetes"
SEVERAL = DEPLOY / "kubernetes" / "several-nodes"
OVERLAYS = ("one-gpu", "eight-gpus", "several-nodes")
KUBERNETES = ("1.29", "1.32", "1.37")
PORTS = {8000, 8001, 8002}


def rendered(overlay):
    return {item["kind"]: item for item in yaml.safe_load_all((GOLDEN / f"{overlay}.yaml").read_text())}


def templates_of(overlay):
    """Pod templates by what the pods are; `serving` answers requests."""
    items = rendered(overlay)
    if "Deployment" in items:
        return {"serving": items["Deployment"]["spec"]["template"]}
    group = items["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return {"serving": group["leaderTemplate"], "worker": group["workerTemplate"]}


def container_of(overlay, pod="serving"):
    (container,) = templates_of(overlay)[pod]["spec"]["containers"]
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
        labels = {pod: template["metadata"]["labels"] for pod, template in templates_of(overlay).items()}
        selector = items["Service"]["spec"]["selector"].items()
        assert [pod for pod in labels if selector <= labels[pod].items()] == ["serving"]
        if "Deployment" in items:
            assert items["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels["serving"].items()
        for pod, template in templates_of(overlay).items():
            mounted = {mount["name"] for mount in container_of(overlay, pod)["volumeMounts"]}
            assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
        assert {port["containerPort"] for port in container_of(overlay)["ports"]} == PORTS
        names = {port["name"] for port in container_of(overlay)["ports"]}
        assert {port["targetPort"] for port in items["Service"]["spec"]["ports"]} == names

    def test_a_pod_has_no_token_of_the_cluster_and_on_one_node_no_rights_of_root(self, overlay):
        for template in templates_of(overlay).values():
            assert template["spec"]["automountServiceAccountToken"] is False
        context = container_of(overlay)["securityContext"]
        if overlay != "several-nodes":  # there sshd changes its user, and NCCL locks memory
            assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}

    def test_gpus_engine_and_shared_memory(self, overlay):
        expected = {"one-gpu": (1, "child-1gpu"), "eight-gpus": (8, "child-8gpu"), "several-nodes": (8, "child-16gpu")}
        gpus, engine = expected[overlay]
        for pod in templates_of(overlay):
            container = container_of(overlay, pod)
            assert container["resources"]["limits"] == {"nvidia.com/gpu": gpus}
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert mounts["/engine"]["subPath"] == engine and mounts["/engine"]["readOnly"] is True
            assert "/dev/shm" in mounts

    def test_prometheus_finds_the_metrics_port(self, overlay):
        template = templates_of(overlay)["serving"]
        annotations = {
            key.removeprefix("prometheus.io/"): text for key, text in template["metadata"]["annotations"].items()
        }
        ports = {port["name"]: port["containerPort"] for port in container_of(overlay)["ports"]}
        assert annotations == {"scrape": "true", "port": str(ports["metrics"]), "path": "/metrics"}

    def test_scaled_by_requests_waiting(self, overlay):
        scaler = rendered(overlay)["HorizontalPodAutoscaler"]["spec"]
        (metric,) = scaler["metrics"]
        assert metric["pods"]["metric"]["name"] == "puzzle_requests_waiting" and "puzzle_requests_waiting" in _GAUGES
        target = rendered(overlay)[scaler["scaleTargetRef"]["kind"]]
        assert scaler["scaleTargetRef"] == {
            "apiVersion": target["apiVersion"],
            "kind": target["kind"],
            "name": target["metadata"]["name"],
        }

    @pytest.mark.parametrize("version", KUBERNETES)
    def test_kubernetes_own_schemas_take_them(self, overlay, version):
        """Strict: a key that the API server does not know is an error. (LeaderWorkerSet is no kind of its own.)"""
        items = list(rendered(overlay).values())
        items += [{"apiVersion": "v1", "kind": "PodTemplate", "template": t} for t in templates_of(overlay).values()]
        for item in items:
            if item["kind"] != "LeaderWorkerSet":
                kubernetes_validate.validate(item, version, strict=True)

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


def test_a_schema_that_would_notice():
    item = rendered("one-gpu")["Deployment"]
    item["spec"]["template"]["spec"]["containers"][0]["livenessProbes"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(item, KUBERNETES[0], strict=True)


class TestSeveralNodes:
    def test_leaderworkersets_own_schema_takes_it(self):
        schema = json.loads((ROOT / "tests" / "data" / "leaderworkerset-v1.schema.json").read_text())
        item = rendered("several-nodes")["LeaderWorkerSet"]
        jsonschema.validate(item, schema)
        item["spec"]["leaderWorkerTemplate"]["restartPolicy"] = "Never"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(item, schema)

    def test_probes_are_those_of_one_node_but_for_the_time_to_load(self):
        one, several = container_of("one-gpu"), container_of("several-nodes")
        for probe in ("livenessProbe", "readinessProbe"):
            assert one[probe] == several[probe]
        assert one["startupProbe"]["httpGet"] == several["startupProbe"]["httpGet"]

    def test_pods_run_the_scripts_of_the_folder(self):
        scripts = rendered("several-nodes")["ConfigMap"]["data"]
        assert scripts == {file.name: file.read_text() for file in SEVERAL.glob("*.sh")}
        for pod in templates_of("several-nodes"):
            command = container_of("several-nodes", pod)["command"]
            assert command[0] == "bash" and Path(command[1]).name in scripts
            mounts = {mount["mountPath"]: mount["name"] for mount in container_of("several-nodes", pod)["volumeMounts"]}
            volumes = {volume["name"]: volume for volume in templates_of("several-nodes")[pod]["spec"]["volumes"]}
            config_map = volumes[mounts[str(Path(command[1]).parent)]]["configMap"]["name"]
            assert config_map == rendered("several-nodes")["ConfigMap"]["metadata"]["name"]


def test_compose_opens_ports_to_this_machine_only():
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["triton"]
    assert sorted(service["ports"]) == [f"127.0.0.1:{port}:{port}" for port in sorted(PORTS)]
    assert service["volumes"] == ["${ENGINE:?the engine folder}:/engine:ro"]


def test_the_key_of_the_ranks_opens_no_tunnels(tmp_path):
    """sshd's word for it stands in front of the key."""
    (tmp_path / "keys").mkdir()
    for name, text in (("private", "PRIVATE"), ("public", "ssh-ed25519 AAAA me@here\n")):
        (tmp_path / "keys" / name).write_text(text)
    script = (SEVERAL / "worker.sh").read_text()
    script = script.replace("mkdir -p /run/sshd", "").replace("exec /usr/sbin/sshd -D -e -f", "cat")
    environment = {**os.environ, "KEYS": str(tmp_path / "keys"), "TMPDIR": str(tmp_path)}
    subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True)
    (authorized,) = tmp_path.glob("tmp.*/authorized")
    assert authorized.read_text() == "restrict ssh-ed25519 AAAA me@here\n"


def test_compose_gives_no_rights_of_root():
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["triton"]
    assert (service["cap_drop"], service["security_opt"]) == (["ALL"], ["no-new-privileges:true"])


def pip_commands(text):
    """The words of every `pip` command in the lines of a Dockerfile or of a guide."""
    lines = text.replace("--no-cache-dir ", "").replace("\\\n   ", "").splitlines()
    commands = [re.match(r"(?:RUN | && )?(pip .*?)(?: \\)?$", line) for line in lines]
    return [shlex.split(command[1], comments=True) for command in commands if command]


def test_the_image_installs_what_the_package_asks_for():
    """The package, which brings what it always needs, and its extra `serve`."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    asked = json.loads(re.search(r"^serve = (.*)$", pyproject, re.MULTILINE)[1])
    installed = " ".join(word for line in pip_commands((DEPLOY / "Dockerfile").read_text()) for word in line)
    assert "/opt/puzzle-trtllm" in installed and len(asked) == 4
    assert [one for one in asked if one.replace("[grpc]", "") not in installed] == []


def test_nothing_that_nvidias_image_holds_is_replaced():
    """pip adds to what its list names, or installs one package alone; the guide does as the image does."""
    listed, *installs = pip_commands((DEPLOY / "Dockerfile").read_text())
    assert listed == ["pip", "list", "--format=freeze", ">", "/tmp/image.txt"]
    pinned, alone = ["-c", "/tmp/image.txt"], ["--no-deps", "tritonclient>=2.52,<2.70"]
    assert [line[2:4] for line in installs] == [pinned, alone]
    guide = (ROOT / "docs" / "deploy.md").read_text().split("## 2. ")[0].replace("./puzzle-", "/opt/puzzle-")
    assert pip_commands(guide) == [listed, *installs]


def test_the_image_starts_what_build_writes():
    text = (DEPLOY / "Dockerfile").read_text()
    assert json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1]) == ["/engine/launch/tritonserver.sh"]
    assert {int(port) for port in re.search(r"^EXPOSE (.*)$", text, re.MULTILINE)[1].split()} == PORTS


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        (None, "trtllm-llmapi-launch /engine/launch/trtllm-serve.sh --host 0.0.0.0 --port 8000"),
        ("tritonserver", "trtllm-llmapi-launch /engine/launch/tritonserver.sh --host 0.0.0.0"),
    ],
)
def test_the_slurm_script_starts_a_launch_script_on_ranks_with_the_engines_environment(tmp_path, server, expected):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$SHARES: $*"\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "environment.sh").write_text("export SHARES=0.25,0.75\n")
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ENGINE": str(tmp_path), "IMAGE": "x.sqsh"}
    variables |= {"SERVER": server} if server else {}
    command = ["bash", str(DEPLOY / "slurm.sbatch")]
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("0.25,0.75: --mpi=pmix ") and ran.stdout.strip().endswith(expected)
    wrong = subprocess.run(command, env={**variables, "SERVER": "x"}, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "expected trtllm-serve or tritonserver" in wrong.stderr
