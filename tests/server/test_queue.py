"""While the engine is full, what waits is where it is counted, the engine has all it can take, and limits hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from running_server import Server, ServerError
from tritonclient.utils import InferenceServerException

SECONDS = 30
SLOTS = 4
IN_ENGINE = SLOTS + 1  # and the margin that keeps the engine from waiting for Triton
BODY = {"text_input": "Count", "max_tokens": 10}  # half a second in a slot
RATES = ("tokens_per_second=20", "--max-batch-size", str(SLOTS), "--max-seq-len", "1000")


@pytest.fixture(scope="module")
def unlimited(build_synthetic: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As it is without options: requests wait in Triton's queue."""
    with Server(build_synthetic(*RATES), tmp_path_factory.mktemp("unlimited") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def limited(build_synthetic: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ("--max-queue-size", "6", "--priority-levels", "3")
    with Server(build_synthetic(*RATES, *limits), tmp_path_factory.mktemp("limited") / "log") as server:
        yield server


def ask_by_generate(server: Server, **values: Any) -> None:
    assert server.generate(**{**BODY, **values})["finish_reason"] == "length"


def ask_by_infer(server: Server, **values: Any) -> None:
    assert server.infer_grpc(**{**BODY, **values})["finish_reason"].item() == b"length"


def waiting(server: Server, model: str) -> int:
    """In Triton's queue of this model."""
    return int(server.metric("nv_inference_pending_request_count", model=model))


def requests(server: Server, kind: str) -> int:
    return int(server.metric("nv_trt_llm_request_metrics", request_type=kind))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("model", "ask"), [("tensorrt_llm", ask_by_generate), ("synthetic_infer", ask_by_infer)], ids=["ensemble", "infer"]
)
def test_requests_beyond_the_slots_wait_where_triton_counts_them(
    unlimited: Server, model: str, ask: Callable[[Server], None]
):
    number = 24
    queued_before = unlimited.metric("nv_inference_queue_duration_us", model=model)
    samples = []
    started = time.monotonic()
    with ThreadPoolExecutor(number) as pool:
        futures = [pool.submit(ask, unlimited) for _ in range(number)]
        while not all(future.done() for future in futures):
            samples.append((waiting(unlimited, model), requests(unlimited, "active"), requests(unlimited, "scheduled")))
            time.sleep(0.05)
        for future in futures:
            future.result()
    seconds = time.monotonic() - started
    in_queue, active, scheduled = zip(*samples, strict=True)
    # One more than the engine has is on its way into it: it has left Triton's queue, which gets no further before.
    assert max(active) == IN_ENGINE + 1
    assert max(scheduled) == SLOTS
    assert max(in_queue) >= number - IN_ENGINE - 1 - 4  # clients start one after the other
    # Triton hands over the next one as soon as there is room, also when none comes: the engine is never starved. With a
    # queue policy it would do so after up to half a second, and this take several times as long.
    assert seconds < 1.5 * number / SLOTS * 0.5
    busy = [each == SLOTS for waits, each in zip(in_queue, scheduled, strict=True) if waits]
    assert sum(busy) >= 0.5 * len(busy)  # the gauges are 0.1 s old, and all four end together every half second
    assert waiting(unlimited, model) == 0
    assert unlimited.metric("nv_inference_queue_duration_us", model=model) - queued_before > 1_000_000


def test_a_priority_is_refused_where_there_are_none(unlimited: Server):
    with pytest.raises(ServerError, match="priority is 1, but this server has no priority levels"):
        ask_by_generate(unlimited, priority=1)


# ---- limits --------------------------------------------------------------------------------------------------------


def fill(server: Server, pool: ThreadPoolExecutor, number: int, seconds: int = 1) -> list[Future]:
    """So many requests in tensorrt_llm, each so long."""
    futures = [pool.submit(ask_by_generate, server, max_tokens=20 * seconds) for _ in range(number)]
    wait_for(lambda: requests(server, "active") >= number)
    return futures


FULL = "the server is busy: 6 requests wait, which is all that may"


def test_when_too_many_wait_every_client_gets_a_sentence_and_may_come_again(limited: Server):
    refused_before = limited.metric("triton_trtllm_admission_refusals_total", reason="queue_full")
    with ThreadPoolExecutor(IN_ENGINE + 6) as pool:
        futures = fill(limited, pool, IN_ENGINE + 6)
        wait_for(lambda: requests(limited, "waiting") == IN_ENGINE + 6 - SLOTS)
        with pytest.raises(ServerError, match=FULL) as caught:
            limited.generate(**BODY)
        assert caught.value.status == 400  # Triton's, for every error of an ensemble
        with pytest.raises(ServerError, match=FULL):
            list(limited.stream_grpc(**BODY, stream=True))
        with pytest.raises(InferenceServerException, match=FULL) as refused:
            limited.infer_http(**BODY)
        assert refused.value.status() == "503"
        with pytest.raises(InferenceServerException, match=FULL) as refused:
            limited.infer_grpc(**BODY)
        assert refused.value.status() == "StatusCode.UNAVAILABLE"
        for future in futures:
            future.result()
    ask_by_generate(limited)
    ask_by_infer(limited)
    wait_for(
        lambda: limited.metric("triton_trtllm_admission_refusals_total", reason="queue_full") == refused_before + 4
    )


def test_whoever_has_priority_goes_first(limited: Server):
    ended: list[int] = []
    with ThreadPoolExecutor(IN_ENGINE + 6) as pool:
        fill(limited, pool, IN_ENGINE, seconds=4)  # none has ended when the last of those below has come
        for priority in (3, 2, 1):
            for _ in range(2):
                future = pool.submit(ask_by_infer, limited, priority=priority)
                future.add_done_callback(lambda _, priority=priority: ended.append(priority))
            wait_for(lambda priority=priority: requests(limited, "active") == IN_ENGINE + 2 * (4 - priority))
    # The first four go together, as the slots come free together; the order among them is chance.
    assert sorted(ended[:4]) == [1, 1, 2, 2]
    assert ended[4:] == [3, 3]


def test_a_priority_that_is_not_there_is_refused(limited: Server):
    with pytest.raises(ServerError, match="priority is 4; it must be 1, the highest, to 3"):
        ask_by_generate(limited, priority=4)


def test_a_deadline_counts_while_a_request_waits(limited: Server):
    with ThreadPoolExecutor(IN_ENGINE) as pool:
        fill(limited, pool, IN_ENGINE)
        started = time.monotonic()
        answer = limited.generate(**BODY, timeout=200_000)
        assert (answer["finish_reason"], answer["num_output_tokens"]) == ("timeout", 0)
        assert time.monotonic() - started < 0.9  # those before it take a second


def test_a_client_that_goes_while_it_waits_makes_room(limited: Server):
    with ThreadPoolExecutor(IN_ENGINE) as pool:
        fill(limited, pool, IN_ENGINE)
        with pytest.raises(InferenceServerException):
            limited.infer_grpc_within(0.2, **BODY)
        wait_for(lambda: requests(limited, "active") == IN_ENGINE)


def test_a_request_that_waits_too_long_is_refused(
    build_synthetic: Callable[..., Path], start_server: Callable[..., Server]
):
    server = start_server(build_synthetic(*RATES, "--queue-timeout", "0.3"))
    with ThreadPoolExecutor(IN_ENGINE) as pool:
        fill(server, pool, IN_ENGINE)
        with pytest.raises(ServerError, match=r"the request has waited 0\.3 s, which is as long as it may"):
            server.generate(**BODY)
        with pytest.raises(InferenceServerException, match=r"has waited 0\.3 s"):
            server.infer_http(**BODY)
    wait_for(lambda: server.metric("triton_trtllm_admission_refusals_total", reason="queue_timeout") == 2)
