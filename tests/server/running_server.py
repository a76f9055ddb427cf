"""A real tritonserver for tests, and short ways to ask it through real clients."""

from __future__ import annotations

import json
import os
import queue
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from local_server import LocalServer
from tritonclient.utils import np_to_triton_dtype

ROOT = Path(__file__).resolve().parents[2]
ANSWER_SECONDS = 60

# numpy dtype and Triton datatype of every input that a client can send.
DATATYPES: dict[str, tuple[Any, str]] = {
    "text_input": (np.object_, "BYTES"),
    "stop_words": (np.object_, "BYTES"),
    "bad_words": (np.object_, "BYTES"),
    **dict.fromkeys(
        (
            "stream",
            "streaming",
            "stop",
            "apply_chat_template",
            "exclude_input_in_output",
            "skip_special_tokens",
            "return_log_probs",
            "return_context_logits",
            "return_generation_logits",
            "return_perf_metrics",
            "return_num_input_tokens",
            "return_num_output_tokens",
        ),
        (np.bool_, "BOOL"),
    ),
    **dict.fromkeys(
        ("top_p", "temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty"),
        (np.float32, "FP32"),
    ),
    **dict.fromkeys(("seed", "random_seed"), (np.uint64, "UINT64")),
}


class ServerError(Exception):
    """What the server answered instead. `status` is HTTP's number or gRPC's name."""

    def __init__(self, message: str, status: int | str | None = None):
        super().__init__(message)
        self.status = status


# Engine kind -> what it refuses. test_trtllm.py and test_bad_input.py see that it does.
CANNOT = {
    "openvino": {"bad_words"},
    "tensorrt": {"beam_search", "log_probs"},
    "pytorch": {"beam_search"},
    "synthetic": {"beam_search", "log_probs", "bad_words"},
}


class Server(LocalServer):
    """One running server, with short ways to ask it."""

    def needs(self, capability: str) -> None:
        """Skip the test where the engine has none of it."""
        if capability in CANNOT[self.engine]:
            pytest.skip(f"engines of the kind {self.engine} have no {capability}, and refuse it")

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        print(f"---- the log of {self.repository} ----\n{self.log.read_text()[-4000:]}")

    def stop(self) -> int:
        try:
            return super().stop()
        finally:
            self._kill_what_is_left()

    def _kill_what_is_left(self) -> None:
        """Whoever outlived the server: all its processes are of the session that it was started in."""
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.pid != self.process.pid:
                    process.kill()
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass

    def pid_of(self, what: str) -> int:
        """The process of this server whose command line has `what`: "tensorrt_llm/1/model.py", "openvino_worker.py"."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if any(argument.endswith(what) for argument in process.cmdline()):
                return process.pid
        raise AssertionError(f"the server has no process with {what}")

    # ---- HTTP --------------------------------------------------------------------------------------------------

    def get(self, path: str, port: int | None = None) -> str:
        return self._http(urllib.request.Request(f"http://127.0.0.1:{port or self.http_port}{path}"))

    def generate(self, model: str | None = None, **body: Any) -> dict[str, Any]:
        return json.loads(self._http(self._post(f"/v2/models/{model or self.name}/generate", body)))

    def generate_stream(self, model: str | None = None, **body: Any) -> list[dict[str, Any]]:
        text = self._http(self._post(f"/v2/models/{model or self.name}/generate_stream", body))
        # By "\n" alone: a text may hold other characters that Python takes for the end of a line.
        return [json.loads(line.removeprefix("data:")) for line in text.split("\n") if line.startswith("data:")]

    def _post(self, path: str, body: Any) -> urllib.request.Request:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data)

    @staticmethod
    def _http(request: urllib.request.Request) -> str:
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            body = error.read().decode()
            try:
                raise ServerError(json.loads(body)["error"], error.code) from None
            except (ValueError, KeyError):
                raise ServerError(body, error.code) from None

    # ---- tritonclient ------------------------------------------------------------------------------------------

    def infer_http(self, model: str | None = None, **values: Any) -> dict[str, np.ndarray]:
        with httpclient.InferenceServerClient(f"127.0.0.1:{self.http_port}", network_timeout=ANSWER_SECONDS) as client:
            result = client.infer(model or self.infer_name, tensors(httpclient, values))
            return {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}

    def infer_grpc(self, model: str | None = None, **values: Any) -> dict[str, np.ndarray]:
        return self.infer_grpc_within(ANSWER_SECONDS, model, **values)

    def infer_grpc_within(self, seconds: float, model: str | None = None, **values: Any) -> dict[str, np.ndarray]:
        """The client goes after so many seconds."""
        with grpcclient.InferenceServerClient(f"127.0.0.1:{self.grpc_port}") as client:
            result = client.infer(model or self.infer_name, tensors(grpcclient, values), client_timeout=seconds)
            return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}

    def stream_grpc(
        self, model: str | None = None, request_id: str = "", **values: Any
    ) -> Iterator[dict[str, np.ndarray]]:
        """The responses of one streamed request; the last one may be empty. Raises ServerError."""
        answers: queue.SimpleQueue = queue.SimpleQueue()
        with grpcclient.InferenceServerClient(f"127.0.0.1:{self.grpc_port}") as client:
            client.start_stream(lambda result, error: answers.put((result, error)))
            client.async_stream_infer(
                model or self.name, tensors(grpcclient, values), request_id=request_id, enable_empty_final_response=True
            )
            final = False
            while not final:
                result, error = answers.get(timeout=ANSWER_SECONDS)
                if error is not None:
                    raise ServerError(error.message(), error.status())
                response = result.get_response()
                final = response.parameters["triton_final_response"].bool_param
                if response.outputs:
                    yield {output.name: result.as_numpy(output.name) for output in response.outputs}

    # ---- metrics -----------------------------------------------------------------------------------------------

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels. KeyError when there is none."""
        found = []
        for line in self.get("/metrics", self.metrics_port).splitlines():
            if line.startswith(name + "{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                found.append(float(line.rsplit(" ", 1)[1]))
        if not found:
            raise KeyError(f"{name} {labels}")
        return sum(found)

    def active_requests(self) -> int:
        return int(self.metric("nv_trt_llm_request_metrics", request_type="active"))


def tensors(client: Any, values: Mapping[str, Any]) -> list[Any]:
    """A tensor per value: a numpy array as it is, a list as one row per prompt, anything else as [1, 1]."""
    inputs = []
    for name, value in values.items():
        dtype, datatype = DATATYPES.get(name, (np.int32, "INT32"))
        if isinstance(value, np.ndarray):
            datatype = np_to_triton_dtype(value.dtype)
        else:
            rows = value if isinstance(value, list) else [value]
            rows = [row if isinstance(row, list) else [row] for row in rows]
            rows = [[cell.encode() if isinstance(cell, str) else cell for cell in row] for row in rows]
            value = np.array(rows, dtype=dtype)
        tensor = client.InferInput(name, list(value.shape), datatype)
        tensor.set_data_from_numpy(value)
        inputs.append(tensor)
    return inputs


def text_of(result: Mapping[str, np.ndarray]) -> list[str]:
    """The texts of one response, sequence by sequence."""
    return [value.decode() for value in result["text_output"].ravel()]
