"""The model `preprocessing`: text to token ids. The work is in prompt_encoding.py and prompt_tensors.py."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

import triton_python_backend_utils as pb_utils
from prompt_encoding import CLIENT_INPUTS, PromptEncoder, PromptError
from prompt_tensors import arrival_tensor, encode_prompts
from request_parameters import ParameterError, read_parameters, refuse_unknown_parameters, timeout_microseconds
from server_ending import end_with_server

# This model's tensor names, which are NVIDIA's, and those of the client and of tensorrt_llm.
_INPUTS = {
    "QUERY": "text_input",
    "REQUEST_OUTPUT_LEN": "max_tokens",
    "APPLY_CHAT_TEMPLATE": "apply_chat_template",
    "STOP_WORDS_DICT": "stop_words",
    "BAD_WORDS_DICT": "bad_words",
}
_OUTPUTS = {
    "input_ids": "INPUT_ID",
    "input_lengths": "REQUEST_INPUT_LEN",
    "request_output_len": "REQUEST_OUTPUT_LEN",
    "stop_words": "STOP_WORDS",
    "bad_words_list": "BAD_WORDS_IDS",
    "ARRIVAL": "ARRIVAL",
}


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="preprocessing: %(message)s")
        end_with_server()
        model_folder = Path(args["model_repository"])
        settings = json.loads((model_folder / args["model_version"] / "settings.json").read_text())
        engine_folder = model_folder.parent / "tensorrt_llm" / "1" / "engine"
        self._encoder = PromptEncoder.load(engine_folder, default_max_tokens=settings["default_max_tokens"])

    def execute(self, requests: list) -> list:
        return [self._respond(request) for request in requests]

    def _respond(self, request) -> pb_utils.InferenceResponse:
        arrival_ns = time.time_ns()
        try:
            parameters = read_parameters(request)
            refuse_unknown_parameters(parameters, CLIENT_INPUTS)
            timeout_microseconds(request.timeout(), parameters)  # tensorrt_llm honours it; here it is only checked
            tensors = {_INPUTS[tensor.name()]: tensor.as_numpy() for tensor in request.inputs()}
            arrays = encode_prompts(self._encoder, tensors)
            arrays["ARRIVAL"] = arrival_tensor(len(arrays["input_ids"]), True, arrival_ns)
            return pb_utils.InferenceResponse([pb_utils.Tensor(_OUTPUTS[name], arrays[name]) for name in arrays])
        except (PromptError, ParameterError) as error:
            return _failed(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception:
            logging.exception("a prompt could not be encoded")
            return _failed("the server failed on this prompt; its log has the reason", pb_utils.TritonError.INTERNAL)


def _failed(message: str, code: int) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
