"""The tally as Prometheus metrics. Nothing is counted twice: a scrape reads what the report will read."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from failures import LoadError
from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from tallies import Tally, Timings

BOUNDS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class TallyCollector(Collector):
    """Reads the tally when it is asked, in the thread of the scrape."""

    def __init__(self, tally: Tally):
        self._tally = tally

    def collect(self) -> Iterable[Metric]:
        tally = self._tally
        requests = CounterMetricFamily("load_client_requests", "Requests that are over, by outcome", labels=["outcome"])
        outcomes = {"ok": tally.ok, "cancelled": tally.cancelled, "cut_off": tally.cut_off, **tally.errors}
        for outcome, number in outcomes.items():
            requests.add_metric([outcome], number)
        yield requests
        yield CounterMetricFamily("load_client_requests_sent", "Requests sent, retries not counted", value=tally.sent)
        yield CounterMetricFamily("load_client_retries", "Requests sent again", value=tally.retries)
        yield CounterMetricFamily("load_client_responses", "Responses received", value=tally.responses)
        yield CounterMetricFamily("load_client_tokens", "Tokens received", value=tally.tokens)
        yield GaugeMetricFamily("load_client_requests_in_flight", "Requests in flight", value=tally.in_flight)
        if tally.offered is not None:
            name = "load_client_offered_requests_per_second" if tally.offers_rate else "load_client_offered_users"
            yield GaugeMetricFamily(name, "What the schedule asks for now", value=tally.offered)
        for name, text, timings in (
            ("time_to_first_token", "From when a request was due to its first token", tally.time_to_first_token),
            ("inter_token", "Between two tokens of a stream", tally.inter_token),
            ("response_gap", "Between two responses of a stream", tally.response_gap),
            ("end_to_end", "From when a request was due to the end of its answer", tally.end_to_end),
            ("lateness", "From when a request was due to when this client sent it", tally.lateness),
        ):
            yield _histogram(f"load_client_{name}_seconds", text, timings)


def _histogram(name: str, text: str, timings: Timings) -> HistogramMetricFamily:
    counts = timings.counts_up_to(BOUNDS_SECONDS)
    buckets = [(str(bound), float(count)) for bound, count in zip(BOUNDS_SECONDS, counts, strict=True)]
    # Read after the buckets, so that it is never below one of them while the load goes on.
    buckets.append(("+Inf", float(timings.count)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=timings.sum_seconds)


def serve_metrics(tally: Tally, address: str, port: int) -> tuple[str, Callable[[], None]]:
    """The URL, and what ends it. Raises LoadError when the port cannot be had."""
    # What the first histogram of a process computes takes some 30 ms; in a scrape it would hold up answers.
    Timings().counts_up_to(BOUNDS_SECONDS)
    registry = CollectorRegistry()
    registry.register(TallyCollector(tally))
    ProcessCollector(registry=registry)  # process_cpu_seconds_total and its like, of this program
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise LoadError(
            f"cannot serve metrics on {address}:{port} ({error.strerror}); choose another --prometheus-port or "
            "--prometheus-address"
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return f"http://{address}:{server.server_port}/metrics", stop
