"""The results, as a table for people and as one JSON document."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from load_options import Options
from tallies import COLUMNS, PERCENTILES, Tally, Timings, percent_key

# Above these this program, not the service, may be what the numbers show.
LATE_SECONDS = 0.010
BUSY_CORES = 0.85


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run beside its tally. `seconds`: from the start to the end of the last answer."""

    options: Options
    model: str
    began: datetime
    seconds: float
    cpu_seconds: float
    ended_by_signal: bool

    @property
    def cores(self) -> float:
        """How much of a processor core this program took."""
        return self.cpu_seconds / self.seconds


def warnings(run: Run, tally: Tally) -> list[str]:
    """Why the numbers may not say what they seem to say."""
    found = []
    late, delayed = (_p99(timings) for timings in (tally.lateness, tally.loop_delay))
    if late > LATE_SECONDS:
        found.append(
            f"this client was late: 1 % of its requests left more than {late * 1000:.0f} ms after they were due. "
            "Latencies count from when they were due, so they hold that time; give it more processor time"
        )
    if delayed > LATE_SECONDS:
        found.append(
            f"this client was held up: in 1 % of its turns for more than {delayed * 1000:.0f} ms, which every latency "
            "may hold; give it more processor time, or spread the load over more clients"
        )
    if run.cores > BUSY_CORES:
        found.append(f"this client used {run.cores:.2f} cores and can use 1; spread the load over more clients")
    if tally.cut_off:
        found.append(
            f"{tally.cut_off} requests were still in flight at the end and were cut off after --grace "
            f"{run.options.grace_seconds:g} s; the latencies lack them, and they may be the slowest"
        )
    if tally.failed or tally.not_sent:
        found.append(
            f"the latencies lack the {tally.failed + tally.not_sent} requests that failed or were not sent; read them "
            "together with the errors"
        )
    return found


def _p99(timings: Timings) -> float:
    return timings.percentile(99) if timings.count else 0.0


# ---- JSON ------------------------------------------------------------------------------------------------------------


def document(run: Run, tally: Tally) -> dict[str, Any]:
    sending_seconds = tally.sending_seconds or run.seconds
    return {
        "model": run.model,
        "url": run.options.target.url,
        "load": run.options.shape.words,
        "arguments": list(run.options.arguments),
        "streams": run.options.target.streams,
        "seed": run.options.seed,
        "began": run.began.isoformat(timespec="milliseconds"),
        "ended_by_signal": run.ended_by_signal,
        "seconds": run.seconds,
        "requests": {
            "sent": tally.sent,
            "ok": tally.ok,
            "cancelled": tally.cancelled,
            "cut_off": tally.cut_off,
            "failed": tally.failed,
            "not_sent": tally.not_sent,
            "retries": tally.retries,
        },
        "errors": {kind: number for kind, number in tally.errors.items() if number},
        "error_examples": dict(tally.examples),
        "error_ratio": tally.error_ratio,
        "responses": tally.responses,
        "tokens": tally.tokens,
        "rates": {
            "requests_per_second": tally.ok / run.seconds,
            "responses_per_second": tally.responses / run.seconds,
            "tokens_per_second": tally.tokens / run.seconds,
        },
        "while_sending": {
            "seconds": sending_seconds,
            "requests_per_second": tally.ok_while_sending / sending_seconds,
            "tokens_per_second": tally.tokens_while_sending / sending_seconds,
        },
        "latency_seconds": {name: timings.summary() for name, timings in _latencies(tally).items()},
        "client": {
            "cpu_seconds": run.cpu_seconds,
            "cores": run.cores,
            "lateness_seconds": tally.lateness.summary(),
            "loop_delay_seconds": tally.loop_delay.summary(),
        },
        "warnings": warnings(run, tally),
        "per_second": {
            name: [None if math.isnan(row[number]) else row[number] for row in tally.rows]
            for number, name in enumerate(COLUMNS)
        },
    }


def _latencies(tally: Tally) -> dict[str, Timings]:
    return {
        "time_to_first_token": tally.time_to_first_token,
        "inter_token": tally.inter_token,
        "response_gap": tally.response_gap,
        "end_to_end": tally.end_to_end,
    }


def write_json(content: dict[str, Any], path: Path) -> None:
    """The whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


# ---- the table -------------------------------------------------------------------------------------------------------

_TITLES = {
    "time_to_first_token": "time to first token",
    "inter_token": "between tokens",
    "response_gap": "between responses",
    "end_to_end": "end to end",
}


def table(run: Run, tally: Tally) -> str:
    return "\n".join([*_head(run, tally), "", *_latency_table(run, tally), *_notes(run, tally)])


def _head(run: Run, tally: Tally) -> Iterator[str]:
    way = "streams" if run.options.target.streams else "infer()"
    yield f"{run.model} at {run.options.target.url}, {way}, {run.options.shape.words}, seed {run.options.seed}"
    yield _line("requests", ", ".join(_counts(tally)))
    yield _line("tokens", f"{tally.tokens:,} in {tally.responses:,} responses")
    yield _line("rates", f"{_rates(tally.ok, tally.tokens, run.seconds)} over all of {run.seconds:.1f} s")
    if tally.sending_seconds and tally.sending_seconds < 0.98 * run.seconds:
        rates = _rates(tally.ok_while_sending, tally.tokens_while_sending, tally.sending_seconds)
        yield _line("", f"{rates} in the {tally.sending_seconds:.1f} s of sending")
    for kind, number in tally.errors.items():
        if number:
            yield _line(kind, f"{number:,}, as: {' '.join(tally.examples[kind].split())}")


def _counts(tally: Tally) -> Iterator[str]:
    """Those that are always of interest, and others that are not 0."""
    yield f"{tally.sent:,} sent"
    yield f"{tally.ok:,} ok"
    yield f"{tally.failed:,} failed"
    for number, word in (
        (tally.cancelled, "cancelled"),
        (tally.cut_off, "cut off"),
        (tally.not_sent, "not sent"),
        (tally.retries, "retries"),
    ):
        if number:
            yield f"{number:,} {word}"


def _rates(requests: int, tokens: int, seconds: float) -> str:
    return f"{requests / seconds:,.1f} requests/s and {tokens / seconds:,.0f} tokens/s"


def _line(title: str, text: str) -> str:
    return f"{title:<12} {text}"


def _latency_table(run: Run, tally: Tally) -> Iterator[str]:
    names = ["mean", *map(percent_key, PERCENTILES), "max"]
    yield f"{'ms':<20}{'count':>10}" + "".join(f"{name.replace('_', '.'):>10}" for name in names)
    rows = {_TITLES[name]: timings for name, timings in _latencies(tally).items()}
    if run.options.shape.users is None:
        rows["client late"] = tally.lateness
    for title, timings in rows.items():
        summary = timings.summary()
        if summary["count"]:
            yield f"{title:<20}{summary['count']:>10,}" + "".join(f"{summary[name] * 1000:>10,.1f}" for name in names)


def _notes(run: Run, tally: Tally) -> Iterator[str]:
    found = warnings(run, tally)
    if found:
        yield ""
    for warning in found:
        yield f"note: {warning}."
