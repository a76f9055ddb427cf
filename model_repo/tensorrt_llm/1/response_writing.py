"""Chunks to Triton responses. The only module beside model.py that touches Triton's types."""

from __future__ import annotations

import triton_python_backend_utils as pb_utils
from chunks import CONSTANT_ARRAYS, Chunk, chunk_arrays
from generation import AdmissionRefused, EngineError, RequestCancelled, RequestError


class ResponseWriter:
    """Makes the response of a chunk; one per model, since the constant tensors are made once."""

    def __init__(self) -> None:
        self._constants = [pb_utils.Tensor(name, array) for name, array in CONSTANT_ARRAYS.items()]

    def write(self, chunk: Chunk) -> pb_utils.InferenceResponse:
        tensors = [pb_utils.Tensor(name, array) for name, array in chunk_arrays(chunk).items()]
        return pb_utils.InferenceResponse(tensors + self._constants)


class TritonResponder:
    """The way back to one Triton request (`dispatcher.Responder`)."""

    def __init__(self, request, writer: ResponseWriter):
        self.request_id = ""  # set by whoever has read it
        self._sender = request.get_response_sender()
        self._writer = writer

    def send(self, chunk: Chunk, *, final: bool) -> None:
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        self._sender.send(self._writer.write(chunk), flags)

    def fail(self, error: Exception) -> None:
        if isinstance(error, RequestCancelled):
            # Nobody reads it, and an error while a chunk is still on its way through the ensemble would leave that
            # request in flight for ever (Triton before 26.03).
            self.finish()
            return
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), _code(error)))
        self._sender.send(response, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finish(self) -> None:
        """A final response with nothing in it."""
        self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()


def _code(error: Exception) -> int:
    match error:
        case AdmissionRefused():
            return pb_utils.TritonError.UNAVAILABLE
        case RequestError():
            return pb_utils.TritonError.INVALID_ARG
        case EngineError():
            return pb_utils.TritonError.UNAVAILABLE
        case _:
            return pb_utils.TritonError.INTERNAL
