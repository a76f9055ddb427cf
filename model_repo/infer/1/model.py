"""The model `<served name>_infer`: the ensemble's answer as one response, for plain `infer()`.

Triton refuses `infer()` on a model that streams, whether or not the request wants a stream. This model does not
stream; it asks the ensemble from a thread per request, so that many requests wait at the same time.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from cancel_channel import CancelSender

_CANCEL_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class _Call:
    """One request, with its values copied: Triton takes their memory back when `execute` returns."""

    sender: object
    request_id: str
    parameters: dict
    timeout_microseconds: int
    inputs: list[tuple[str, np.ndarray]]
    output_names: list[str]


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="infer: %(message)s")
        settings = json.loads((Path(args["model_repository"]) / args["model_version"] / "settings.json").read_text())
        self._ensemble = settings["ensemble"]
        self._cancel = CancelSender()
        self._in_flight: dict[str, _Call] = {}
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(settings["max_requests"], "infer")
        self._watcher = threading.Thread(target=self._watch, name="cancel", daemon=True)
        self._watcher.start()

    def execute(self, requests: list) -> None:
        for request in requests:
            call = _Call(
                request.get_response_sender(),
                request.request_id(),
                json.loads(request.parameters() or "{}"),
                request.timeout(),
                [(tensor.name(), tensor.as_numpy().copy()) for tensor in request.inputs()],
                request.requested_output_names(),
            )
            self._pool.submit(self._answer, call)

    def finalize(self) -> None:
        self._pool.shutdown()
        self._stopping.set()
        self._watcher.join()
        self._cancel.close()

    def _answer(self, call: _Call) -> None:
        try:
            response = self._ask(call)
        except pb_utils.TritonModelException as error:
            response = _failed(str(error), pb_utils.TritonError.INTERNAL)
        except Exception:
            logging.exception("a request failed")
            message = "the server failed on this request; its log has the reason"
            response = _failed(message, pb_utils.TritonError.INTERNAL)
        call.sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _ask(self, call: _Call) -> pb_utils.InferenceResponse:
        for name, array in call.inputs:
            if name == "stream" and array.any():
                message = "stream is true, but this model gives one response; stream from the model without '_infer'"
                return _failed(message, pb_utils.TritonError.INVALID_ARG)
        # An id of its own, since the client's may be shared by others: cancelling must hit this request alone.
        key = f"infer-{uuid.uuid4().hex}"
        request = pb_utils.InferenceRequest(
            model_name=self._ensemble,
            request_id=key,
            inputs=[pb_utils.Tensor(name, array) for name, array in call.inputs],
            requested_output_names=list(dict.fromkeys([*call.output_names, "batch_index"])),
            parameters=call.parameters,
            timeout=call.timeout_microseconds,
        )
        self._in_flight[key] = call
        try:
            rows: dict[int, dict[str, np.ndarray]] = {}
            for response in request.exec(decoupled=True):
                if response.has_error():
                    return pb_utils.InferenceResponse(error=response.error())
                tensors = {tensor.name(): tensor.as_numpy().copy() for tensor in response.output_tensors()}
                if tensors:
                    rows[int(tensors["batch_index"].ravel()[0])] = tensors
        finally:
            del self._in_flight[key]
        if not rows:  # the only request that ends without an answer is a cancelled one
            return _failed("the request was cancelled", pb_utils.TritonError.CANCELLED)
        ordered = [rows[index] for index in sorted(rows)]
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, _stack([row[name] for row in ordered])) for name in call.output_names]
        )

    def _watch(self) -> None:
        while not self._stopping.wait(_CANCEL_POLL_SECONDS):
            for key, call in list(self._in_flight.items()):
                if call.sender.is_cancelled():
                    self._cancel.cancel_request_id(key)


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    """[1, ...] per prompt to [prompts, ...]; lists of different length are filled with zeros."""
    if len(rows) == 1:
        return rows[0]
    shape = [len(rows), *(max(sizes) for sizes in zip(*(row.shape[1:] for row in rows), strict=True))]
    stacked = np.zeros(shape, rows[0].dtype) if rows[0].dtype != np.object_ else np.full(shape, b"", np.object_)
    for index, row in enumerate(rows):
        stacked[(index, *(slice(size) for size in row.shape[1:]))] = row[0]
    return stacked


def _failed(message: str, code: int) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
