"""The model `tensorrt_llm`: token ids in, token ids out, by whichever engine lies in `engine/`.

`initialize` loads the engine, `execute` admits requests, and the dispatcher answers them from its own thread. A
request's life is described in dispatcher.py; the types are in generation.py.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
from pathlib import Path

import triton_python_backend_utils as pb_utils
from dispatcher import Dispatcher
from engine_channel import EngineListener
from engine_loading import load_engine
from engine_manifest import ManifestError
from engine_metrics import EngineMetrics
from exchanges import Responder
from feedback_channel import FeedbackListener
from generation import EngineError, RequestError
from measurements import Measurements
from metric_families import gauges
from pacing import affordable_responses_per_second
from request_parameters import ParameterError, read_parameters, timeout_microseconds
from request_reading import RequestReader, Tensors
from response_writing import ResponseWriter, TritonResponder
from server_ending import end_server, end_with_server, leave_message
from text_decoding import load_tokenizer
from waiting_room import QueueLimits

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
    "priority",
    "ARRIVAL",
)

# Requests that came by the engine channel are in flight in another model, so Triton unloads this one while they run.
_DRAIN_SECONDS = 30.0


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="tensorrt_llm: %(message)s")
        end_with_server()
        version_folder = Path(args["model_repository"]) / args["model_version"]
        settings = json.loads((version_folder / "settings.json").read_text())
        engine_folder = version_folder / "engine"
        try:
            self._engine, manifest = load_engine(engine_folder)
        except (ManifestError, EngineError) as error:
            logging.critical("%s", error)
            leave_message(str(error))
            raise pb_utils.TritonModelException(str(error)) from None
        tokenizer = load_tokenizer(engine_folder)
        self._reader = RequestReader(
            limits=self._engine.limits,
            capabilities=self._engine.capabilities,
            engine_kind=manifest.engine,
            tokenizer=tokenizer,
            end_ids=tuple(manifest.eos_token_ids),
            exclude_input_in_output=settings["exclude_input_in_output"],
            priority_levels=settings["priority_levels"],
        )
        measurements = Measurements(self._engine.limits.max_batch_size)
        self._dispatcher = Dispatcher(
            self._engine,
            tokenizer,
            responses_per_second=settings["responses_per_second"]
            or affordable_responses_per_second(self._engine.computes_on_cpu),
            hang_seconds=settings["hang_seconds"],
            queue_limits=_queue_limits(settings),
            measurements=measurements,
            on_fatal=lambda error: end_server(str(error)),
        )
        self._measurements = measurements
        self._metrics = EngineMetrics(
            {"model": args["model_name"], "version": args["model_version"]}, self._gauges, measurements.take
        )
        self._writer = ResponseWriter()
        self._feedback = FeedbackListener(
            on_gone=self._dispatcher.cancel_key,
            on_done=self._dispatcher.done,
            on_drain=self._dispatcher.drain,
            on_end=self._dispatcher.end,
        )
        self._engine_listener = EngineListener(self._serve, self._dispatcher.cancel_request_id)

    def execute(self, requests: list) -> None:
        for request in requests:
            responder = TritonResponder(request, self._writer)
            try:
                timeout = timeout_microseconds(request.timeout(), read_parameters(request))
                responder.request_id = request.request_id()
            except ParameterError as error:
                self._refuse(responder, RequestError(str(error)))
                continue
            if self._is_stop(request):
                self._stop(responder)
            else:
                self._serve(self._tensors(request), timeout, responder)

    def _serve(self, tensors: Tensors, timeout: int, responder: Responder) -> None:
        """Begin one request, from Triton or from the engine channel. Blocks while the engine is full; never raises.

        `timeout` in microseconds, 0 for none.
        """
        try:
            self._dispatcher.submit(self._reader.read(tensors, timeout), responder)
        except RequestError as error:
            self._refuse(responder, error)
        except Exception:
            logging.exception("a request could not be read")
            self._refuse(responder, RuntimeError("the server failed on this request; its log has the reason"))

    def _refuse(self, responder: Responder, error: Exception) -> None:
        self._measurements.invalid()
        responder.fail(error)

    def _gauges(self) -> dict:
        return gauges(self._engine.stats(), self._dispatcher.num_in_flight, self._dispatcher.max_in_engine)

    def finalize(self) -> None:
        self._engine_listener.stop_accepting()
        if not self._dispatcher.wait_until_idle(_DRAIN_SECONDS):
            logging.warning("requests are still in flight after %g s; they fail now", _DRAIN_SECONDS)
        self._dispatcher.close()
        self._engine_listener.close()
        self._feedback.close()
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


def _queue_limits(settings: dict) -> QueueLimits | None:
    """None where nothing is asked for that Triton's own queue cannot do."""
    limits = QueueLimits(max_size=settings["max_queue_size"], timeout_seconds=settings["queue_timeout_seconds"])
    return limits if settings["priority_levels"] or limits != QueueLimits() else None
