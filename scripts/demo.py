"""The whole path on this machine's CPU: `make demo` builds, serves, asks, and stops.

Builds the engine of the bundled checkpoint (or takes it from the store), verifies it against transformers, starts
tritonserver on free ports, asks one question by plain infer() and one by streaming, and stops the server.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from local_server import LocalServer, LocalServerError

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = ROOT / "scripts/demo_checkpoint/demo-gpt2"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--infer", default="What is the capital of France?", help="the question asked by infer()")
    parser.add_argument("--stream", default="Tell me a story about a fox.", help="the question answered as a stream")
    arguments = parser.parse_args(argv)
    report = build()
    repository = Path(report["repository"])
    log = repository.with_suffix(".log")
    started = time.monotonic()
    server = LocalServer(repository, log)
    print("\n$", shown(server.command), flush=True)
    try:
        server.wait_until_ready()
        print(f"ready after {time.monotonic() - started:.1f} s")
        ask(f"127.0.0.1:{server.http_port}", server.infer_name, arguments.infer)
        stream(f"127.0.0.1:{server.grpc_port}", server.name, arguments.stream)
    except LocalServerError as error:
        sys.exit(f"demo: {error}")
    finally:
        print(f"\nserver stopped, exit code {server.stop()}; its log is {log.relative_to(ROOT)}")
    return 0


def build() -> dict:
    """The report of `build/engines.py --verify --json`; its progress lines are shown as they come."""
    command = [sys.executable, str(ROOT / "build/engines.py"), "--model", str(CHECKPOINT), "--engine", "openvino"]
    command += ["--verify", "--json", "--output", str(ROOT / "out/demo-gpt2")]
    print("$", shown(command), flush=True)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(result.returncode)
    return json.loads(result.stdout)


def shown(command: list[str]) -> str:
    return " ".join(command[1:]).replace(f"{ROOT}/", "")


def inputs_for(client, question: str, *, streaming: bool) -> list:
    """`client` is tritonclient's http or grpc module: both have InferInput."""
    values = {
        "text_input": (np.array([[question.encode()]], dtype=np.object_), "BYTES"),
        "max_tokens": (np.array([[400]], dtype=np.int32), "INT32"),
        "apply_chat_template": (np.array([[True]]), "BOOL"),
        "stream": (np.array([[streaming]]), "BOOL"),
    }
    inputs = []
    for name, (array, datatype) in values.items():
        tensor = client.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def ask(address: str, model: str, question: str) -> None:
    print(f"\ninfer() on the model '{model}' over HTTP")
    print(f"  prompt  {question}")
    with httpclient.InferenceServerClient(address) as client:
        started = time.perf_counter()
        result = client.infer(model, inputs_for(httpclient, question, streaming=False))
        seconds = time.perf_counter() - started
    tokens = int(result.as_numpy("num_output_tokens").item())
    print(f"  answer  {result.as_numpy('text_output').item().decode()}")
    print(f"  {tokens} tokens in {seconds * 1000:.0f} ms")


def stream(address: str, model: str, question: str) -> None:
    print(f"\nstreaming from the model '{model}' over gRPC")
    print(f"  prompt  {question}")
    print("  answer  ", end="", flush=True)
    answers: queue.SimpleQueue = queue.SimpleQueue()
    tokens, first, final = 0, 0.0, False
    with grpcclient.InferenceServerClient(address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        started = time.perf_counter()
        client.async_stream_infer(
            model, inputs_for(grpcclient, question, streaming=True), enable_empty_final_response=True
        )
        while not final:
            result, error = answers.get(timeout=60)
            if error is not None:
                sys.exit(f"\nthe server answered: {error}")
            first = first or time.perf_counter() - started
            final = result.get_response().parameters["triton_final_response"].bool_param
            text = result.as_numpy("text_output")
            if text is not None:
                print(text.item().decode(), end="", flush=True)
                tokens += int(result.as_numpy("num_output_tokens").item())
        seconds = time.perf_counter() - started
        client.stop_stream()
    print(f"\n  {tokens} tokens, {tokens / seconds:.0f} tokens/s, time to first token {first * 1000:.1f} ms")


if __name__ == "__main__":
    sys.exit(main())
