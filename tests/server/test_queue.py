"""While the engine is full, what waits is in Triton's queue, where its metrics see it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from running_server import Server

SLOTS = 8 + 1 + 1  # --max-batch-size, the margin that keeps the engine from waiting, and who waits for a slot
REQUESTS = 24
BODY = {"text_input": "Count", "max_tokens": 1000, "end_id": -1}


@pytest.mark.parametrize(
    ("model", "ask"),
    [
        ("tensorrt_llm", lambda server: server.generate(**BODY)),
        ("demo-gpt2_infer", lambda server: server.infer_grpc(**BODY)),
    ],
    ids=["ensemble", "infer"],
)
def test_requests_beyond_the_slots_wait_where_triton_counts_them(
    server: Server, model: str, ask: Callable[[Server], object]
):
    queued_before = server.metric("nv_inference_queue_duration_us", model=model)
    threads = [threading.Thread(target=ask, args=(server,)) for _ in range(REQUESTS)]
    for thread in threads:
        thread.start()
    most_waiting = most_active = 0
    while any(thread.is_alive() for thread in threads):
        most_waiting = max(most_waiting, int(server.metric("nv_inference_pending_request_count", model=model)))
        most_active = max(most_active, server.active_requests())
        time.sleep(0.01)
    assert most_active == SLOTS
    assert most_waiting >= (REQUESTS - SLOTS) // 2  # not all: clients start one after the other while others finish
    assert server.metric("nv_inference_pending_request_count", model=model) == 0
    assert server.metric("nv_inference_queue_duration_us", model=model) - queued_before > 100_000
