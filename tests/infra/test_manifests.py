"""The manifests of infra/kuberay and the Dockerfile: valid, consistent with the code, without a typo or a secret."""

import copy
import re
import shlex
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jobs.cli import load, parser
from jobs.rayjob import named

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "infra" / "kuberay"
KUBERNETES = "1.30"
SCHEMA = jsonschema.Draft202012Validator(yaml.safe_load((Path(__file__).parent / "kuberay_schema.yaml").read_text()))


def documents(name):
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def everything():
    return [(path.name, document) for path in sorted(FOLDER.glob("*.yaml")) for document in documents(path.name)]


def cluster_spec(document):
    """The RayClusterSpec of a KubeRay document."""
    spec = document["spec"]
    return spec if document["kind"] == "RayCluster" else spec.get("jobTemplate", spec)["rayClusterSpec"]


def groups(spec):
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


CLUSTER, JOB, RAY_CRON = (documents(f"{name}.yaml")[0] for name in ("cluster", "job", "raycronjob"))
(CRON,) = documents("cronjob.yaml")
SPEC = cluster_spec(CLUSTER)


def problems(document):
    """Errors of a document: KubeRay's kinds by the schema here, pod templates and the rest by Kubernetes' schema."""
    if document["apiVersion"] != "ray.io/v1":
        return _core(document)
    found = [error.message for error in SCHEMA.iter_errors(document)]
    if found:
        return found
    spec = cluster_spec(document)
    templates = [group["template"] for group in groups(spec)]
    # The operator adds the autoscaler as a container: check these options as a container.
    part = {key: spec["autoscalerOptions"][key] for key in ("resources", "securityContext")}
    templates.append({"spec": {"containers": [{"name": "autoscaler", **part}]}})
    name = {"name": "checked"}
    pods = [{"apiVersion": "v1", "kind": "PodTemplate", "metadata": name, "template": one} for one in templates]
    return [problem for pod in pods for problem in _core(pod)]


def _core(document):
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


@pytest.mark.parametrize(
    ("name", "document"), everything(), ids=lambda value: value if isinstance(value, str) else value["kind"]
)
def test_manifests_are_valid(name, document):
    assert problems(document) == []


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("RayCluster", ["spec", "enableInTreeAutoScaling"], True),
        ("RayCluster", ["spec", "workerGroupSpecs", 1, "minReplica"], 0),
        ("RayCluster", ["spec", "workerGroupSpecs", 1, "rayStartParams", "num-cpus"], 8),
        ("RayCluster", ["spec", "headGroupSpec", "template", "spec", "terminationGracePeriod"], 5),
        (
            "RayCluster",
            ["spec", "headGroupSpec", "template", "spec", "containers", 0, "securityContext", "runAsNonroot"],
            True,
        ),
        ("RayCluster", ["spec", "autoscalerOptions", "securityContext", "privilegd"], False),
        ("RayJob", ["spec", "activeDeadlineSecond"], 5),
        ("RayJob", ["spec", "submissionMode"], "HttpMode"),
        ("RayCronJob", ["spec", "timezone"], "UTC"),
        ("CronJob", ["spec", "concurencyPolicy"], "Forbid"),
        ("CronJob", ["spec", "jobTemplate", "spec", "template", "spec", "containers", 0, "arg"], []),
        ("Role", ["rules", 0, "verb"], []),
    ],
)
def test_a_misspelt_field_or_value_is_found(kind, path, value):
    document = copy.deepcopy(next(document for _, document in everything() if document["kind"] == kind))
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    assert problems(document)


def test_all_kinds_are_there():
    assert sorted({document["kind"] for _, document in everything()}) == [
        "CronJob",
        "RayCluster",
        "RayCronJob",
        "RayJob",
        "Role",
        "RoleBinding",
        "ServiceAccount",
    ]


def test_cluster_job_and_schedule_describe_the_same_cluster():
    assert cluster_spec(JOB) == cluster_spec(RAY_CRON) == SPEC
    runs = [
        {k: v for k, v in spec.items() if k != "entrypoint"} for spec in (JOB["spec"], RAY_CRON["spec"]["jobTemplate"])
    ]
    assert runs[0] == runs[1]
    assert (CRON["spec"]["schedule"], CRON["spec"]["timeZone"]) == (
        RAY_CRON["spec"]["schedule"],
        RAY_CRON["spec"]["timeZone"],
    )


def configuration(entrypoint):
    """The configuration of an entrypoint, parsed by the job's own parser."""
    words = shlex.split(entrypoint.replace("$(date -u +%Y-%m-%dT%H-%M-%SZ)", "NOW"))
    assert words[:3] == ["python", "-m", "jobs.caption"]
    arguments = parser("").parse_args(words[3:])
    assert arguments.config == "/app/configs/caption.yaml"
    arguments.config = str(ROOT / "configs" / "caption.yaml")
    return load(arguments)


@pytest.mark.parametrize("spec", [JOB["spec"], RAY_CRON["spec"]["jobTemplate"]], ids=["RayJob", "RayCronJob"])
def test_entrypoints_are_commands_that_the_job_takes(spec):
    job = configuration(spec["entrypoint"])
    assert job.sink.uri.startswith(f"{job.source.known}/run=")


def test_the_cron_job_gives_every_firing_a_folder_of_its_own():
    job = configuration(named(JOB, "lightkv-nightly-29384720", "uid")["spec"]["entrypoint"])
    assert job.sink.uri == f"{job.source.known}/run=lightkv-nightly-29384720"
    (container,) = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    from jobs import rayjob

    options = set(re.findall(r"--[a-z-]+", " ".join(container["args"])))
    assert options <= set(re.findall(r"--[a-z-]+", Path(rayjob.__file__).read_text()))
    assert container["args"][0] == "jobs.rayjob"
    volume = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]["volumes"][0]
    comment = (FOLDER / "cronjob.yaml").read_text()
    assert f"configmap {volume['configMap']['name']} --from-file=infra/kuberay/job.yaml" in comment
    assert f"{container['volumeMounts'][0]['mountPath']}/job.yaml" in container["args"]


def test_the_cron_job_may_do_what_it_does_and_nothing_else():
    accounts, (role,), (binding,) = (
        [d for d in documents("access.yaml") if d["kind"] == kind] for kind in ("ServiceAccount", "Role", "RoleBinding")
    )
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    pod = CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert [subject["name"] for subject in binding["subjects"]] == [pod["serviceAccountName"]]
    used = {group["template"]["spec"]["serviceAccountName"] for group in groups(SPEC)} | {pod["serviceAccountName"]}
    assert used == {account["metadata"]["name"] for account in accounts}


def test_one_run_at_a_time_and_each_ends_before_the_next():
    cron = CRON["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"
    assert 0 < cron["startingDeadlineSeconds"] < 86400
    assert JOB["spec"]["activeDeadlineSeconds"] < cron["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 86400
    assert JOB["spec"]["shutdownAfterJobFinishes"]


def containers():
    pods = [(group["template"]["spec"], group) for group in groups(SPEC)]
    pods.append((CRON["spec"]["jobTemplate"]["spec"]["template"]["spec"], None))
    return [(pod, container) for pod, _ in pods for container in pod["containers"]]


@pytest.mark.parametrize(("pod", "container"), containers(), ids=["head", "decode", "gpu", "cron"])
def test_pods_run_confined_and_without_secrets(pod, container):
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(container["resources"]) == {"requests", "limits"}
    assert "memory" in container["resources"]["limits"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert not any("SECRET" in variable["name"] or "KEY" in variable["name"] for variable in container.get("env", []))


def test_workers_get_no_token_of_the_api_server():
    assert all(group["template"]["spec"]["automountServiceAccountToken"] is False for group in SPEC["workerGroupSpecs"])


def _bytes(quantity):
    return int(quantity.removesuffix("Gi")) << 30


@pytest.mark.parametrize("group", groups(SPEC), ids=["head", "decode", "gpu"])
def test_the_object_store_fits_into_shared_memory_and_that_into_the_limit(group):
    pod = group["template"]["spec"]
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    assert volumes["shm"]["medium"] == "Memory"
    shm = _bytes(volumes["shm"]["sizeLimit"])
    limits = pod["containers"][0]["resources"]["limits"]
    assert int(group["rayStartParams"]["object-store-memory"]) < shm < _bytes(limits["memory"]) / 2
    disk = sum(_bytes(volume["sizeLimit"]) for volume in volumes.values() if volume.get("medium") != "Memory")
    assert disk <= _bytes(limits["ephemeral-storage"])


def test_groups_fit_the_configuration():
    job = configuration(JOB["spec"]["entrypoint"])
    decode, gpu = SPEC["workerGroupSpecs"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert gpu["minReplicas"] == gpu["replicas"] == 0
    assert int(limits["nvidia.com/gpu"]) >= job.ray.actors.num_gpus
    assert gpu["maxReplicas"] * int(limits["nvidia.com/gpu"]) >= job.ray.actors.max * job.ray.actors.num_gpus
    assert job.ray.actors.num_cpus <= int(limits["cpu"])
    cpus = decode["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    assert job.decode.num_cpus <= int(cpus)
    assert "nvidia.com/gpu" not in decode["template"]["spec"]["containers"][0]["resources"]["limits"]
    copied = next(v["emptyDir"]["sizeLimit"] for v in decode["template"]["spec"]["volumes"] if v["name"] == "tmp")
    assert _bytes(copied) >= int(cpus) / job.decode.num_cpus * job.decode.max_object_bytes


def test_pods_have_time_to_drain():
    job = configuration(JOB["spec"]["entrypoint"])
    head, *workers = (group["template"]["spec"] for group in groups(SPEC))
    environment = {variable["name"]: variable["value"] for variable in head["containers"][0]["env"]}
    stop_s = float(environment["RAY_JOB_STOP_WAIT_TIME_S"])
    command = head["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert command[:3] == ["python", "-m", "jobs.drain"]
    assert job.run.grace_s < stop_s < float(command[-1]) < head["terminationGracePeriodSeconds"]
    for worker in workers:
        program, seconds = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        assert job.run.grace_s < float(seconds) < worker["terminationGracePeriodSeconds"]


def test_metrics_have_a_port_on_every_pod():
    for group in groups(SPEC):
        ports = {port["name"]: port["containerPort"] for port in group["template"]["spec"]["containers"][0]["ports"]}
        assert ports["metrics"] == 8080


def test_one_image_and_one_ray_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {container["image"] for _, container in containers()} == {f"lightkv:{version}"}
    dockerfile = (ROOT / "infra" / "Dockerfile").read_text()
    assert f"-t lightkv:{version} ." in dockerfile
    assert f"ARG VERSION={version}\n" in dockerfile
    ray = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE).group(1)
    assert SPEC["rayVersion"] == ray


def test_the_image_holds_every_package_and_runs_as_the_pods_do():
    dockerfile = (ROOT / "infra" / "Dockerfile").read_text()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {package.split(".")[0] for package in packages} <= names
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "configs"} <= names
    allowed = (ROOT / "infra" / "Dockerfile.dockerignore").read_text().splitlines()
    assert names == {line.removeprefix("!") for line in allowed if line.startswith("!")}
    assert "USER 1000:1000" in dockerfile
    assert "WORKDIR /app" in dockerfile


def test_the_base_image_is_pinned_to_the_tested_python():
    base = re.search(
        r"^ARG BASE=python:(3\.\d+)\.\d+-slim-\w+$", (ROOT / "infra" / "Dockerfile").read_text(), re.MULTILINE
    )
    tested = re.search(r"CPython (3\.\d+)", (ROOT / "constraints.txt").read_text()).group(1)
    assert base.group(1) == tested
    assert f"/install/lib/python{tested}/site-packages" in (ROOT / "infra" / "Dockerfile").read_text()
