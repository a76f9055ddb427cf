"""The double of prometheus-adapter: what it reads of a values file, and what it answers."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from prometheus_adapter import Metrics, StatusError, Values, ValuesError, quantity

ROOT = Path(__file__).resolve().parents[2]
METRIC = "triton:requests:current"
RULE = {
    "seriesQuery": METRIC + '{namespace!="",pod!=""}',
    "resources": {"overrides": {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}},
    "name": {"matches": "^triton:(.+):current$", "as": "triton_$1"},
    "metricsQuery": "sum by (<<.GroupBy>>) (<<.Series>>{<<.LabelMatchers>>})",
}


def values_of(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"rules": {"default": False, "custom": list(rules)}, **more}


class Prometheus:
    """Answers /api/v1/series and /api/v1/query with what a test has set."""

    def __init__(self) -> None:
        self.series: list[dict[str, str]] = []
        self.result: list[tuple[str, str]] = []
        self.asked: list[dict[str, list[str]]] = []
        prometheus = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                prometheus.asked.append(parse_qs(url.query))
                vector = [{"metric": {"pod": pod}, "value": [0, value]} for pod, value in prometheus.result]
                data: Any = prometheus.series
                if url.path.endswith("/query"):
                    data = {"resultType": "vector", "result": vector}
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"status": "success", "data": data}).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def values(self) -> dict[str, Any]:
        return {"url": "http://127.0.0.1", "port": self.server.server_address[1]}


@pytest.fixture
def prometheus() -> Iterator[Prometheus]:
    double = Prometheus()
    yield double
    double.server.shutdown()


def metrics_of(prometheus: Prometheus, pods: list[str]) -> Metrics:
    values = Values.read(values_of(RULE, prometheus=prometheus.values))
    return Metrics(values, lambda namespace, selector: pods)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0, "0"),
        (7, "7"),
        (7.5, "7500m"),
        (0.0123, "12m"),
        (0.0009, "0"),
        (1000, "1k"),
        (1500, "1500"),
        (float("nan"), "0"),
        (-1.5, "-1500m"),
    ],
)
def test_a_value_is_written_as_kubernetes_does(value: float, written: str):
    assert quantity(value) == written


def test_only_metrics_with_series_are_served(prometheus: Prometheus):
    metrics = metrics_of(prometheus, ["a"])
    metrics.relist()
    assert metrics.names == []
    with pytest.raises(StatusError, match="could not find the metric triton_requests for pods") as caught:
        metrics.answer("v1beta2", "ns", "*", "triton_requests", "")
    assert caught.value.status["code"] == 404
    prometheus.series = [{"__name__": METRIC, "namespace": "elsewhere", "pod": "z"}, {"__name__": METRIC}]
    metrics.relist()
    assert metrics.names == ["triton_requests"]


def test_pods_without_a_value_are_left_out(prometheus: Prometheus):
    prometheus.series = [{"__name__": METRIC, "namespace": "ns", "pod": "a"}]
    prometheus.result = [("a", "3.5"), ("c", "NaN"), ("stranger", "99")]
    metrics = metrics_of(prometheus, ["a", "b", "c"])
    metrics.relist()
    items = metrics.answer("v1beta2", "ns", "*", "triton_requests", "")["items"]
    assert [(item["describedObject"]["name"], item["value"]) for item in items] == [("a", "3500m"), ("c", "0")]
    assert items[0]["metric"] == {"name": "triton_requests", "selector": None}
    assert prometheus.asked[-1]["query"] == [f'sum by (pod) ({METRIC}{{namespace="ns",pod=~"a|b|c"}})']
    (item,) = metrics.answer("v1beta1", "ns", "a", "triton_requests", "")["items"]
    assert item["metricName"] == "triton_requests"
    assert prometheus.asked[-1]["query"] == [f'sum by (pod) ({METRIC}{{namespace="ns",pod="a"}})']
    with pytest.raises(StatusError, match="for pods b"):
        metrics.answer("v1beta2", "ns", "b", "triton_requests", "")


def test_without_prometheus_names_stay_and_values_are_an_error(prometheus: Prometheus):
    prometheus.series = [{"__name__": METRIC, "namespace": "ns", "pod": "a"}]
    metrics = metrics_of(prometheus, ["a"])
    metrics.relist()
    prometheus.server.shutdown()
    prometheus.server.server_close()
    with pytest.raises(OSError, match="refused"):
        metrics.relist()
    assert metrics.names == ["triton_requests"]
    with pytest.raises(StatusError, match="unable to fetch metrics"):
        metrics.answer("v1beta2", "ns", "*", "triton_requests", "")


def wrong(path: str, value: Any) -> dict[str, Any]:
    values: Any = copy.deepcopy(values_of(RULE))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    at = values
    for part in parents:
        at = at[part]
    at[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("replicas", 2, "the file has replicas, which the double does not know"),
        ("rules/default", True, "rules.default is not false"),
        ("rules/external", [], "rules has external"),
        ("rules/custom/0/seriesFilters", [], r"rules.custom\[0\] has seriesFilters"),
        ("rules/custom/0/resources/template", "<<.Resource>>", "resources has template"),
        ("rules/custom/0/resources/overrides/pod", {"resource": "pot"}, "is for 'pot'"),
        ("rules/custom/0/resources/overrides", {"pod": {"resource": "pod"}}, "a label for namespace and one for pod"),
        ("rules/custom/0/metricsQuery", "sum(<<.LabelValuesByName>>)", "has <<.LabelValuesByName>>"),
        ("rules/custom/0/name/as", "${requests}", r"a \$ without a number"),
        ("rules/custom/0/name", {"matches": "(a)(b)"}, "needs `as`"),
        ("metricsRelistInterval", 60, "60 is no duration"),
        ("extraArguments", ["--v=6"], "'--v=6', which the double does not know"),
        ("extraArguments", ["--metrics-max-age=30s"], "less than metricsRelistInterval"),
    ],
)
def test_what_it_does_not_know_is_an_error(path: str, value: Any, sentence: str):
    with pytest.raises(ValuesError, match=sentence):
        Values.read(wrong(path, value))


def test_the_values_file_of_the_project_is_read():
    values = Values.read(yaml.safe_load((ROOT / "monitoring/prometheus-adapter.yaml").read_text()))
    records = ("triton:requests:current", "triton:queue_compute:ratio", "triton:kv_cache:fraction")
    assert {rule.metric(record) for rule in values.rules for record in records} >= {*records}
    assert all("<<" not in rule.query("x", "ns", ["a", "b"]) for rule in values.rules)
