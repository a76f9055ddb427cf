"""The processes that build an engine: side by side, one after another, watched, and never left behind.

Steps are small scripts here, instead of tensorrt_rank.py: what they do stands in their job, as Python text.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from compilers import step_processes
from compilers.step_processes import Step, StepFailedError, run
from gpus import Gpu

BUILD = Path(step_processes.__file__).parent.parent
SOON_SECONDS = 20
GPUS = [Gpu(index=index, product="NVIDIA-L4", compute_capability="8.9", memory_mib=23034) for index in range(4)]
PROGRAM = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
result = {}
exec(job["python"])
json.dump(result | {"seconds": 0.0}, open(sys.argv[2], "w"))
"""

MakeStep = Callable[..., Step]


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    monkeypatch.setattr(step_processes, "PROGRAM", path)


@pytest.fixture
def step(tmp_path: Path) -> MakeStep:
    def make(name: str, python: str, gpus: tuple[int, ...] = (0,), **options: Any) -> Step:
        folder = tmp_path / name
        folder.mkdir()
        used = tuple(GPUS[index] for index in gpus)
        return Step(name=name, folder=folder, gpus=used, job=lambda: {"python": python}, **options)

    return make


def results_of(steps: list[Step]) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    run(steps, lambda step, result: results.update({step.name: result}))
    return results


def failure_of(step: Step) -> StepFailedError:
    with pytest.raises(StepFailedError) as raised:
        run([step], lambda step, result: None)
    return raised.value


def test_each_result_is_told(step: MakeStep):
    results = results_of([step("a", "result = {'n': 1}"), step("b", "result = {'n': 2}")])
    assert [results[name]["n"] for name in ("a", "b")] == [1, 2]


def test_steps_of_two_gpus_run_side_by_side(step: MakeStep, tmp_path: Path):
    meet = (
        "open('{own}', 'w'); deadline = time.time() + 20\n"
        "while not os.path.exists('{other}') and time.time() < deadline: time.sleep(0.01)\n"
        "result = {{'met': os.path.exists('{other}')}}"
    )
    a, b = tmp_path / "a-is-here", tmp_path / "b-is-here"
    results = results_of(
        [step("a", meet.format(own=a, other=b), gpus=(0,)), step("b", meet.format(own=b, other=a), gpus=(1,))]
    )
    assert [results[name]["met"] for name in ("a", "b")] == [True, True]


def test_steps_of_one_gpu_run_one_after_another(step: MakeStep, tmp_path: Path):
    marker = tmp_path / "busy"
    alone = f"os.close(os.open('{marker}', os.O_CREAT | os.O_EXCL)); time.sleep(0.1); os.unlink('{marker}')"
    assert len(results_of([step(name, alone) for name in "abc"])) == 3


def test_a_step_is_asked_for_its_job_when_it_starts(step: MakeStep):
    first = step("first", "open('../first.txt', 'w').write('done')")
    second = step("second", "")
    asked = Step(
        name="second",
        folder=second.folder,
        gpus=first.gpus,
        job=lambda: {"python": f"result = {{'seen': {(first.folder.parent / 'first.txt').exists()}}}"},
    )
    assert results_of([first, asked])["second"]["seen"] is True


def test_a_step_sees_its_gpus_and_no_mpi(step: MakeStep, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    for name in ("OMPI_COMM_WORLD_RANK", "PMIX_SERVER_URI2", "PMI_FD", "ORTE_X", "TLLM_DISABLE_MPI"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMPI_MCA_btl", "self")
    seen = results_of([step("a", "result = {'environment': dict(os.environ)}", gpus=(3,))])["a"]["environment"]
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["CUDA_DEVICE_ORDER"]) == ("3", "PCI_BUS_ID")
    assert seen["OMPI_MCA_btl"] == "self"  # configuration, not identity
    left = [name for name in seen if name.startswith(("OMPI_", "PMIX_", "PMI_", "ORTE_", "TLLM_", "TRTLLM_"))]
    assert sorted(left) == ["OMPI_MCA_btl", "OMPI_MCA_rmaps_base_oversubscribe"]


@pytest.mark.parametrize("needs_hub", [True, False])
def test_only_a_step_that_needs_the_hub_may_ask_it(step: MakeStep, monkeypatch: pytest.MonkeyPatch, needs_hub: bool):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    made = step("a", "result = {'offline': os.environ.get('HF_HUB_OFFLINE')}", needs_hub=needs_hub)
    assert results_of([made])["a"]["offline"] == (None if needs_hub else "1")


def test_a_step_works_in_its_own_folder(step: MakeStep, tmp_path: Path):
    results_of([step("a", "open('model.cache', 'w')")])
    assert (tmp_path / "a/model.cache").exists()


def test_who_fails_says_so_and_quotes_its_log(step: MakeStep):
    failed = failure_of(step("a", "print('[E] something'); sys.exit(3)"))
    assert (failed.exit_code, failed.error, failed.lines) == (3, None, ["[E] something"])


def test_who_is_killed_has_the_signals_number(step: MakeStep):
    assert failure_of(step("a", "os.kill(os.getpid(), 9)")).exit_code == -9


def test_who_ends_without_a_result_has_failed(step: MakeStep):
    assert failure_of(step("a", "os._exit(0)")).exit_code == 0


@pytest.mark.parametrize(
    ("said", "is_memory"),
    [
        ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("[TRT] [E] Error Code 2: OutOfMemory (Requested size was 2147483648 bytes.)", True),
        ("[TRT] [W] Device memory is insufficient to use tactic.", False),
    ],
)
def test_an_error_for_want_of_gpu_memory_is_known(step: MakeStep, said: str, is_memory: bool):
    python = f"print({said!r})\nfor n in range(40): print('Traceback line', n)\nsys.exit(1)"
    assert failure_of(step("a", python)).is_out_of_gpu_memory is is_memory


def test_when_one_fails_the_others_end(step: MakeStep, tmp_path: Path):
    note = tmp_path / "pid"
    long = step("long", f"open('{note}', 'w').write(str(os.getpid())); time.sleep(60)", gpus=(1,))
    wait = f"while not os.path.exists('{note}') or not open('{note}').read(): time.sleep(0.01)\nsys.exit(1)"
    with pytest.raises(StepFailedError, match="short"):
        run([long, step("short", wait)], lambda step, result: None)
    assert not psutil.pid_exists(int(note.read_text()))


def test_what_a_step_starts_ends_with_it(step: MakeStep, tmp_path: Path):
    note = tmp_path / "pid"
    daemon = (
        f"import subprocess; process = subprocess.Popen(['sleep', '60'])\nopen('{note}', 'w').write(str(process.pid))"
    )
    results_of([step("a", daemon)])
    assert has_ended(int(note.read_text()))


def test_it_says_now_and_then_that_it_goes_on(
    step: MakeStep, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(step_processes, "HEARTBEAT_SECONDS", 0.2)
    caplog.set_level(logging.INFO)
    results_of([step("rank 1 of 2", "time.sleep(0.5)", gpus=(2,))])
    assert "rank 1 of 2: at work for 0 s, GPU 2" in caplog.messages


# The program's own end. The builder is a process here, and the step is the real program with a step that only waits.

BUILDER = """
import sys; sys.path[:0] = [{build!r}]
import logging
from pathlib import Path
from compilers import step_processes
from compilers.step_processes import Step, run
from gpus import Gpu
from store import _sigterm_raised
step_processes.PROGRAM = Path({program!r})
gpu = Gpu(index=0, product="NVIDIA-L4", compute_capability="8.9", memory_mib=23034)
step = Step(name="a", folder=Path({folder!r}), gpus=(gpu,), job=lambda: {{"step": "wait"}})
with _sigterm_raised():
    run([step], lambda step, result: None)
"""
WAITING = """
import sys; sys.path[:0] = [{compilers!r}]
import os, subprocess, time, tensorrt_rank

def wait(job):
    child = subprocess.Popen(["sleep", "60"])
    open({note!r} + ".new", "w").write(f"{{os.getpid()}} {{child.pid}}")
    os.replace({note!r} + ".new", {note!r})
    time.sleep(60)

tensorrt_rank.STEPS["wait"] = wait
tensorrt_rank.main(sys.argv[1:])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_builder_leaves_no_process(tmp_path: Path, how: signal.Signals):
    program, note, folder = tmp_path / "waiting.py", tmp_path / "pids", tmp_path / "a"
    program.write_text(WAITING.format(compilers=str(BUILD / "compilers"), note=str(note)))
    folder.mkdir()
    text = BUILDER.format(build=str(BUILD), program=str(program), folder=str(folder))
    builder = subprocess.Popen([sys.executable, "-c", text], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + SOON_SECONDS
        while not note.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        rank, child = map(int, note.read_text().split())
        builder.send_signal(how)
        builder.wait(SOON_SECONDS)
        assert has_ended(rank)
        # What the rank has started is in its group: it ends with the builder unless that is killed outright.
        if how != signal.SIGKILL:
            assert has_ended(child)
    finally:
        builder.kill()
        builder.wait()
        if note.exists():
            for pid in map(int, note.read_text().split()):
                if psutil.pid_exists(pid):
                    os.kill(pid, signal.SIGKILL)


def has_ended(pid: int) -> bool:
    deadline = time.monotonic() + SOON_SECONDS
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:  # of a test's own init, which reaps late
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def test_a_step_whose_builder_has_just_ended_does_not_start(tmp_path: Path):
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"step": "build", "parent": 1 << 22}))  # no process has this number
    program = BUILD / "compilers/tensorrt_rank.py"
    ended = subprocess.run([sys.executable, program, job, tmp_path / "result.json"], timeout=SOON_SECONDS)
    assert ended.returncode == 1
    assert not (tmp_path / "result.json").exists()
