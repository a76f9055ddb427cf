"""The requests in flight, as the dispatcher holds them: what has come for each, and what has been sent.

An exchange is one Triton request. It has an answer for each of its prompts, and an answer has a sequence for each text
that was asked for.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from chunk_header import ChunkHeader
from chunks import Chunk, SequenceChunk
from generation import FinishReason, GenerationRequest
from request_reading import Prompt, Request
from stop_words import StopWordMatcher
from text_decoding import CONTEXT_TOKENS


class Responder(Protocol):
    """The way back to one Triton request. Only the dispatcher's thread calls it."""

    request_id: str

    def send(self, chunk: Chunk, *, final: bool) -> None: ...

    def fail(self, error: Exception) -> None:
        """The final response, in place of what is missing."""

    def is_cancelled(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Exchange:
    """One Triton request with all of its prompts. `deadline` in monotonic seconds."""

    responder: Responder
    request: Request
    deadline: float = math.inf
    answers: list[Answer] = field(default_factory=list)
    prompts_left: int = 0
    has_left: threading.Event = field(default_factory=threading.Event)  # the waiting room, for the engine or for good
    engine_keys: set[int] = field(default_factory=set)  # the engine has them, and each has a slot
    closed: bool = False  # its final response is out, or is being held back until those before it are decoded
    last_number: int = 0  # of the last response that postprocessing decodes

    @property
    def goes_to_postprocessing(self) -> bool:
        """Or directly to a client, which asked the model `tensorrt_llm`, or came through the engine channel."""
        return self.request.from_ensemble

    def sequences(self) -> Iterator[Sequence]:
        for answer in self.answers:
            yield from answer.sequences


@dataclass(slots=True, eq=False)
class Answer:
    """One prompt's sequences. Times in ns since 1970; 0: not yet."""

    exchange: Exchange
    prompt: Prompt
    sequences: list[Sequence] = field(default_factory=list)
    sequences_left: int = 0
    scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence: tokens that came and have not been sent."""

    answer: Answer
    engine_key: int
    text_key: int  # names its text in postprocessing
    index: int
    matcher: StopWordMatcher | None
    held: list[int] = field(default_factory=list)  # waiting for the matcher
    token_ids: list[int] = field(default_factory=list)  # may go
    log_probs: list[float] = field(default_factory=list)
    cumulative_log_prob: float = 0.0
    num_tokens: int = 0  # sent
    last_token_ns: int = 0
    trim_characters: int = 0
    finish_reason: FinishReason = ""
    cut_short: bool = False  # ended by us: for all we know, the engine goes on with it
    is_first: bool = True  # nothing has been sent
    next_send: float = 0.0  # monotonic seconds

    def take_chunk(self, *, listener_pid: int, number: int) -> SequenceChunk:
        """What can be sent now, which is then no longer here."""
        prompt = self.answer.prompt
        is_first = self.is_first
        token_ids, log_probs = self.token_ids, self.log_probs[: len(self.token_ids)]
        self.token_ids = []
        del self.log_probs[: len(log_probs)]
        self.cumulative_log_prob += sum(log_probs)
        self.num_tokens += len(token_ids)
        self.is_first = False
        echo = is_first and prompt.echo
        return SequenceChunk(
            header=ChunkHeader(
                key=self.text_key,
                is_first=is_first,
                is_last=bool(self.finish_reason),
                keep_special_tokens=prompt.keep_special_tokens,
                trim_characters=self.trim_characters,
                listener_pid=listener_pid,
                number=number,
                context=() if echo or not is_first else prompt.prompt_ids[-CONTEXT_TOKENS:],
            ),
            token_ids=[*prompt.prompt_ids, *token_ids] if echo else token_ids,
            num_output_tokens=len(token_ids),
            log_probs=log_probs,
            cumulative_log_prob=self.cumulative_log_prob,
            finish_reason=self.finish_reason,
        )


def new_exchange(
    request: Request,
    responder: Responder,
    deadline: float,
    make_matcher: Callable[[Prompt], StopWordMatcher | None],
) -> Exchange:
    exchange = Exchange(responder, request, deadline, prompts_left=len(request.prompts))
    for prompt in request.prompts:
        answer = Answer(exchange, prompt)
        for generation in prompt.generations:
            for beam in range(generation.num_beams_returned):
                answer.sequences.append(_new_sequence(answer, generation, beam, make_matcher(prompt)))
        answer.sequences_left = len(answer.sequences)
        exchange.answers.append(answer)
    return exchange


def _new_sequence(
    answer: Answer, generation: GenerationRequest, beam: int, matcher: StopWordMatcher | None
) -> Sequence:
    return Sequence(
        answer=answer,
        engine_key=generation.key,
        # Beams share the engine's key; the highest bits tell their texts apart.
        text_key=generation.key | beam << 56,
        index=len(answer.sequences),
        matcher=matcher,
    )
