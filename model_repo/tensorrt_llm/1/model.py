"""The model `tensorrt_llm`: token ids in, token ids out, by whichever engine lies in `engine/`.

`initialize` loads the engine, `execute` admits requests, and the dispatcher answers them from its own thread. A
request's life is described in dispatcher.py; the types are in generation.py.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import triton_python_backend_utils as pb_utils
from cancel_channel import CancelListener
from dispatcher import Dispatcher, Responder
from engine_channel import EngineListener
from engine_loading import load_engine
from engine_manifest import ManifestError
from engine_metrics import EngineMetrics
from generation import EngineError, RequestError
from request_reading import RequestReader, Tensors
from response_writing import ResponseWriter, TritonResponder
from text_decoding import load_tokenizer

INPUTS = (
    "input_ids",
    "input_lengths",
    "request_output_len",
    "streaming",
    "end_id",
    "pad_id",
    "stop_words",
    "stop_words_list",
    "bad_words_list",
    "exclude_input_in_output",
    "skip_special_tokens",
    "runtime_top_k",
    "runtime_top_p",
    "temperature",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "len_penalty",
    "min_tokens",
    "min_length",
    "seed",
    "random_seed",
    "beam_width",
    "num_return_sequences",
    "return_log_probs",
    "return_context_logits",
    "return_generation_logits",
)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="tensorrt_llm: %(message)s")
        version_folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((version_folder / "settings.json").read_text())
        engine_folder = version_folder / "engine"
        try:
            self._engine, manifest = load_engine(engine_folder)
        except (ManifestError, EngineError) as error:
            logging.critical("%s", error)
            raise pb_utils.TritonModelException(str(error)) from None
        tokenizer = load_tokenizer(engine_folder)
        self._reader = RequestReader(
            limits=self._engine.limits,
            capabilities=self._engine.capabilities,
            engine_kind=manifest.engine,
            tokenizer=tokenizer,
            end_ids=tuple(manifest.eos_token_ids),
            exclude_input_in_output=settings["exclude_input_in_output"],
        )
        self._dispatcher = Dispatcher(
            self._engine,
            tokenizer,
            responses_per_second=settings["responses_per_second"],
            on_fatal=_end_server,
        )
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._metrics = EngineMetrics(self._engine, labels, self._dispatcher.max_in_flight)
        self._writer = ResponseWriter()
        self._cancel_listener = CancelListener(self._dispatcher.cancel_key, self._dispatcher.cancel_request_id)
        self._engine_listener = EngineListener(self._serve, self._dispatcher.cancel_request_id)

    def execute(self, requests: list) -> None:
        for request in requests:
            responder = TritonResponder(request, self._writer)
            if self._is_stop(request):
                self._stop(responder)
            else:
                self._serve(self._tensors(request), responder)

    def _serve(self, tensors: Tensors, responder: Responder) -> None:
        """Begin one request, from Triton or from the engine channel. Blocks while the engine is full; never raises."""
        try:
            self._dispatcher.submit(self._reader.read(tensors), responder)
        except RequestError as error:
            responder.fail(error)
        except Exception:
            logging.exception("a request could not be read")
            responder.fail(RuntimeError("the server failed on this request; its log has the reason"))

    def finalize(self) -> None:
        self._engine_listener.close()
        self._cancel_listener.close()
        self._dispatcher.close()
        self._metrics.close()
        self._engine.shutdown()
        del self._metrics, self._dispatcher, self._engine
        gc.collect()

    @staticmethod
    def _tensors(request) -> dict:
        tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
        return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}

    @staticmethod
    def _is_stop(request) -> bool:
        stop = pb_utils.get_input_tensor_by_name(request, "stop")
        return stop is not None and bool(stop.as_numpy().any())

    def _stop(self, responder: TritonResponder) -> None:
        if not responder.request_id:
            responder.fail(RequestError("stop is true, but the request has no id; give it that of the request to stop"))
            return
        self._dispatcher.cancel_request_id(responder.request_id)
        responder.finish()


def _end_server(error: EngineError) -> None:
    """An engine that failed does not come back by itself: end the server, so that its platform starts a new one."""
    logging.critical("%s; ending the server", error)
    # From a timer, so that the failed requests' responses are out before Triton stops.
    threading.Timer(0.5, os.kill, (os.getppid(), signal.SIGTERM)).start()
