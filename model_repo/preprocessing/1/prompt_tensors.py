"""A request's texts as arrays: what a client sent, by its names, to what `tensorrt_llm` takes, by its names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from prompt_encoding import PromptEncoder, PromptError, decode_utf8, word_list_array

Tensors = Mapping[str, np.ndarray]


def encode_prompts(encoder: PromptEncoder, tensors: Tensors) -> dict[str, np.ndarray]:
    """For n prompts: input_ids [n, longest], input_lengths and request_output_len [n, 1], words per prompt.

    Reads text_input, max_tokens, apply_chat_template, stop_words and bad_words. Raises PromptError.
    """
    texts = _strings(tensors, "text_input")
    if texts is None:
        raise PromptError("text_input is missing; send the prompt as text")
    as_chat = _values(tensors, "apply_chat_template")
    prompts = [
        encoder.encode("".join(row), as_chat=as_chat is not None and bool(as_chat.ravel()[index]))
        for index, row in enumerate(texts)
    ]
    output_lengths = _values(tensors, "max_tokens")
    if output_lengths is None:
        output_lengths = np.array([[encoder.max_tokens_by_default(ids)] for ids in prompts], np.int32)
    input_ids = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, ids in zip(input_ids, prompts, strict=True):
        row[: len(ids)] = ids
    no_words: list[list[str]] = [[]] * len(prompts)
    return {
        "input_ids": input_ids,
        "input_lengths": np.array([[len(ids)] for ids in prompts], np.int32),
        "request_output_len": output_lengths,
        "stop_words": _string_rows(_strings(tensors, "stop_words") or no_words),
        "bad_words_list": _word_lists(encoder, _strings(tensors, "bad_words") or no_words),
    }


def arrival_tensor(num_prompts: int, from_ensemble: bool, arrival_ns: int) -> np.ndarray:
    """ARRIVAL, INT64 [n, 2]: whether the answers go to `postprocessing`, and the Unix time."""
    return np.full((num_prompts, 2), (from_ensemble, arrival_ns), np.int64)


def _values(tensors: Tensors, name: str) -> np.ndarray | None:
    """The tensor, or None where it is absent or empty as JSON's "" and [] make it."""
    array = tensors.get(name)
    return array if array is not None and array.size else None


def _strings(tensors: Tensors, name: str) -> list[list[str]] | None:
    """Rows of text. An empty string may come as a tensor without a value: it is still one (empty) string."""
    array = tensors.get(name)
    if array is None:
        return None
    if not array.size:
        return [[""] for _ in range(max(1, array.shape[0]))]
    return [[decode_utf8(value, name) for value in row.ravel()] for row in array]


def _string_rows(rows: Sequence[Sequence[str]]) -> np.ndarray:
    array = np.full((len(rows), max(1, *map(len, rows))), b"", np.object_)
    for index, row in enumerate(rows):
        array[index, : len(row)] = [word.encode() for word in row]
    return array


def _word_lists(encoder: PromptEncoder, rows: Sequence[Sequence[str]]) -> np.ndarray:
    """INT32 [n, 2, longest], see `word_list_array`."""
    arrays = [word_list_array(encoder.encode_words(row)) for row in rows]
    result = np.full((len(rows), 2, max(array.shape[1] for array in arrays)), -1, np.int32)
    for index, array in enumerate(arrays):
        result[index, :, : array.shape[1]] = array
    return result
