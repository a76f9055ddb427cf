"""Results as a table for people, as JSON, and as one picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.results import Figure, Result


def machine_lines(machine: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB\n{machine['system']}\n"
        f"{packages}\ncommit {machine['commit']}, load before the run {machine['load_before']:.2f}"
    )


def table(result: Result) -> str:
    lines = [result.title]
    for figure in result.figures:
        value = f"{_number(figure.value)} {figure.unit}".strip()
        lines.append(f"  {figure.name:<42}{value:>16}   {_asked(figure)}".rstrip())
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _asked(figure: Figure) -> str:
    if figure.holds is None:
        return ""
    asked = f">= {figure.at_least:,g}" if figure.at_least is not None else f"<= {figure.at_most:,g}"
    return f"{asked}: {'holds' if figure.holds else 'MISSED'}"


def write_json(path: Path, machine: Mapping[str, Any], results: Sequence[Result]) -> None:
    """The whole file or none."""
    content = {
        "machine": machine,
        "results": [
            {
                "name": result.name,
                "title": result.title,
                "figures": [asdict(figure) | {"holds": figure.holds} for figure in result.figures],
                "data": result.data,
            }
            for result in results
        ],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


# ---- the picture -----------------------------------------------------------------------------------------------------


def plot(path: Path, machine: Mapping[str, Any], results: Sequence[Result]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure as Picture

    drawn = [result for result in results if _drawer(result)]
    if not drawn:
        return
    picture = Picture(figsize=(6 * min(2, len(drawn)), 3.6 * -(-len(drawn) // 2)), layout="constrained")
    axes = picture.subplots(-(-len(drawn) // 2), min(2, len(drawn)), squeeze=False).ravel()
    for result, ax in zip(drawn, axes, strict=False):
        ax.set_title(result.title, fontsize=9)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        _drawer(result)(result, ax)
    for ax in axes[len(drawn) :]:
        ax.set_axis_off()
    picture.suptitle(f"{machine['cpu']}, {machine['cores']} cores, commit {machine['commit']}", fontsize=8)
    picture.savefig(path, dpi=120)


def _drawer(result: Result) -> Any:
    return _DRAWERS.get(result.name.partition("-")[0])


def _draw_streams(result: Result, ax: Any) -> None:
    rates = result.data["tokens_per_second"]
    ax.plot(range(len(rates)), rates)
    ax.axhline(next(f.at_least for f in result.figures if f.at_least), color="grey", linestyle="--")
    ax.set(xlabel="seconds", ylabel="tokens/s", ylim=0)


def _draw_official(result: Result, ax: Any) -> None:
    rates = result.data["tokens_per_second"]
    ax.bar(list(rates), list(rates.values()))
    ax.set(ylabel="tokens/s")


def _draw_single(result: Result, ax: Any) -> None:
    delays = sorted(result.data["delay_milliseconds"])
    ax.plot(delays, [100 * (number + 1) / len(delays) for number in range(len(delays))])
    ax.set(xlabel="ms from the engine to the client", ylabel="% of tokens", xlim=0, ylim=(0, 100))


def _draw_length(result: Result, ax: Any) -> None:
    values = result.data["streamed_microseconds_per_token"]
    ax.bar(range(1, len(values) + 1), values)
    ax.set(xlabel="eighth of a streamed answer", ylabel="us of CPU per token")


def _draw_engine(result: Result, ax: Any) -> None:
    rates = result.data["tokens_per_second"]
    ax.boxplot(list(rates.values()), tick_labels=[way.replace(" ", "\n", 1) for way in rates])
    ax.set(ylabel="tokens/s", ylim=0)


_DRAWERS = {
    "streams": _draw_streams,
    "official": _draw_official,
    "single": _draw_single,
    "length": _draw_length,
    "engine": _draw_engine,
}
