"""The Grafana dashboard of chart/: `make chart` writes chart/files/dashboard.json with it.

    python scripts/dashboard.py chart/files/dashboard.json

Every query is over the records of monitoring/, but for panels whose `needs` names another exporter. tests/cluster runs
each of them against a real Prometheus.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Needs = Literal["", "kube-state-metrics", "dcgm-exporter"]

PODS = 'namespace=~"$namespace", app_kubernetes_io_instance=~"$release", triton_trtllm_model=~"$model", pod=~"$pod"'
OF_RELEASE = 'namespace=~"$namespace", app_kubernetes_io_instance=~"$release", triton_trtllm_model=~"$model"'
OBJECTS = 'namespace=~"$namespace"'

# Variable -> the query that lists its values, each within those chosen before.
VARIABLES = {
    "namespace": "label_values(triton:slots:current, namespace)",
    "release": 'label_values(triton:slots:current{namespace=~"$namespace"}, app_kubernetes_io_instance)',
    "model": (
        'label_values(triton:slots:current{namespace=~"$namespace", app_kubernetes_io_instance=~"$release"}, '
        "triton_trtllm_model)"
    ),
    "pod": f"label_values(triton:slots:current{{{OF_RELEASE}}}, pod)",
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A graph over time. `queries`: legend -> PromQL; `unit` is Grafana's."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    description: str = ""
    needs: Needs = ""
    thresholds: list[float] = field(default_factory=list)  # lines


def by_pod(record: str) -> str:
    return f"{record}{{{PODS}}}"


def over_pods(quantile: float, name: str) -> str:
    return f"histogram_quantile({quantile}, sum by (le) (triton:{name}_bucket:rate5m{{{PODS}}}))"


def percentiles(name: str) -> dict[str, str]:
    return {f"p{round(100 * quantile)}": over_pods(quantile, name) for quantile in (0.5, 0.95, 0.99)}


def of_hpa(name: str) -> str:
    return f'kube_horizontalpodautoscaler_{name}{{{OBJECTS}, horizontalpodautoscaler=~"$release"}}'


ROWS: dict[str, list[Panel]] = {
    "Load": [
        Panel(
            title="Requests",
            queries={
                "waiting": f"sum(triton:requests_waiting:current{{{PODS}}})",
                "running": f"sum(triton:requests_running:current{{{PODS}}})",
                "slots": f"sum(triton:slots:current{{{PODS}}})",
            },
            description="All servers together. Waiting requests beside free slots wait for the KV cache.",
        ),
        Panel(
            title="Queue to compute",
            queries={"{{pod}}": by_pod("triton:queue_compute:ratio")},
            description="Time waited per time computed: 0 without a queue, 1 when as many wait as run.",
            thresholds=[1],
        ),
        Panel(
            title="Requests per slot", queries={"{{pod}}": by_pod("triton:requests_slots:ratio")}, unit="percentunit"
        ),
        Panel(
            title="Servers",
            queries={"ready": f"count(triton:slots:current{{{PODS}}})"},
            description="Servers that give metrics, so that have loaded their engine.",
        ),
    ],
    "What clients see": [
        Panel(title="Time to first token", queries=percentiles("time_to_first_token_seconds"), unit="s"),
        Panel(title="Between two tokens", queries=percentiles("inter_token_seconds"), unit="s"),
        Panel(title="Time in the queue", queries=percentiles("queue_seconds"), unit="s"),
        Panel(title="Arrival to end", queries=percentiles("request_seconds"), unit="s"),
        Panel(
            title="Requests ended, by finish reason",
            queries={"{{finish_reason}}": f"sum by (finish_reason) (triton:requests_ended:rate5m{{{PODS}}})"},
            unit="reqps",
        ),
        Panel(
            title="Tokens",
            queries={
                "generated": f"sum(triton:generated_tokens:rate{{{PODS}}})",
                "of prompts": f"sum(triton:prompt_tokens:rate{{{PODS}}})",
            },
            description="Per second, all servers together.",
        ),
    ],
    "Servers": [
        Panel(title="KV cache", queries={"{{pod}}": by_pod("triton:kv_cache:fraction")}, unit="percentunit"),
        Panel(title="Tokens of each server", queries={"{{pod}}": by_pod("triton:generated_tokens:rate")}),
        Panel(
            title="GPU utilisation",
            queries={"{{pod}} GPU {{gpu}}": f'DCGM_FI_DEV_GPU_UTIL{{{OBJECTS}, pod=~"$pod"}}'},
            unit="percent",
            needs="dcgm-exporter",
        ),
        Panel(
            title="GPU memory",
            queries={"{{pod}} GPU {{gpu}}": f'DCGM_FI_DEV_FB_USED{{{OBJECTS}, pod=~"$pod"}}'},
            unit="decmbytes",
            needs="dcgm-exporter",
        ),
    ],
    "Scaling": [
        Panel(
            title="Replicas that the autoscaler wants and has",
            queries={
                "desired": of_hpa("status_desired_replicas"),
                "current": of_hpa("status_current_replicas"),
                "most": of_hpa("spec_max_replicas"),
            },
            needs="kube-state-metrics",
        ),
        Panel(
            title="Cold start: from a Pod's making to ready",
            queries={"{{pod}}": f'triton:cold_start_seconds:current{{{OBJECTS}, pod=~"$release-.*"}}'},
            unit="s",
            needs="kube-state-metrics",
        ),
        Panel(
            title="Cold start: Pods by stage",
            queries={
                "no node": f'count(kube_pod_status_unschedulable{{{OBJECTS}, pod=~"$release-.*"}}) or vector(0)',
                "building or fetching the engine": (
                    f'sum(kube_pod_init_container_status_running{{{OBJECTS}, pod=~"$release-.*"}}) or vector(0)'
                ),
                "loading": (
                    f'sum(kube_pod_container_status_running{{{OBJECTS}, pod=~"$release-.*", container="server"}}) '
                    f'- sum(kube_pod_container_status_ready{{{OBJECTS}, pod=~"$release-.*", container="server"}})'
                ),
            },
            needs="kube-state-metrics",
        ),
    ],
}


def dashboard() -> dict[str, Any]:
    panels, position = [], 0
    for row, graphs in ROWS.items():
        panels.append(
            {"type": "row", "title": row, "collapsed": False, "panels": [], "gridPos": place(0, position, 24, 1)}
        )
        for number, panel in enumerate(graphs):
            x, y = number % 3 * 8, position + 1 + number // 3 * 8
            panels.append(graph(panel) | {"gridPos": place(x, y, 8, 8)})
        position += 1 + (len(graphs) + 2) // 3 * 8
    for number, panel in enumerate(panels):
        panel["id"] = number + 1
    return {
        "uid": "triton-trtllm",
        "title": "triton-trtllm",
        "tags": ["triton", "llm"],
        "schemaVersion": 39,  # of Grafana 10.4; newer ones read it
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one cursor for all graphs
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [datasource(), *(variable(name, query) for name, query in VARIABLES.items())]},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus", "hide": 0}


def variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # with the range of time
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
        "sort": 1,
        "hide": 0,
    }


def graph(panel: Panel) -> dict[str, Any]:
    needs = f"Needs {panel.needs}." if panel.needs else ""
    steps = [{"color": "green", "value": None}, *({"color": "red", "value": value} for value in panel.thresholds)]
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.thresholds:
        defaults["custom"] = {"thresholdsStyle": {"mode": "line"}}
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": " ".join(filter(None, [panel.description, needs])),
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {"refId": chr(ord("A") + number), "datasource": SOURCE, "expr": query, "legendFormat": legend}
            for number, (legend, query) in enumerate(panel.queries.items())
        ],
    }


def main() -> None:
    Path(sys.argv[1]).write_text(json.dumps(dashboard(), indent=1) + "\n")


if __name__ == "__main__":
    main()
