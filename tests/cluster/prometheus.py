"""The cluster's Prometheus, asked through the API server, and Pods that play an exporter for it."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import quote

from cluster_client import Namespace, kubectl, pod_of

PROMETHEUS = os.environ.get("TEST_PROMETHEUS", "monitoring/services/prometheus-operated:9090")

_SERVE = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(sys.argv[1].encode())
http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
"""


def api(path: str) -> Any:
    answer = json.loads(kubectl("get", "--raw", f"/api/v1/namespaces/{PROMETHEUS}/proxy/api/v1/{path}"))
    assert answer["status"] == "success", answer
    return answer["data"]


def ask(query: str) -> list[dict[str, Any]]:
    return api(f"query?query={quote(query, safe='')}")["result"]


def monitor(name: str) -> dict[str, Any]:
    """Of a Pod that `exporter` makes. Prometheus takes up to two minutes to read a new configuration."""
    endpoint = {"port": "exporter", "honorLabels": True, "interval": "5s"}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": {"test": name}}, "podMetricsEndpoints": [endpoint]},
    }


def exporter(namespace: Namespace, image_tag: str, name: str, lines: list[str]) -> None:
    """A Pod that says these lines whenever it is scraped."""
    command = ["python3", "-c", _SERVE, "\n".join(lines) + "\n"]
    ports = [{"name": "exporter", "containerPort": 8080}]
    namespace.apply(pod_of(name, f"triton-trtllm/client:{image_tag}", command, ports=ports))


# What a Triton with TensorRT-LLM that serves 500 requests says; a server of this project says it also.
BUSY_TRITON = [
    'nv_inference_pending_request_count{model="tensorrt_llm",version="1"} 200',
    'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 0',
    'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 300',
    'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 338',
    'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 1',
    'triton_trtllm_compute_seconds_total{model="tensorrt_llm",version="1"} 1e6',
]
