"""Comparing an engine's greedy tokens with transformers'."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
import tiny_checkpoints
import tiny_engines
import verify
from checkpoint import resolve
from compilers.quiet_libraries import refuse_telemetry
from errors import StoreError, UsageError, VerifyError
from tiny_engines import TinyEngine
from verify import Answer

refuse_telemetry()
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("optimum.intel")
pytest.importorskip("openvino_genai")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return tiny_engines.build("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """torch's threads wait for each other, and OpenVINO's are in the way; tiny models need one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@dataclass
class FakeEngine:
    """Answers with the reference's tokens, but for some that are given by prompt and position."""

    answers: Sequence[Answer]
    other: dict[tuple[int, int], int]
    rounds: int = 0

    def __call__(self, requests: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        self.rounds += 1
        return [self._answer(prompt_ids, num_tokens) for prompt_ids, num_tokens in requests]

    def _answer(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        number, answer = next(
            (i, each) for i, each in enumerate(self.answers) if prompt_ids[: len(each.prompt_ids)] == each.prompt_ids
        )
        start = len(prompt_ids) - len(answer.prompt_ids)
        positions = range(start, start + num_tokens)
        return [self.other.get((number, position), answer.ids[position]) for position in positions]


def make_answer(number: int, length: int = 10) -> Answer:
    """The reference's token is 100 + position; 1 is nearly as good, 2 worse, and others are not among the best."""
    return Answer(
        prompt=f"prompt {number}",
        prompt_ids=[number],
        is_prompt_shortened=False,
        ids=[100 + position for position in range(length)],
        best_ids=[[100 + position, 1, 2] for position in range(length)],
        best_logits=[[5.0, 4.9995, 3.0]] * length,
    )


def compare(engine: TinyEngine, other: dict, *, num_prompts: int = 3, **manifest) -> verify.VerifyReport:
    answers = [make_answer(number) for number in range(num_prompts)]
    changed = replace(engine.manifest, **manifest)
    return verify.compare(answers, FakeEngine(answers, other), engine.folder, changed, started=0.0)


# --- an engine that must be exact


def test_equal_tokens_are_a_good_report(engine: TinyEngine):
    report = compare(engine, {})
    assert (report.num_prompts, report.num_tokens, report.num_equal, report.share) == (3, 30, 30, 1.0)
    assert report.sentence == "all 30 tokens for 3 prompts are those of transformers in float32"


def test_first_difference_is_named_with_both_tokens_and_their_margin(engine: TinyEngine):
    with pytest.raises(VerifyError) as caught:
        compare(engine, {(1, 4): 2, (2, 0): 2})
    assert "for 2 of 3 prompts" in str(caught.value)
    assert re.search(
        r"prompt 'prompt 1', token 4 of the answer: transformers says 104 \('.+'\), the engine 2 \('.+'\), "
        r"with logits 2 apart",
        str(caught.value),
    )


def test_token_that_the_reference_never_thought_of_has_a_least_margin(engine: TinyEngine):
    with pytest.raises(VerifyError, match="with logits more than 2 apart"):
        compare(engine, {(0, 0): 600})


def test_tie_is_reported_and_the_comparison_goes_on_behind_it(engine: TinyEngine):
    report = compare(engine, {(0, 3): 1})
    assert [(tie.prompt, tie.position, tie.got_id) for tie in report.ties] == [("prompt 0", 3, 1)]
    assert report.share == 1.0
    assert report.sentence.endswith("1 of them ties")
    with pytest.raises(VerifyError, match="token 7 of the answer"):
        compare(engine, {(0, 3): 1, (0, 7): 2})


def test_answer_that_ends_early_is_an_error(engine: TinyEngine):
    answers = [make_answer(0)]
    with pytest.raises(VerifyError, match="stopped after 2 of 10 tokens"):
        verify.compare(answers, lambda requests: [[100, 101]], engine.folder, engine.manifest, started=0.0)


# --- an engine of fewer bits


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", "none"), ("float16", "none"), ("float32", "int8"), ("float32", "int4")]
)
def test_share_of_equal_tokens_is_reported(engine: TinyEngine, dtype: str, quantization: str):
    report = compare(engine, {(0, 0): 2, (0, 1): 2, (2, 9): 600}, dtype=dtype, quantization=quantization)
    assert report.share == 0.9
    assert [difference.position for difference in report.differences] == [0, 1, 9]
    assert report.sentence.startswith("90.0 % of 30 tokens")


def test_each_position_is_judged_by_itself(engine: TinyEngine):
    """A token that differs is put right before the next one is asked for."""
    answers = [make_answer(0)]
    fake = FakeEngine(answers, {(0, 0): 2, (0, 5): 2})
    report = verify.compare(answers, fake, engine.folder, replace(engine.manifest, quantization="int4"), started=0.0)
    assert report.num_equal == 8
    assert fake.rounds == 3


@pytest.mark.parametrize(("quantization", "num_wrong"), [("int8", 7), ("int4", 13)])
def test_share_below_the_floor_is_an_error(engine: TinyEngine, quantization: str, num_wrong: int):
    other = {(number, position): 2 for number in range(3) for position in range(10)}
    few = dict(list(other.items())[: num_wrong - 1])
    compare(engine, few, quantization=quantization)
    with pytest.raises(VerifyError, match=rf"only .* quantization {quantization} must reach"):
        compare(engine, dict(list(other.items())[:num_wrong]), quantization=quantization)


def test_report_is_plain_data(engine: TinyEngine):
    report = compare(engine, {(0, 0): 2}, quantization="int8")
    assert json.loads(json.dumps(asdict(report)))["differences"][0]["got_id"] == 2


# --- with real engines


def test_default_prompts_agree(engine: TinyEngine):
    report = verify.verify(engine.folder, engine.checkpoint)
    assert report.exact
    assert report.num_prompts == len(verify.DEFAULT_PROMPTS) == 16
    assert report.num_shortened_prompts == 0


def test_engine_of_other_weights_is_found_out(engine: TinyEngine, tmp_path: Path):
    other = resolve(str(tiny_checkpoints.make("gpt2", tmp_path, seed=1)))
    with pytest.raises(VerifyError, match="does not say what the checkpoint says, for 2 of 2 prompts"):
        verify.verify(engine.folder, other, ["Hello", "One, two"])


def test_engine_with_another_tokenizer_is_found_out(engine: TinyEngine, tmp_path: Path):
    other = resolve(str(tiny_checkpoints.make("opt", tmp_path)))
    with pytest.raises(VerifyError, match=r"tokenizer\.json gives other ids than transformers for 'Hello'"):
        verify.verify(engine.folder, other, ["Hello"])


def test_long_prompt_is_shortened_to_leave_room_for_an_answer(engine: TinyEngine):
    report = verify.verify(engine.folder, engine.checkpoint, ["one two three " * 100], max_tokens=8)
    assert (report.num_shortened_prompts, report.num_tokens) == (1, 8)


def test_empty_prompt_is_compared_too(engine: TinyEngine):
    assert verify.verify(engine.folder, engine.checkpoint, [""], max_tokens=4).num_tokens == 4


def test_reference_ends_at_any_of_the_end_tokens(engine: TinyEngine):
    first = verify.reference(engine.checkpoint, engine.folder, engine.manifest, ["Hello"], max_tokens=8)[0].ids
    manifest = replace(engine.manifest, eos_token_ids=[639, first[2]])
    [answer] = verify.reference(engine.checkpoint, engine.folder, manifest, ["Hello"], max_tokens=8)
    assert answer.ids == first[: first.index(first[2]) + 1]


def test_checkpoints_own_sampling_and_penalties_do_not_count(tmp_path: Path):
    """Qwen's generation_config.json asks for sampling and a repetition penalty."""
    engine = tiny_engines.build("qwen2", tmp_path)
    assert verify.verify(engine.folder, engine.checkpoint, ["One, two"] * 2, max_tokens=24).exact


def test_folder_without_an_engine_is_a_store_error(engine: TinyEngine, tmp_path: Path):
    with pytest.raises(StoreError, match=re.escape("has no engine.json")):
        verify.verify(tmp_path, engine.checkpoint)


def test_engine_of_another_kind_is_refused(engine: TinyEngine, tmp_path: Path):
    manifest = json.loads((engine.folder / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps({**manifest, "engine": "tensorrt"}))
    with pytest.raises(UsageError, match="--verify compares OpenVINO engines"):
        verify.verify(tmp_path, engine.checkpoint)


def test_engine_that_does_not_load_is_one_sentence(engine: TinyEngine, tmp_path: Path):
    for name in ("engine.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((engine.folder / name).read_bytes())
    with pytest.raises(VerifyError, match="cannot be compared with transformers") as caught:
        verify.verify(tmp_path, engine.checkpoint, ["Hello"])
    assert "\n" not in str(caught.value)


# --- prompts from a file


def test_prompts_come_from_a_json_lines_file(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Hello", "answer": "x"}\n\n{"prompt": "日本\u2028"}\n', encoding="utf-8")
    assert verify.read_prompts(path) == ["Hello", "日本\u2028"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\nHello\n', 'line 2: not a JSON object with a text "prompt"'),
        ('{"text": "a"}', "line 1: not a JSON object"),
        ('{"prompt": 3}', "line 1: not a JSON object"),
        ("[1]", "line 1: not a JSON object"),
        (None, "cannot be read"),
    ],
)
def test_bad_prompts_are_named(content: str | None, sentence: str, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=re.escape(sentence)):
        verify.read_prompts(path)
