"""scripts/bench.py: what it is asked for, and how it tells what it found. Measuring is tests/server/test_bench.py's."""

from __future__ import annotations

import json
from pathlib import Path

import bench
import pytest
from benchmarks import official, report
from benchmarks.repositories import BenchmarkError
from benchmarks.results import Result

MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "memory_gib": 4.0,
    "system": "Linux",
    "packages": {"numpy": "1.0"},
    "commit": "abc",
    "load_before": 0.1,
}


@pytest.fixture
def result() -> Result:
    result = Result(name="length", title="a title", data={"streamed_microseconds_per_token": [1.0, 2.0]})
    result.add("rate", 41_234.4, "tokens/s", at_least=40_000)
    result.add("gap", 0.3, "s", at_most=0.25)
    result.add("of no account", 3)
    return result


def test_the_table_says_what_was_asked_and_whether_it_holds(result: Result):
    lines = report.table(result).splitlines()
    assert lines[0] == "a title"
    assert lines[1].split() == ["rate", "41,234", "tokens/s", ">=", "40,000:", "holds"]
    assert lines[2].split() == ["gap", "0.3", "s", "<=", "0.25:", "MISSED"]
    assert lines[3].split() == ["of", "no", "account", "3"]


def test_the_files_have_the_machine_and_every_figure(tmp_path: Path, result: Result):
    report.write_json(tmp_path / "results.json", MACHINE, [result])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["machine"] == MACHINE
    (written,) = content["results"]
    assert [figure["holds"] for figure in written["figures"]] == [True, False, None]
    assert written["data"] == result.data
    report.plot(tmp_path / "results.png", MACHINE, [result])
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results.png"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["strems"], "there is no benchmark 'strems'; choose from streams, official, single, length, demo, larger"),
        (["official"], "the benchmark 'official' needs NVIDIA's files; say with --official where they are"),
        (["--seconds", "0"], "--seconds"),
        (["--rounds", "0"], "--rounds"),
    ],
)
def test_what_cannot_be_measured_is_refused(argv: list[str], sentence: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        bench.parse(argv)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_folder_without_nvidia_s_files_is_named_with_what_is_missing(tmp_path: Path):
    with pytest.raises(BenchmarkError, match=r"has no ensemble/config.pbtxt; give the folder triton_backend/"):
        official.assemble(tmp_path, tmp_path)
