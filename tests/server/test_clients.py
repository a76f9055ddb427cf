"""What clients of NVIDIA's repository send, and what they do with the answer.

Each section is one client, with the requests that its source builds (named by repository and file) and the way it reads
the answer, so that it works here without a change, or fails with the error that is written down.
"""

from __future__ import annotations

import json
import queue
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from running_server import Server, ServerError
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

PROMPT = "The capital of France is"
SECONDS = 10


@pytest.fixture(scope="module")
def answer(session_server: Server) -> str:
    """Twelve tokens of the greedy answer to PROMPT."""
    return session_server.generate(text_input=PROMPT, max_tokens=12)["text_output"]


def _tensor(client: Any, name: str, array: np.ndarray) -> Any:
    """As every one of these clients makes it: the type is that of the array."""
    tensor = client.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
    tensor.set_data_from_numpy(array)
    return tensor


def _stream(
    server: Server,
    model: str,
    arrays: dict[str, np.ndarray],
    outputs: list[str] | None = None,
    request_id: str = "",
) -> Iterator[grpcclient.InferResult]:
    """One request on a gRPC stream of its own, until its final response. Raises the error that comes instead."""
    answers: queue.SimpleQueue = queue.SimpleQueue()
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer(
            model,
            [_tensor(grpcclient, name, array) for name, array in arrays.items()],
            outputs=outputs and [grpcclient.InferRequestedOutput(name) for name in outputs],
            request_id=request_id,
        )
        final = False
        while not final:
            result, error = answers.get(timeout=SECONDS)
            if error is not None:
                raise error
            final = result.get_response().parameters["triton_final_response"].bool_param
            yield result


# ---- curl: tutorials, triton-inference-server/tensorrtllm_backend README.md ----------------------------------------


def _curl(server: Server, path: str, body: str) -> str:
    """What `curl -X POST -d BODY` sends, with the type that it gives to every body."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.http_port}{path}", body.encode())
    request.add_header("Content-Type", "application/x-www-form-urlencoded")
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return response.read().decode()


def test_the_kubernetes_tutorials_client_gets_its_text(server: Server):
    """tutorials, Deployment/Kubernetes/TensorRT-LLM_Autoscaling_and_Load_Balancing/containers/client.py"""
    payload = json.dumps({"text_input": "What is the largest company in the world?", "max_tokens": 512})
    assert isinstance(json.loads(_curl(server, "/v2/models/demo-gpt2/generate", payload))["text_output"], str)


DOCUMENTED_BODIES = [
    {"text_input": PROMPT, "max_tokens": 12, "bad_words": "", "stop_words": ""},
    {"text_input": PROMPT, "max_tokens": 12, "bad_words": "", "stop_words": "", "pad_id": 0},
    {"text_input": PROMPT, "max_tokens": 12, "bad_words": [""], "stop_words": [""], "stream": False},
    {"text_input": PROMPT, "parameters": {"max_tokens": 12, "bad_words": "", "stop_words": ""}},
    {"text_input": PROMPT, "parameters": {"max_tokens": 12, "stream": False, "temperature": 0}},
    {"text_input": PROMPT, "max_tokens": 12, "id": "42"},
]


@pytest.mark.parametrize("body", DOCUMENTED_BODIES)
def test_a_documented_curl_answers(server: Server, answer: str, body: dict):
    for model in ("ensemble", "demo-gpt2"):
        assert json.loads(_curl(server, f"/v2/models/{model}/generate", json.dumps(body)))["text_output"] == answer


@pytest.mark.parametrize("stream", [{"stream": True}, {"parameters": {"stream": True}}])
def test_a_documented_streaming_curl_gets_events(server: Server, answer: str, stream: dict):
    body = json.dumps({"text_input": PROMPT, "max_tokens": 12, **stream})
    lines = _curl(server, "/v2/models/demo-gpt2/generate_stream", body).split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert len(events) > 1
    assert "".join(event["text_output"] for event in events) == answer


def test_generate_of_a_stream_is_refused_by_triton_with_status_200(server: Server):
    """Triton's own: `generate` needs one response, and says so in a body that curl --fail does not notice."""
    result = server.generate(text_input=PROMPT, max_tokens=12, stream=True)
    assert "generate expects model to produce exactly 1 response" in result["error"]


# ---- triton-inference-server/server, python/openai/openai_frontend/engine/utils/triton.py --------------------------

OPENAI = {
    "text_input": np.array([[PROMPT]], np.object_),
    "max_tokens": np.int32([[16]]),
    "return_num_input_tokens": np.bool_([[True]]),
    "return_num_output_tokens": np.bool_([[True]]),
}
OPENAI_OPTIONS = {
    "stop_words": np.array([["nowhere", "never"]], np.object_),
    "top_p": np.float32([[0.9]]),
    "frequency_penalty": np.float32([[0.1]]),
    "presence_penalty": np.float32([[-0.1]]),
    "seed": np.uint64([[7]]),
    "temperature": np.float32([[0.2]]),
}


def _openai_text(result: grpcclient.InferResult) -> str:
    """The frontend refuses more than one string, decodes strictly, and ends at a NUL."""
    array = result.as_numpy("text_output")
    assert array.size == 1
    text = array.ravel()[0].decode("utf-8")
    assert "\0" not in text
    return text


@pytest.mark.parametrize("options", [{}, OPENAI_OPTIONS], ids=["plain", "all options"])
def test_the_openai_frontend_gets_one_response(server: Server, options: dict):
    (result,) = _stream(server, "ensemble", {**OPENAI, **options, "stream": np.bool_([[False]])})
    assert _openai_text(result).startswith(" Paris")
    assert result.as_numpy("num_input_tokens").dtype == result.as_numpy("num_output_tokens").dtype == np.int32


@pytest.mark.parametrize("options", [{}, OPENAI_OPTIONS], ids=["plain", "all options"])
def test_the_openai_frontend_sums_a_streams_usage(server: Server, options: dict):
    (whole,) = _stream(server, "ensemble", {**OPENAI, **options, "stream": np.bool_([[False]])})
    chunks = list(_stream(server, "ensemble", {**OPENAI, **options, "stream": np.bool_([[True]])}))
    assert len(chunks) > 1
    assert "".join(map(_openai_text, chunks)) == _openai_text(whole)
    assert chunks[0].as_numpy("num_input_tokens").item() == whole.as_numpy("num_input_tokens").item()
    summed = sum(chunk.as_numpy("num_output_tokens").item() for chunk in chunks)
    assert summed == whole.as_numpy("num_output_tokens").item()


def test_the_openai_frontend_stops_at_its_stop_words(server: Server):
    stops = {"stop_words": np.array([["nowhere", "Par"]], np.object_)}
    for stream in (False, True):
        chunks = _stream(server, "ensemble", {**OPENAI, **stops, "stream": np.bool_([[stream]])})
        assert "".join(map(_openai_text, chunks)) == " "


def test_the_openai_frontends_tool_calls_are_refused(server: Server):
    guide = {"guided_decoding_guide_type": np.array([["json_schema"]], np.object_)}
    guide["guided_decoding_guide"] = np.array([['{"type": "object"}']], np.object_)
    with pytest.raises(InferenceServerException, match="unexpected inference input 'guided_decoding_guide"):
        list(_stream(server, "ensemble", {**OPENAI, **guide, "stream": np.bool_([[False]])}))


# ---- triton-inference-server/perf_analyzer, genai-perf/genai_perf/inputs/converters/ -------------------------------


def test_genai_perf_gets_as_many_tokens_as_it_asks_for(server: Server):
    """tensorrtllm_converter.py with --output-tokens-deterministic; input names as perf_analyzer's gRPC client sends."""
    arrays = {
        "text_input": np.array([[PROMPT]], np.object_),
        "max_tokens": np.int32([[30]]),
        "min_length": np.int32([[30]]),
        "stream": np.bool_([[True]]),
        "exclude_input_in_output": np.bool_([[True]]),
    }
    chunks = list(_stream(server, "demo-gpt2", arrays))
    assert sum(chunk.as_numpy("num_output_tokens").item() for chunk in chunks) == 30
    assert PROMPT.encode() not in b"".join(text for chunk in chunks for text in chunk.as_numpy("text_output"))


def test_genai_perf_finds_the_inputs_that_it_sends(server: Server):
    """perf_analyzer asks the model's metadata and refuses data for inputs that it does not have."""
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        metadata = client.get_model_metadata("demo-gpt2")
        config = client.get_model_config("demo-gpt2").config
    types = {tensor.name: tensor.datatype for tensor in metadata.inputs}
    assert types["text_input"] == "BYTES"
    assert {types[name] for name in ("max_tokens", "min_length")} == {"INT32"}
    assert {types[name] for name in ("stream", "exclude_input_in_output")} == {"BOOL"}
    assert config.model_transaction_policy.decoupled
    assert config.max_batch_size >= 1


def test_genai_perfs_generate_requests_answer(server: Server, answer: str):
    """triton_generate_converter.py: text_input is a list with the prompt."""
    body = {"text_input": [PROMPT], "max_tokens": 12}
    assert json.loads(_curl(server, "/v2/models/demo-gpt2/generate", json.dumps(body)))["text_output"] == answer
    events = server.generate_stream(text_input=[PROMPT], max_tokens=12, stream=True)
    assert "".join(event["text_output"] for event in events) == answer


def test_genai_perfs_engine_requests_answer(server: Server):
    """tensorrtllm_engine_converter.py, which sends token ids to tensorrt_llm."""
    arrays = {
        "input_ids": np.int32([[5, 6, 7]]),
        "input_lengths": np.int32([[3]]),
        "request_output_len": np.int32([[9]]),
        "min_length": np.int32([[9]]),
        "end_id": np.int32([[2]]),
        "streaming": np.bool_([[True]]),
    }
    chunks = list(_stream(server, "tensorrt_llm", arrays))
    assert sum(chunk.as_numpy("output_ids").size for chunk in chunks) == 9


# ---- llama_index, llama-index-llms-nvidia-triton; langchain-nvidia, libs/trt ---------------------------------------


def _connector_arrays(integer: type, seed: int) -> dict[str, np.ndarray]:
    """What both connectors send, but for the type of integers and the seed."""
    return {
        "text_input": np.array([[PROMPT]]).astype(object),
        "max_tokens": np.array([12]).astype(integer).reshape((1, -1)),
        "top_k": np.array([1]).astype(integer).reshape((1, -1)),
        "top_p": np.array([0]).astype(np.float32).reshape((1, -1)),
        "temperature": np.array([1.0]).astype(np.float32).reshape((1, -1)),
        "length_penalty": np.array([1.0]).astype(np.float32).reshape((1, -1)),
        "repetition_penalty": np.array([1]).astype(np.float32).reshape((1, -1)),
        "random_seed": np.array([seed]).astype(np.uint64).reshape((1, -1)),
        "beam_width": np.array([1]).astype(integer).reshape((1, -1)),
        "stream": np.array([[True]], dtype=bool),
    }


def _connector_text(result: grpcclient.InferResult) -> str:
    """Both decode each element, so the array must have one dimension, as that of NVIDIA's postprocessing has."""
    return "".join([token.decode() for token in result.as_numpy("text_output")])


def test_llama_index_gets_its_tokens(server: Server, answer: str):
    results = _stream(server, "ensemble", _connector_arrays(np.int32, 0), ["text_output"], request_id="4711")
    assert "".join(map(_connector_text, results)) == answer


def test_llama_index_may_send_its_stop_signal_to_the_ensemble(server: Server):
    """It does so after every answer. NVIDIA's ensemble refuses it too; only the stream must go on to its end."""
    arrays = {
        "input_ids": np.zeros([1, 1], np.int32),
        "input_lengths": np.zeros([1, 1], np.int32),
        "request_output_len": np.array([[0]], np.uint32),
        "stop": np.array([[True]]),
    }
    message = f"unexpected inference input '({'|'.join(arrays)})'"
    with pytest.raises(InferenceServerException, match=message):
        list(_stream(server, "ensemble", arrays, request_id="4711"))


def test_langchains_unsigned_integers_are_refused_by_triton(server: Server):
    """langchain_nvidia_trt sends UINT32, the types of 2023 (langchain #17764). Triton converts nothing."""
    message = (
        "inference input '(max_tokens|top_k|beam_width)' data-type is 'UINT32', but model 'ensemble' expects 'INT32'"
    )
    with pytest.raises(InferenceServerException, match=message):
        list(_stream(server, "ensemble", _connector_arrays(np.uint32, 42), ["text_output"]))


def test_a_connector_finds_its_model_ready(server: Server):
    """Both load a model that is not ready, which a server without --model-control-mode=explicit refuses."""
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        assert client.is_model_ready("ensemble")
        names = {model["name"] for model in client.get_model_repository_index(as_json=True)["models"]}
    assert {"ensemble", "demo-gpt2", "demo-gpt2_infer"} <= names


# ---- TensorRT-LLM / tensorrtllm_backend, inflight_batcher_llm/client/ ----------------------------------------------


def _end_to_end_arrays(prompt: str, *, streaming: bool, beam_width: int = 1, **more: np.ndarray) -> dict:
    """prepare_inputs of end_to_end_grpc_client.py, with the defaults of its command line."""
    return {
        "text_input": np.array([[prompt]]).astype(object),
        "max_tokens": np.ones_like([[prompt]], dtype=object).astype(np.int32) * 12,
        "stream": np.array([[streaming]], dtype=bool),
        "beam_width": np.array([[beam_width]], dtype=np.int32),
        "temperature": np.array([[1.0]], dtype=np.float32),
        "exclude_input_in_output": np.array([[False]], dtype=bool),
        **more,
    }


def _end_to_end_texts(results: Iterator[grpcclient.InferResult], batch_size: int, *, streaming: bool) -> list[str]:
    """run_inference of the same file: which indices it reads, and how."""
    texts = [""] * batch_size
    for result in results:
        batch_index = result.as_numpy("batch_index")
        batch_index = 0 if batch_index is None else batch_index[0][0]
        text = result.as_numpy("text_output")[0].decode("utf-8")
        texts[batch_index] = texts[batch_index] + text if streaming else text
    return texts


@pytest.mark.parametrize("streaming", [False, True])
def test_nvidias_end_to_end_client_gets_prompt_and_answer(server: Server, answer: str, streaming: bool):
    results = _stream(server, "ensemble", _end_to_end_arrays(PROMPT, streaming=streaming), ["text_output"])
    (text,) = _end_to_end_texts(results, 1, streaming=streaming)
    assert text.startswith(PROMPT + " Paris")  # sampled: the client's temperature of 1 asks for that here


@pytest.mark.parametrize("streaming", [False, True])
def test_nvidias_end_to_end_client_gets_a_batch(server: Server, streaming: bool):
    """--batch-inputs: one request, told apart by batch_index."""
    prompts = [PROMPT, "The capital of Japan is", "The capital of Italy is"]
    singles = [_end_to_end_arrays(prompt, streaming=streaming) for prompt in prompts]
    arrays = {name: np.concatenate([single[name] for single in singles]) for name in singles[0]}
    texts = _end_to_end_texts(
        _stream(server, "ensemble", arrays, ["text_output", "batch_index"]), 3, streaming=streaming
    )
    for text, prompt, capital in zip(texts, prompts, ("Paris", "Tokyo", "Rome"), strict=True):
        assert text.startswith(f"{prompt} {capital}")


@pytest.mark.parametrize("client", [httpclient, grpcclient], ids=["http", "grpc"])
def test_nvidias_batch_answers_by_plain_infer_too(server: Server, client: Any):
    prompts = [PROMPT, "The capital of Japan is"]
    singles = [_end_to_end_arrays(prompt, streaming=False) for prompt in prompts]
    arrays = {name: np.concatenate([single[name] for single in singles]) for name in singles[0]}
    port = server.http_port if client is httpclient else server.grpc_port
    with client.InferenceServerClient(f"127.0.0.1:{port}") as connection:
        tensors = [_tensor(client, name, array) for name, array in arrays.items()]
        result = connection.infer(server.infer_name, tensors, outputs=[client.InferRequestedOutput("text_output")])
    texts = result.as_numpy("text_output")
    assert texts.shape == (2, 1)
    assert [text.decode() for text in texts[:, 0]][1].startswith("The capital of Japan is Tokyo")


def test_nvidias_end_to_end_client_gets_all_it_may_ask_for(server: Server):
    server.needs("log_probs")
    yes = np.array([[True]], dtype=bool)
    arrays = _end_to_end_arrays(PROMPT, streaming=False, return_log_probs=yes, return_perf_metrics=yes)
    outputs = ["text_output", "cum_log_probs", "output_log_probs", "arrival_time_ns", "first_scheduled_time_ns"]
    outputs += ["first_token_time_ns", "last_token_time_ns", "kv_cache_alloc_new_blocks", "kv_cache_reused_blocks"]
    outputs += ["kv_cache_alloc_total_blocks", "acceptance_rate", "total_accepted_draft_tokens", "total_draft_tokens"]
    (result,) = _stream(server, "ensemble", arrays, outputs)
    assert result.as_numpy("output_log_probs").ndim == 3
    times = [result.as_numpy(name).item() for name in outputs if name.endswith("_time_ns")]
    assert times == sorted(times)
    assert {output.name for output in result.get_response().outputs} == set(outputs)


def test_nvidias_end_to_end_client_gets_beams(server: Server):
    server.needs("beam_search")
    (result,) = _stream(server, "ensemble", _end_to_end_arrays(PROMPT, streaming=False, beam_width=2), ["text_output"])
    texts = [text.decode() for text in result.as_numpy("text_output")]
    assert len(texts) == 2
    assert texts[0].startswith(PROMPT + " Paris")


def test_nvidias_end_to_end_client_gets_sequences(server: Server):
    more = {"num_return_sequences": np.array([[3]], dtype=np.int32)}
    arrays = _end_to_end_arrays(PROMPT, streaming=True, **more)
    texts = ["", "", ""]
    for result in _stream(server, "ensemble", arrays, ["text_output", "sequence_index"]):
        texts[result.as_numpy("sequence_index")[0][0]] += result.as_numpy("text_output")[0].decode("utf-8")
    assert all(text.startswith(PROMPT) for text in texts)


LORA = {"lora_task_id": np.array([[1]], np.uint64)}
BIAS = {
    "embedding_bias_words": np.array([["a"]]).astype(object),
    "embedding_bias_weights": np.array([[1.0]], np.float32),
}
DRAFT = {"num_draft_tokens": np.array([[3]], np.int32)}


@pytest.mark.parametrize("more", [LORA, BIAS, DRAFT], ids=["lora", "bias", "draft"])
def test_nvidias_end_to_end_client_is_told_what_there_is_not(server: Server, more: dict):
    with pytest.raises(InferenceServerException, match=f"unexpected inference input '({'|'.join(more)})'"):
        list(_stream(server, "ensemble", _end_to_end_arrays(PROMPT, streaming=False, **more)))


def _inflight_batcher_arrays(**more: np.ndarray) -> dict[str, np.ndarray]:
    """inflight_batcher_llm_client.py, which sends token ids to tensorrt_llm."""
    return {
        "input_ids": np.int32([[5, 6, 7]]),
        "input_lengths": np.int32([[3]]),
        "request_output_len": np.int32([[8]]),
        "beam_width": np.int32([[1]]),
        "temperature": np.float32([[1.0]]),
        "streaming": np.array([[False]]),
        "end_id": np.int32([[-1]]),
        "pad_id": np.int32([[0]]),
        **more,
    }


def test_nvidias_inflight_batcher_client_gets_its_tokens(server: Server):
    (result,) = _stream(server, "tensorrt_llm", _inflight_batcher_arrays(), ["output_ids", "sequence_length"])
    assert result.as_numpy("output_ids").shape == (1, 1, 8)
    assert result.as_numpy("sequence_length").tolist() == [[8]]


def test_nvidias_inflight_batcher_client_stops_its_request(server: Server):
    """--stop-after-ms: a second request with the same id and `stop`; the first one then ends without an answer."""
    results: queue.SimpleQueue = queue.SimpleQueue()
    with grpcclient.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        client.start_stream(lambda result, error: results.put((result, error)))
        ask: Callable = client.async_stream_infer
        long = _inflight_batcher_arrays(request_output_len=np.int32([[1000]]), streaming=np.array([[True]]))
        ask("tensorrt_llm", [_tensor(grpcclient, *item) for item in long.items()], request_id="1")
        assert results.get(timeout=SECONDS)[1] is None
        stop = {name: long[name] for name in ("input_ids", "input_lengths", "request_output_len")}
        stop |= {"stop": np.array([[True]]), "streaming": np.array([[True]])}
        ask("tensorrt_llm", [_tensor(grpcclient, *item) for item in stop.items()], request_id="1")
        client.stop_stream()
    tokens = 1
    while not results.empty():
        result, error = results.get()
        assert error is None
        tokens += result.as_numpy("output_ids") is not None
    assert tokens < 1000


def test_a_client_of_the_llmapi_model_is_told_so(server: Server):
    """NVIDIA's newer template calls its inputs otherwise; generate says which one is not known."""
    with pytest.raises(ServerError, match="'sampling_param_max_tokens' is not an input of this model"):
        server.generate(text_input=PROMPT, sampling_param_max_tokens=3)
