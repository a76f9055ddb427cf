"""Bad input gets one clear error, whichever way it comes, and the server goes on as if it had never come.

Every test here is followed by a good request and a look at the log, the module by a look at slots and processes. Where
Triton answers before our models see anything, its sentence is what the table has, so that a new release which says
something else, or nothing, is noticed.

What is not covered, since tritonserver 2.51 itself ends with a signal (fixed in later releases): JSON nested 50,000
levels deep, and `classification` asked for `text_output`.
"""

from __future__ import annotations

import http.client
import json
import queue
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from running_server import Server, ServerError, tensors, text_of
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

SECONDS = 10  # for one answer, which takes milliseconds; the rest is for a machine that is busy
GOOD = {"text_input": "The capital of France is", "max_tokens": 3}
GOOD_TEXT = " Paris"
GOOD_IDS = {"input_ids": np.array([[5, 6, 7]], np.int32), "input_lengths": 3, "request_output_len": 2}


def _ints(*rows: Any) -> np.ndarray:
    return np.array(rows, np.int32)


def _texts(*rows: Any) -> np.ndarray:
    return np.array(rows, np.object_)


def _floats(value: float) -> np.ndarray:
    return np.array([[value]], np.float32)


# ---- what is good before and after ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def goes_on(server: Server) -> Iterator[None]:
    """A good request after the bad one succeeds, and the bad one has not made any of our models raise."""
    start = server.log.stat().st_size
    yield
    assert server.generate(**GOOD)["text_output"] == GOOD_TEXT
    with server.log.open() as log:
        log.seek(start)
        assert "Traceback" not in log.read()


@pytest.fixture(autouse=True, scope="module")
def nothing_is_lost(session_server: Server) -> Iterator[None]:
    """No slot stays taken and no process ends or is replaced."""
    before = _processes(session_server)
    yield
    assert _processes(session_server) == before
    deadline = time.monotonic() + SECONDS
    while session_server.active_requests() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert session_server.active_requests() == 0


def _processes(server: Server) -> set[int]:
    """The server's and its models'; the engine's own process is a child of a model's."""
    running = psutil.Process(server.process.pid).children(recursive=True)
    return {server.process.pid} | {p.pid for p in running if p.status() != psutil.STATUS_ZOMBIE}


# ---- the ways to ask, each giving the one error --------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """`status` is HTTP's number or gRPC's name; a gRPC stream has none."""

    message: str
    status: int | str | None


def _http(server: Server, method: str, path: str, body: bytes | None = None, **headers: str) -> Refusal:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=SECONDS)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    errors = [json.loads(line.removeprefix("data:")) for line in text.splitlines() if line]
    assert [list(error) for error in errors] == [["error"]], text
    return Refusal(errors[0]["error"], response.status)


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode()


def generate(server: Server, values: dict[str, Any], model: str | None = None) -> Refusal:
    return _http(server, "POST", f"/v2/models/{model or server.name}/generate", _json(values))


def generate_stream(server: Server, values: dict[str, Any], model: str | None = None) -> Refusal:
    return _http(server, "POST", f"/v2/models/{model or server.name}/generate_stream", _json(values))


def infer_http(server: Server, values: dict[str, Any], model: str | None = None) -> Refusal:
    with httpclient.InferenceServerClient(f"127.0.0.1:{server.http_port}", network_timeout=SECONDS) as client:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model or server.infer_name, tensors(httpclient, values))
    return Refusal(caught.value.message(), int(caught.value.status()))


def infer_grpc(server: Server, values: dict[str, Any], model: str | None = None) -> Refusal:
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(model or server.infer_name, tensors(grpcclient, values), client_timeout=SECONDS)
    return Refusal(caught.value.message(), caught.value.status().removeprefix("StatusCode."))


def stream_grpc(server: Server, values: dict[str, Any], model: str | None = None) -> Refusal:
    """On a stream that then serves a good request: a second error would come before the end of that one."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))

        def ask(name: str, request: dict[str, Any]) -> tuple[Any, Any]:
            client.async_stream_infer(name, tensors(grpcclient, request), enable_empty_final_response=True)
            return answers.get(timeout=SECONDS)

        result, refused = ask(model or server.name, values)
        assert refused is not None, result.get_response()
        result, error = ask(server.name, GOOD)
        assert error is None, error
        assert result.as_numpy("text_output").item().decode() == GOOD_TEXT
        client.stop_stream()
    assert answers.empty()
    return Refusal(refused.message(), refused.status())


JSON_WAYS: tuple[Callable, ...] = (generate, generate_stream)
TENSOR_WAYS: tuple[Callable, ...] = (infer_http, infer_grpc, stream_grpc)
STREAM_WAYS: tuple[Callable, ...] = (generate, generate_stream, stream_grpc)  # `_infer` has its own answer to `stream`
STATUS = {generate: 400, generate_stream: 400, infer_http: 400, infer_grpc: "INVALID_ARGUMENT", stream_grpc: None}


def check(refusal: Refusal, says: str, status: int | str | None) -> None:
    assert says in refusal.message
    assert refusal.status == status
    assert not re.search(r"\n|Traceback|\.py\b|/tmp/|/model_repo/|0x[0-9a-f]{6}", refusal.message)
    assert len(refusal.message) < 600  # Triton's own about shapes has 480


def check_ours(refusal: Refusal, says: str, status: int | str | None) -> None:
    """And one sentence. An ensemble's is prefixed by Triton."""
    check(refusal, says, status)
    sentence = refusal.message.removeprefix("in ensemble 'demo-gpt2', ")
    assert ". " not in sentence
    assert not sentence.endswith((".", "\n"))
    assert "server failed" not in sentence


def _by_way(cases: list[tuple], ways: tuple[Callable, ...]) -> list:
    """Every case over every way: (way, values, says). The first of a case is its id."""
    return [
        pytest.param(way, *case[1:3], id=f"{case[0]}-{way.__name__}".replace(" ", "_"))
        for case in cases
        for way in ways
        if len(case) < 4 or way in case[3]
    ]


def _ids(cases: list[tuple]) -> list:
    return [pytest.param(*case[1:], id=case[0].replace(" ", "_")) for case in cases]


def need_what_they_are_about(server: Server, values: dict, says: str = "") -> None:
    """Skip what is about beams, or about the refusal of bad words, where the engine is another."""
    if values.get("beam_width", 1) == 2:
        server.needs("beam_search")
    if "the engine 'openvino'" in says and server.engine != "openvino":
        pytest.skip(f"engines of the kind {server.engine} have bad words")


# ---- values that every way can carry -------------------------------------------------------------------------------

ROOM = "with a prompt of 6 tokens it must be 1 to 1018, since prompt and answer together may have 1024 tokens"

VALUES: list[tuple] = [
    ("max_tokens 0", {"max_tokens": 0}, f"max_tokens (request_output_len) is 0; {ROOM}"),
    ("max_tokens negative", {"max_tokens": -1}, f"max_tokens (request_output_len) is -1; {ROOM}"),
    ("max_tokens one too many", {"max_tokens": 1019}, f"max_tokens (request_output_len) is 1019; {ROOM}"),
    ("max_tokens huge", {"max_tokens": 2**31 - 1}, f"max_tokens (request_output_len) is 2147483647; {ROOM}"),
    ("max_tokens least", {"max_tokens": -(2**31)}, f"max_tokens (request_output_len) is -2147483648; {ROOM}"),
    ("min_tokens negative", {"min_tokens": -3}, "min_tokens is -3; it must be 0 to max_tokens, here 3"),
    ("min_tokens above max_tokens", {"min_tokens": 4}, "min_tokens is 4; it must be 0 to max_tokens, here 3"),
    ("min_length above max_tokens", {"min_length": 4}, "min_tokens is 4; it must be 0 to max_tokens, here 3"),
    ("min_tokens and min_length", {"min_tokens": 1, "min_length": 2}, "min_tokens is 1 and min_length is 2; they mean"),
    ("seed and random_seed", {"seed": 1, "random_seed": 2}, "seed is 1 and random_seed is 2; they mean the same"),
    ("temperature negative", {"temperature": -0.5}, "temperature is -0.5; it must be at least 0"),
    ("temperature nan", {"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
    ("temperature inf", {"temperature": float("inf")}, "temperature is inf; it must be a finite number"),
    ("temperature -inf", {"temperature": -float("inf")}, "temperature is -inf; it must be a finite number"),
    ("temperature denormal negative", {"temperature": -1e-40}, "temperature is -9.99995e-41; it must be at least 0"),
    ("top_p above 1", {"top_p": 1.5}, "top_p (runtime_top_p) is 1.5; it must be 0 to 1"),
    ("top_p negative", {"top_p": -0.1}, "top_p (runtime_top_p) is -0.1; it must be 0 to 1"),
    ("top_p nan", {"top_p": float("nan")}, "top_p (runtime_top_p) is nan; it must be a finite number"),
    ("top_k negative", {"top_k": -1}, "top_k (runtime_top_k) is -1; it must be 0 (all tokens) or more"),
    ("repetition_penalty 0", {"repetition_penalty": 0.0}, "repetition_penalty is 0; it must be above 0"),
    ("repetition_penalty negative", {"repetition_penalty": -1.0}, "repetition_penalty is -1; it must be above 0"),
    ("repetition_penalty nan", {"repetition_penalty": float("nan")}, "repetition_penalty is nan; it must be a finite"),
    ("presence_penalty above 2", {"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be -2 to 2"),
    ("frequency_penalty below -2", {"frequency_penalty": -2.5}, "frequency_penalty is -2.5; it must be -2 to 2"),
    ("frequency_penalty inf", {"frequency_penalty": float("inf")}, "frequency_penalty is inf; it must be a finite"),
    ("length_penalty without beams", {"length_penalty": 2.0}, "is 2 and beam_width is 1; it only ranks beams"),
    ("length_penalty nan", {"length_penalty": float("nan"), "beam_width": 2}, "(len_penalty) is nan; it must be"),
    ("beam_width 0", {"beam_width": 0}, "beam_width is 0; this engine takes 1 to"),
    ("beam_width 5", {"beam_width": 5}, "beam_width is 5; this engine takes 1 to"),
    ("beam_width huge", {"beam_width": 2**31 - 1}, "beam_width is 2147483647; this engine takes 1 to"),
    ("num_return_sequences 0", {"num_return_sequences": 0}, "num_return_sequences is 0; it must be 1 to 8"),
    (
        "num_return_sequences above the batch",
        {"num_return_sequences": 9, "temperature": 1.0},
        "num_return_sequences is 9; it must be 1 to 8 (--max-batch-size of the build)",
    ),
    (
        "num_return_sequences above beam_width",
        {"num_return_sequences": 3, "beam_width": 2},
        "num_return_sequences is 3; it must be 1 to 2 (beam_width)",
    ),
    ("several greedy sequences", {"num_return_sequences": 2}, "greedy decoding gives the same sequence every time"),
    ("end_id no token", {"end_id": 10**6}, "end_id is 1000000; it must be a token id, 0 to 1279, or -1 for none"),
    ("end_id -2", {"end_id": -2}, "end_id is -2; it must be a token id"),
    ("pad_id no token", {"pad_id": 10**6}, "pad_id is 1000000; it must be a token id"),
    ("prompt too long", {"text_input": " a" * 3000}, "text_input has 3000 tokens; this engine takes at most 1023"),
    (
        "prompt of a megabyte",
        {"text_input": " a" * 500_000},
        "text_input has 1000000 characters, more than 2046 tokens; this engine takes at most 1023",
    ),
    ("prompt of one long word", {"text_input": "a" * 1_000_000}, "text_input has 1000000 characters, more than"),
    (
        "chat prompt too long",
        {"text_input": "a" * 100_000, "apply_chat_template": True},
        "more than 2046 tokens; this engine takes at most 1023",
    ),
    (
        "10,000 stop words",
        {"stop_words": [[f"word{i}" for i in range(10_000)]]},
        "stop_words has 10000 words; at most 256 can be watched for",
        TENSOR_WAYS,
    ),
    ("bad_words", {"bad_words": "never"}, "bad_words is not something the engine 'openvino' can do; leave it out"),
    (
        "10,000 bad words",
        {"bad_words": [[f"word{i}" for i in range(10_000)]]},
        "bad_words has 10000 words; at most 256 can be kept out",
        TENSOR_WAYS,
    ),
    (
        "bad word of a megabyte",
        {"bad_words": "a" * 1_000_000},
        "bad_words has a word of 1000000 characters; a word may",
    ),
    ("context logits", {"return_context_logits": True}, "return_context_logits is true; this repository returns log"),
    ("generation logits", {"return_generation_logits": True}, "return_generation_logits is true; this repository"),
    ("beams that stream", {"stream": True, "beam_width": 2}, "stream is true and beam_width is 2; beams", STREAM_WAYS),
    (
        "stream to infer",
        {"stream": True},
        "stream is true and this model gives one response",
        (infer_http, infer_grpc),
    ),
]


@pytest.mark.parametrize(("way", "values", "says"), _by_way(VALUES, (*JSON_WAYS, *TENSOR_WAYS)))
def test_a_bad_value_is_named_with_its_rule(server: Server, way: Callable, values: dict, says: str):
    need_what_they_are_about(server, values, says)
    check_ours(way(server, GOOD | values), says, STATUS[way])


@pytest.mark.parametrize("way", [*JSON_WAYS, *TENSOR_WAYS], ids=lambda way: way.__name__)
def test_a_request_without_a_prompt_is_told_so(server: Server, way: Callable):
    check_ours(way(server, {"max_tokens": 3}), "text_input is missing; send the prompt as text", STATUS[way])


@pytest.mark.parametrize("way", [*JSON_WAYS, *TENSOR_WAYS], ids=lambda way: way.__name__)
def test_a_request_with_nothing_gets_tritons_sentence(server: Server, way: Callable):
    check(way(server, {}), "request has 0 inputs", STATUS[way])


def test_what_is_wrong_with_one_prompt_of_several_ends_the_request_once(server: Server):
    for way in TENSOR_WAYS:
        refusal = way(server, {"text_input": ["a", "b", "c"], "max_tokens": [1, 0, 1]})
        check_ours(refusal, "max_tokens (request_output_len) is 0", STATUS[way])


# ---- tensors: what JSON cannot say ---------------------------------------------------------------------------------

TENSORS: list[tuple] = [
    ("prompt is not UTF-8", {"text_input": _texts([b"caf\xe9"])}, "text_input is not UTF-8: byte 3 is 0xe9"),
    ("prompt is cut UTF-8", {"text_input": _texts([b"\xe2\x82"])}, "text_input is not UTF-8: byte 0 is 0xe2"),
    ("stop word is not UTF-8", {"stop_words": _texts([b"ok", b"\xff"])}, "stop_words is not UTF-8: byte 0 is 0xff"),
    ("bad word is not UTF-8", {"bad_words": _texts([b"\xff"])}, "bad_words is not UTF-8: byte 0 is 0xff"),
]

UNFIT_TENSORS: list[tuple] = [
    ("int64", {"max_tokens": np.array([[3]], np.int64)}, "'max_tokens' data-type is 'INT64', but model 'demo-gpt2"),
    ("float for int", {"max_tokens": _floats(3)}, "'max_tokens' data-type is 'FP32'"),
    ("int for float", {"temperature": _ints([1])}, "'temperature' data-type is 'INT32'"),
    ("int for bool", {"stream": _ints([1])}, "'stream' data-type is 'INT32'"),
    ("signed seed", {"seed": np.array([[-1]], np.int64)}, "'seed' data-type is 'INT64'"),
    ("number for text", {"text_input": _ints([1])}, "'text_input' data-type is 'INT32'"),
    ("prompt without batch", {"text_input": _texts(b"a")}, "unexpected shape for input 'text_input' for model"),
    ("prompt in three dimensions", {"text_input": _texts([[b"a"]])}, "Expected [-1,1], got [1,1,1]"),
    ("two prompts in one row", {"text_input": _texts([b"a", b"b"])}, "Expected [-1,1], got [1,2]"),
    ("empty prompt tensor", {"text_input": np.zeros((1, 0), np.object_)}, "Expected [-1,1], got [1,0]"),
    ("empty max_tokens", {"max_tokens": np.zeros((1, 0), np.int32)}, "Expected [-1,1], got [1,0]"),
    ("two values for one prompt", {"top_k": _ints([1, 2])}, "unexpected shape for input 'top_k'"),
    ("batch of nothing", {"text_input": np.zeros((0, 1), np.object_)}, "batch size does not match other inputs"),
    ("batches that disagree", {"text_input": ["a", "b"]}, "batch size does not match other inputs"),
    ("stop words for two prompts", {"stop_words": _texts([b"a"], [b"b"])}, "'stop_words' batch size does not match"),
    ("65 prompts", {"text_input": ["a"] * 65, "max_tokens": [1] * 65}, "batch-size must be <= 64"),
]

# What NVIDIA's repository has and this one has not, and what nobody has.
UNKNOWN_INPUTS = [
    "lora_task_id",
    "prompt_embedding_table",
    "prompt_vocab_size",
    "guided_decoding_guide",
    "guided_decoding_guide_type",
    "embedding_bias_words",
    "decoder_text_input",
    "draft_input_ids",
    "image_input",
    "max_token",
    "temprature",
]


@pytest.mark.parametrize(("way", "values", "says"), _by_way(TENSORS, TENSOR_WAYS))
def test_a_bad_text_is_named_with_its_byte(server: Server, way: Callable, values: dict, says: str):
    check_ours(way(server, GOOD | values), says, STATUS[way])


@pytest.mark.parametrize(("way", "values", "says"), _by_way(UNFIT_TENSORS, TENSOR_WAYS))
def test_an_unfit_tensor_gets_tritons_sentence(server: Server, way: Callable, values: dict, says: str):
    check(way(server, GOOD | values), says, STATUS[way])


@pytest.mark.parametrize("way", TENSOR_WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", UNKNOWN_INPUTS)
def test_an_unknown_input_gets_tritons_sentence(server: Server, way: Callable, name: str):
    check(way(server, {**GOOD, name: 1}), f"unexpected inference input '{name}'", STATUS[way])


@pytest.mark.parametrize("way", TENSOR_WAYS, ids=lambda way: way.__name__)
def test_an_unknown_model_gets_tritons_sentence(server: Server, way: Callable):
    status = {infer_http: 404, infer_grpc: "NOT_FOUND", stream_grpc: None}[way]
    check(way(server, GOOD, "demo_gpt2"), "Request for unknown model: 'demo_gpt2' is not found", status)


def test_infer_on_the_model_that_streams_gets_tritons_sentence(server: Server):
    for name in ("ensemble", "demo-gpt2", "tensorrt_llm"):
        check(infer_http(server, {}, name), "doesn't support models with decoupled transaction policy", 501)
        check(infer_grpc(server, {}, name), "doesn't support models with decoupled transaction", "UNIMPLEMENTED")


# ---- JSON: what tensors cannot say ---------------------------------------------------------------------------------

UNKNOWN_KEYS = [
    ("max_token", "'max_token' is not an input of this model; perhaps you meant 'max_tokens'"),
    ("temprature", "'temprature' is not an input of this model; perhaps you meant 'temperature'"),
    ("stop_word", "'stop_word' is not an input of this model; perhaps you meant 'stop_words'"),
    ("Stream", "'Stream' is not an input of this model; perhaps you meant 'stream'"),
    ("n", "'n' is not an input of this model; leave it out"),
    ("lora_task_id", "'lora_task_id' is not an input of this model; leave it out"),
    ("guided_decoding_guide", "'guided_decoding_guide' is not an input of this model; leave it out"),
    ("prompt_embedding_table", "'prompt_embedding_table' is not an input of this model; leave it out"),
    ("model_name", "'model_name' is not an input of this model; leave it out"),
]


@pytest.mark.parametrize("way", JSON_WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("key", "says"), UNKNOWN_KEYS)
def test_an_unknown_key_is_refused_with_the_nearest_one(server: Server, way: Callable, key: str, says: str):
    check_ours(way(server, {**GOOD, key: 1}), says, 400)
    check_ours(way(server, {**GOOD, "parameters": {key: 1}}), says, 400)


JSON_BODIES = [
    ("malformed", b'{"text_input": "a"', "failed to parse the request JSON buffer", 500),
    ("empty", b"", "The document is empty", 500),
    ("array", b"[]", "attempt to get members for non-object", 500),
    ("null", b"null", "attempt to get members for non-object", 500),
    ("form", b"text_input=hello&max_tokens=3", "failed to parse the request JSON buffer", 500),
    ("two documents", b'{"text_input": "a"}{}', "must not be followed by other values", 500),
    ("not UTF-8", b'{"text_input": "\xff"}', "text_input is not UTF-8: byte 0 is 0xff", 400),
    ("half a surrogate pair", b'{"text_input": "\\ud800"}', "The surrogate pair in string is invalid", 500),
    ("only unknown keys", b'{"prompt": "a"}', "request has 0 inputs", 400),
    ("prompt null", b'{"text_input": null}', "attempt to access JSON non-string as string", 500),
    ("prompt a number", b'{"text_input": 5}', "attempt to access JSON non-string as string", 500),
    ("prompt an object", b'{"text_input": {"a": "b"}}', "attempt to access JSON non-string as string", 500),
    ("prompt an empty list", b'{"text_input": [], "max_tokens": 3}', "batch size does not match other inputs", 400),
    ("two prompts", b'{"text_input": ["a", "b"], "max_tokens": 3}', "batch size does not match other inputs", 400),
    ("prompt twice", b'{"text_input": "a", "text_input": "b"}', "'text_input' already exists in request", 400),
    ("max_tokens null", b'{"text_input": "a", "max_tokens": null}', "non-signed-integer as signed-integer", 500),
    ("max_tokens text", b'{"text_input": "a", "max_tokens": "3"}', "non-signed-integer as signed-integer", 500),
    ("max_tokens fraction", b'{"text_input": "a", "max_tokens": 3.5}', "non-signed-integer as signed-integer", 500),
    ("max_tokens true", b'{"text_input": "a", "max_tokens": true}', "non-signed-integer as signed-integer", 500),
    ("max_tokens empty", b'{"text_input": "a", "max_tokens": []}', "byte size mismatch for input 'max_tokens'", 400),
    (
        "max_tokens 2**31",
        b'{"text_input": "a", "max_tokens": 2147483648}',
        "max_tokens (request_output_len) is -2",
        400,
    ),
    ("seed negative", b'{"text_input": "a", "seed": -1}', "non-unsigned-integer as unsigned-integer", 500),
    ("seed 2**64", b'{"text_input": "a", "seed": 18446744073709551616}', "non-unsigned-integer", 500),
    ("stream 1", b'{"text_input": "a", "stream": 1}', "attempt to access JSON non-boolean as boolean", 500),
    ("stream text", b'{"text_input": "a", "stream": "true"}', "attempt to access JSON non-boolean as boolean", 500),
    ("temperature text", b'{"text_input": "a", "temperature": "hot"}', "attempt to access JSON non-number", 500),
    ("temperature 1e39", b'{"text_input": "a", "temperature": 1e39}', "temperature is inf; it must be a finite", 400),
    ("temperature 1e400", b'{"text_input": "a", "temperature": 1e400}', "Number too big to be stored in double", 500),
    ("stop words numbers", b'{"text_input": "a", "stop_words": [1]}', "attempt to access JSON non-string as", 500),
    ("unknown key with null", b'{"text_input": "a", "user": null}', "parameter 'user' has invalid type", 400),
    ("unknown key with a list", b'{"text_input": "a", "messages": []}', "'messages' has invalid type", 400),
    ("unknown key with an object", b'{"text_input": "a", "x": {"y": 1}}', "parameter 'x' has invalid type", 400),
    ("parameters a number", b'{"text_input": "a", "parameters": 5}', "Expected JSON object for keyword", 500),
    ("said twice", b'{"text_input": "a", "top_k": 5, "parameters": {"top_k": 6}}', "already exists in request", 400),
    ("id a number", b'{"text_input": "a", "id": 7}', "Unable to parse 'id'", 500),
]


@pytest.mark.parametrize("endpoint", ["generate", "generate_stream"])
@pytest.mark.parametrize(("body", "says", "status"), _ids(JSON_BODIES))
def test_a_bad_body_of_generate_gets_one_error(server: Server, endpoint: str, body: bytes, says: str, status: int):
    check(_http(server, "POST", f"/v2/models/{server.name}/{endpoint}", body), says, status)


def _text_tensor(**changes: Any) -> dict[str, Any]:
    return {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]} | changes


INFER_BODIES = [
    ("malformed", b'{"inputs": [', "failed to parse the request JSON buffer", 500),
    ("no inputs", {}, "Unable to parse 'inputs'", 500),
    ("inputs an object", {"inputs": {"text_input": "a"}}, "non-array as array", 500),
    (
        "input without a name",
        {"inputs": [{"shape": [1, 1], "datatype": "BYTES", "data": ["a"]}]},
        "Unable to parse 'name'",
        500,
    ),
    ("data null", {"inputs": [_text_tensor(data=None)]}, "non-array as array", 500),
    ("data too short", {"inputs": [_text_tensor(data=[])]}, "expected 1 string elements", 400),
    ("data too long", {"inputs": [_text_tensor(data=["a", "b"])]}, "unexpected number of string elements 2", 400),
    ("shape negative", {"inputs": [_text_tensor(shape=[-1, 1])]}, "Unable to parse 'shape'", 500),
    ("shape huge", {"inputs": [_text_tensor(shape=[2**62, 4])]}, "unexpected shape for input 'text_input'", 400),
    ("no such type", {"inputs": [_text_tensor(datatype="TEXT")]}, "invalid datatype for input text_input", 400),
    ("input twice", {"inputs": [_text_tensor()] * 2}, "'text_input' already exists in request", 400),
    ("no such output", {"inputs": [_text_tensor()], "outputs": [{"name": "text"}]}, "inference output 'text'", 400),
    (
        "unknown parameter",
        {"inputs": [_text_tensor()], "parameters": {"max_token": 3}},
        "'max_token' is not an input of this model; perhaps you meant 'max_tokens'",
        400,
    ),
    (
        "input sent as parameter",
        {"inputs": [_text_tensor()], "parameters": {"max_tokens": 3}},
        "'max_tokens' came as a parameter, where it has no effect; send it as an input tensor",
        400,
    ),
    (
        "parameter an object",
        {"inputs": [_text_tensor()], "parameters": {"x": {}}},
        "parameter 'x' has invalid type",
        400,
    ),
    (
        "data and shared memory",
        {"inputs": [_text_tensor(parameters={"shared_memory_region": "x", "shared_memory_byte_size": 4})]},
        "Input must set only one of the following fields",
        400,
    ),
]


@pytest.mark.parametrize(("body", "says", "status"), _ids(INFER_BODIES))
def test_a_bad_body_of_infer_gets_one_error(server: Server, body: bytes | dict, says: str, status: int):
    body = body if isinstance(body, bytes) else _json(body)
    check(_http(server, "POST", f"/v2/models/{server.infer_name}/infer", body), says, status)


PATHS = [
    ("GET", "/v2/models/demo-gpt2/generate", "Method Not Allowed", 405),
    ("GET", "/v2/models/demo-gpt2/generate_stream", "Method Not Allowed", 405),
    ("GET", "/v2/models/demo-gpt2_infer/infer", "Method Not Allowed", 405),
    ("PUT", "/v2/models/demo-gpt2/generate", "Method Not Allowed", 405),
    ("DELETE", "/v2/models/demo-gpt2/generate", "Method Not Allowed", 405),
    ("POST", "/v2/models/demo-gpt2/generates", "Not Found", 404),
    ("POST", "/v1/chat/completions", "Not Found", 404),
    ("POST", "/v2/models/demo_gpt2/generate", "Request for unknown model: 'demo_gpt2' is not found", 404),
    ("POST", "/v2/models/demo_gpt2/generate_stream", "Request for unknown model: 'demo_gpt2' is not found", 404),
    ("POST", "/v2/models/demo_gpt2/infer", "Request for unknown model: 'demo_gpt2' is not found", 404),
    ("POST", "/v2/models/demo-gpt2/versions/2/generate", "'demo-gpt2' version 2 is not found", 404),
    ("POST", "/v2/models/demo-gpt2/infer", "doesn't support models with decoupled transaction policy", 501),
]


@pytest.mark.parametrize(("method", "path", "says", "status"), PATHS)
def test_a_wrong_path_or_method_is_tritons_to_refuse(server: Server, method: str, path: str, says: str, status: int):
    check(_http(server, method, path, _json(GOOD) if method in ("POST", "PUT") else None), says, status)


def test_a_packed_body_is_refused(server: Server):
    refusal = _http(server, "POST", "/v2/models/demo-gpt2/generate", _json(GOOD), **{"Content-Encoding": "gzip"})
    check(refusal, "Unsupported content-encoding, only 'identity' is supported", 400)


# ---- gRPC messages that no client library writes -------------------------------------------------------------------


def _string(value: bytes) -> bytes:
    return len(value).to_bytes(4, "little") + value


def _raw(*contents: bytes, shape: tuple = (1, 1), datatype: str = "BYTES", **more: Any) -> dict[str, Any]:
    tensor = service_pb2.ModelInferRequest.InferInputTensor(name="text_input", shape=shape, datatype=datatype)
    return {"inputs": [tensor], "raw_input_contents": contents, **more}


RAW_MESSAGES = [
    ("a string longer than its bytes", _raw(b"\xff\xff\xff\x7fabc"), "incomplete string data for inference input"),
    ("half a length", _raw(b"\x01"), "incomplete string length indicator for inference input 'text_input'"),
    ("bytes after the string", _raw(_string(b"a") + b"zz"), "incomplete string length indicator"),
    ("two strings", _raw(_string(b"a") * 2), "unexpected number of string elements 2"),
    ("no bytes", _raw(), "unable to find data for input tensor 'text_input'"),
    ("no shape", _raw(_string(b"a"), shape=()), "has no shape but model requires batch dimension"),
    ("negative shape", _raw(_string(b"a"), shape=(-1, 1)), "string elements for inference input 'text_input'"),
    ("no such type", _raw(_string(b"a"), datatype="TEXT"), "data-type is '<invalid>'"),
    ("no such version", _raw(_string(b"a"), model_version="x"), "failed to get model version from specified version"),
    (
        "input sent as parameter",
        _raw(_string(b"a"), parameters={"temperature": service_pb2.InferParameter(double_param=1.0)}),
        "'temperature' came as a parameter, where it has no effect; send it as an input tensor",
    ),
    ("parameter without a value", _raw(_string(b"a"), parameters={"x": service_pb2.InferParameter()}), "parameter"),
]


@pytest.mark.parametrize(("message", "says"), _ids(RAW_MESSAGES))
def test_a_bad_grpc_message_gets_one_error(server: Server, message: dict, says: str):
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(service_pb2.ModelInferRequest(model_name=server.infer_name, **message), timeout=SECONDS)
        check(Refusal(caught.value.details(), caught.value.code().name), says, "INVALID_ARGUMENT")
        request = service_pb2.ModelInferRequest(model_name=server.name, **message)
        (answer,) = stub.ModelStreamInfer(iter([request]), timeout=SECONDS)
        check(Refusal(answer.error_message, None), says, None)


# ---- tensorrt_llm by itself ----------------------------------------------------------------------------------------

TOKEN_IDS: list[tuple] = [
    ("id negative", {"input_ids": _ints([5, -6, 7])}, "input_ids holds -6; token ids of this model are 0 to 1279"),
    ("id too large", {"input_ids": _ints([5, 1280, 7])}, "input_ids holds 1280; token ids of this model are 0 to 1279"),
    ("length too large", {"input_lengths": 4}, "input_lengths is 4, but input_ids has 3 values"),
    ("length negative", {"input_lengths": -1}, "input_lengths is -1, but input_ids has 3 values"),
    ("length 0", {"input_lengths": 0}, "the prompt has no tokens; send at least one"),
    (
        "no ids",
        {"input_ids": np.zeros((1, 0), np.int32), "input_lengths": 0},
        "the prompt has no tokens; send at least",
    ),
    ("a million ids", {"input_ids": np.ones((1, 10**6), np.int32), "input_lengths": 10**6}, "has 1000000 tokens; this"),
    ("request_output_len 0", {"request_output_len": 0}, "max_tokens (request_output_len) is 0; with a prompt of 3"),
    ("stop list ends too far", {"stop_words_list": _ints([[5, 6], [3, -1]])}, "says a word ends at 3; ends must rise"),
    ("stop list falls", {"stop_words_list": _ints([[5, 6], [2, 1]])}, "says a word ends at 1; ends must rise"),
    ("stop list of no ids", {"stop_words_list": _ints([[5, -6], [2, -1]])}, "stop_words_list holds -6; token ids"),
    ("stop list of 10,000", {"stop_words_list": _ints([[5] * 10**4, range(1, 10**4 + 1)])}, "has 10000 words; at most"),
    ("bad list", {"bad_words_list": _ints([[5, 6], [2, -1]])}, "bad_words is not something the engine 'openvino' can"),
    (
        "stop without id",
        {"stop": True},
        "stop is true, but the request has no id; give it that of the request to stop",
    ),
    ("beams that stream", {"streaming": True, "beam_width": 2}, "stream is true and beam_width is 2; beams are known"),
]


@pytest.mark.parametrize(("values", "says"), _ids(TOKEN_IDS))
def test_bad_token_ids_are_named_with_their_rule(server: Server, values: dict, says: str):
    need_what_they_are_about(server, values, says)
    check_ours(stream_grpc(server, GOOD_IDS | values, "tensorrt_llm"), says, None)


@pytest.mark.parametrize(
    ("values", "says"),
    _ids(
        [
            ("stop list in two rows", {"stop_words_list": _ints([[1], [2], [3]])}, "Expected [-1,2,-1], got [1,3,1]"),
            ("ids int64", {"input_ids": np.array([[5]], np.int64)}, "'input_ids' data-type is 'INT64'"),
            ("logits to draft", {"draft_logits": _floats(1)}, "unexpected inference input 'draft_logits'"),
        ]
    ),
)
def test_unfit_tensors_of_token_ids_get_tritons_sentence(server: Server, values: dict, says: str):
    check(stream_grpc(server, GOOD_IDS | values, "tensorrt_llm"), says, None)


def test_token_ids_that_are_missing_are_told_so(server: Server):
    refusal = stream_grpc(server, {"input_lengths": 3, "request_output_len": 2}, "tensorrt_llm")
    check_ours(refusal, "input_ids is missing: the model tensorrt_llm takes token ids; send text to the ensemble", None)
    refusal = generate(server, {"request_output_len": 2}, "tensorrt_llm")
    check_ours(refusal, "input_ids is missing", 400)


def test_stopping_an_id_that_nobody_has_is_no_error(server: Server):
    assert list(server.stream_grpc("tensorrt_llm", request_id="nobody", stop=True)) == []


# ---- preprocessing and postprocessing by themselves ----------------------------------------------------------------

TEXT_MODELS: list[tuple] = [
    ("no text", "preprocessing", {"REQUEST_OUTPUT_LEN": 3}, "text_input is missing; send the prompt as text"),
    ("text not UTF-8", "preprocessing", {"QUERY": _texts([b"\xff"])}, "text_input is not UTF-8: byte 0 is 0xff"),
    ("text too long", "preprocessing", {"QUERY": _texts([b" a" * 1024])}, "text_input has 1024 tokens; this engine"),
    (
        "id negative",
        "postprocessing",
        {"TOKENS_BATCH": _ints([[5, -6, 7]]), "SEQUENCE_LENGTH": _ints([3])},
        "TOKENS_BATCH holds -6 within SEQUENCE_LENGTH; token ids are 0 to 1279",
    ),
    (
        "id too large",
        "postprocessing",
        {"TOKENS_BATCH": _ints([[5, 6, 7]], [[5, 1280, 7]]), "SEQUENCE_LENGTH": _ints([3], [3])},
        "TOKENS_BATCH holds 1280 within SEQUENCE_LENGTH; token ids are 0 to 1279",
    ),
    (
        "length too large",
        "postprocessing",
        {"TOKENS_BATCH": _ints([[5, 6, 7]]), "SEQUENCE_LENGTH": _ints([4])},
        "SEQUENCE_LENGTH holds 4; TOKENS_BATCH has 3 tokens a sequence",
    ),
    (
        "length negative",
        "postprocessing",
        {"TOKENS_BATCH": _ints([[5, 6, 7]]), "SEQUENCE_LENGTH": _ints([-1])},
        "SEQUENCE_LENGTH holds -1; TOKENS_BATCH has 3 tokens a sequence",
    ),
    (
        "a length too many",
        "postprocessing",
        {"TOKENS_BATCH": _ints([[5, 6, 7]]), "SEQUENCE_LENGTH": _ints([3, 3])},
        "SEQUENCE_LENGTH has shape [1, 2]; it must have one number for each of TOKENS_BATCH's sequences, [1, 1]",
    ),
]


@pytest.mark.parametrize("way", [infer_http, infer_grpc], ids=lambda way: way.__name__)
@pytest.mark.parametrize(("model", "values", "says"), _ids(TEXT_MODELS))
def test_a_text_model_names_what_is_wrong(server: Server, way: Callable, model: str, values: dict, says: str):
    check_ours(way(server, values, model), says, STATUS[way])


@pytest.mark.parametrize("way", [infer_http, infer_grpc], ids=lambda way: way.__name__)
def test_tokens_without_lengths_get_tritons_sentence(server: Server, way: Callable):
    check(way(server, {"TOKENS_BATCH": _ints([[5]])}, "postprocessing"), "missing required input(s) ['SEQ", STATUS[way])


def test_postprocessing_in_nvidias_way_gives_one_text_per_row(server: Server):
    """As its clients ask: [prompts, beams, tokens] and what counts of each, with anything as padding."""
    ids = _ints([[5, 6, 7], [8, 9, -1]], [[10, 11, 12], [13, 10**6, 0]])
    lengths = _ints([3, 2], [0, 1])
    output = server.infer_http("postprocessing", TOKENS_BATCH=ids, SEQUENCE_LENGTH=lengths)["OUTPUT"]
    assert output.tolist() == [b'"#$', b"%&", b"", b"*"]


@pytest.mark.parametrize("way", [infer_http, infer_grpc], ids=lambda way: way.__name__)
def test_a_chunk_header_of_another_shape_gets_tritons_sentence(server: Server, way: Callable):
    """CHUNK_HEADER is what tensorrt_llm tells postprocessing; clients leave it out."""
    values = {"TOKENS_BATCH": _ints([[5]]), "SEQUENCE_LENGTH": _ints([1]), "CHUNK_HEADER": np.array([[1, 2, 3]])}
    check(way(server, values, "postprocessing"), "unexpected shape for input 'CHUNK_HEADER'", STATUS[way])


# ---- odd, but good -------------------------------------------------------------------------------------------------

ODD: list[tuple] = [
    ("largest seed", {"seed": 2**64 - 1, "temperature": 1.0}),
    ("largest seed for several", {"seed": 2**64 - 1, "temperature": 1.0, "num_return_sequences": 3}),
    ("same seed twice", {"seed": 5, "random_seed": 5}),
    ("temperature denormal", {"temperature": 1e-40}),
    ("temperature largest", {"temperature": 3.4e38, "seed": 1}),
    ("top_p denormal", {"top_p": 1e-40, "seed": 1}),
    ("top_k largest", {"top_k": 2**31 - 1, "seed": 1}),
    ("repetition_penalty denormal", {"repetition_penalty": 1e-40}),
    ("repetition_penalty largest", {"repetition_penalty": 3.4e38}),
    ("length_penalty largest", {"length_penalty": -3.4e38, "beam_width": 2}),
    ("prompt with NUL", {"text_input": "a\0b\0"}),
    ("prompt of control characters", {"text_input": "".join(map(chr, range(32))) + "\x7f\ufeff\u2028\ufffe"}),
    ("prompt outside the BMP", {"text_input": "\U0001f9d1\u200d\U0001f680" * 5}),
    ("prompt of spaces", {"text_input": " " * 500}),
    ("empty prompt", {"text_input": ""}),
    ("empty stop word", {"stop_words": ""}),
    ("stop word with NUL", {"stop_words": "\0"}),
    ("stop word of a megabyte", {"stop_words": "a" * 1_000_000}),
    ("empty bad word", {"bad_words": ""}),
]


@pytest.mark.parametrize("values", _ids(ODD))
def test_an_odd_value_that_means_something_works(server: Server, values: dict):
    need_what_they_are_about(server, values)
    values = GOOD | values
    texts = text_of(server.infer_http(**values))
    assert len(texts) == values.get("num_return_sequences", values.get("beam_width", 1))
    assert text_of(server.infer_grpc(**values)) == texts
    assert list(map(text_of, server.stream_grpc(**values))) == [texts]
    generated = server.generate(**values)["text_output"]
    assert generated == (texts if len(texts) > 1 else texts[0])
    pieces = [event["text_output"] for event in server.generate_stream(**values)]
    assert pieces == [generated]


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-9, 1e-6])
def test_a_tiny_temperature_is_greedy(server: Server, temperature: float):
    whole = {**GOOD, "max_tokens": 12}
    assert server.generate(**whole, temperature=temperature)["text_output"] == server.generate(**whole)["text_output"]


def test_256_stop_words_are_watched_for(server: Server):
    words = [f"word{i}" for i in range(255)]
    assert server.generate(**GOOD, stop_words=[*words, "Par"])["text_output"] == " "


def test_64_prompts_are_answered(server: Server):
    result = server.infer_grpc(text_input=[GOOD["text_input"]] * 64, max_tokens=[3] * 64)
    assert text_of(result) == [GOOD_TEXT] * 64


def test_an_empty_list_of_stop_words_is_none(server: Server):
    for values in ({"stop_words": np.zeros((1, 0), np.object_)}, {"stop_words": _texts([b"", b""])}):
        assert text_of(server.infer_http(**GOOD | values)) == [GOOD_TEXT]


# ---- all at once ---------------------------------------------------------------------------------------------------


def test_bad_requests_leave_the_good_ones_of_the_same_moment_alone(server: Server):
    long = {"text_input": "Count", "max_tokens": 400, "end_id": -1}
    expected = server.generate(**long)["text_output"]

    def ask(number: int) -> str | None:
        if number % 8 == 0:
            return server.generate(**long)["text_output"]
        _, values, _, *ways = VALUES[number % len(VALUES)]
        way = (*ways[0],)[number % len(ways[0])] if ways else (*JSON_WAYS, *TENSOR_WAYS)[number % 5]
        assert way(server, GOOD | values).message
        return None

    with ThreadPoolExecutor(16) as pool:
        answers = [answer for answer in pool.map(ask, range(96)) if answer is not None]
    assert answers == [expected] * 12


def test_a_bad_request_to_a_full_server_is_refused_too(server: Server):
    with ThreadPoolExecutor(24) as pool:
        busy = [pool.submit(server.generate, text_input="Count", max_tokens=300, end_id=-1) for _ in range(20)]
        with pytest.raises(ServerError, match="max_tokens"):
            server.generate(**GOOD | {"max_tokens": 0})
        assert {len(request.result()["text_output"]) > 0 for request in busy} == {True}
