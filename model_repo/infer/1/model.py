"""The model `<served name>_infer`: text to text in one response, for plain `infer()`.

Triton refuses `infer()` on a model that streams, whether or not the request wants a stream. This one does not stream:
it encodes and decodes with the code of preprocessing and postprocessing, and asks the engine through engine_channel.py.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from chunks import CONSTANT_ARRAYS, Chunk, chunk_arrays
from engine_channel import Asked, EngineClient
from generation import AdmissionRefused, EngineError, RequestCancelled, RequestError
from prompt_encoding import CLIENT_INPUTS, PromptEncoder, PromptError
from prompt_tensors import arrival_tensor, encode_prompts
from request_parameters import ParameterError, read_parameters, refuse_unknown_parameters, timeout_microseconds
from server_ending import end_with_server
from text_decoding import load_tokenizer
from text_states import TextStates

_CANCEL_POLL_SECONDS = 0.25  # each is a round trip to Triton for every request in flight

# Inputs that go to the engine as they are; the ensemble's config maps them in the same way.
ENGINE_NAMES = {
    "stream": "streaming",
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "length_penalty": "len_penalty",
    **{
        name: name
        for name in (
            "end_id",
            "pad_id",
            "exclude_input_in_output",
            "skip_special_tokens",
            "temperature",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
            "min_tokens",
            "min_length",
            "seed",
            "random_seed",
            "beam_width",
            "num_return_sequences",
            "return_log_probs",
            "return_context_logits",
            "return_generation_logits",
            "return_perf_metrics",
            "return_num_input_tokens",
            "return_num_output_tokens",
            "priority",
        )
    },
}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="infer: %(message)s")
        end_with_server()
        model_folder = Path(args["model_repository"])
        settings = json.loads((model_folder / args["model_version"] / "settings.json").read_text())
        engine_folder = model_folder.parent / "tensorrt_llm" / "1" / "engine"
        self._encoder = PromptEncoder.load(engine_folder, default_max_tokens=settings["default_max_tokens"])
        self._texts = TextStates(load_tokenizer(engine_folder))
        self._engine = EngineClient()
        self._waiting: dict[Asked, _Answer] = {}
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="cancel", daemon=True)
        self._watcher.start()

    def execute(self, requests: list) -> None:
        """Returns when the engine has taken the requests: what waits for a slot waits in Triton's queue."""
        for request in requests:
            answer = _Answer(request, self._texts)
            arrival_ns = time.time_ns()
            try:
                parameters = read_parameters(request)
                refuse_unknown_parameters(parameters, CLIENT_INPUTS)
                timeout = timeout_microseconds(request.timeout(), parameters)
                tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
                if "stream" in tensors and tensors["stream"].any():
                    message = "stream is true and this model gives one response; stream from the model without '_infer'"
                    raise RequestError(message)
                for_engine = encode_prompts(self._encoder, tensors)
                for_engine |= {ENGINE_NAMES[name]: array for name, array in tensors.items() if name in ENGINE_NAMES}
                for_engine["ARRIVAL"] = arrival_tensor(len(for_engine["input_ids"]), False, arrival_ns)
                self._waiting[self._engine.ask(for_engine, timeout, answer)] = answer
            except (PromptError, ParameterError, RequestError, EngineError) as error:
                answer.fail(error)
            except Exception:
                logging.exception("a request could not be read")
                answer.fail(RuntimeError("the server failed on this request; its log has the reason"))

    def finalize(self) -> None:
        self._stopping.set()
        self._watcher.join()
        self._engine.close()

    def _watch(self) -> None:
        while not self._stopping.wait(_CANCEL_POLL_SECONDS):
            for asked, answer in list(self._waiting.items()):
                if answer.is_over_or_cancelled():
                    asked.cancel()
                    del self._waiting[asked]


class _Answer:
    """Collects one request's prompts and sends them as one response (`engine_channel.Answers`)."""

    def __init__(self, request, texts: TextStates):
        self._sender = request.get_response_sender()
        # Asking a sender that has sent its last response, even at the same moment, ends tritonserver with SIGSEGV.
        self._sender_lock = threading.Lock()
        self._is_over = False
        self._output_names = request.requested_output_names()
        self._texts = texts
        self._rows: dict[int, dict[str, np.ndarray]] = {}

    def send(self, chunk: Chunk, *, final: bool) -> None:
        # An answer that cannot be written must not end the thread that brings everybody's.
        if self._is_over:
            return
        try:
            self._take(chunk, final=final)
        except Exception:
            logging.exception("an answer could not be written")
            self.fail(RuntimeError("the server failed on this answer; its log has the reason"))

    def _take(self, chunk: Chunk, *, final: bool) -> None:
        texts = [self._texts.text_of(sequence.header, sequence.token_ids).encode() for sequence in chunk.sequences]
        row = {"text_output": np.array([texts], np.object_), **CONSTANT_ARRAYS, **chunk_arrays(chunk)}
        self._rows[chunk.batch_index] = row
        if final:
            rows = [self._rows[index] for index in sorted(self._rows)]
            tensors = [pb_utils.Tensor(name, _stack([row[name] for row in rows])) for name in self._output_names]
            self._respond(pb_utils.InferenceResponse(tensors))

    def fail(self, error: Exception) -> None:
        self._respond(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), _code(error))))

    def is_over_or_cancelled(self) -> bool:
        with self._sender_lock:
            return self._is_over or self._sender.is_cancelled()

    def _respond(self, response: pb_utils.InferenceResponse) -> None:
        with self._sender_lock:
            if self._is_over:
                return
            self._is_over = True
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _code(error: Exception) -> int:
    match error:
        case RequestCancelled():
            return pb_utils.TritonError.CANCELLED
        case AdmissionRefused():
            return pb_utils.TritonError.UNAVAILABLE
        case RequestError() | PromptError() | ParameterError():
            return pb_utils.TritonError.INVALID_ARG
        case EngineError():
            return pb_utils.TritonError.UNAVAILABLE
        case _:
            return pb_utils.TritonError.INTERNAL


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    """[1, ...] per prompt to [prompts, ...]; lists of different length are filled with zeros."""
    if len(rows) == 1:
        return rows[0]
    shape = [len(rows), *(max(sizes) for sizes in zip(*(row.shape[1:] for row in rows), strict=True))]
    stacked = np.full(shape, b"", np.object_) if rows[0].dtype == np.object_ else np.zeros(shape, rows[0].dtype)
    for index, row in enumerate(rows):
        stacked[(index, *(slice(size) for size in row.shape[1:]))] = row[0]
    return stacked
