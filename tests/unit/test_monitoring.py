"""The rule files for Prometheus: promtool's tests of them, and that whatever they name exists."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import metric_families
import packed_binaries
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
RULE_FILES = [ROOT / f"monitoring/{name}.yaml" for name in ("rules", "alerts", "kubernetes")]
TEST_FILES = sorted((ROOT / "monitoring/tests").glob("*.yaml"))

RULES = [rule for path in RULE_FILES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]
RECORDS = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
CASES = [case for path in TEST_FILES for case in yaml.safe_load(path.read_text())["tests"]]
FAMILIES = {family.name: family for family in metric_families.FAMILIES}

# What the server exports besides them: Triton's own metrics. And what Prometheus knows of each target.
TRITONS_OWN = {"nv_inference_pending_request_count", "nv_inference_queue_duration_us"}
PROMETHEUS_OWN = {"up"}
KUBE_STATE = {
    "kube_horizontalpodautoscaler_spec_max_replicas",
    "kube_horizontalpodautoscaler_status_condition",
    "kube_horizontalpodautoscaler_status_desired_replicas",
    "kube_pod_container_resource_requests",
    "kube_pod_created",
    "kube_pod_status_phase",
    "kube_pod_status_ready_time",
    "kube_pod_status_unschedulable",
}

# Records over all servers of a namespace; every other one is per server.
OF_NAMESPACES = {
    "triton:first_tokens:rate5m",
    "triton:first_tokens_late:rate5m",
    "triton:requests_to_answer:rate5m",
    "triton:requests_unanswered:rate5m",
}

# Labels that a series has from the server, by what the scraper makes of them.
EVERY_SERIES = {"model", "version", "exported_model", "exported_version"}

KEYWORDS = {"and", "or", "unless", "bool", "offset"}


def names_in(expression: str) -> set[str]:
    """The metrics and records that a PromQL expression reads."""
    expression = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]', " ", expression)
    expression = re.sub(r"\b(on|ignoring|by|without)\s*\([^)]*\)", " ", expression)
    return set(re.findall(r"(?<![\w.:])[a-zA-Z_:][\w:]*\b(?!\s*\()", expression)) - KEYWORDS


def matchers_in(expression: str) -> Iterator[tuple[str, str, str]]:
    """(metric, label, value) of each selector, with every alternative of a regular expression for itself."""
    for metric, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\{([^}]*)\}", expression):
        for label, values in re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', matchers):
            for value in values.split("|"):
                yield metric, label, value


def run_promtool(*arguments: str) -> None:
    promtool = packed_binaries.find("promtool")
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", RULE_FILES, ids=lambda path: path.name)
def test_promtool_accepts_the_rules(path: Path):
    run_promtool("check", "rules", "--lint=all", "--lint-fatal", str(path))


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.name)
def test_the_rules_do_what_their_tests_say(path: Path):
    run_promtool("test", "rules", str(path))


def test_names_and_matchers_in_an_expression_are_found():
    expression = (
        'sum without (model) (rate(a_total{b="c|d", e!=""}[5m])) / on (job) (x:y:z > 0) and clamp_min(up, 1e6) or f{}'
    )
    assert names_in(expression) == {"a_total", "x:y:z", "up", "f"}
    assert list(matchers_in(expression)) == [("a_total", "b", "c"), ("a_total", "b", "d"), ("a_total", "e", "")]


def test_rules_read_only_what_is_exported_or_recorded():
    known = {*RECORDS, *TRITONS_OWN, *PROMETHEUS_OWN, *KUBE_STATE}
    for family in FAMILIES.values():
        suffixes = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        known |= {family.name + suffix for suffix in suffixes}
    assert set().union(*(names_in(rule["expr"]) for rule in RULES)) - known == set()


def test_rules_select_only_label_values_that_exist():
    matchers = {matcher for rule in RULES for matcher in matchers_in(rule["expr"])}
    selected = {(metric, label, value) for metric, label, value in matchers if metric not in KUBE_STATE}
    exported = {(family.name, family.label, value) for family in FAMILIES.values() for value in family.values}
    of_records = {
        ("triton:requests_ended:rate5m", "finish_reason", value)
        for value in FAMILIES["triton_trtllm_requests_total"].values
    } | {("triton:time_to_first_token_seconds_bucket:rate5m", "le", value) for value in ("+Inf", "5", "5.0")}
    models = {
        (metric, label, value)
        for metric in TRITONS_OWN
        for label, values in {
            "model": ("tensorrt_llm", ".+_infer"),
            "exported_model": ("tensorrt_llm", ".+_infer", ""),
        }.items()
        for value in values
    }
    assert selected - exported - of_records - models == set()


def test_records_keep_the_labels_of_the_target_and_no_others():
    own = EVERY_SERIES | {family.label for family in FAMILIES.values()}
    for record, expression in RECORDS.items():
        if record in OF_NAMESPACES:
            continue
        assert not re.search(r"\bby\s*\(", expression), record  # would drop labels that only the scraper knows
        reads_series = bool(names_in(expression) - set(RECORDS))
        for labels in re.findall(r"without \(([^)]*)\)", expression):
            dropped = set(re.split(r",\s*", labels))
            assert dropped <= own, record
            assert not reads_series or dropped >= EVERY_SERIES, record


def test_every_rule_has_a_test_in_which_it_has_a_value():
    tests = [test for case in CASES for test in case.get("promql_expr_test", []) if test["exp_samples"]]
    seen = set().union(*(names_in(test["expr"]) for test in tests))
    seen |= {name for test in tests for sample in test["exp_samples"] for name in names_in(sample["labels"])}
    fired = {
        name
        for test in tests
        for sample in test["exp_samples"]
        if 'alertstate="firing"' in sample["labels"]
        for name in re.findall(r'alertname="(\w+)"', sample["labels"])
    }
    fired |= {name for test in tests for name in re.findall(r'alertname="(\w+)", alertstate="firing"', test["expr"])}
    fired |= {test["alertname"] for case in CASES for test in case.get("alert_rule_test", []) if test["exp_alerts"]}
    assert set(RECORDS) - seen == set()
    assert set(ALERTS) - fired == set()


def test_alerts_say_how_bad_it_is_and_what_to_do():
    for name, alert in ALERTS.items():
        assert alert["labels"]["severity"] in ("critical", "warning"), name
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}, name
        assert alert["for"], name


def test_the_page_about_monitoring_names_every_rule():
    page = (ROOT / "docs/monitoring.md").read_text()
    assert {name for name in {**RECORDS, **ALERTS} if f"`{name}`" not in page} == set()
