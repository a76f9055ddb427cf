"""The double of prometheus-adapter in a namespace: tests/fakes/prometheus_adapter.py behind two APIServices."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import prometheus_adapter
import yaml
from cluster_client import ROOT, CommandError, Namespace, kubectl, pod_of, run, until

VALUES = ROOT / "monitoring/prometheus-adapter.yaml"
# The file's own 1m is right where nobody waits for a test.
FASTER = {"metricsRelistInterval": "10s"}
_MINE = {"triton-trtllm/test": "prometheus-adapter"}


def api_server() -> str | None:
    """Who serves custom.metrics.k8s.io."""
    services = json.loads(kubectl("get", "apiservices", "--output", "json"))["items"]
    for service in services:
        if service["spec"].get("group") == prometheus_adapter.GROUP:
            return "{namespace}/{name}".format(**service["spec"]["service"])
    return None


class MetricsAdapter:
    """Started when made; `remove` takes the APIServices away, which are the cluster's and not the namespace's."""

    def __init__(self, namespace: Namespace, image_tag: str):
        self._namespace, self._full_name = namespace, f"prometheus-adapter-{namespace.name}"
        values = yaml.safe_load(VALUES.read_text()) | FASTER
        prometheus_adapter.Values.read(values)  # a sentence here is easier to find than one in a Pod's log
        namespace.apply(*self._access(), *self._configuration(values), self._deployment(image_tag), *self._services())
        namespace.rolled_out("prometheus-adapter", 60)
        until("custom.metrics.k8s.io is served", lambda: self.names() is not None, 60)

    def _access(self) -> list[dict[str, Any]]:
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": self._full_name}
        subject = {"kind": "ServiceAccount", "name": "prometheus-adapter", "namespace": self._namespace.name}
        rbac, metadata = {"apiVersion": "rbac.authorization.k8s.io/v1"}, {"name": self._full_name, "labels": _MINE}
        rules = [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}]
        return [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "prometheus-adapter"}},
            {**rbac, "kind": "ClusterRole", "metadata": metadata, "rules": rules},
            {**rbac, "kind": "ClusterRoleBinding", "metadata": metadata, "roleRef": role, "subjects": [subject]},
        ]

    def _configuration(self, values: dict[str, Any]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            key, certificate = Path(folder, "key"), Path(folder, "certificate")
            command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=adapter"]
            run(*command, "-keyout", str(key), "-out", str(certificate))
            tls = {"tls.crt": certificate.read_text(), "tls.key": key.read_text()}
        code = Path(prometheus_adapter.__file__).read_text()
        metadata = {"name": "prometheus-adapter"}
        return [
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": metadata,
                "type": "kubernetes.io/tls",
                "stringData": tls,
            },
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": metadata,
                "data": {"prometheus_adapter.py": code, "values.json": json.dumps(values)},
            },
        ]

    def _deployment(self, image_tag: str) -> dict[str, Any]:
        command = ["python3", "/adapter/prometheus_adapter.py", "/adapter/values.json", "/tls", "6443"]
        probe = {"httpGet": {"path": "/readyz", "port": 6443, "scheme": "HTTPS"}, "periodSeconds": 1}
        mounts = [{"name": "adapter", "mountPath": "/adapter"}, {"name": "tls", "mountPath": "/tls"}]
        pod = pod_of(
            "prometheus-adapter",
            f"triton-trtllm/client:{image_tag}",
            command,
            readinessProbe=probe,
            volumeMounts=mounts,
        )
        pod["spec"] |= {
            "restartPolicy": "Always",
            "serviceAccountName": "prometheus-adapter",
            "automountServiceAccountToken": True,
            "volumes": [
                {"name": "adapter", "configMap": {"name": "prometheus-adapter"}},
                {"name": "tls", "secret": {"secretName": "prometheus-adapter"}},
            ],
        }
        pod["spec"]["securityContext"]["fsGroup"] = 1000
        labels = pod["metadata"]["labels"]
        return {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "prometheus-adapter"},
            "spec": {
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": pod["spec"]},
            },
        }

    def _services(self) -> list[dict[str, Any]]:
        reference = {"name": "prometheus-adapter", "namespace": self._namespace.name}
        ports = [{"port": 443, "targetPort": 6443}]
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "prometheus-adapter"},
            "spec": {"selector": {"test": "prometheus-adapter"}, "ports": ports},
        }
        return [service] + [
            {
                "apiVersion": "apiregistration.k8s.io/v1",
                "kind": "APIService",
                "metadata": {"name": f"{version}.{prometheus_adapter.GROUP}", "labels": _MINE},
                "spec": {
                    "group": prometheus_adapter.GROUP,
                    "version": version,
                    "service": reference,
                    "insecureSkipTLSVerify": True,
                    "groupPriorityMinimum": 100,
                    "versionPriority": priority,
                },
            }
            for priority, version in ((200, "v1beta2"), (100, "v1beta1"))
        ]

    def stop(self) -> None:
        self._scale(0)
        until("custom.metrics.k8s.io is not served", lambda: self.names() is None, 60)

    def start(self) -> None:
        self._scale(1)
        until("custom.metrics.k8s.io is served", lambda: self.names() is not None, 60)

    def _scale(self, replicas: int) -> None:
        self._namespace.kubectl("scale", "deployment/prometheus-adapter", f"--replicas={replicas}")

    def names(self) -> set[str] | None:
        """Of the Pods metrics that are served."""
        try:
            found = json.loads(kubectl("get", "--raw", f"/apis/{prometheus_adapter.GROUP}/v1beta2"))
        except CommandError:
            return None
        names = (resource["name"].split("/", 1) for resource in found["resources"])
        return {name for resource, name in names if resource == "pods"}

    def values(self, namespace: Namespace, metric: str, selector: str) -> dict[str, str]:
        """By Pod; the request is the autoscaler's own."""
        path = f"namespaces/{namespace.name}/pods/*/{metric}?labelSelector={quote(selector, safe='')}"
        found = json.loads(kubectl("get", "--raw", f"/apis/{prometheus_adapter.GROUP}/v1beta2/{path}"))
        return {item["describedObject"]["name"]: item["value"] for item in found["items"]}

    def remove(self) -> None:
        for kind in ("apiservices", "clusterrolebindings", "clusterroles"):
            kubectl("delete", kind, "--selector", "triton-trtllm/test=prometheus-adapter")
