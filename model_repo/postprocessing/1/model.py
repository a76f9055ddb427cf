"""The model `postprocessing`: token ids to text. The work is in text_states.py and text_decoding.py.

It is also where a vanished client is noticed: Triton marks the request of an ensemble's next step as cancelled, and
this is the next step after `tensorrt_llm` (see cancel_channel.py).
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from cancel_channel import CancelSender
from chunk_header import ChunkHeader
from text_decoding import load_tokenizer
from text_states import TextStates


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="postprocessing: %(message)s")
        engine_folder = Path(args["model_repository"]).parent / "tensorrt_llm" / "1" / "engine"
        self._states = TextStates(load_tokenizer(engine_folder))
        self._cancel = CancelSender()

    def execute(self, requests: list) -> list:
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        self._cancel.close()

    def _respond(self, request) -> pb_utils.InferenceResponse:
        headers = []
        try:
            headers = self._headers(request)
            if request.is_cancelled():
                # Nobody reads this text, but it must not be an error: while tensorrt_llm still works for the same
                # request, that makes Triton before 26.03 count it as in flight for ever, and wait for it at shutdown.
                self._cancel_all(headers)
                texts = [""] * len(headers)
            else:
                texts = self._texts(request, headers)
            text = np.array([[text.encode() for text in texts]], np.object_)
            return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", text)])
        except Exception:
            logging.exception("a chunk could not be decoded")
            self._cancel_all(headers)
            message = "the server failed to decode this answer; its log has the reason"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, pb_utils.TritonError.INTERNAL))

    def _cancel_all(self, headers: list[ChunkHeader]) -> None:
        for header in headers:
            if not header.is_last:
                self._states.forget(header.key)
                self._cancel.cancel_key(header.key)

    @staticmethod
    def _headers(request) -> list[ChunkHeader]:
        tensor = pb_utils.get_input_tensor_by_name(request, "CHUNK_HEADER")
        return [] if tensor is None else [ChunkHeader.from_row(row) for row in tensor.as_numpy()[0].tolist()]

    def _texts(self, request, headers: list[ChunkHeader]) -> list[str]:
        ids = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()[0]
        lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()[0].tolist()
        if not headers:  # NVIDIA's interface: every row is a whole sequence of its own
            headers = [ChunkHeader(key=0)] * len(lengths)
        return [
            self._states.text_of(header, row[:length].tolist())
            for header, row, length in zip(headers, ids, lengths, strict=True)
        ]
