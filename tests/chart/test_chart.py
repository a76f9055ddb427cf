"""The chart without a cluster: what it renders, and what it refuses. tests/cluster/ installs it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import dashboard
import packed_binaries
import pytest
import yaml
from checkpoint import Checkpoint
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from plan import BuildRequest, make_plan
from rendering import CHART, EXAMPLES, GOLDEN, GOLDEN_CASES, ROOT, RefusedError, render, render_text
from sizing_report import size_plan

VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
BAKED = {"engine": {"source": "image"}, "model": {"checkpoint": ""}, "builderImage": {"repository": ""}}
ON_GPUS = "llama-3.1-70b-4xh100"


@pytest.fixture(scope="session")
def helm() -> Path:
    return packed_binaries.find("helm")


def pod_of(objects: dict[str, Any]) -> dict[str, Any]:
    return objects["Deployment/llm"]["spec"]["template"]["spec"]


def containers_of(objects: dict[str, Any]) -> list[dict[str, Any]]:
    pod = pod_of(objects)
    return pod.get("initContainers", []) + pod["containers"]


# ---- what it renders


@pytest.mark.parametrize("name", EXAMPLES)
def test_helm_finds_nothing_to_say(helm: Path, name: str):
    done = subprocess.run([helm, "lint", "--strict", CHART, "--values", EXAMPLES[name]], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", GOLDEN_CASES)
def test_it_renders_what_was_reviewed(helm: Path, name: str):
    """After a change: `make chart`, then look at the difference."""
    assert render_text(helm, *GOLDEN_CASES[name]) == (GOLDEN / f"{name}.yaml").read_text()


@pytest.mark.parametrize(("drain", "age"), [(1, 0), (60, 8), (120, 30), (86400, 3600)])
def test_the_times_of_a_pods_end_follow_from_one_value(helm: Path, drain: int, age: int):
    pod = pod_of(render(helm, values={"drainSeconds": drain, "grpcConnectionAgeSeconds": age}))
    server = pod["containers"][0]
    pre_stop = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert f"--exit-timeout={drain}" in server["args"]
    assert pre_stop >= round(5 + 1.1 * age, 3), "every gRPC connection is renewed before the server refuses"
    # scripts/serve.py: the supervisor's end_seconds 15, and 2.5 for the models.
    assert pod["terminationGracePeriodSeconds"] >= pre_stop + drain + 17.5


@pytest.mark.parametrize("name", EXAMPLES)
def test_requests_are_limits_and_gpus_are_ranks(helm: Path, name: str):
    example = yaml.safe_load(EXAMPLES[name].read_text())
    for container in containers_of(render(helm, name)):
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]
        if container["name"] in ("build", "server"):
            ranks = example["engine"].get("tensorParallel", 1) if example["engine"]["kind"] == "tensorrt" else None
            assert resources["limits"].get("nvidia.com/gpu") == ranks


def test_only_the_builder_sees_the_token(helm: Path):
    for container in containers_of(render(helm, "llama-3.1-8b-h100")):
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        assert ("token" in mounts) == (container["name"] == "build")


def test_the_server_cannot_write_where_engines_are(helm: Path):
    server = pod_of(render(helm))["containers"][0]
    mounts = {mount["name"]: mount for mount in server["volumeMounts"]}
    assert mounts["store"]["readOnly"] and mounts["models"]["readOnly"]


@pytest.mark.parametrize("mode", ["keda", "hpa"])
def test_what_scales_has_the_number_of_pods(helm: Path, mode: str):
    objects = render(helm, values={"autoscaling": {"mode": mode}, "monitoring": {"enabled": True}})
    assert "replicas" not in objects["Deployment/llm"]["spec"]
    assert ("ScaledObject/llm" in objects, "HorizontalPodAutoscaler/llm" in objects) == (mode == "keda", mode == "hpa")
    assert render(helm)["Deployment/llm"]["spec"]["replicas"] == 1


@pytest.mark.parametrize(("rollout", "surge"), [("surge", 1), ("inPlace", 0)])
def test_a_rollout_with_and_without_a_spare_gpu(helm: Path, rollout: str, surge: int):
    strategy = render(helm, values={"rollout": rollout})["Deployment/llm"]["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": surge, "maxUnavailable": 1 - surge}


def test_pods_go_where_the_engine_fits(helm: Path):
    terms = pod_of(render(helm, ON_GPUS))["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (expression,) = terms["nodeSelectorTerms"][0]["matchExpressions"]
    assert expression == {
        "key": "nvidia.com/gpu.product",
        "operator": "In",
        "values": ["NVIDIA-H100-80GB-HBM3"],
    }


def test_a_baked_engine_needs_no_builder_and_no_store(helm: Path):
    pod = pod_of(render(helm, values=BAKED))
    assert "initContainers" not in pod
    assert {volume["name"] for volume in pod["volumes"]} == {"tmp", "shm"}


# ---- what it refuses

REFUSED: list[tuple[str | None, dict[str, Any], str]] = [
    (None, {}, "gpuProducts is empty, and a tensorrt engine runs on the GPU product it is built for"),
    ("demo-cpu", {"engine": {"sources": "node"}}, "additional properties 'sources' not allowed"),
    ("demo-cpu", {"replica": 2}, "additional properties 'replica' not allowed"),
    ("demo-cpu", {"engine": {"source": "nfs"}}, "value must be one of 'image', 'node', 'claim'"),
    ("demo-cpu", {"resources": {"memory": "10GB"}}, "'10GB' does not match pattern '^[1-9][0-9]*(Mi|Gi|Ti)$'"),
    ("demo-cpu", {"resources": {"memory": 1024}}, "got number, want string"),
    ("demo-cpu", {"sharedMemory": "1Gi"}, "sharedMemory is 1Gi and counts as memory of the Pod, of which resources"),
    ("demo-cpu", {"drainSeconds": 0}, "at '/drainSeconds': minimum: got 0, want 1"),
    ("demo-cpu", {"drainSeconds": "60s"}, "at '/drainSeconds': got string, want integer"),
    ("demo-cpu", {"replicas": -1}, "at '/replicas': minimum: got -1, want 0"),
    ("demo-cpu", {"model": {"name": "a/b"}}, "at '/model/name'"),
    ("demo-cpu", {"engine": {"tensorParallel": 2}}, "tensorParallel x pipelineParallel is 2, and an openvino engine"),
    ("demo-cpu", {"gpus": 1}, "gpus is 1, and this engine needs 0"),
    ("demo-cpu", {"gpuProducts": ["NVIDIA-L4"]}, "gpuProducts is NVIDIA-L4, and an openvino engine uses no GPU"),
    (ON_GPUS, {"gpus": 2}, "gpus is 2, and this engine needs 4 (tensorParallel 4 x pipelineParallel 1"),
    (ON_GPUS, {"engine": {"pipelineParallel": 2}, "gpus": 4}, "gpus is 4, and this engine needs 8"),
    (ON_GPUS, {"engine": {"nodes": 2}}, "engine.nodes is 2, and this version runs an engine on one node only"),
    (
        ON_GPUS,
        {"engine": {"maxInputLen": 9000}},
        "engine.maxInputLen is 9000 and maxSeqLen, prompt and answer together",
    ),
    (ON_GPUS, {"engine": {"claim": {"name": ""}}}, "engine.claim.name is empty; make a PersistentVolumeClaim"),
    (ON_GPUS, {"engine": {"source": "node"}}, "engine.claim is set, and engine.source is node"),
    (ON_GPUS, {"engine": {"claim": {"readOnly": True}}}, "readOnly and engine.prebuild.enabled contradict each other"),
    ("demo-cpu", {"engine": {"source": "image"}}, "engine.source is image, whose engine is baked in"),
    ("demo-cpu", {"model": {"checkpoint": ""}}, "model.checkpoint is empty, and engine.source node builds the engine"),
    ("demo-cpu", {"builderImage": {"repository": ""}}, "the server's image cannot compile an openvino engine"),
    ("demo-cpu", {"autoscaling": {"mode": "keda"}}, "autoscaling.mode is keda, which scales on a Prometheus metric"),
    ("demo-cpu", {"autoscaling": {"minReplicas": 5}}, "autoscaling.minReplicas is 5 and maxReplicas is 4"),
    ("demo-cpu", {"ingress": {"enabled": True}}, "ingress.enabled is true and ingress.host is empty"),
    ("demo-cpu", {"gateway": {"enabled": True}}, "gateway.enabled is true and gateway.name is empty"),
    ("demo-cpu", {"podSecurityContext": {"runAsUser": 0}}, "minimum: got 0, want 1"),
    ("demo-cpu", {"podDisruptionBudget": {"maxUnavailable": 0}}, "at '/podDisruptionBudget/maxUnavailable'"),
]


@pytest.mark.parametrize(("example", "values", "sentence"), REFUSED, ids=lambda value: str(value)[:50])
def test_values_that_make_no_sense_get_a_sentence(helm: Path, example: str | None, values: dict, sentence: str):
    with pytest.raises(RefusedError) as refused:
        render_text(helm, example, values)
    assert sentence in str(refused.value)


# ---- examples


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_engine_fits(name: str):
    """As `build/engines.py --plan` has it: all sequences at their longest, on each product that the example names."""
    example = yaml.safe_load(EXAMPLES[name].read_text())
    engine = example["engine"]
    config_file = ROOT / "tests/chart/configs" / f"{example['model']['checkpoint'].rpartition('/')[2]}.json"
    if engine["kind"] == "openvino":
        config_file = ROOT / "scripts/demo_checkpoint/demo-gpt2/config.json"
    for product in example.get("gpuProducts", [None]):
        request = BuildRequest(
            model=example["model"]["checkpoint"],
            engine=engine["kind"],
            dtype=engine.get("dtype", "auto"),
            quantization=engine.get("quantization", "none"),
            tensor_parallel=engine.get("tensorParallel", 1),
            pipeline_parallel=engine.get("pipelineParallel", 1),
            gpu=product,
            max_batch_size=engine.get("maxBatchSize"),
            max_input_len=engine.get("maxInputLen"),
            max_seq_len=engine.get("maxSeqLen"),
        )
        config = json.loads(config_file.read_text())
        checkpoint = Checkpoint(model=request.model, revision=None, path=config_file.parent, digest="")
        plan = make_plan(request, _with_config(checkpoint, config_file), engine["kind"], versions={})
        sizes = size_plan(plan, config)
        if product:
            (gpu,) = [gpu for gpu in sizes["gpus"] if gpu["product"] == product]
            assert gpu["asked"]["holds_all"], gpu["verdict"]
            assert example["autoscaling"]["signals"]["concurrency"] < plan.limits.max_batch_size
        else:
            needed = sizes["weights"]["bytes"] + plan.limits.max_batch_size * sizes["kv_cache"]["bytes_per_sequence"]
            assert needed + 256e6 < int(example["resources"]["memory"].removesuffix("Gi")) * 2**30


def _with_config(checkpoint: Checkpoint, config_file: Path) -> Checkpoint:
    """read_config() reads `config.json` of a folder."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(config_file.read_text())
    return dataclasses.replace(checkpoint, path=folder)


# ---- values, schema, files


def keys_of(values: Any, schema: dict[str, Any], path: str = "") -> list[tuple[str, bool]]:
    """(path, is known to the schema) of every value; free-form ones are not entered."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    if not isinstance(values, dict) or "additionalProperties" not in schema or schema.get("properties") is None:
        return [(path, True)]
    found = []
    for key, value in values.items():
        known = key in schema["properties"]
        found += (
            keys_of(value, schema["properties"].get(key, {}), f"{path}/{key}") if known else [(f"{path}/{key}", False)]
        )
    found += [(f"{path}/{key}", False) for key in set(schema["properties"]) - set(values) - {"global"}]
    return found


def test_schema_and_values_have_the_same_keys():
    assert [path for path, is_known in keys_of(VALUES, SCHEMA) if not is_known] == []


def test_every_group_of_values_says_what_it_does():
    """A comment before it, inside it, or before the group that it belongs to."""
    text = (CHART / "values.yaml").read_text()
    for key in VALUES:
        block = re.search(rf"((?:^#.*\n)*)^{key}:.*\n((?:^[ #-].*\n|^\n)*)", text, re.MULTILINE)
        assert block and ("# --" in block[1] or "# --" in block[2]), key


@pytest.mark.parametrize("name", ["rules", "alerts", "kubernetes"])
def test_the_charts_rules_are_those_of_monitoring(name: str):
    """`make chart` copies them: Helm reads nothing outside of a chart."""
    assert (CHART / f"files/{name}.yaml").read_text() == (ROOT / f"monitoring/{name}.yaml").read_text()


def test_rules_reach_prometheus_as_they_are(helm: Path):
    objects = render(helm, values={"monitoring": {"enabled": True}})
    for name in ("rules", "alerts", "kubernetes"):
        assert objects[f"PrometheusRule/llm-{name}"]["spec"] == yaml.safe_load(
            (ROOT / f"monitoring/{name}.yaml").read_text()
        )


# ---- the dashboard


def test_the_charts_dashboard_is_what_the_script_makes():
    assert json.loads((CHART / "files/dashboard.json").read_text()) == dashboard.dashboard()


def test_grafana_knows_every_field_of_the_dashboard():
    """Read into Grafana's own types and written again, nothing is lost or different."""
    register_default_plugins()
    made = dashboard.dashboard()
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(made)))
    assert is_part_of(made, again)


def is_part_of(part: Any, whole: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and is_part_of(part[key], whole[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) == len(whole) and all(map(is_part_of, part, whole))
    return part == whole


def test_the_dashboard_reads_only_records_that_exist():
    records = {
        rule["record"]
        for name in ("rules", "kubernetes")
        for group in yaml.safe_load((ROOT / f"monitoring/{name}.yaml").read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    for panels in dashboard.ROWS.values():
        for panel in panels:
            for query in panel.queries.values():
                names = set(re.findall(r"[a-zA-Z_]\w*:[\w:]+|kube_\w+|DCGM_\w+", query))
                assert names, query
                if not panel.needs:
                    assert names <= records, query
