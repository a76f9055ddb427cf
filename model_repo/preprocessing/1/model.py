"""The model `preprocessing`: text to token ids. The work is in prompt_encoding.py."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from prompt_encoding import (
    PromptEncoder,
    PromptError,
    decode_utf8,
    refuse_unknown_parameters,
    word_list_array,
)


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="preprocessing: %(message)s")
        model_folder = Path(args["model_repository"])
        settings = json.loads((model_folder / args["model_version"] / "settings.json").read_text())
        self._encoder = PromptEncoder.load(
            model_folder.parent / "tensorrt_llm" / "1" / "engine", default_max_tokens=settings["default_max_tokens"]
        )

    def execute(self, requests: list) -> list:
        return [self._respond(request) for request in requests]

    def _respond(self, request) -> pb_utils.InferenceResponse:
        try:
            return pb_utils.InferenceResponse(self._encode(request))
        except PromptError as error:
            return _failed(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception:
            logging.exception("a prompt could not be encoded")
            return _failed("the server failed on this prompt; its log has the reason", pb_utils.TritonError.INTERNAL)

    def _encode(self, request) -> list[pb_utils.Tensor]:
        """For n prompts: INPUT_ID [n, longest], REQUEST_INPUT_LEN and REQUEST_OUTPUT_LEN [n, 1], words per prompt."""
        refuse_unknown_parameters(json.loads(request.parameters() or "{}"))
        queries = _strings(request, "QUERY", "text_input")
        if queries is None:
            raise PromptError("text_input is missing; send the prompt as text")
        as_chat = _array(request, "APPLY_CHAT_TEMPLATE")
        prompts = [
            self._encoder.encode("".join(row), as_chat=as_chat is not None and bool(as_chat.ravel()[index]))
            for index, row in enumerate(queries)
        ]
        output_lengths = _array(request, "REQUEST_OUTPUT_LEN")
        if output_lengths is None:
            output_lengths = np.array([[self._encoder.max_tokens_by_default(ids)] for ids in prompts], np.int32)
        input_ids = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
        for row, ids in zip(input_ids, prompts, strict=True):
            row[: len(ids)] = ids
        stop_words = _strings(request, "STOP_WORDS_DICT", "stop_words") or [[]] * len(prompts)
        bad_words = _strings(request, "BAD_WORDS_DICT", "bad_words") or [[]] * len(prompts)
        return [
            pb_utils.Tensor("INPUT_ID", input_ids),
            pb_utils.Tensor("REQUEST_INPUT_LEN", np.array([[len(ids)] for ids in prompts], np.int32)),
            pb_utils.Tensor("REQUEST_OUTPUT_LEN", output_lengths),
            pb_utils.Tensor("STOP_WORDS", _string_rows(stop_words)),
            pb_utils.Tensor("BAD_WORDS_IDS", self._word_lists(bad_words)),
        ]

    def _word_lists(self, rows: list[list[str]]) -> np.ndarray:
        arrays = [word_list_array(self._encoder.encode_words(row)) for row in rows]
        result = np.full((len(rows), 2, max(array.shape[1] for array in arrays)), -1, np.int32)
        for index, array in enumerate(arrays):
            result[index, :, : array.shape[1]] = array
        return result


def _array(request, name: str) -> np.ndarray | None:
    """The tensor, or None where it is absent or empty as JSON's "" and [] make it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    array = None if tensor is None else tensor.as_numpy()
    return array if array is not None and array.size else None


def _strings(request, name: str, client_name: str) -> list[list[str]] | None:
    """Rows of text. An empty string may come as a tensor without a value: it is still one (empty) string."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    array = tensor.as_numpy()
    if not array.size:
        return [[""] for _ in range(max(1, array.shape[0]))]
    return [[decode_utf8(value, client_name) for value in row.ravel()] for row in array]


def _string_rows(rows: list[list[str]]) -> np.ndarray:
    array = np.full((len(rows), max(1, *map(len, rows))), b"", np.object_)
    for index, row in enumerate(rows):
        array[index, : len(row)] = [word.encode() for word in row]
    return array


def _failed(message: str, code: int) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
