"""The CPU engine without Triton: `python in_process.py REPOSITORY`, started by real_engine.py.

Reads one JSON object a line, {"prompts": [[token id, ...], ...], "max_tokens": 64, "at_once": 16, "is_streamed": true},
and answers each with {"seconds": ...}. Between two it does nothing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

engine_code = Path(sys.argv[1], "tensorrt_llm/1")
sys.path.insert(0, str(engine_code))

import numpy as np  # noqa: E402
import openvino  # noqa: E402
import openvino_genai  # noqa: E402
from engine_manifest import read_manifest  # noqa: E402
from openvino_worker import load_pipeline, num_kv_blocks  # noqa: E402


def main() -> None:
    folder = engine_code / "engine"
    manifest = read_manifest(folder)
    pipeline = load_pipeline(folder, manifest, num_kv_blocks(manifest))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        print(json.dumps({"seconds": run(pipeline, **work)}), flush=True)


def run(
    pipeline: openvino_genai.ContinuousBatchingPipeline,
    prompts: list[list[int]],
    max_tokens: int,
    at_once: int,
    is_streamed: bool,
) -> float:
    """Seconds until all prompts are answered, `at_once` at a time.

    Streamed, each token is read after the step that made it, as whoever shows it must. Else they are read when a
    request is over, which costs the engine the least. Nothing is done with them.
    """
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = max_tokens
    config.ignore_eos = True
    waiting = [openvino.Tensor(np.array([ids], np.int64)) for ids in prompts]
    running: dict[openvino_genai.GenerationHandle, int] = {}  # tokens that were read
    started = time.monotonic()
    while waiting or running:
        while waiting and len(running) < at_once:
            running[pipeline.add_request(len(waiting), waiting.pop(), config)] = 0
        pipeline.step()
        for handle in list(running):
            is_over = handle.get_status() != openvino_genai.GenerationStatus.RUNNING
            while (is_streamed or is_over) and handle.can_read():
                running[handle] += sum(len(output.generated_ids) for output in handle.read().values())
            if is_over:
                assert running.pop(handle) == max_tokens
    return time.monotonic() - started


if __name__ == "__main__":
    main()
