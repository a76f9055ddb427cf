"""A double of prometheus-adapter, for a cluster that has no image of it: an API server for custom.metrics.k8s.io.

    python prometheus_adapter.py VALUES.json TLS_FOLDER PORT

VALUES.json is the values file of prometheus-adapter's Helm chart, as JSON (the standard library reads no YAML). Rules
are read as prometheus-adapter reads them; Prometheus and the Kubernetes API are asked, and the HorizontalPodAutoscaler
is answered. It is stricter: what it does not know is an error. It knows rules for Pods, and answers for Pods only. It
leaves authentication to the API server before it (the real one checks that server's certificate).
"""

from __future__ import annotations

import json
import math
import re
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError
from urllib.parse import parse_qs, unquote, urlencode, urlsplit
from urllib.request import Request, urlopen

GROUP = "custom.metrics.k8s.io"
VERSIONS = ("v1beta2", "v1beta1")
# A resource may be named in the singular and in the plural. The plural is what paths have.
RESOURCES = {"namespace": "namespaces", "namespaces": "namespaces", "pod": "pods", "pods": "pods"}
Resource = Literal["namespaces", "pods"]


class ValuesError(Exception):
    """The values file has something that this double, or prometheus-adapter, cannot do."""


# ---- the values file


def _fields(where: str, given: Any, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValuesError(f"{where} is {given!r}; it must be a mapping")
    if unknown := sorted(set(given) - {*required, *optional}):
        raise ValuesError(f"{where} has {', '.join(unknown)}, which the double does not know")
    if missing := [name for name in required if name not in given]:
        raise ValuesError(f"{where} lacks {', '.join(missing)}")
    return given


def _seconds(text: Any) -> float:
    if not isinstance(text, str) or not (found := re.fullmatch(r"(\d+)(s|m|h)", text)):
        raise ValuesError(f"{text!r} is no duration such as 30s or 1m")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


@dataclass(frozen=True, kw_only=True)
class Rule:
    series_query: str
    labels: dict[Resource, str]
    matches: re.Pattern[str]
    name: str  # what Python's re calls a template
    metrics_query: str

    @classmethod
    def read(cls, where: str, given: Any) -> Rule:
        given = _fields(where, given, required=("seriesQuery", "resources", "metricsQuery"), optional=("name",))
        resources = _fields(f"{where}.resources", given["resources"], required=("overrides",))
        labels: dict[Resource, str] = {}
        for label, resource in resources["overrides"].items():
            resource = _fields(f"{where}.resources.overrides.{label}", resource, required=("resource",))["resource"]
            if resource not in RESOURCES:
                raise ValuesError(f"{where}.resources.overrides.{label} is for {resource!r}; the double knows pod")
            labels[RESOURCES[resource]] = label
        if set(labels) != {"namespaces", "pods"}:
            raise ValuesError(f"{where}.resources.overrides must have a label for namespace and one for pod")
        unknown = set(re.findall(r"<<.*?>>", given["metricsQuery"])) - {f"<<.{name}>>" for name in _VARIABLES}
        if unknown:
            raise ValuesError(f"{where}.metricsQuery has {', '.join(sorted(unknown))}")
        name = _fields(f"{where}.name", given.get("name", {}), required=(), optional=("matches", "as"))
        matches = re.compile(name.get("matches") or ".*")
        if not name.get("as") and matches.groups > 1:
            raise ValuesError(f"{where}.name needs `as`, since `matches` has several groups")
        return cls(
            series_query=given["seriesQuery"],
            labels=labels,
            matches=matches,
            name=_template(name.get("as") or ("$1" if matches.groups else "$0")),
            metrics_query=given["metricsQuery"],
        )

    def metric(self, series: str) -> str | None:
        found = self.matches.search(series)
        return found.expand(self.name) if found else None

    def query(self, series: str, namespace: str, pods: list[str]) -> str:
        # One name is compared, several are a regular expression in which nothing is escaped; as the real one does.
        operator = "=" if len(pods) == 1 else "=~"
        matchers = f'{self.labels["namespaces"]}="{namespace}",{self.labels["pods"]}{operator}"{"|".join(pods)}"'
        values = {"Series": series, "LabelMatchers": matchers, "GroupBy": self.labels["pods"]}
        query = self.metrics_query
        for name in _VARIABLES:
            query = query.replace(f"<<.{name}>>", values[name])
        return query


_VARIABLES = ("Series", "LabelMatchers", "GroupBy")


def _template(go: str) -> str:
    r"""Go's $1 and ${1} as Python's \g<1>."""
    if left := re.sub(r"\$(?:\{\d+\}|\d+(?!\w))", "", go).count("$"):
        raise ValuesError(f"name.as {go!r} has {left} times a $ without a number; names of groups are not known here")
    return re.sub(r"\$(?:\{(\d+)\}|(\d+))", lambda found: rf"\g<{found[1] or found[2]}>", go.replace("\\", r"\\"))


@dataclass(frozen=True, kw_only=True)
class Values:
    prometheus: str
    relist_seconds: float
    max_age_seconds: float
    rules: list[Rule]

    @classmethod
    def read(cls, given: Any) -> Values:
        given = _fields(
            "the file", given, required=("rules",), optional=("prometheus", "metricsRelistInterval", "extraArguments")
        )
        url = _fields("prometheus", given.get("prometheus", {}), required=(), optional=("url", "port", "path"))
        port = url.get("port", 9090)
        relist = _seconds(given.get("metricsRelistInterval", "1m"))
        max_age = relist
        for argument in given.get("extraArguments", []):
            name, _, value = argument.partition("=")
            if name != "--metrics-max-age":
                raise ValuesError(f"extraArguments has {argument!r}, which the double does not know")
            max_age = _seconds(value)
        if max_age < relist:
            raise ValuesError("--metrics-max-age is less than metricsRelistInterval, so metrics would come and go")
        rules = _fields("rules", given["rules"], required=("default", "custom"))
        if rules["default"] is not False:
            raise ValuesError("rules.default is not false: the default rules are not known here")
        return cls(
            prometheus=url.get("url", "http://prometheus.default.svc")
            + (f":{port}" if port else "")
            + url.get("path", ""),
            relist_seconds=relist,
            max_age_seconds=max_age,
            rules=[Rule.read(f"rules.custom[{number}]", rule) for number, rule in enumerate(rules["custom"])],
        )


# ---- metrics


class StatusError(Exception):
    """What the API answers instead of a metric: a Status."""

    def __init__(self, code: int, reason: str, message: str):
        super().__init__(message)
        self.status = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "code": code,
        }


def _not_found(metric: str, pod: str = "") -> StatusError:
    return StatusError(404, "NotFound", f"the server could not find the metric {metric} for {f'pods {pod}'.strip()}")


def quantity(value: float) -> str:
    """As Kubernetes writes a number of thousandths; the rest is cut off, and no number is none."""
    if math.isnan(value):
        return "0"
    if math.isinf(value):
        raise ValueError("the value is infinite, which becomes anything in the real one")
    thousandths, suffixes = math.trunc(value * 1000), ["m", "", "k", "M", "G", "T", "P", "E"]
    if not thousandths:
        return "0"
    while thousandths % 1000 == 0 and len(suffixes) > 1:
        thousandths //= 1000
        suffixes.pop(0)
    return f"{thousandths}{suffixes[0]}"


class Metrics:
    """The names that are served, and values for them. `pods` gives the names of Pods, of a namespace and a selector."""

    def __init__(self, values: Values, pods: Callable[[str, str], list[str]]):
        self._values, self._pods = values, pods
        self._served: dict[str, tuple[Rule, str]] = {}

    def _ask(self, path: str, **parameters: str) -> Any:
        with urlopen(f"{self._values.prometheus}/api/v1/{path}?{urlencode(parameters)}", timeout=10) as answer:
            return json.load(answer)["data"]

    def relist(self) -> None:
        """Which metrics there are. When Prometheus does not answer, those that there were."""
        served = {}
        since = str(time.time() - self._values.max_age_seconds)
        for rule in self._values.rules:
            for series in self._ask("series", **{"match[]": rule.series_query, "start": since}):
                name = rule.metric(series["__name__"])
                if name and all(label in series for label in rule.labels.values()):
                    served[name] = (rule, series["__name__"])
        self._served = served

    def keep_relisting(self) -> None:
        while True:
            try:
                self.relist()
            except (OSError, ValueError, KeyError) as error:
                print(f"relist: {error}", flush=True)
            time.sleep(self._values.relist_seconds)

    @property
    def names(self) -> list[str]:
        return sorted(self._served)

    def values(self, namespace: str, pods: list[str], metric: str) -> dict[str, str]:
        """By Pod. One without a value is left out."""
        if metric not in self._served or not pods:
            raise _not_found(metric)
        rule, series = self._served[metric]
        try:
            data = self._ask("query", query=rule.query(series, namespace, pods))
            if data["resultType"] != "vector":
                raise ValueError(f"a {data['resultType']}")
            found = {sample["metric"].get(rule.labels["pods"]): sample["value"][1] for sample in data["result"]}
            return {pod: quantity(float(found[pod])) for pod in pods if pod in found}
        except (OSError, ValueError, KeyError) as error:
            print(f"{namespace} {metric}: {error}", flush=True)
            raise StatusError(500, "InternalError", "Internal error occurred: unable to fetch metrics") from error

    def answer(self, version: str, namespace: str, pod: str, metric: str, selector: str) -> dict[str, Any]:
        found = self.values(namespace, self._pods(namespace, selector) if pod == "*" else [pod], metric)
        if pod != "*" and pod not in found:
            raise _not_found(metric, pod)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        items = []
        for name, value in found.items():
            described = {"kind": "Pod", "namespace": namespace, "name": name, "apiVersion": "/v1"}
            item = {"describedObject": described, "timestamp": now, "value": value}
            if version == "v1beta1":
                item |= {"metricName": metric, "selector": None}
            else:
                item |= {"metric": {"name": metric, "selector": None}}
            items.append(item)
        return {"kind": "MetricValueList", "apiVersion": f"{GROUP}/{version}", "metadata": {}, "items": items}


# ---- the API


class Api(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    metrics: Metrics

    def do_GET(self) -> None:
        try:
            code, body = 200, self._answer()
        except StatusError as error:
            code, body = error.status["code"], error.status
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _answer(self) -> Any:
        url = urlsplit(self.path)
        match [unquote(part) for part in url.path.strip("/").split("/")]:
            case ["healthz" | "livez" | "readyz"]:
                return "ok"
            case ["apis"]:
                return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group()]}
            case ["apis", group] if group == GROUP:
                return _group()
            case ["apis", group, version] if group == GROUP and version in VERSIONS:
                return self._resources(version)
            case ["apis", group, version, "namespaces", namespace, "pods", pod, metric] if (
                group == GROUP and version in VERSIONS
            ):
                asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
                selector = asked.pop("labelSelector", "")
                if any(asked.values()):
                    raise StatusError(501, "NotImplemented", f"the double does not know {', '.join(asked)}")
                return self.metrics.answer(version, namespace, pod, metric, selector)
            case ["apis", group, version, *_] if group == GROUP and version in VERSIONS:
                raise StatusError(501, "NotImplemented", f"the double answers for Pods only, not {url.path}")
        raise StatusError(404, "NotFound", "the server could not find the requested resource")

    def _resources(self, version: str) -> dict[str, Any]:
        kind = {"singularName": "", "kind": "MetricValueList", "verbs": ["get"]}
        resources = [
            {"name": f"{resource}/{metric}", "namespaced": resource == "pods", **kind}
            for metric in self.metrics.names
            for resource in ("namespaces", "pods")
        ]
        group_version = f"{GROUP}/{version}"
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}

    def log_message(self, *_: Any) -> None:
        print(f"{self.command} {self.path}", flush=True)


def _group() -> dict[str, Any]:
    versions = [{"groupVersion": f"{GROUP}/{version}", "version": version} for version in VERSIONS]
    return {
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": GROUP,
        "versions": versions,
        "preferredVersion": versions[0],
    }


def kubernetes_pods(namespace: str, selector: str) -> list[str]:
    """Asked with the rights of the Pod that this runs in."""
    account = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    request = Request(
        f"https://kubernetes.default.svc/api/v1/namespaces/{namespace}/pods?{urlencode({'labelSelector': selector})}",
        headers={"Authorization": f"Bearer {(account / 'token').read_text()}"},
    )
    try:
        with urlopen(request, timeout=10, context=ssl.create_default_context(cafile=account / "ca.crt")) as answer:
            return [pod["metadata"]["name"] for pod in json.load(answer)["items"]]
    except HTTPError as error:
        print(f"Pods of {namespace}: {error} {error.read()}", flush=True)
        raise StatusError(500, "InternalError", "Internal error occurred: unable to list matching resources") from error


def main(argv: list[str]) -> None:
    values_file, tls, port = Path(argv[0]), Path(argv[1]), int(argv[2])
    metrics = Metrics(Values.read(json.loads(values_file.read_text())), kubernetes_pods)
    threading.Thread(target=metrics.keep_relisting, daemon=True).start()
    Api.metrics = metrics
    server = ThreadingHTTPServer(("", port), Api)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "tls.crt", tls / "tls.key")
    # A handshake at accept() would keep everybody waiting for one who does not shake hands.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
