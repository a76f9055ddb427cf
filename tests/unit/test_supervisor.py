"""Signals and deaths around a server: who is told, who is waited for, and which exit code remains.

The server here is a Python process with children, as tritonserver is one with its models' processes: what is looked at
is /proc. The supervisor runs in a process of its own, as in scripts/serve.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import supervisor

SECONDS = 15
FOLDER = Path(supervisor.__file__).parent

# Starts its "models" with the arguments that tritonserver gives them, writes their pids, collects those that end when
# told to with SIGHUP, and ends at SIGTERM unless it is to ignore that.
SERVER = """
import os, signal, subprocess, sys, time
models = []
def end(*_):
    if not os.path.exists("ignore-sigterm"):
        [model.kill() for model in models]
        os._exit(int(open("exit-code").read()) if os.path.exists("exit-code") else 0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGHUP, lambda *_: [model.poll() for model in models])
for name in sys.argv[1:]:
    command = [sys.executable, "-c", "import time; time.sleep(100)", f"/repository/{name}/1/model.py"]
    models.append(subprocess.Popen(command))
open("new", "w").write(" ".join(str(pid) for pid in [os.getpid(), *(model.pid for model in models)]))
os.rename("new", "pids")
while True:
    time.sleep(1)
"""

SUPERVISOR = f"""
import os, sys
sys.path.insert(0, {str(FOLDER)!r})
from supervisor import Supervisor
class Feedback:
    def drain(self, pid): print("drain", pid, file=open("feedback", "a"))
    def end(self, pid): print("end", pid, file=open("feedback", "a"))
def num_in_flight():
    text = open("in-flight").read()
    return int(text) if text else None
made = Supervisor(feedback=Feedback(), is_ready=lambda: os.path.exists("ready"), num_in_flight=num_in_flight,
                  drain_seconds=float(sys.argv[1]), ready_line="it is ready", end_seconds=2.0)
sys.exit(made.run([sys.executable, "-c", {SERVER!r}, *sys.argv[2:]], os.environ))
"""


class Supervised:
    """In `folder` lie the files by which server and supervisor are told what to say and do."""

    def __init__(self, folder: Path, *models: str, drain_seconds: float = 30.0):
        self.folder = folder
        (folder / "ready").touch()
        self.set_in_flight("0")
        command = [sys.executable, "-c", SUPERVISOR, str(drain_seconds), *models]
        with (folder / "out").open("w") as out:
            self.process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, start_new_session=True)
        wait_for(lambda: (folder / "pids").exists())
        self.server, *pids = map(int, (folder / "pids").read_text().split())
        self.models = dict(zip(models, pids, strict=True))
        wait_for(lambda: "it is ready" in self.out())
        time.sleep(0.5)  # until the models are known

    def out(self) -> str:
        return (self.folder / "out").read_text()

    def feedback(self) -> list[str]:
        path = self.folder / "feedback"
        return path.read_text().splitlines() if path.exists() else []

    def set_in_flight(self, number: str) -> None:
        new = self.folder / "new-in-flight"
        new.write_text(number)
        new.rename(self.folder / "in-flight")

    def has_ended(self) -> bool:
        return supervisor._state(self.server) in (None, "Z")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    started: list[Supervised] = []

    def start(*models: str, **options: float) -> Supervised:
        started.append(
            Supervised(tmp_path, *(models or ("preprocessing", "tensorrt_llm", "postprocessing")), **options)
        )
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        for pid in (each.server, *each.models.values()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


# ---- signals -------------------------------------------------------------------------------------------------------


def test_an_idle_server_ends_at_sigterm_with_0(start: Callable[..., Supervised]):
    server = start()
    server.process.terminate()
    assert server.process.wait(SECONDS) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_newcomers_are_kept_out_and_the_server_ends_when_nothing_is_in_flight(
    start: Callable[..., Supervised], number: int
):
    server = start()
    server.set_in_flight("2")
    server.process.send_signal(number)
    wait_for(lambda: server.feedback() == [f"drain {server.models['tensorrt_llm']}"])
    time.sleep(1.5)
    assert not server.has_ended()
    server.set_in_flight("0")
    assert server.process.wait(SECONDS) == 0
    assert len(server.feedback()) == 1


def test_a_moment_without_requests_is_not_the_end(start: Callable[..., Supervised]):
    """A request may just be on its way from one model to the next."""
    server = start()
    server.set_in_flight("1")
    server.process.terminate()
    wait_for(lambda: bool(server.feedback()))
    for _ in range(4):
        server.set_in_flight("0")
        time.sleep(0.25)
        server.set_in_flight("1")
        time.sleep(0.5)
    assert not server.has_ended()


def test_requests_that_take_too_long_are_ended(start: Callable[..., Supervised]):
    server = start(drain_seconds=1.0)
    server.set_in_flight("3")
    server.process.terminate()
    assert server.process.wait(SECONDS) == 1
    pid = server.models["tensorrt_llm"]
    assert server.feedback() == [f"drain {pid}", f"end {pid}"]
    assert "3 requests are still in flight and fail now" in server.out()


def test_a_server_that_does_not_say_is_given_its_time(start: Callable[..., Supervised]):
    server = start(drain_seconds=2.0)
    server.set_in_flight("")
    server.process.terminate()
    time.sleep(1.2)
    assert not server.has_ended()
    assert server.process.wait(SECONDS) == 1


def test_a_second_signal_does_not_wait(start: Callable[..., Supervised]):
    server = start()
    server.set_in_flight("1")
    server.process.terminate()
    wait_for(lambda: bool(server.feedback()))
    server.process.terminate()
    assert server.process.wait(SECONDS) == 0


def test_a_third_signal_kills(start: Callable[..., Supervised]):
    server = start()
    (server.folder / "ignore-sigterm").touch()
    server.set_in_flight("1")
    for _ in range(3):
        server.process.terminate()
        time.sleep(0.5)
    assert server.process.wait(SECONDS) == 128 + signal.SIGKILL


def test_a_server_that_ignores_sigterm_is_killed(start: Callable[..., Supervised]):
    server = start()
    (server.folder / "ignore-sigterm").touch()
    server.process.terminate()
    assert server.process.wait(SECONDS) == 0  # it was idle: nothing is lost
    assert "killing it" in server.out()


# ---- ends that nobody asked for ------------------------------------------------------------------------------------


def test_the_servers_exit_code_is_handed_on(start: Callable[..., Supervised]):
    server = start()
    (server.folder / "exit-code").write_text("7")
    os.kill(server.server, signal.SIGTERM)
    assert server.process.wait(SECONDS) == 7


def test_a_server_that_is_killed_ends_with_128_and_the_signal(start: Callable[..., Supervised]):
    server = start()
    os.kill(server.server, signal.SIGKILL)
    assert server.process.wait(SECONDS) == 128 + signal.SIGKILL


def test_a_server_that_is_killed_leaves_no_models_behind(start: Callable[..., Supervised]):
    server = start()
    os.kill(server.server, signal.SIGKILL)
    server.process.wait(SECONDS)
    wait_for(lambda: {supervisor._state(pid) for pid in server.models.values()} <= {None, "Z"})


def test_the_server_and_its_models_end_with_their_supervisor(start: Callable[..., Supervised]):
    server = start()
    (server.folder / "ignore-sigterm").touch()
    server.process.kill()
    wait_for(server.has_ended)
    wait_for(lambda: {supervisor._state(pid) for pid in server.models.values()} <= {None, "Z"})


@pytest.mark.parametrize("model", ["tensorrt_llm", "postprocessing"])
def test_without_a_model_that_every_answer_needs_the_server_is_killed(start: Callable[..., Supervised], model: str):
    server = start()
    (server.folder / "ignore-sigterm").touch()
    server.set_in_flight("5")
    os.kill(server.models[model], signal.SIGKILL)
    assert server.process.wait(SECONDS) == supervisor.MODEL_DIED_EXIT_CODE
    assert f"the process of the model '{model}' (pid {server.models[model]}) has died" in server.out()


@pytest.mark.parametrize("model", ["preprocessing", "gpt2_infer"])
def test_without_another_model_requests_in_flight_may_finish(start: Callable[..., Supervised], model: str):
    server = start("tensorrt_llm", model)
    server.set_in_flight("1")
    os.kill(server.models[model], signal.SIGKILL)
    wait_for(lambda: bool(server.feedback()))
    time.sleep(1.0)
    assert not server.has_ended()
    server.set_in_flight("0")
    assert server.process.wait(SECONDS) == supervisor.MODEL_DIED_EXIT_CODE


def test_a_model_that_ends_in_an_orderly_way_is_none_of_our_business(start: Callable[..., Supervised]):
    server = start()
    os.kill(server.models["preprocessing"], signal.SIGTERM)
    wait_for(lambda: supervisor._state(server.models["preprocessing"]) == "Z")
    os.kill(server.server, signal.SIGHUP)  # collects it
    time.sleep(1.5)
    assert not server.has_ended()
    assert server.process.poll() is None


# ---- what the server says ------------------------------------------------------------------------------------------


def test_requests_in_flight_are_those_that_wait_and_those_that_are_active(tmp_path: Path):
    page = tmp_path / "metrics"
    page.write_text(
        "# HELP nv_inference_pending_request_count x\n"
        'nv_inference_pending_request_count{model="tensorrt_llm",version="1"} 4\n'
        'nv_inference_pending_request_count{model="gpt2_infer",version="1"} 2\n'
        'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 3\n'
        'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 18\n'
    )
    assert supervisor.num_in_flight(page.as_uri()) == 9


def test_without_an_answer_nobody_knows(tmp_path: Path):
    assert supervisor.num_in_flight((tmp_path / "none").as_uri()) is None
