"""What a request is and what an engine does with it: plain types that know neither Triton nor any engine library.

The life of a request, as these types see it:

    tensors -> [GenerationRequest, ...] -> Engine.submit -> Step, Step, ... -> responses
              (request_reading.py)        (*_engine.py)                      (dispatcher.py, response_writing.py)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

# "" on every step but a sequence's last. An engine only ever reports "stop" and "length"; the others are ours.
FinishReason = Literal["", "stop", "length", "timeout", "cancelled"]

# Why a request is not let in although nothing is wrong with it.
Refusal = Literal["queue_full", "queue_timeout"]

# What an engine may or may not be able to do; a request that needs more is refused with a sentence.
Capability = Literal["beam_search", "log_probs", "bad_words", "min_tokens", "no_end_id", "penalties", "seed"]


class RequestError(Exception):
    """This request cannot be served: one sentence for the client. Other requests are not touched."""


class AdmissionRefused(RequestError):
    """The server has too much to do for this request now; later it may not."""

    def __init__(self, reason: Refusal, sentence: str):
        super().__init__(reason, sentence)  # both, as it is pickled on its way to the infer model
        self.reason, self._sentence = reason, sentence

    def __str__(self) -> str:
        return self._sentence


class RequestCancelled(RequestError):
    """Nobody waits for this request any more."""


class EngineError(Exception):
    """The engine cannot go on: every request in flight fails with this sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen. `None` means "engine's default", which changes nothing.

    Greedy unless `temperature`, `top_k` or `top_p` asks for sampling, the rule of TensorRT-LLM's SamplingParams.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    greedy: bool = True
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    beam_width: int = 1
    length_penalty: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt for the engine. It generates one sequence, or `num_beams_returned` of them with beam search."""

    key: int  # unique among the requests in flight
    prompt_ids: Sequence[int]  # at least one
    max_tokens: int
    min_tokens: int = 0
    end_ids: Sequence[int] = ()  # any of them ends the sequence and is not part of it; empty: only length ends it
    bad_words: Sequence[Sequence[int]] = ()  # token sequences that may not be generated
    sampling: Sampling = Sampling()
    num_beams_returned: int = 1
    log_probs: bool = False
    is_streamed: bool = False  # its tokens are sent while it goes on
    is_watched: bool = False  # it may have to end after any token


@dataclass(slots=True)
class Step:
    """What came new for one sequence. `token_ids` may be empty only when `finish_reason` is set."""

    token_ids: Sequence[int]
    log_probs: Sequence[float] | None = None  # natural logarithms, one per token, when asked for
    finish_reason: FinishReason = ""
    beam: int = 0


# Called by the engine, from its own thread and in order; must return at once and never raise. An exception instead
# of a Step ends the request: RequestError for this one alone, EngineError when all of them fail.
Deliver = Callable[["Step | RequestError | EngineError"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """What one engine takes. Lengths in tokens; `max_batch_size` in sequences that generate at the same time."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_beam_width: int
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A look at the engine now. Blocks are KV-cache blocks."""

    num_active_requests: int
    num_scheduled_requests: int
    num_context_requests: int  # of those scheduled: without a token yet
    kv_blocks_max: int
    kv_blocks_used: int
    kv_tokens_per_block: int

    def when_idle(self) -> EngineStats:
        """The same engine with nothing to do."""
        return replace(self, num_active_requests=0, num_scheduled_requests=0, num_context_requests=0, kv_blocks_used=0)


class Engine(Protocol):
    """One loaded engine that batches requests in flight. All methods may be called from any thread."""

    limits: EngineLimits
    capabilities: Collection[Capability]
    computes_on_cpu: bool  # where the responses are made too

    def submit(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Begin, without waiting for anything. Raises RequestError.

        `deliver` gets the steps; the last one of the last beam has a finish reason.
        """

    def abort(self, key: int) -> None:
        """Forget the request and free what it holds. Nothing more is delivered for it. Unknown keys are ignored."""

    def pace(self, seconds: float) -> None:
        """How long tokens of a streamed sequence may be kept, to hand over several at once; 0: not at all.

        For engines to which handing over costs something. First and last tokens, and those of watched requests, are
        never kept; requests that are not streamed may keep theirs a few tenths of a second in any case.
        """

    def stats(self) -> EngineStats: ...

    def shutdown(self) -> None:
        """Stop the engine and its threads. Requests in flight get an EngineError."""
