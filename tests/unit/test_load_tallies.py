"""What the load client keeps of what it measured: percentiles, rows per second, reports, metrics."""

from __future__ import annotations

import json
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import numpy as np
import pytest
from failures import LoadError
from load import exit_code
from load_options import Options, parse
from load_report import Run, document, table, warnings
from progress import Progress, csv_line, progress_line
from prometheus_client import CollectorRegistry, generate_latest
from tallies import COLUMNS, COUNTED, PERCENTILES, ROWS_KEPT, Tally, Timings, percent_key, quantile


def timings(values: list[float]) -> Timings:
    result = Timings()
    for value in values:
        result.record(value)
    return result


def a_run(*arguments: str, seconds: float = 10.0, cpu_seconds: float = 1.0, by_signal: bool = False) -> Run:
    options: Options = parse(["--rate", "5", "--seed", "7", *arguments])
    return Run(
        options=options,
        model="gpt2",
        began=datetime(2026, 1, 2, tzinfo=UTC),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        ended_by_signal=by_signal,
    )


def a_tally(ok: int = 0, failed: int = 0) -> Tally:
    """Of answers that took 0.1 s to the first of two tokens and 0.2 s in all."""
    tally = Tally(offers_rate=True)
    for _ in range(ok):
        tally.request_sent(0.001)
        tally.response_arrived(1)
        tally.time_to_first_token.record(0.1)
        tally.response_arrived(1)
        tally.gap(0.1, 1)
        tally.answer_complete(0.2)
        tally.request_over()
    for _ in range(failed):
        tally.request_sent(0.001)
        tally.request_failed("refused", "Exceeds maximum\n queue size")
        tally.request_over()
    return tally


# ---- percentiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_seconds", [1e-5, 1e-3, 1.0, 100.0])
def test_percentiles_are_exact_to_a_tenth_of_a_percent(scale_seconds: float):
    random = Random(1)
    values = [random.lognormvariate(0, 1) * scale_seconds for _ in range(20_000)]
    summary = timings(values).summary()
    for percent in PERCENTILES:
        exact = np.percentile(values, percent, method="inverted_cdf")
        # HDR: 0.1 %, and a microsecond where it counts single ones; ranks may be rounded to the next value.
        assert summary[percent_key(percent)] == pytest.approx(exact, rel=0.004, abs=2e-6)
    assert summary["count"] == len(values)
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["min"], summary["max"] == (min(values), max(values))


def test_a_percentile_is_never_above_the_maximum():
    summary = timings([1.2345678]).summary()
    assert summary["p50"] == summary["p99_9"] == summary["max"] == 1.2345678


def test_nothing_measured_has_no_percentiles():
    summary = Timings().summary()
    assert summary == {"count": 0} | dict.fromkeys(["mean", "min", "p50", "p90", "p95", "p99", "p99_9", "max"])
    assert math.isnan(Timings().percentile(50))


def test_durations_beyond_an_hour_keep_their_maximum_and_mean():
    summary = timings([5000.0, 7000.0]).summary()
    assert (summary["max"], summary["mean"]) == (7000.0, 6000.0)
    assert summary["p50"] == pytest.approx(3600, rel=0.01)


def test_a_duration_may_count_for_many():
    result = Timings()
    result.record(0.01, 99)
    result.record(1.0)
    summary = result.summary()
    assert (summary["count"], summary["mean"]) == (100, pytest.approx(0.0199))
    assert summary["p90"] == pytest.approx(0.01, rel=0.001)
    assert summary["p99_9"] == pytest.approx(1.0, rel=0.001)


def test_counts_up_to_a_bound_are_those_of_the_values():
    random = Random(1)
    values = [random.lognormvariate(-3, 2) for _ in range(5000)]
    bounds = [0.001, 0.01, 0.05, 0.5, 5.0, 50.0]
    counts = timings(values).counts_up_to(bounds)
    for bound, count in zip(bounds, counts, strict=True):
        below, above = sum(value <= bound * 0.998 for value in values), sum(value <= bound * 1.002 for value in values)
        assert below <= count <= above
    assert timings([0.01, 0.02]).counts_up_to([0.005, 0.01, 0.02]) == [0, 1, 2]


def test_a_quantile_of_few_values_is_one_of_them():
    assert quantile(np.array([3.0, 1.0, 2.0]), 0.5) == 2.0
    assert quantile(np.array([3.0, 1.0, 2.0]), 0.99) == 3.0
    assert math.isnan(quantile(np.empty(0), 0.5))


def test_memory_does_not_grow_with_what_is_measured():
    result = Timings()
    for _ in range(3):
        for _ in range(1000):
            result.record(0.01)
        assert result.take_recent().size == 1000
    assert result.take_recent().size == 0


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_add_up_to_the_totals_and_have_the_percentiles_of_their_second():
    tally = a_tally(ok=3, failed=1)
    first = tally.close_row()
    tally.request_sent(0.5)
    tally.time_to_first_token.record(2.0)
    tally.response_arrived(1)
    second = tally.close_row()
    assert list(first) == list(second) == list(COLUMNS)
    assert (first["sent"], first["ok"], first["errors_refused"], first["tokens"]) == (4, 3, 1, 6)
    assert (second["sent"], second["ok"], second["in_flight"], second["tokens"]) == (1, 0, 1, 1)
    assert (first["time_to_first_token_p50_seconds"], second["time_to_first_token_p50_seconds"]) == (0.1, 2.0)
    assert math.isnan(second["end_to_end_p99_seconds"])
    assert second["lateness_max_seconds"] == 0.5
    totals = dict(zip(COLUMNS, np.array(tally.rows).sum(axis=0), strict=True))
    assert [totals[name] for name in COUNTED] == [5, 3, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 7]


def test_the_last_hours_are_kept():
    tally = Tally()
    tally.close_row()
    tally.rows.extend([tally.rows[0]] * ROWS_KEPT)
    assert len(tally.rows) == ROWS_KEPT


def test_a_line_of_the_csv_has_an_empty_cell_for_what_was_not_measured():
    row = Tally().close_row() | {"tokens": 123456789, "time_seconds": 86400.125}
    cells = dict(zip(COLUMNS, csv_line(row).split(","), strict=True))
    assert cells["tokens"] == "123456789"
    assert cells["time_seconds"] == "86400.125"
    assert cells["offered"] == cells["end_to_end_p50_seconds"] == ""


def test_a_full_disk_ends_the_csv_and_not_the_load(capsys: pytest.CaptureFixture[str]):
    progress = Progress(Tally(), lambda seconds: None, Path("/dev/full"))
    progress.close()
    assert capsys.readouterr().err == "--csv /dev/full ends here, it cannot be written: No space left on device\n"


def test_the_progress_line_says_what_is_offered_and_what_comes_of_it():
    tally = a_tally(ok=10, failed=2)
    tally.offered = 12.0
    row = tally.close_row() | {"time_seconds": 3.0, "width_seconds": 2.0}
    assert progress_line(row, tally) == (
        "3 s  offered 12/s  in flight 0  10 tokens/s  answered 5.0/s  first token p50 100 p99 100 ms  failed refused 2"
    )


# ---- reports ---------------------------------------------------------------------------------------------------------


def test_the_document_is_json_and_has_the_totals():
    tally = a_tally(ok=8, failed=2)
    tally.sending_over()
    tally.close_row()
    content = json.loads(json.dumps(document(a_run(), tally), allow_nan=False))
    assert content["requests"] == {
        "sent": 10, "ok": 8, "cancelled": 0, "cut_off": 0, "failed": 2, "not_sent": 0, "retries": 0,
    }  # fmt: skip
    assert content["errors"] == {"refused": 2}
    assert content["error_ratio"] == 0.2
    assert content["rates"] == {"requests_per_second": 0.8, "responses_per_second": 1.6, "tokens_per_second": 1.6}
    assert content["latency_seconds"]["time_to_first_token"]["p50"] == pytest.approx(0.1, rel=0.001)
    assert content["per_second"]["tokens"] == [16]
    assert content["per_second"]["offered"] == [None]
    assert (content["seed"], content["model"], content["load"]) == (7, "gpt2", "--rate 5")
    assert content["arguments"] == ["--rate", "5", "--seed", "7"]


def test_the_table_has_the_same_totals_and_the_errors_in_a_line():
    lines = table(a_run(), a_tally(ok=8, failed=2)).splitlines()
    assert lines[0] == "gpt2 at localhost:8001, streams, --rate 5, seed 7"
    assert "requests     10 sent, 8 ok, 2 failed" in lines
    assert "rates        0.8 requests/s and 2 tokens/s over all of 10.0 s" in lines
    assert "refused      2, as: Exceeds maximum queue size" in lines
    assert any(line.split() == ["end", "to", "end", "8", *["200.0"] * 7] for line in lines)


def test_a_client_that_was_the_bottleneck_says_so():
    assert warnings(a_run(), a_tally(ok=10)) == []
    late = a_tally(ok=10)
    late.lateness.record(0.5)
    assert "this client was late: 1 % of its requests left more than 500 ms after" in " ".join(warnings(a_run(), late))
    delayed = a_tally(ok=10)
    delayed.loop_delay.record(0.5)
    assert "this client was held up" in " ".join(warnings(a_run(), delayed))
    assert "this client used 0.95 cores" in " ".join(warnings(a_run(cpu_seconds=9.5), a_tally(ok=10)))


def test_requests_that_the_percentiles_lack_are_named():
    tally = a_tally(ok=8, failed=2)
    tally.cut_off = 3
    found = " ".join(warnings(a_run("--grace", "2s"), tally))
    assert "3 requests were still in flight at the end and were cut off after --grace 2 s" in found
    assert "the latencies lack the 2 requests that failed" in found


# ---- exit codes ------------------------------------------------------------------------------------------------------


def test_errors_are_data_unless_there_are_too_many():
    assert exit_code(a_run(), a_tally(ok=1, failed=99)) == 0
    assert exit_code(a_run("--max-error-ratio", "0.5"), a_tally(ok=5, failed=5)) == 0
    with pytest.raises(LoadError, match=r"60.00% of the requests failed, and --max-error-ratio allows 50.00%"):
        exit_code(a_run("--max-error-ratio", "0.5"), a_tally(ok=4, failed=6))


def test_no_answer_at_all_is_a_failure_unless_a_signal_ended_it():
    with pytest.raises(LoadError, match="no request was answered"):
        exit_code(a_run(), a_tally(failed=3))
    with pytest.raises(LoadError, match="no request was sent"):
        exit_code(a_run(), a_tally())
    assert exit_code(a_run(by_signal=True), a_tally(failed=3)) == 0
    cut_off = a_tally()
    cut_off.request_sent(0.0)
    cut_off.response_arrived(5)
    assert exit_code(a_run(), cut_off) == 0


# ---- metrics ---------------------------------------------------------------------------------------------------------


def metrics_text(tally: Tally) -> str:
    from load_metrics import TallyCollector

    registry = CollectorRegistry()
    registry.register(TallyCollector(tally))
    return generate_latest(registry).decode()


def test_metrics_are_the_tally():
    tally = a_tally(ok=8, failed=2)
    tally.offered = 5.0
    lines = metrics_text(tally).splitlines()
    for line in (
        'load_client_requests_total{outcome="ok"} 8.0',
        'load_client_requests_total{outcome="refused"} 2.0',
        "load_client_requests_sent_total 10.0",
        "load_client_tokens_total 16.0",
        "load_client_requests_in_flight 0.0",
        "load_client_offered_requests_per_second 5.0",
        'load_client_time_to_first_token_seconds_bucket{le="0.05"} 0.0',
        'load_client_time_to_first_token_seconds_bucket{le="0.1"} 8.0',
        'load_client_time_to_first_token_seconds_bucket{le="+Inf"} 8.0',
        "load_client_time_to_first_token_seconds_count 8.0",
    ):
        assert line in lines


def test_every_metric_is_documented():
    page = (Path(__file__).resolve().parents[2] / "docs/load-client.md").read_text()
    rate, users = a_tally(ok=1), a_tally(ok=1)
    rate.offered = users.offered = 5.0
    users.offers_rate = False
    text = metrics_text(rate) + metrics_text(users)
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert len(names) == 13
    for name in names:
        assert f"`{name}" in page


def test_time_goes_on_from_when_the_load_begins():
    tally = Tally()
    tally.started = time.monotonic() - 100
    tally.begin()
    assert tally.close_row()["time_seconds"] < 50
