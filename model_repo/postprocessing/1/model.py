"""The model `postprocessing`: token ids to text. The work is in text_states.py and text_decoding.py, and in
whole_sequences.py for requests that do not come from `tensorrt_llm`.

It is also where a vanished client is noticed: Triton marks the request of an ensemble's next step as cancelled, and
this is the next step after `tensorrt_llm` (see feedback_channel.py).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from chunk_header import ChunkHeader, ChunkHeaderError, read_headers
from feedback_channel import FeedbackSender
from server_ending import end_with_server
from text_decoding import load_tokenizer
from text_states import TextStates
from whole_sequences import SequenceError, decode_sequences


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="postprocessing: %(message)s")
        end_with_server()
        engine_folder = Path(args["model_repository"]).parent / "tensorrt_llm" / "1" / "engine"
        self._tokenizer = load_tokenizer(engine_folder)
        self._vocab_size = json.loads((engine_folder / "engine.json").read_text())["vocab_size"]
        self._states = TextStates(self._tokenizer)
        self._feedback = FeedbackSender()

    def execute(self, requests: list) -> list:
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        self._feedback.close()

    def _respond(self, request) -> pb_utils.InferenceResponse:
        header = pb_utils.get_input_tensor_by_name(request, "CHUNK_HEADER")
        return self._decode_whole(request) if header is None else self._decode_chunk(request, header.as_numpy())

    def _decode_chunk(self, request, header: np.ndarray) -> pb_utils.InferenceResponse:
        """One response of `tensorrt_llm`: header [1, sequences, 5 or more], a row of tokens for each."""
        headers = []
        try:
            headers = read_headers(header)
            if request.is_cancelled():
                # Nobody reads this text, but it must not be an error: while tensorrt_llm still works for the same
                # request, that makes Triton before 26.03 count it as in flight for ever, and wait for it at shutdown.
                self._cancel_all(headers)
                texts = [""] * len(headers)
            else:
                texts = self._texts(request, headers)
                if headers[0].number:
                    self._feedback.done(headers[0].listener_pid, headers[0].number)
            return _answer([text.encode() for text in texts])
        except ChunkHeaderError as error:
            return _failed(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception:
            logging.exception("a chunk could not be decoded")
            self._cancel_all(headers)
            message = "the server failed to decode this answer; its log has the reason"
            return _failed(message, pb_utils.TritonError.INTERNAL)

    def _texts(self, request, headers: list[ChunkHeader]) -> list[str]:
        ids, lengths = _array(request, "TOKENS_BATCH")[0], _array(request, "SEQUENCE_LENGTH")[0].tolist()
        return [
            self._states.text_of(header, row[:length].tolist())
            for header, row, length in zip(headers, ids, lengths, strict=True)
        ]

    def _cancel_all(self, headers: list[ChunkHeader]) -> None:
        for header in headers:
            self._states.forget(header.key)
            if not header.is_last:
                self._feedback.gone(header.listener_pid, header.key)

    def _decode_whole(self, request) -> pb_utils.InferenceResponse:
        ids, lengths = _array(request, "TOKENS_BATCH"), _array(request, "SEQUENCE_LENGTH")
        try:
            return _answer(decode_sequences(self._tokenizer, self._vocab_size, ids, lengths).ravel())
        except SequenceError as error:
            return _failed(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception:
            logging.exception("sequences could not be decoded")
            message = "the server failed on these tokens; its log has the reason"
            return _failed(message, pb_utils.TritonError.INTERNAL)


def _array(request, name: str) -> np.ndarray:
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()


def _answer(texts: Sequence[bytes]) -> pb_utils.InferenceResponse:
    """OUTPUT as NVIDIA's is, a flat list: its clients, LangChain and LlamaIndex decode each element."""
    return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", np.array(texts, np.object_))])


def _failed(message: str, code: int) -> pb_utils.InferenceResponse:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
