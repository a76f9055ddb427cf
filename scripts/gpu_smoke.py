"""Try everything once on a machine with NVIDIA GPUs: `python scripts/gpu_smoke.py`, in the container that will serve.

Builds an engine for all GPUs of this machine, serves it, compares its greedy tokens with transformers, streams,
cancels, measures, ends the server, and writes report.json and report.md. Needs what the container has (Python,
TensorRT-LLM, tritonserver, transformers) and a model: a hub id, or a folder (then nothing is downloaded).

Each step is tried even if one before it failed, as far as that makes sense. The exit code is 0 if all of them passed.
What the steps do not cover: more than one node, LoRA, speculative decoding, beam search.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "build"), str(Path(__file__).parent)]

import gpus
import trtllm_installation
import verify
from checkpoint import resolve
from engine_manifest import read_manifest
from local_server import LocalServer
from model_shape import model_shape
from sizing import legal_tensor_parallel
from supervisor import num_in_flight

READY_SECONDS = 3600  # a large model from a slow disk
ANSWER_SECONDS = 300
LONG_TOKENS = 200
# Small ones that need no token. The PyTorch backend has no GPT-2.
MODELS = {"tensorrt": "gpt2", "pytorch": "Qwen/Qwen2.5-0.5B-Instruct"}
SPEED_TOKENS = 128
SPEED_PROMPT = "Once upon a time, in a village by the sea, there lived an old man who"


class SmokeError(Exception):
    """What was tried did not work: one sentence."""


@dataclass
class Step:
    name: str
    is_ok: bool
    seconds: float
    says: str  # one line: the result, or what went wrong
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Smoke:
    """One run: what was asked for, and the steps so far."""

    arguments: argparse.Namespace
    folder: Path
    steps: list[Step] = field(default_factory=list)
    repository: Path | None = None
    server: LocalServer | None = None

    def try_out(self, name: str, step: Callable[[], tuple[str, dict[str, Any]]], *, needs: bool = True) -> bool:
        """Run one step and tell how it went."""
        if not needs:
            return False
        print(f"smoke: {name} ...", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            says, figures = step()
            is_ok = True
        except Exception as error:
            says, figures, is_ok = _sentence(error), {}, False
            if not isinstance(error, SmokeError):
                traceback.print_exc()
        seconds = round(time.monotonic() - started, 2)
        self.steps.append(Step(name, is_ok, seconds, says, figures))
        print(f"smoke: {name}: {'ok' if is_ok else 'FAILED'} ({seconds:.1f} s): {says}", file=sys.stderr, flush=True)
        return is_ok


def main(argv: list[str] | None = None) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    smoke = Smoke(arguments, folder)
    try:
        run(smoke)
    finally:
        if smoke.server is not None:
            smoke.server.stop()
        write_report(smoke, folder)
    print(f"{folder / 'report.md'}\n{folder / 'report.json'}")
    return 0 if all(step.is_ok for step in smoke.steps) else 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Build, serve and try a model on this machine's NVIDIA GPUs.",
    )
    parser.add_argument("--model", help=f"hub id or checkpoint folder (default: {MODELS})")
    parser.add_argument(
        "--engine", choices=("tensorrt", "pytorch"), default="tensorrt", help="what runs it (default: tensorrt)"
    )
    parser.add_argument("--tp", type=int, metavar="N", help="tensor parallel GPUs (default: what the GPUs allow)")
    parser.add_argument("--pp", type=int, metavar="N", help="pipeline parallel GPUs (default: 2 of 4 GPUs or more)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/gpu-smoke"),
        metavar="DIR",
        help="report and logs (default: out/gpu-smoke)",
    )
    parser.add_argument(
        "--build-option",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        help="further options of build/engines.py, such as --build-option=--dtype=bfloat16",
    )
    parser.add_argument("--no-compare", action="store_true", help="leave out transformers, which runs on the CPU")
    arguments = parser.parse_args(argv)
    arguments.model = arguments.model or MODELS[arguments.engine]
    return arguments


def run(smoke: Smoke) -> None:
    smoke.try_out("machine", lambda: look_at_machine(smoke))
    is_built = smoke.try_out("build", lambda: build(smoke))
    is_served = smoke.try_out("serve", lambda: serve(smoke), needs=is_built)
    smoke.try_out("answer", lambda: answer(smoke), needs=is_served)
    smoke.try_out("compare", lambda: compare(smoke), needs=is_served and not smoke.arguments.no_compare)
    smoke.try_out("stream", lambda: stream(smoke), needs=is_served)
    smoke.try_out("bad request", lambda: bad_request(smoke), needs=is_served)
    smoke.try_out("cancel", lambda: cancel(smoke), needs=is_served)
    smoke.try_out("speed", lambda: speed(smoke), needs=is_served)
    smoke.try_out("stop", lambda: stop(smoke), needs=is_served)


# ---- the steps -------------------------------------------------------------------------------------------------------


def look_at_machine(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    found = gpus.find_gpus()
    figures = {
        "gpus": [asdict(gpu) for gpu in found],
        "driver": _driver_version(),
        "versions": trtllm_installation.versions() | _python_versions(),
        "has_engine_backend": trtllm_installation.has_engine_backend(),
        "host_memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "cores": len(os.sched_getaffinity(0)),
    }
    if not found:
        raise SmokeError("nvidia-smi names no GPU; start the container with --gpus all")
    if "tensorrt_llm" not in figures["versions"]:
        raise SmokeError("TensorRT-LLM is not installed here; run this in NVIDIA's tritonserver container that has it")
    return f"{len(found)} x {found[0].product}, TensorRT-LLM {figures['versions']['tensorrt_llm']}", figures


def build(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    arguments = smoke.arguments
    tp, pp = layout_for(arguments, len(gpus.find_gpus()))
    output = smoke.folder / "repository"
    command = [sys.executable, str(ROOT / "build/engines.py"), "--model", arguments.model, "--json"]
    command += ["--engine", arguments.engine, "--tp", str(tp), "--pp", str(pp), "--served-name", "smoke"]
    command += ["--output", str(output), *arguments.build_option]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    if done.returncode:
        raise SmokeError(report["error"]["message"])
    smoke.repository = output
    figures = {"tp": tp, "pp": pp, "seconds": report["seconds"], "plan": report["plan"], "engine": report["engine"]}
    was_stored = ", stored before" if report["was_stored"] else ""
    return f"TP {tp} x PP {pp} in {report['seconds']:.0f} s{was_stored}", figures | {"was_stored": report["was_stored"]}


def serve(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    assert smoke.repository is not None
    started = time.monotonic()
    smoke.server = LocalServer(smoke.repository, smoke.folder / "server.log")
    smoke.server.wait_until_ready(READY_SECONDS)
    seconds = time.monotonic() - started
    return f"ready after {seconds:.1f} s", {"ready_seconds": round(seconds, 2)}


def answer(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    text = ask(smoke, text_input="The capital of France is", max_tokens=16)["text_output"]
    if not text:
        raise SmokeError("the answer to 'The capital of France is' is empty")
    return repr(text), {"text": text}


def compare(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    """Token by token, each position behind the reference's own text: see build/verify.py."""
    assert smoke.repository is not None
    started = time.monotonic()
    engine = smoke.repository / "tensorrt_llm/1/engine"
    manifest = read_manifest(engine)
    checkpoint = resolve(smoke.arguments.model)
    answers = verify.reference(checkpoint, engine, manifest, verify.DEFAULT_PROMPTS, max_tokens=verify.MAX_TOKENS)

    def generate(requests: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        return [ask_for_ids(smoke, ids, number) for ids, number in requests]

    result = verify.compare(answers, generate, engine, manifest, started=started)
    return result.sentence, {"num_tokens": result.num_tokens, "share": round(result.share, 4)}


def stream(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    body = {"text_input": SPEED_PROMPT, "max_tokens": 64, "end_id": -1}
    ask(smoke, **body)  # from now on the prompt comes from the KV cache, and all later answers are computed alike
    whole = ask(smoke, **body)["text_output"]
    events = [event for event, _ in ask_for_stream(smoke, body)]
    joined = "".join(event["text_output"] for event in events)
    if joined != whole:
        raise SmokeError(f"the streamed text is {joined!r}, and the one sent as a whole {whole!r}")
    if len(events) < 8:
        raise SmokeError(f"64 tokens came in {len(events)} responses; a stream that is alone has one for each")
    return f"the same text in {len(events)} responses", {"responses": len(events)}


def bad_request(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    for body in ({"text_input": "a " * 100_000}, {"text_input": "a", "temperature": -1.0}):
        try:
            ask(smoke, **body)
        except SmokeError:
            continue
        raise SmokeError("a request that cannot be served was answered")
    ask(smoke, text_input="a", max_tokens=1)
    return "refused with a sentence, and the server goes on", {}


def cancel(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    """The client goes away in the middle of a stream, and its place in the engine is free again."""
    body = {"text_input": SPEED_PROMPT, "max_tokens": LONG_TOKENS, "end_id": -1}
    started = time.monotonic()
    for _ in ask_for_stream(smoke, body):
        pass
    whole = time.monotonic() - started
    events = ask_for_stream(smoke, body)
    next(events)
    gone = time.monotonic()
    events.close()
    assert smoke.server is not None
    while num_in_flight(f"http://127.0.0.1:{smoke.server.metrics_port}/metrics") != 0:
        if time.monotonic() - gone > ANSWER_SECONDS:
            raise SmokeError(f"a cancelled request still holds its place after {ANSWER_SECONDS} s")
        time.sleep(0.02)
    seconds = time.monotonic() - gone
    ask(smoke, text_input="a", max_tokens=1)
    return f"free after {seconds:.2f} s, where a whole answer takes {whole:.2f} s", {
        "free_seconds": round(seconds, 3),
        "whole_answer_seconds": round(whole, 3),
    }


def speed(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    assert smoke.repository is not None
    batch = read_manifest(smoke.repository / "tensorrt_llm/1/engine").limits["max_batch_size"]
    figures = {"alone": measure(smoke, 1), f"{batch} at a time": measure(smoke, batch)}
    alone, together = figures.values()
    says = f"alone {alone['tokens_per_second']:.0f} tokens/s, first token after {alone['first_token_ms']:.0f} ms; "
    says += f"{batch} at a time {together['tokens_per_second']:.0f} tokens/s, {together['first_token_ms']:.0f} ms"
    return says, figures


def stop(smoke: Smoke) -> tuple[str, dict[str, Any]]:
    assert smoke.server is not None
    started = time.monotonic()
    code = smoke.server.stop()
    seconds = time.monotonic() - started
    if code:
        raise SmokeError(f"the server ended with {code}; see {smoke.folder / 'server.log'}")
    return f"ended with 0 after {seconds:.1f} s", {"seconds": round(seconds, 2)}


# ---- what they are made of -------------------------------------------------------------------------------------------


def layout_for(arguments: argparse.Namespace, num_gpus: int) -> tuple[int, int]:
    """As many GPUs as the model can be divided over; with four or more, both kinds of parallelism."""
    pp = arguments.pp or (2 if num_gpus >= 4 and not arguments.tp else 1)
    if arguments.tp:
        return arguments.tp, pp
    checkpoint = resolve(arguments.model, is_plan=True)
    config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    legal = legal_tensor_parallel(model_shape(config, checkpoint.model))
    return max((tp for tp in legal if tp * pp <= max(num_gpus, 1)), default=1), pp


def measure(smoke: Smoke, number: int) -> dict[str, Any]:
    """`number` streams at the same time. Tokens are those of all streams; times are medians over the streams."""
    first: list[float] = []
    tokens: list[int] = []
    errors: list[str] = []
    lock = threading.Lock()

    def client(index: int) -> None:
        body = {"text_input": f"{index}. {SPEED_PROMPT}", "max_tokens": SPEED_TOKENS, "end_id": -1}
        begun = time.monotonic()
        times, count = [], 0
        try:
            for event, at in ask_for_stream(smoke, body):
                times.append(at - begun)
                count += event["num_output_tokens"]
        except Exception as error:
            with lock:
                errors.append(_sentence(error))
            return
        with lock:
            first.append(times[0])
            tokens.append(count)

    client(0)  # warm
    first.clear()
    tokens.clear()
    started = time.monotonic()
    threads = [threading.Thread(target=client, args=(index,)) for index in range(1, number + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - started
    if errors:
        raise SmokeError(f"{len(errors)} of {number} streams failed, such as: {errors[0]}")
    return {
        "streams": number,
        "tokens": sum(tokens),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(sum(tokens) / seconds, 1),
        "first_token_ms": round(1e3 * sorted(first)[len(first) // 2], 1),
    }


def ask(smoke: Smoke, model: str = "smoke", **body: Any) -> dict[str, Any]:
    assert smoke.server is not None
    url = f"http://127.0.0.1:{smoke.server.http_port}/v2/models/{model}/generate"
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, json.dumps(body).encode()), timeout=ANSWER_SECONDS
        ) as r:
            return json.load(r)
    except urllib.error.HTTPError as error:
        raise SmokeError(f"status {error.code}: {error.read().decode(errors='replace')}") from None


def ask_for_ids(smoke: Smoke, prompt_ids: list[int], number: int) -> list[int]:
    body = {"input_ids": prompt_ids, "input_lengths": len(prompt_ids), "request_output_len": number, "end_id": -1}
    found = ask(smoke, "tensorrt_llm", **body)["output_ids"]
    return found if isinstance(found, list) else [found]  # Triton writes a list of one number as a number


def ask_for_stream(smoke: Smoke, body: dict[str, Any]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each event with its monotonic time; the connection ends with the iterator."""
    assert smoke.server is not None
    connection = http.client.HTTPConnection("127.0.0.1", smoke.server.http_port, timeout=ANSWER_SECONDS)
    try:
        connection.request("POST", "/v2/models/smoke/generate_stream", json.dumps(body | {"stream": True}))
        response = connection.getresponse()
        if response.status != 200:
            raise SmokeError(f"status {response.status}: {response.read().decode(errors='replace')}")
        for line in response:
            if line.startswith(b"data:"):
                event = json.loads(line.removeprefix(b"data:"))
                if "error" in event:
                    raise SmokeError(event["error"])
                yield event, time.monotonic()
    finally:
        connection.close()


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def _python_versions() -> dict[str, str]:
    from importlib import metadata

    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, SmokeError) else f"{type(error).__name__}: {text}"[:1000]


# ---- the report ------------------------------------------------------------------------------------------------------


def write_report(smoke: Smoke, folder: Path) -> None:
    report = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["python", "scripts/gpu_smoke.py", *sys.argv[1:]],
        "model": smoke.arguments.model,
        "engine": smoke.arguments.engine,
        "passed": all(step.is_ok for step in smoke.steps),
        "steps": [asdict(step) for step in smoke.steps],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.md").write_text(_page(report))


def _page(report: dict[str, Any]) -> str:
    machine = next((step["figures"] for step in report["steps"] if step["name"] == "machine"), {})
    lines = [
        f"# GPU smoke test: {report['model']}, --engine {report['engine']}: "
        + ("passed" if report["passed"] else "FAILED"),
        "",
        f"{report['made']}, `{' '.join(report['command'])}`",
        "",
        "| step | | seconds | |",
        "|---|---|---|---|",
    ]
    for step in report["steps"]:
        says = step["says"].replace("|", "\\|")
        lines.append(f"| {step['name']} | {'ok' if step['is_ok'] else 'FAILED'} | {step['seconds']} | {says} |")
    lines += ["", "| | |", "|---|---|"]
    for gpu in machine.get("gpus", []):
        lines.append(f"| GPU {gpu['index']} | {gpu['product']}, {gpu['compute_capability']}, {gpu['memory_mib']} MiB |")
    lines += [f"| {name} | {version} |" for name, version in machine.get("versions", {}).items()]
    lines.append(f"| driver | {machine.get('driver')} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
