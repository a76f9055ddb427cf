"""The chart on a cluster, with a real engine: where engines come from, and what a Pod's status says when one cannot."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from cluster_client import CHART, Namespace, kubectl, messages, pod_of, run, selector, until
from pod_logs import PodLogs

DEMO = "/opt/triton-trtllm/demo-gpt2"
IMAGE_SOURCE = ("engine.source=image", "model.checkpoint=", "builderImage.repository=")
BAKED = (*IMAGE_SOURCE, "image.repository=triton-trtllm/server-demo")


@pytest.fixture(scope="module")
def restricted(make_namespace: Callable[[str], Namespace]) -> Namespace:
    return make_namespace("restricted")


@pytest.fixture(scope="module")
def privileged(make_namespace: Callable[[str], Namespace]) -> Namespace:
    return make_namespace("privileged")


@pytest.fixture(scope="module")
def claim(restricted: Namespace, privileged: Namespace, image_tag: str) -> Iterator[str]:
    """A claim that user 1000 may write, on a cluster without dynamic volumes too: a folder that all nodes share."""
    name = f"engines-{restricted.name}"
    folder = f"/var/tmp/{name}"
    prepare = pod_of("prepare", f"triton-trtllm/server-cpu:{image_tag}", ["chown", "1000:1000", "/store"])
    prepare["spec"]["securityContext"] = {"runAsUser": 0}
    prepare["spec"]["containers"][0]["securityContext"] = {}
    prepare["spec"]["containers"][0]["volumeMounts"] = [{"name": "store", "mountPath": "/store"}]
    prepare["spec"]["volumes"] = [{"name": "store", "hostPath": {"path": folder, "type": "DirectoryOrCreate"}}]
    privileged.run_to_end(prepare, 60)
    spec = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": name}
    volume = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteMany"],
        "hostPath": {"path": folder},
        "persistentVolumeReclaimPolicy": "Retain",
    }
    restricted.apply(
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "engines"},
            "spec": spec | {"resources": {"requests": {"storage": "1Gi"}}},
        },
    )
    yield "engines"
    kubectl("delete", "persistentvolume", name, "--wait=false")


def asks(namespace: Namespace, release: str) -> None:
    """`helm test`: one request through the Service, by a Pod that fails without a complete answer."""
    told = namespace.helm("test", release, "--timeout", "90s")
    assert told.count("Phase:          Succeeded") == 1, told


# ---- where engines come from


def test_a_baked_engine_serves_under_restricted(restricted: Namespace):
    restricted.install("baked", *BAKED, wait=90)
    asks(restricted, "baked")


def test_the_client_deployment_asks_every_pod(restricted: Namespace):
    restricted.install("baked", *BAKED, "replicas=2", "client.enabled=true", wait=90)
    restricted.rolled_out("baked-client", 60)

    def answered() -> bool:
        paths = [
            f"/api/v1/namespaces/{restricted.name}/pods/{pod['metadata']['name']}:8002/proxy/metrics"
            for pod in restricted.ready_pods()
        ]
        counts = [kubectl("get", "--raw", path).count('finish_reason="length"} 0\n') for path in paths]
        return len(counts) == 2 and not any(counts)

    until("answers of both Pods", answered, 60)
    restricted.helm("uninstall", "baked", "--wait=false")


def test_four_pods_on_empty_nodes_build_once_per_node(privileged: Namespace):
    folder = f"/mnt/node/{privileged.name}"
    built: dict[str, int] = {}
    with PodLogs(privileged, "build") as logs:
        privileged.install("demo", f"engine.node.path={folder}", "replicas=4", wait=240)
        for pod in privileged.pods():
            log = logs.of(pod["metadata"]["name"])
            node = pod["spec"]["nodeName"]
            built[node] = built.get(node, 0) + ("compile:" in log)
            assert "compile:" in log or "(stored engine" in log, log
            assert "compile:" in log or "waiting for" in log, f"the others wait, and say so: {log}"
    assert set(built.values()) == {1}, built
    asks(privileged, "demo")


def test_the_next_pod_starts_from_the_nodes_store(privileged: Namespace):
    before = {pod["metadata"]["name"] for pod in privileged.pods()}
    privileged.kubectl("scale", "deployment/demo", "--replicas=2")
    with PodLogs(privileged, "build") as logs:
        privileged.kubectl("scale", "deployment/demo", "--replicas=3")
        privileged.rolled_out("demo", 90)
        (new,) = [pod for pod in privileged.ready_pods() if pod["metadata"]["name"] not in before]
        assert "(stored)" in logs.of(new["metadata"]["name"])
    privileged.helm("uninstall", "demo", "--wait=false")


def test_a_claim_serves_under_restricted_and_prebuild_fills_it(restricted: Namespace, claim: str):
    values = ("engine.source=claim", f"engine.claim.name={claim}", "engine.prebuild.enabled=true")
    with PodLogs(restricted, "build") as logs:
        restricted.install("claimed", *values)
        job = restricted.get("job", "claimed-prebuild")
        assert job["status"]["succeeded"] == 1
        restricted.rolled_out("claimed", 90)
        (pod,) = restricted.pods(selector("claimed"))
        assert "(stored)" in logs.of(pod["metadata"]["name"])
    asks(restricted, "claimed")


def test_a_read_only_store_serves_what_it_has(restricted: Namespace, claim: str):
    """After the test above."""
    readonly = ("engine.source=claim", f"engine.claim.name={claim}", "engine.claim.readOnly=true")
    restricted.install("readonly", *readonly, wait=90)
    asks(restricted, "readonly")
    restricted.install("readonly", *readonly, "engine.maxBatchSize=3")  # an engine that the store does not have
    sentence = until("a message", lambda: refusal(restricted, "readonly"), 60)
    assert sentence.startswith("engines: the engine store /var/lib/triton-trtllm/store is on a read-only file system;")
    restricted.helm("uninstall", "readonly", "claimed", "--wait=false")


def refusal(namespace: Namespace, release: str) -> str | None:
    for pod in namespace.pods(selector(release)):
        for message in messages(pod):
            return message
    return None


# ---- what goes wrong


def test_a_build_that_is_killed_leaves_nothing_harmful(privileged: Namespace):
    folder = f"/mnt/node/{privileged.name}-killed"
    privileged.install("killed", f"engine.node.path={folder}")

    def builds() -> str | None:
        for pod in privileged.pods(selector("killed")):
            if any("running" in status["state"] for status in pod["status"].get("initContainerStatuses", [])[1:]):
                return pod["metadata"]["name"]
        return None

    first = until("a build", builds, 60)
    time.sleep(3)
    privileged.kubectl("delete", "pod", first, "--force", "--grace-period=0")
    privileged.rolled_out("killed", 180)
    asks(privileged, "killed")
    privileged.helm("uninstall", "killed", "--wait=false")


A10G = {
    "engine": "tensorrt",
    "gpu": {"product": "NVIDIA-A10G", "compute_capability": "8.6"},
    "versions": {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1.48"},
}
# By what the Pod's machine is said to have: the engine's manifest, nvidia-smi's answer, the Pod's message.
REFUSED_ENGINES = {
    "another GPU": (
        A10G,
        "0, GPU-1, NVIDIA H100 80GB HBM3, 9.0, 81559",
        "the engine was built for NVIDIA-A10G (8.6) with TensorRT-LLM 1.2.1; this machine has "
        "NVIDIA-H100-80GB-HBM3 (9.0); rebuild with --gpu NVIDIA-H100-80GB-HBM3",
    ),
    "no TensorRT-LLM": (A10G, "", "the engine is of the kind tensorrt and TensorRT-LLM is not installed here; "),
    "another version": (
        {"versions": {"openvino": "2099.1.0"}},
        "",
        "the engine was built with OpenVINO 2099.1.0; this machine has OpenVINO 2026.4.1; ",
    ),
}
# Serves the baked engine with another manifest. With a second argument on a machine that has an nvidia-smi with this
# answer, and the records and the folder by which an installed TensorRT-LLM is known; nothing of it is ever imported.
SERVE_OTHER = """
import json, os, pathlib, shutil, sys, sysconfig, venv
shutil.copytree('/models/demo-gpt2', '/tmp/other')
path = pathlib.Path('/tmp/other/tensorrt_llm/1/engine/engine.json')
path.write_text(json.dumps(json.loads(path.read_text()) | json.loads(sys.argv[1])))
python, gpu = sys.executable, sys.argv[2]
if gpu:
    venv.create('/tmp/environment')
    (packages,) = pathlib.Path('/tmp/environment/lib').glob('python*/site-packages')
    (packages / 'image.pth').write_text(sysconfig.get_path('purelib'))
    (packages / 'tensorrt_llm/_tensorrt_engine').mkdir(parents=True)
    for name, version in (('tensorrt_llm', '1.2.1'), ('tensorrt', '10.14.1.48')):
        (packages / f'{name}-{version}.dist-info').mkdir()
        (packages / f'{name}-{version}.dist-info/METADATA').write_text(f'Name: {name}\\nVersion: {version}\\n')
    smi, python = pathlib.Path('/tmp/environment/bin/nvidia-smi'), '/tmp/environment/bin/python3'
    smi.write_text(f'#!/bin/sh\\necho "{gpu}"\\n')
    smi.chmod(0o755)
    os.environ['PATH'] = f'{smi.parent}:' + os.environ['PATH']
os.execv(python, [python, '/opt/triton-trtllm/scripts/serve.py', '/tmp/other'])
"""


@pytest.mark.parametrize("reason", REFUSED_ENGINES)
def test_an_engine_that_does_not_fit_is_refused_in_the_pods_status(restricted: Namespace, image_tag: str, reason: str):
    manifest, gpu, sentence = REFUSED_ENGINES[reason]
    name = f"refused-{reason.replace(' ', '-').lower()}"
    pod = pod_of(
        name,
        f"triton-trtllm/server-demo:{image_tag}",
        ["python3", "-c", SERVE_OTHER, json.dumps(manifest), gpu],
        cpu="1",
        env=[{"name": "TERMINATION_MESSAGE_PATH", "value": "/dev/termination-log"}],
    )
    restricted.apply(pod)
    restricted.ended(name, 60)
    (message,) = messages(restricted.get("pod", name))
    assert message.startswith(sentence)


def test_a_checkpoint_that_is_not_there_is_said_in_the_pods_status(restricted: Namespace, claim: str):
    restricted.install("nomodel", "engine.source=claim", f"engine.claim.name={claim}", "model.checkpoint=/nowhere")
    assert until("a message", lambda: refusal(restricted, "nomodel"), 60) == (
        "engines: folder '/nowhere' does not exist; --model takes a Hugging Face id or an existing folder"
    )
    restricted.helm("uninstall", "nomodel", "--wait=false")


def test_a_full_store_is_said_in_the_pods_status(privileged: Namespace, image_tag: str):
    """A store of 1 MB: the builder alone, as the chart runs it, on a volume in memory."""
    arguments = ["--model", DEMO, "--engine", "openvino", "--cache-dir", "/full/store", "--output", "/tmp/models/demo"]
    pod = pod_of(
        "full",
        f"triton-trtllm/builder:{image_tag}",
        ["python3", "/opt/triton-trtllm/build/engines.py", *arguments],
        cpu="1",
        env=[{"name": "TERMINATION_MESSAGE_PATH", "value": "/dev/termination-log"}],
        volumeMounts=[{"name": "full", "mountPath": "/full"}],
    )
    pod["spec"]["containers"][0]["resources"] = {"limits": {"cpu": "1", "memory": "2Gi"}}
    pod["spec"]["volumes"] = [{"name": "full", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]
    privileged.apply(pod)
    privileged.ended("full", 120)
    (message,) = messages(privileged.get("pod", "full"))
    assert message.startswith("engines: the engine store /full/store is too full for this engine: "), message


# ---- the API server's opinion


@pytest.mark.parametrize("example", sorted(path.stem for path in (CHART / "examples").glob("*.yaml")))
def test_the_api_server_takes_every_example(restricted: Namespace, example: str):
    everything = [
        "monitoring.enabled=true",
        "networkPolicy.enabled=true",
        "client.enabled=true",
        "ingress.enabled=true",
    ]
    everything += ["ingress.host=llm.example", "gateway.enabled=true", "gateway.name=gateway", "autoscaling.mode=keda"]
    rendered = run(
        *("helm", "template", "llm", str(CHART), "--namespace", restricted.name, "--kube-version", "1.35.0"),
        *("--values", str(CHART / f"examples/{example}.yaml")),
        *(part for value in everything for part in ("--set", value)),
    )
    installed = {line.split(".")[0] for line in kubectl("api-resources", "--output=name").split()}
    missing = {"podmonitors", "prometheusrules", "httproutes", "grpcroutes", "scaledobjects"} - installed
    if missing:
        pytest.skip(f"the cluster has no {', '.join(sorted(missing))}")
    told = restricted.kubectl("apply", "--dry-run=server", "--filename", "-", input=rendered)
    assert told.count("(server dry run)") == rendered.count("\nkind: ")


def test_hostpath_is_refused_under_restricted_by_name(restricted: Namespace):
    """What `helm install` prints: the API server's warning names the volume."""
    try:
        restricted.install("hostpath")
        events = until(
            "an event",
            lambda: [e["message"] for e in restricted.get("events") if "hostpath-" in e["message"]],
            30,
        )
        assert any("hostPath volumes" in event or "restricted volume types" in event for event in events), events
    finally:
        restricted.helm("uninstall", "hostpath", "--wait=false")
