"""What deploy/ holds, against the schemas of those who read it: Kubernetes, Ray's cluster launcher, systemd, cron."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipeline.cli import build_parser

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = "1.34"
RAY_CLUSTER = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec"} | {
    "workerGroupSpecs"
}
RAY_JOB = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds"} | {
    "backoffLimit", "rayClusterSpec",
}  # fmt: skip
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Keys of KubeRay's resources (ray.io/v1) that the manifests use; a misspelt one would be dropped in silence there."""


def document(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def ray_clusters() -> Iterator[dict[str, Any]]:
    yield document("kuberay/raycluster.yaml")["spec"]
    yield document("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]


def test_the_cron_job_is_what_kubernetes_takes() -> None:
    job = document("kuberay/cronjob.yaml")
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    job["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_ray_resources_use_known_keys_and_valid_pods() -> None:
    job = document("kuberay/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"].keys() <= RAY_JOB
    pods = 0
    for cluster in ray_clusters():
        assert cluster.keys() <= RAY_CLUSTER
        assert cluster["authOptions"] == {"mode": "token"}, "nobody without the token may submit"
        assert cluster["headGroupSpec"].keys() == {"rayStartParams", "template"}
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert group.keys() <= GROUP
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "one"}, **group["template"]}
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)
            pods += 1
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert pods == 5


def test_every_pod_may_write_to_its_volumes_as_the_images_user() -> None:
    uid = re.search(r"--uid (\d+) ray$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert uid is not None
    pods = [group["template"]["spec"] for c in ray_clusters() for group in (c["headGroupSpec"], *c["workerGroupSpecs"])]
    for pod in pods:
        (container,) = pod["containers"]
        (cache,) = (variable["value"] for variable in container["env"] if variable["name"] == "XDG_CACHE_HOME")
        assert {"name": "cache", "mountPath": cache} in container["volumeMounts"]
        assert any(volume["name"] == "cache" and "emptyDir" in volume for volume in pod["volumes"])
    pods.append(document("kuberay/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"])
    assert len(pods) == 6
    for pod in pods:
        assert pod["securityContext"] == {"fsGroup": int(uid[1]), "fsGroupChangePolicy": "OnRootMismatch"}


def test_gpu_workers_go_to_spot_nodes_alike_and_a_failed_job_makes_no_second_cluster() -> None:
    spots = [group for c in ray_clusters() for group in c["workerGroupSpecs"] if group["groupName"] == "spot-gpu"]
    one, other = (group["template"]["spec"] for group in spots)
    assert one["nodeSelector"] == other["nodeSelector"] == {"handstill.example/capacity": "spot"}
    assert one["tolerations"] == other["tolerations"]
    assert document("kuberay/rayjob.yaml")["spec"]["backoffLimit"] == 0


def test_the_dockerfile_makes_both_images_with_what_ray_up_needs() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", text, re.MULTILINE | re.DOTALL))
    assert list(stages) == ["nodes", "handstill"]
    assert "\nFROM nodes AS handstill\n" in text
    apt = re.search(r"apt-get install (.*) \\", stages["nodes"])
    assert apt is not None
    assert {"rsync", "openssh-client"} <= set(apt[1].split())
    for stage in stages.values():
        assert re.findall(r"^USER (\w+)", stage, re.MULTILINE)[-1] == "ray"
    with (DEPLOY.parent / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    assert re.findall(r"^COPY (\w+) /tmp/handstill/\1$", stages["handstill"], re.MULTILINE) == sorted(packages)
    assert not re.search(r"^COPY (?!pyproject.toml constraints.txt )", stages["nodes"], re.MULTILINE), "no code of ours"
    built = re.findall(r"^#   docker build -f deploy/Dockerfile --target (\w+) -t (\S+) \.$", text, re.MULTILINE)
    assert [target for target, _ in built] == list(stages)
    used = {
        image for path in DEPLOY.rglob("*.yaml") for image in re.findall(r"image: (\S+)", path.read_text())
    }  # fmt: skip
    assert used == {image for _, image in built}


def test_the_cluster_file_is_what_ray_up_takes() -> None:
    cluster = document("ray-cluster.yaml")
    validate_config(prepare_config(cluster))
    with pytest.raises(jsonschema.ValidationError, match="head_node_typ"):
        validate_config(prepare_config(cluster | {"head_node_typ": "head"}))
    spot = cluster["available_node_types"]["spot-gpu"]
    assert spot["min_workers"] == 0
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    text = (DEPLOY / "ray-cluster.yaml").read_text()
    assert "--dashboard-host=127.0.0.1" in text
    assert "security group or firewall must close" in text, "the other ports listen on the nodes' interfaces"


def test_versions_are_those_of_the_constraints() -> None:
    pinned = re.search(r"^ray==(.+)$", (DEPLOY.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert {cluster["rayVersion"] for cluster in ray_clusters()} == {pinned[1]}
    images = [line for path in DEPLOY.rglob("*.yaml") for line in path.read_text().splitlines() if "image:" in line]
    assert len(images) == 7
    assert all(line.endswith(f":{pinned[1]}") for line in images)


def test_the_commands_exist() -> None:
    """Every `handstill ...` that a scheduler would start is one that the command line takes."""
    job = document("kuberay/cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    lines = [job["command"], document("kuberay/rayjob.yaml")["spec"]["entrypoint"].split()]
    for name in ("handstill.cron", "systemd/handstill.service"):
        found = re.search(r"\.venv/bin/(handstill run -c \S+)", (DEPLOY / name).read_text())
        assert found is not None
        lines.append(found[1].split())
    for program, *arguments in lines:
        assert program == "handstill"
        assert build_parser().parse_args(arguments).config == Path("/data/pipeline.yaml")


def test_the_units_are_what_systemd_takes(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed here")
    for name in ("handstill.service", "handstill.timer"):
        text = (DEPLOY / "systemd" / name).read_text()
        (tmp_path / name).write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    units = [str(tmp_path / "handstill.service"), str(tmp_path / "handstill.timer")]
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    (tmp_path / "handstill.timer").write_text("[Timer]\nOnCalender=daily\n")
    checked = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False)
    assert "OnCalender" in checked.stderr


def test_three_failures_leave_the_next_night_its_run_and_a_stop_is_no_failure() -> None:
    service, timer = configparser.ConfigParser(), configparser.ConfigParser()
    service.read(DEPLOY / "systemd" / "handstill.service")
    timer.read(DEPLOY / "systemd" / "handstill.timer")

    def minutes(text: str) -> int:
        found = re.fullmatch(r"(\d+)(h|min)", text)
        assert found is not None
        return int(found[1]) * {"h": 60, "min": 1}[found[2]]

    unit, run = service["Unit"], service["Service"]
    last = int(unit["StartLimitBurst"]) * minutes(run["RestartSec"]) + minutes(timer["Timer"]["RandomizedDelaySec"])
    assert last + minutes(unit["StartLimitIntervalSec"]) < 24 * 60
    assert (run["Restart"], run["SuccessExitStatus"], run["RestartPreventExitStatus"]) == ("on-failure", "143", "2")


@pytest.mark.parametrize("code", [0, 2])
def test_the_cron_line_mails_only_failures_and_logs_to_a_folder_of_its_user(tmp_path: Path, code: int) -> None:
    text = (DEPLOY / "handstill.cron").read_text()
    (line,) = [line for line in text.splitlines() if re.match(r"[\d*]", line)]
    command = line.split(maxsplit=6)[6]
    assert set(re.findall(r"/var/log/\S+?(?=[\s;])", command)) == {"/var/log/handstill/run.log"}
    assert "install -d -o handstill -g handstill -m 755 /var/log/handstill\n" in text
    assert "logrotate" in text
    program = tmp_path / ".venv" / "bin" / "handstill"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho what it says\nexit {code}\n")
    program.chmod(0o755)
    (tmp_path / "log").mkdir()
    command = command.replace("/srv/handstill", str(tmp_path)).replace("/var/log/handstill", str(tmp_path / "log"))
    ran = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert ran.stdout == (f"handstill run: exit code {code}\nwhat it says\n" if code else "")
    assert (ran.stderr, (tmp_path / "log" / "run.log").read_text()) == ("", "what it says\n")


def test_the_cron_line_has_six_fields_a_user_and_a_command() -> None:
    lines = [line for line in (DEPLOY / "handstill.cron").read_text().splitlines() if re.match(r"[\d*]", line)]
    (line,) = lines
    fields = line.split(maxsplit=6)
    assert all(re.fullmatch(r"[\d*/,-]+", field) for field in fields[:5])
    assert fields[5] == "handstill"
    assert "%" not in fields[6], "cron makes a line break of it"
    assert subprocess.run(["bash", "-n", "-c", fields[6]], check=False).returncode == 0
