"""What is asked: texts and their lengths, drawn from a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from failures import UsageError
from lengths import Lengths
from traces import TracedRequest, check_text, read_lines, read_object

# Frequent English words, each one token with its space in the usual vocabularies (GPT-2, Llama, Qwen), so that words
# are about tokens. Drawn at random: no two prompts share a beginning that a server could have kept.
_WORDS_TEXT = """
the of and to in is was for that on with as by at from his it an are were which this be had has have not or one
their first new also two who its been after more other they when time all there into some can only over years
most would about where may up out made many before such so through these use between during both known then
under part well year world state three war being city people later now while called life day water long house
"""
WORDS = _WORDS_TEXT.split()


@dataclass(frozen=True, slots=True)
class Question:
    """One request. `cancel_after_tokens`: its client goes away once it has this many tokens, unless it is done."""

    prompt: str
    output_tokens: int
    cancel_after_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Where texts come from: one of `texts`, or as many words as `input_tokens` says when there are none."""

    texts: tuple[str, ...] = ()
    input_tokens: Lengths
    output_tokens: Lengths
    cancel_ratio: float = 0.0

    def questions(self, random: Random) -> Iterator[Question]:
        """For ever."""
        while True:
            prompt = random.choice(self.texts) if self.texts else words(self.input_tokens.draw(random), random)
            yield self._question(prompt, self.output_tokens.draw(random), random)

    def traced(self, request: TracedRequest, random: Random) -> Question:
        prompt = request.prompt if request.input_tokens is None else words(request.input_tokens, random)
        tokens = self.output_tokens.draw(random) if request.output_tokens is None else request.output_tokens
        return self._question(prompt or "", tokens, random)

    def _question(self, prompt: str, output_tokens: int, random: Random) -> Question:
        is_cancelled = random.random() < self.cancel_ratio
        return Question(prompt, output_tokens, random.randint(1, max(1, output_tokens - 1)) if is_cancelled else None)


def words(number: int, random: Random) -> str:
    return " ".join(random.choices(WORDS, k=number))


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt a line; in a file called .jsonl the line's `prompt`. Empty lines are skipped. Raises UsageError."""
    lines = read_lines(path)
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt_of(line) if path.suffix == ".jsonl" else line)
        except ValueError as error:
            raise UsageError(f"{path} line {number}: {error}") from None
    if not prompts:
        raise UsageError(f"{path} has no prompts; write one a line")
    return tuple(prompts)


def _prompt_of(line: str) -> str:
    content = read_object(line)
    if "prompt" not in content:
        raise ValueError("it has no prompt; a line is like " + '{"prompt": "Hello"}')
    check_text("prompt", content["prompt"])
    return content["prompt"]
