"""Requests that no client should send, for hypothesis to draw: raw bodies over HTTP, and raw messages over gRPC.

Most are nearly right, because what is quite wrong never gets past the parser. What is not drawn, since tritonserver
2.51 itself ends of it, or stops answering: JSON nested thousands of levels deep, tensors in JSON whose shape says
gigabytes, `classification` asked of a text, the gRPC header `triton_grpc_error`, several faulty requests in one stream.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

NAME = "synthetic"

# Inputs of the ensemble and of tensorrt_llm: name -> datatype, and values that are right for it.
_TEXTS = st.text(max_size=40) | st.sampled_from(
    ["", " ", "\x00", "\ufeff", "日本", "👩‍🚀", "e\u0301", "<|endoftext|>", "x" * 3000]
)
_INTS = st.integers(-3, 40) | st.sampled_from([-(2**31), 2**31 - 1, 1023, 1024, 2**16])
_FLOATS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-30, 1e30])
_BOOLS = st.booleans()
INPUTS: dict[str, tuple[str, st.SearchStrategy]] = {
    "text_input": ("BYTES", _TEXTS),
    "max_tokens": ("INT32", _INTS),
    "stream": ("BOOL", _BOOLS),
    "apply_chat_template": ("BOOL", _BOOLS),
    "stop_words": ("BYTES", _TEXTS),
    "bad_words": ("BYTES", _TEXTS),
    "end_id": ("INT32", _INTS),
    "pad_id": ("INT32", _INTS),
    "exclude_input_in_output": ("BOOL", _BOOLS),
    "skip_special_tokens": ("BOOL", _BOOLS),
    "top_k": ("INT32", _INTS),
    "top_p": ("FP32", _FLOATS),
    "temperature": ("FP32", _FLOATS),
    "repetition_penalty": ("FP32", _FLOATS),
    "presence_penalty": ("FP32", _FLOATS),
    "frequency_penalty": ("FP32", _FLOATS),
    "length_penalty": ("FP32", _FLOATS),
    "min_tokens": ("INT32", _INTS),
    "min_length": ("INT32", _INTS),
    "seed": ("UINT64", st.integers(0, 2**64 - 1)),
    "random_seed": ("UINT64", st.integers(0, 2**64 - 1)),
    "beam_width": ("INT32", _INTS),
    "num_return_sequences": ("INT32", _INTS),
    "return_log_probs": ("BOOL", _BOOLS),
    "return_context_logits": ("BOOL", _BOOLS),
    "return_generation_logits": ("BOOL", _BOOLS),
    "return_perf_metrics": ("BOOL", _BOOLS),
    "return_num_input_tokens": ("BOOL", _BOOLS),
    "priority": ("INT32", _INTS),
    # tensorrt_llm's and postprocessing's own
    "input_ids": ("INT32", _INTS),
    "input_lengths": ("INT32", _INTS),
    "request_output_len": ("INT32", _INTS),
    "streaming": ("BOOL", _BOOLS),
    "stop": ("BOOL", _BOOLS),
    "stop_words_list": ("INT32", _INTS),
    "bad_words_list": ("INT32", _INTS),
    "ARRIVAL": ("INT64", st.integers(-(2**63), 2**63 - 1)),
    "QUERY": ("BYTES", _TEXTS),
    "REQUEST_OUTPUT_LEN": ("INT32", _INTS),
    "TOKENS_BATCH": ("INT32", _INTS),
    "SEQUENCE_LENGTH": ("INT32", _INTS),
    "CHUNK_HEADER": ("INT64", st.integers(-2, 2**40)),
}
_FOR_TENSORRT_LLM = (
    "input_ids",
    "input_lengths",
    "request_output_len",
    "streaming",
    "end_id",
    "seed",
    "stop_words_list",
)
_FOR_POSTPROCESSING = ("TOKENS_BATCH", "SEQUENCE_LENGTH", "CHUNK_HEADER")
_FOR_PREPROCESSING = ("QUERY", "REQUEST_OUTPUT_LEN")
_FOR_CLIENTS = tuple(INPUTS)[: tuple(INPUTS).index("input_ids")]
MODELS = {
    NAME: _FOR_CLIENTS,
    f"{NAME}_infer": _FOR_CLIENTS,
    "ensemble": _FOR_CLIENTS,
    "tensorrt_llm": _FOR_TENSORRT_LLM,
    "preprocessing": _FOR_PREPROCESSING,
    "postprocessing": _FOR_POSTPROCESSING,
    "nobody": _FOR_CLIENTS,
}
REQUIRED = {
    "tensorrt_llm": ("input_ids",),
    "postprocessing": ("TOKENS_BATCH", "SEQUENCE_LENGTH"),
    "preprocessing": ("QUERY",),
}

_ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
_NAMES = st.sampled_from(tuple(INPUTS)) | st.text(max_size=12) | st.sampled_from(["id", "timeout", "max_token"])


@dataclass(frozen=True)
class HttpRequest:
    path: str
    body: bytes


@st.composite
def generate_requests(draw: st.DrawFn) -> HttpRequest:
    """A body for generate or generate_stream: inputs by name, mostly with values of their type."""
    model = draw(st.sampled_from(tuple(MODELS)))
    values: dict[str, Any] = {}
    for name in REQUIRED.get(model, ("text_input",)):
        if draw(st.integers(0, 9)):
            values[name] = draw(INPUTS[name][1])
    for name in draw(st.lists(st.sampled_from(MODELS[model]), max_size=4)):
        one = INPUTS[name][1]
        values[name] = draw(one | st.lists(one, max_size=3)) if draw(st.integers(0, 4)) else draw(_ANY_JSON)
    for name in draw(st.lists(_NAMES, max_size=1)):
        values[name] = draw(_ANY_JSON)
    if "max_tokens" not in values and draw(st.booleans()):
        values["max_tokens"] = draw(st.integers(1, 8))
    body = json.dumps(values).encode()
    endpoint = draw(st.sampled_from(("generate", "generate_stream")))
    return HttpRequest(f"/v2/models/{model}/{endpoint}", draw(_damaged(body)))


@st.composite
def infer_requests(draw: st.DrawFn) -> HttpRequest:
    """A body for infer: tensors in JSON, whose shape and data fit each other more often than not."""
    model = draw(st.sampled_from(tuple(MODELS)))
    tensors = []
    for name in [*REQUIRED.get(model, ("text_input",)), *draw(st.lists(st.sampled_from(MODELS[model]), max_size=3))]:
        datatype, one = INPUTS[name]
        shape = draw(
            st.sampled_from(([1, 1], [1, 1], [1, 2], [2, 1], [1], [], [0], [1, 0], [1, 2, 2], [-1, 1], [3000, 1]))
        )
        count = 1
        for size in shape:
            count *= max(0, min(size, 4))
        tensor = {"name": name, "datatype": datatype, "shape": shape, "data": [draw(one) for _ in range(count)]}
        if not draw(st.integers(0, 5)):
            tensor[draw(st.sampled_from(tuple(tensor)))] = draw(_ANY_JSON)
        tensors.append(tensor)
    document: dict[str, Any] = {"inputs": tensors}
    if not draw(st.integers(0, 3)):
        document["outputs"] = [{"name": draw(st.sampled_from(("text_output", "finish_reason", "nothing")))}]
    if not draw(st.integers(0, 3)):
        document["parameters"] = draw(st.dictionaries(_NAMES, _ANY_JSON, max_size=2))
    if not draw(st.integers(0, 3)):
        document["id"] = draw(_ANY_JSON)
    return HttpRequest(f"/v2/models/{model}/infer", draw(_damaged(json.dumps(document).encode())))


@st.composite
def _damaged(draw: st.DrawFn, body: bytes) -> bytes:
    match draw(st.integers(0, 19)):
        case 0:
            return body[: draw(st.integers(0, len(body)))]
        case 1:
            at = draw(st.integers(0, len(body)))
            return body[:at] + draw(st.binary(max_size=4)) + body[at:]
        case 2:
            return draw(st.binary(max_size=30))
        case _:
            return body


@st.composite
def grpc_requests(draw: st.DrawFn) -> service_pb2.ModelInferRequest:
    """A message as no client library would make it: raw bytes of any length, in one place or the other or in both."""
    model = draw(st.sampled_from(tuple(MODELS)))
    request = service_pb2.ModelInferRequest(model_name=model)
    for name in [*REQUIRED.get(model, ("text_input",)), *draw(st.lists(st.sampled_from(MODELS[model]), max_size=3))]:
        datatype, one = INPUTS[name]
        shape = draw(st.sampled_from(([1, 1], [1, 1], [1, 1], [1, 2], [2, 1], [1], [], [1, 0], [1, 2, 3], [-1, 1])))
        values = [draw(one) for _ in range(abs(_product(shape)))]
        if not draw(st.integers(0, 9)):
            datatype = draw(st.sampled_from(("BYTES", "INT32", "FP32", "BOOL", "UINT64", "FP64", "nothing", "")))
        tensor = request.inputs.add(name=name, datatype=datatype, shape=shape)
        raw = b"".join(_bytes_of(INPUTS[name][0], value) for value in values)
        match draw(st.integers(0, 14)):
            case 0:
                request.raw_input_contents.append(raw[: draw(st.integers(0, len(raw)))])
            case 1:
                request.raw_input_contents.append(raw + draw(st.binary(max_size=5)))
            case 2:
                request.raw_input_contents.append(draw(st.binary(max_size=20)))
            case 3:
                tensor.contents.int_contents.extend([1, 2])
            case _:
                request.raw_input_contents.append(raw)
    if not draw(st.integers(0, 3)):
        name = draw(st.sampled_from(("timeout", "priority", "sequence_id", "max_tokens", "whatever")))
        request.parameters[name].int64_param = draw(st.integers(0, 2**40))
    if not draw(st.integers(0, 3)):
        request.id = draw(st.text(st.characters(exclude_categories=("Cs",)), max_size=10))
    return request


def _product(shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _bytes_of(datatype: str, value: Any) -> bytes:
    match datatype:
        case "BYTES":
            text = value.encode("utf-8", "surrogatepass")
            return struct.pack("<I", len(text)) + text
        case "BOOL":
            return struct.pack("?", value)
        case "FP32":
            return struct.pack("<f", value)
        case "UINT64":
            return struct.pack("<Q", value)
        case "INT64":
            return struct.pack("<q", value)
        case _:
            return struct.pack("<i", value)
