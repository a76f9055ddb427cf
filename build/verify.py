"""Does the engine say what the checkpoint says? Greedy tokens of both, compared one by one.

transformers answers a set of prompts in float32; the engine, with the arithmetic that the server gives it, answers the
same token ids. Where it chooses another token, the comparison goes on behind the reference's: so each position is
judged by itself, and one difference early in an answer does not spoil the rest. What is expected:

    float32, not quantized    every token equal. A position where the reference itself can hardly choose (its logits for
                              the two tokens are closer than `TIE_MARGIN`) is a tie: counted apart, and no error.
    16 bits, int8, int4       a share of equal tokens, no lower than `LEAST_SHARES` says: an engine below is broken, one
                              above may still be worse than you need.

The ids come from the engine's own tokenizer.json and must be those of transformers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from compilers.openvino_compiler import runtime_properties
from compilers.quiet_libraries import quiet_libraries
from engine_manifest import EngineManifest, ManifestError, read_manifest
from errors import StoreError, UsageError, VerifyError

# torch, transformers and openvino_genai are imported inside functions: they take seconds.

log = logging.getLogger(__name__)

MAX_TOKENS = 24
TIE_MARGIN = 1e-3  # logits of two float32 implementations differ by 1e-4 and less
# By quantization, when not exact. Random weights, whose best tokens lie close together, are the worst case: 95 % was
# seen for 16 bits, 89 % for int8, 38 % for int4; a trained model of a million parameters had 100, 99 and 90 %.
LEAST_SHARES = {"none": 0.9, "int8": 0.8, "int4": 0.6}
REMEMBERED_LOGITS = 50  # the best of each position, to say how far off the engine's choice was
TOKENS_PER_KV_BLOCK = 32  # the CPU plugin's paged attention has no other block size

DEFAULT_PROMPTS = (
    "Hello",
    "The capital of France is",
    "1, 2, 3, 4, 5,",
    "Once upon a time, in a village by the sea, there lived an old man who",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    'SELECT name, COUNT(*) FROM orders WHERE price > 9.99 GROUP BY name; -- {"a": [1, 2]}',
    "Q: What is the boiling point of water?\nA:",
    "Der schnelle braune Fuchs springt über den faulen Hund, weil",
    "L'été dernier, nous sommes allés à la plage où",
    "El cielo es azul porque la atmósfera",
    "Быстрая коричневая лиса прыгает через",
    "日本の首都は東京です。人口は",
    "人工智能的未来",
    "السماء زرقاء لأن",
    "Thanks!!! 🙂🚀 See you  soon,\tok?",
    "It was a bright cold day in spring, and the clocks were striking. The engineer opened the log, read the first "
    "line, read it again, and closed the log. Nothing in it made sense: the queue was empty, the cache was full, and "
    "every request had been answered twice. She wrote down three questions. Who had sent them? Why at night? And why, "
    "of all machines, this one? Then she did what she always did first, which was to",
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A position of an answer where the engine chose another token than the reference."""

    prompt: str
    position: int  # in the answer, from 0
    expected_id: int
    expected_text: str
    got_id: int
    got_text: str
    margin: float  # the reference's logit of its token, less that of the engine's token
    is_margin_exact: bool  # False: the engine's token was not among the best, and the margin is at least this

    def __str__(self) -> str:
        margin = f"{self.margin:.3g}" if self.is_margin_exact else f"more than {self.margin:.3g}"
        return (
            f"prompt {_shorten(self.prompt)!r}, token {self.position} of the answer: transformers says "
            f"{self.expected_id} ({self.expected_text!r}), the engine {self.got_id} ({self.got_text!r}), "
            f"with logits {margin} apart"
        )


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    exact: bool  # every token had to be equal
    least_share: float  # of equal tokens, that was asked for
    num_prompts: int
    num_shortened_prompts: int  # cut, to leave room for an answer
    num_tokens: int
    num_equal: int
    ties: tuple[Difference, ...]
    differences: tuple[Difference, ...]  # none in an exact report: they are an error
    seconds: float

    @property
    def share(self) -> float:
        """Of equal tokens; ties count as equal."""
        return (self.num_equal + len(self.ties)) / self.num_tokens if self.num_tokens else 1.0

    @property
    def sentence(self) -> str:
        what = f"{self.num_tokens} tokens for {self.num_prompts} prompts are those of transformers in float32"
        if self.ties:
            what += f", {len(self.ties)} of them ties"
        if self.exact:
            return f"all {what}"
        return f"{100 * self.share:.1f} % of {what}; of such an engine {100 * self.least_share:.0f} % is asked"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The reference's answer to one prompt."""

    prompt: str
    prompt_ids: list[int]
    is_prompt_shortened: bool
    ids: list[int]  # up to and with the first end token
    best_ids: list[list[int]]  # by position, best first
    best_logits: list[list[float]]

    def margin(self, position: int, token_id: int) -> tuple[float, bool]:
        """How much lower than the best the token's logit is, and whether that is exact."""
        ids, logits = self.best_ids[position], self.best_logits[position]
        if token_id in ids:
            return logits[0] - logits[ids.index(token_id)], True
        return logits[0] - logits[-1], False


# Greedy tokens: prompts and the number of tokens wanted of each -> that many tokens of each.
Generate = Callable[[Sequence[tuple[list[int], int]]], list[list[int]]]


def verify(
    engine_folder: Path,
    checkpoint: Checkpoint,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    *,
    max_tokens: int = MAX_TOKENS,
    trust_remote_code: bool = False,
) -> VerifyReport:
    """Raises VerifyError if the engine says something else, StoreError if its folder cannot be read."""
    started = time.monotonic()
    try:
        manifest = read_manifest(engine_folder)
    except ManifestError as error:
        raise StoreError(str(error)) from error
    if manifest.engine != "openvino":
        raise UsageError(
            f"--verify compares OpenVINO engines, and {engine_folder} is a {manifest.engine} engine; leave it out"
        )
    with quiet_libraries():
        try:
            answers = reference(
                checkpoint,
                engine_folder,
                manifest,
                prompts,
                max_tokens=max_tokens,
                trust_remote_code=trust_remote_code,
            )
            log.info("verify: transformers answered %d prompts in %.1f s", len(answers), time.monotonic() - started)
            generate = load_openvino(engine_folder, manifest, answers)
            return compare(answers, generate, engine_folder, manifest, started=started)
        except (RuntimeError, MemoryError, OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise VerifyError(f"{engine_folder} cannot be compared with transformers: {reason}") from error


def read_prompts(path: Path) -> list[str]:
    """Of a JSON Lines file, each line an object with "prompt". Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompts in {path} cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise UsageError(f'{path}, line {number}: not a JSON object with a text "prompt": {{"prompt": "Hello"}}')
        prompts.append(prompt)
    if not prompts:
        raise UsageError(f'{path} holds no prompts; write one JSON object with "prompt" per line')
    return prompts


# --- the reference


def reference(
    checkpoint: Checkpoint,
    engine_folder: Path,
    manifest: EngineManifest,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    trust_remote_code: bool = False,
) -> list[Answer]:
    """transformers' greedy answers in float32. Raises VerifyError where the engine's tokenizer gives other ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, **options)
    ours = _load_tokenizer(engine_folder)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32, **options).eval()
    end_ids = manifest.eos_token_ids
    # Set on the model and not passed: what is passed inherits the checkpoint's sampling and penalties.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end_ids or None, pad_token_id=0)
    answers = []
    for prompt in prompts:
        ids = ours.encode(prompt).ids
        if ids != tokenizer(prompt).input_ids:
            raise VerifyError(
                f"the engine's tokenizer.json gives other ids than transformers for {_shorten(prompt)!r}; "
                "build the engine again with --force"
            )
        most = max(1, manifest.limits["max_seq_len"] - max_tokens)
        kept = ids[:most] or [next(i for i in (manifest.bos_token_id, *end_ids, 0) if i is not None)]
        tensor = torch.tensor([kept])
        with torch.no_grad():
            output = model.generate(
                tensor,
                attention_mask=torch.ones_like(tensor),
                max_new_tokens=min(max_tokens, manifest.limits["max_seq_len"] - len(kept)),
                return_dict_in_generate=True,
                output_logits=True,
            )
        best = torch.cat(output.logits).topk(min(REMEMBERED_LOGITS, output.logits[0].shape[-1]))
        answers.append(
            Answer(
                prompt=prompt,
                prompt_ids=kept,
                is_prompt_shortened=len(ids) > len(kept),
                ids=output.sequences[0, len(kept) :].tolist(),
                best_ids=best.indices.tolist(),
                best_logits=best.values.tolist(),
            )
        )
    return answers


# --- the engine


def load_openvino(engine_folder: Path, manifest: EngineManifest, answers: Sequence[Answer]) -> Generate:
    """The engine in this process, with the properties that the server gives it, and a cache for these answers."""
    import numpy as np
    import openvino
    import openvino_genai

    blocks = [-(-(len(answer.prompt_ids) + len(answer.ids)) // TOKENS_PER_KV_BLOCK) + 1 for answer in answers]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 0  # in GB; the number of blocks decides
    scheduler.num_kv_blocks = sum(blocks)
    scheduler.max_num_seqs = 16
    scheduler.max_num_batched_tokens = 256
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True  # prompts come again, a few tokens longer
    properties = runtime_properties(manifest.dtype)
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(engine_folder), scheduler, "CPU", properties)

    def generate(requests: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        handles = []
        for number, (prompt_ids, num_tokens) in enumerate(requests):
            config = openvino_genai.GenerationConfig()
            config.do_sample = False
            config.ignore_eos = True
            config.max_new_tokens = num_tokens
            ids = openvino.Tensor(np.asarray([prompt_ids], dtype=np.int64))
            handles.append(pipeline.add_request(number, ids, config))
        outputs: list[list[int]] = [[] for _ in requests]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for handle, output in zip(handles, outputs, strict=True):
                while handle.can_read():
                    for news in handle.read().values():
                        output += news.generated_ids
        return outputs

    return generate


# --- the comparison


def compare(
    answers: Sequence[Answer], generate: Generate, engine_folder: Path, manifest: EngineManifest, *, started: float
) -> VerifyReport:
    """Raises VerifyError when the answers of `generate` are not good enough for an engine of this kind."""
    exact = manifest.dtype == "float32" and manifest.quantization == "none"
    tokenizer = _load_tokenizer(engine_folder)
    found: dict[tuple[int, int], Difference] = {}  # by prompt and position
    positions = {number: 0 for number, answer in enumerate(answers) if answer.ids}  # compared so far
    while positions:
        requests = []
        for number, position in positions.items():
            answer = answers[number]
            requests.append((answer.prompt_ids + answer.ids[:position], len(answer.ids) - position))
        outputs = dict(zip(list(positions), generate(requests), strict=True))
        for number, got in outputs.items():
            answer, position = answers[number], positions.pop(number)
            expected = answer.ids[position:]
            if len(got) != len(expected):
                raise VerifyError(
                    f"the engine stopped after {len(got)} of {len(expected)} tokens for the prompt "
                    f"{_shorten(answer.prompt)!r}; look into the debug log (-v)"
                )
            offset = next((i for i in range(len(got)) if got[i] != expected[i]), None)
            if offset is None:
                continue
            position += offset
            margin, is_exact = answer.margin(position, got[offset])
            difference = Difference(
                prompt=answer.prompt,
                position=position,
                expected_id=expected[offset],
                expected_text=tokenizer.decode([expected[offset]], skip_special_tokens=False),
                got_id=got[offset],
                got_text=tokenizer.decode([got[offset]], skip_special_tokens=False),
                margin=margin,
                is_margin_exact=is_exact,
            )
            found[number, position] = difference
            gives_up = exact and not _is_tie(difference)
            if position + 1 < len(answer.ids) and not gives_up:
                positions[number] = position + 1
    ordered = [found[key] for key in sorted(found)]
    ties = tuple(difference for difference in ordered if _is_tie(difference))
    differences = tuple(difference for difference in ordered if not _is_tie(difference))
    if exact and differences:
        prompts = len({difference.prompt for difference in differences})
        raise VerifyError(
            f"the engine does not say what the checkpoint says, for {prompts} of {len(answers)} prompts. "
            f"{differences[0]}"
        )
    num_tokens = sum(len(answer.ids) for answer in answers)
    report = VerifyReport(
        exact=exact,
        least_share=1.0 if exact else LEAST_SHARES[manifest.quantization],
        num_prompts=len(answers),
        num_shortened_prompts=sum(answer.is_prompt_shortened for answer in answers),
        num_tokens=num_tokens,
        num_equal=num_tokens - len(ordered),
        ties=ties,
        differences=differences,
        seconds=round(time.monotonic() - started, 3),
    )
    if report.share < report.least_share:
        raise VerifyError(
            f"only {100 * report.share:.1f} % of the engine's tokens are those of transformers, and a {manifest.dtype} "
            f"engine with quantization {manifest.quantization} must reach {100 * report.least_share:.0f} %. "
            f"{differences[0]}"
        )
    return report


def _is_tie(difference: Difference) -> bool:
    return difference.is_margin_exact and difference.margin < TIE_MARGIN


def _load_tokenizer(engine_folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(engine_folder / "tokenizer.json"))


def _shorten(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else prompt[:37] + "..."
