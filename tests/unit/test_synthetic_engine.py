"""The synthetic engine keeps to its rates, to the engines' rules, and writes text that is whole."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from checkpoint import resolve
from compilers import synthetic_compiler
from engine_manifest import EngineManifest
from errors import UsageError
from generation import EngineError, GenerationRequest, Sampling, Step
from plan import BuildRequest, EnginePlan, SyntheticRates, make_plan
from synthetic_engine import SyntheticEngine
from tokenizers import Tokenizer

DEMO = Path(__file__).resolve().parents[2] / "scripts/demo_checkpoint/demo-gpt2"
SECONDS = 10


def plan_for(**request: Any) -> EnginePlan:
    asked = BuildRequest(model=str(DEMO), engine="synthetic", **{"synthetic": SyntheticRates(), **request})
    synthetic_compiler.check_request(asked)
    return make_plan(asked, resolve(str(DEMO)), "synthetic", synthetic_compiler.versions())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    synthetic_compiler.compile(plan_for(), resolve(str(DEMO)), folder, folder / "kept")
    return folder


@pytest.fixture
def make_engine(folder: Path, tmp_path: Path) -> Iterator[Callable[..., SyntheticEngine]]:
    engines: list[SyntheticEngine] = []

    def make(max_batch_size: int = 4, max_seq_len: int = 10_000, **rates: float) -> SyntheticEngine:
        content = json.loads((folder / "synthetic.json").read_text())
        content |= {"tokens_per_second": 500.0, "prefill_seconds": 0.0, "kv_tokens": 0, **rates}
        (tmp_path / "synthetic.json").write_text(json.dumps(content))
        limits = {"max_batch_size": max_batch_size, "max_input_len": 100, "max_seq_len": max_seq_len}
        manifest = EngineManifest(
            **dict.fromkeys(
                ("key", "model", "checkpoint_digest", "architecture", "dtype", "quantization", "kv_cache_dtype"), "x"
            ),
            **dict.fromkeys(("revision", "bos_token_id", "pad_token_id", "gpu"), None),
            engine="synthetic",
            limits={**limits, "max_beam_width": 1},
            vocab_size=1280,
            tensor_parallel=1,
            pipeline_parallel=1,
            eos_token_ids=[],
            kv_bytes_per_token=0,
            versions={},
            created="",
            files={},
        )
        engines.append(SyntheticEngine(tmp_path, manifest))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


class Delivered:
    """What came for one request, with the time of each."""

    def __init__(self, engine: SyntheticEngine, key: int, **request: Any):
        self.steps: queue.SimpleQueue = queue.SimpleQueue()
        self.key = key
        fields = {"prompt_ids": [key], "max_tokens": 10, **request}
        engine.submit(GenerationRequest(key=key, **fields), lambda what: self.steps.put((time.monotonic(), what)))

    def until_end(self) -> list[tuple[float, Step]]:
        came = []
        while not came or not came[-1][1].finish_reason:
            came.append(self.steps.get(timeout=SECONDS))
        return came

    def token_ids(self) -> list[int]:
        return [token_id for _, step in self.until_end() for token_id in step.token_ids]


def test_exactly_as_many_tokens_come_as_are_wanted(make_engine: Any):
    engine = make_engine()
    for number in (1, 2, 37, 2000):
        assert len(Delivered(engine, number, max_tokens=number).token_ids()) == number


def test_a_rate_is_kept(make_engine: Any):
    engine = make_engine(tokens_per_second=200.0)
    came = Delivered(engine, 1, max_tokens=101).until_end()
    assert came[-1][0] - came[0][0] >= 0.49  # never faster; how much slower depends on the machine


def test_the_first_token_waits_for_the_prefill(make_engine: Any):
    engine = make_engine(prefill_seconds=0.3)
    started = time.monotonic()
    came = Delivered(engine, 1).until_end()
    assert came[0][0] - started >= 0.3


def test_the_same_prompt_gives_the_same_text_and_others_others(make_engine: Any):
    engine = make_engine()
    texts = [tuple(Delivered(engine, index, prompt_ids=[5, 6], max_tokens=40).token_ids()) for index in range(3)]
    assert len(set(texts)) == 1
    others = {tuple(Delivered(engine, 10 + n, prompt_ids=[n], max_tokens=40).token_ids()) for n in range(20)}
    assert len(others) > 10


def test_a_seed_decides_a_sampled_text(make_engine: Any):
    engine = make_engine()
    sampled = [Sampling(greedy=False, seed=seed) for seed in (1, 1, 2, 3, 4, 5)]
    texts = [
        Delivered(engine, index, prompt_ids=[5], max_tokens=40, sampling=sampling).token_ids()
        for index, sampling in enumerate(sampled)
    ]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) > 1


def test_a_text_begins_and_goes_on_with_whole_characters(make_engine: Any, folder: Path):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    engine = make_engine(max_batch_size=64)
    started = [Delivered(engine, key, max_tokens=300) for key in range(60)]
    for delivered in started:
        text = tokenizer.decode(delivered.token_ids()[:-10])
        assert "\ufffd" not in text.rstrip("\ufffd")


def test_beyond_the_slots_requests_wait(make_engine: Any):
    engine = make_engine(max_batch_size=2, tokens_per_second=50.0)
    first = [Delivered(engine, key, max_tokens=20) for key in range(2)]
    third = Delivered(engine, 2, max_tokens=1)
    for delivered in first:
        assert delivered.steps.get(timeout=SECONDS)
    stats = engine.stats()
    assert (stats.num_active_requests, stats.num_scheduled_requests) == (3, 2)
    last = max(delivered.until_end()[-1][0] for delivered in first)
    assert third.until_end()[0][0] >= last - 0.021  # a slot is free at the tick of the last token


def test_what_the_kv_cache_has_no_room_for_waits(make_engine: Any):
    engine = make_engine(max_batch_size=4, max_seq_len=128, kv_tokens=128, tokens_per_second=100.0)
    first = Delivered(engine, 1, max_tokens=50)  # 51 tokens: 2 blocks of the 4
    second = Delivered(engine, 2, max_tokens=90)  # 3 blocks
    assert first.steps.get(timeout=SECONDS)
    stats = engine.stats()
    assert (stats.num_scheduled_requests, stats.kv_blocks_used, stats.kv_blocks_max) == (1, 2, 4)
    end = first.until_end()[-1][0]
    assert second.until_end()[0][0] >= end - 0.011
    assert engine.stats().kv_blocks_used == 0


def test_a_request_in_its_prefill_is_a_context_request(make_engine: Any):
    engine = make_engine(prefill_seconds=5.0)
    Delivered(engine, 1)
    deadline = time.monotonic() + SECONDS
    while not engine.stats().num_context_requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().num_context_requests == 1


@pytest.mark.parametrize("which", [0, 2], ids=["running", "waiting"])
def test_an_aborted_request_gets_nothing_more_and_frees_its_place(make_engine: Any, which: int):
    engine = make_engine(max_batch_size=2, tokens_per_second=100.0)
    started = [Delivered(engine, key, max_tokens=5000) for key in range(3)]
    assert started[0].steps.get(timeout=SECONDS)
    engine.abort(which)
    while not started[which].steps.empty():
        started[which].steps.get()
    others = [delivered for delivered in started if delivered.key != which]
    for delivered in others:
        assert delivered.steps.get(timeout=SECONDS)
    time.sleep(0.1)
    assert started[which].steps.empty()
    assert engine.stats().num_active_requests == 2


def test_an_unknown_key_is_not_aborted(make_engine: Any):
    make_engine().abort(99)


def test_shutdown_tells_everybody_once(folder: Path, make_engine: Any):
    engine = make_engine(max_batch_size=1, tokens_per_second=10.0)
    told: list[Any] = []
    for key in range(3):
        request = GenerationRequest(key=key, prompt_ids=[1], max_tokens=1000)
        engine.submit(request, lambda what: told.append(what) if isinstance(what, EngineError) else None)
    engine.shutdown()
    assert len(told) == 3
    assert not [thread for thread in threading.enumerate() if thread is engine._thread]


# ---- building ------------------------------------------------------------------------------------------------------


def test_without_rates_nothing_is_built():
    with pytest.raises(UsageError, match="made-up tokens at a set rate, for benchmarks only"):
        synthetic_compiler.check_request(BuildRequest(model="x", engine="synthetic"))


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--tp and --pp", {"tensor_parallel": 2}),
        ("--tp and --pp", {"pipeline_parallel": 2}),
        ("--gpu", {"gpu": "NVIDIA-L4"}),
        ("--quantization", {"quantization": "int8"}),
        ("--dtype", {"dtype": "float16"}),
    ],
)
def test_what_is_about_weights_and_gpus_is_refused(option: str, values: dict[str, Any]):
    with pytest.raises(UsageError, match=f"{option} is about weights and GPUs"):
        plan_for(**values)


def test_other_rates_are_another_engine():
    plans = [plan_for(synthetic=SyntheticRates(tokens_per_second=rate)) for rate in (50.0, 50.0, 51.0)]
    keys = [json.dumps(plan.key_fields(), sort_keys=True) for plan in plans]
    assert keys[0] == keys[1] != keys[2]


def test_the_length_of_an_answer_is_not_bounded_by_a_model_that_is_not_there():
    assert plan_for(max_seq_len=100_000).limits.max_seq_len == 100_000


def test_the_engine_knows_the_rates_it_was_built_with(tmp_path: Path):
    rates = SyntheticRates(tokens_per_second=7.0, prefill_seconds=0.25, kv_tokens=640)
    compiled = synthetic_compiler.compile(plan_for(synthetic=rates), resolve(str(DEMO)), tmp_path, tmp_path / "kept")
    content = json.loads((tmp_path / "synthetic.json").read_text())
    assert {name: content[name] for name in asdict(rates)} == asdict(rates)
    assert max(content["token_ids"]) < compiled.vocab_size
    assert 0 in content["starts"]
