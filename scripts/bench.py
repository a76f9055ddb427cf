"""Measure what this repository costs and carries on this machine: `python scripts/bench.py`, or `make bench`.

Builds small repositories, serves them on free ports, and asks them: many streams, one stream, long answers, and a
real engine through Triton against the same engine in process. Prints a table, and writes JSON and a picture. On a
machine that does nothing else it takes about ten minutes. docs/benchmarks.md has results and says how to read them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import larger_checkpoint, long_answers, machine, official, real_engine, report, single_stream, streams
from benchmarks.repositories import DEMO_CHECKPOINT, ROOT, BenchmarkError
from benchmarks.results import Result
from local_server import LocalServerError


def main(argv: list[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    described = machine.describe()
    print(report.machine_lines(described), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            for result in measure(Path(folder), arguments):
                results.append(result)
                print(f"\n{report.table(result)}", flush=True)
                report.write_json(arguments.output / "results.json", described, results)
        except (BenchmarkError, LocalServerError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 2
    report.plot(arguments.output / "results.png", described, results)
    print(f"\nwrote {arguments.output}/results.json and results.png")
    missed = [figure for result in results for figure in result.figures if figure.holds is False]
    return 1 if missed else 0


BENCHMARKS: dict[str, Callable[[Path, argparse.Namespace], Result]] = {
    "streams": lambda folder, given: streams.measure(folder, given.seconds),
    "official": lambda folder, given: official.measure(folder, given.seconds, given.official),
    "single": lambda folder, given: single_stream.measure(folder, given.seconds),
    "length": lambda folder, given: long_answers.measure(folder),
    "demo": lambda folder, given: real_engine.measure(
        folder, DEMO_CHECKPOINT, "demo-gpt2", given.rounds, max_tokens=400
    ),
    "larger": lambda folder, given: real_engine.measure(
        folder, larger_checkpoint.make(folder), "gpt2-92m", given.rounds, max_tokens=256
    ),
}


def measure(folder: Path, arguments: argparse.Namespace) -> Iterator[Result]:
    for name in arguments.benchmarks or [name for name in BENCHMARKS if name != "official" or arguments.official]:
        yield BENCHMARKS[name](folder, arguments)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "benchmarks",
        nargs="*",
        metavar="NAME",
        help=f"which ones: {', '.join(BENCHMARKS)}; without any, all (official with --official)",
    )
    parser.add_argument("--seconds", type=_at_least_one, default=60, help="how long streams are measured")
    parser.add_argument("--rounds", type=_at_least_one, default=7, help="how often real engines take turns")
    parser.add_argument("--output", type=Path, default=ROOT / "out/bench", metavar="FOLDER")
    parser.add_argument(
        "--official",
        type=Path,
        metavar="FOLDER",
        help="NVIDIA's all_models/inflight_batcher_llm, to measure its preprocessing, ensemble and postprocessing in "
        "the same run, around the same engine",
    )
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.benchmarks if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark '{unknown[0]}'; choose from {', '.join(BENCHMARKS)}")
    if "official" in arguments.benchmarks and arguments.official is None:
        parser.error("the benchmark 'official' needs NVIDIA's files; say with --official where they are")
    return arguments


def _at_least_one(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
