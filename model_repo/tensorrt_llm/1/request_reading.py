"""One Triton request to generation requests: every value is checked here, before an engine sees it.

Works on numpy arrays by tensor name and knows nothing of Triton. Names in messages are those of the ensemble's
inputs, which is what a client sent; where `tensorrt_llm` calls the same thing otherwise, both are given.
"""

from __future__ import annotations

import itertools
import math
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from generation import Capability, EngineLimits, GenerationRequest, RequestError, Sampling
from tokenizers import Tokenizer

Tensors = Mapping[str, np.ndarray]

# Below this a temperature means greedy: the logits divided by it can be beyond what an engine's floats hold, and the
# text is then noise. It is also vLLM's bound.
_GREEDY_TEMPERATURE = 1e-5

# Each is searched for after every token, by the one thread that serves all requests.
_MAX_STOP_WORDS = 256

# What the client called it, where that differs from the name of the tensor.
_CLIENT_NAMES = {
    "request_output_len": "max_tokens (request_output_len)",
    "runtime_top_k": "top_k (runtime_top_k)",
    "runtime_top_p": "top_p (runtime_top_p)",
    "len_penalty": "length_penalty (len_penalty)",
    "min_length": "min_length (min_tokens)",
    "random_seed": "random_seed (seed)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One Triton request.

    `arrival_ns` is Unix time; `timeout_seconds` counts from it. Of the priorities 1 is the highest.
    """

    prompts: Sequence[Prompt]
    arrival_ns: int
    from_ensemble: bool = False  # preprocessing was before, and postprocessing comes after
    timeout_seconds: float | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of a request's batch: what to generate and how to answer."""

    batch_index: int
    generations: Sequence[GenerationRequest]  # one, or one per returned sequence
    streaming: bool
    echo: bool  # the answer begins with the prompt
    keep_special_tokens: bool
    stop_words: Sequence[str] = ()

    @property
    def prompt_ids(self) -> Sequence[int]:
        return self.generations[0].prompt_ids


@dataclass(slots=True)
class RequestReader:
    """Reads requests for one engine.

    `end_ids` end a sequence unless the request names its own `end_id`. `exclude_input_in_output` is the answer for
    requests that do not say whether they want their prompt back.
    """

    limits: EngineLimits
    capabilities: Collection[Capability]
    engine_kind: str
    tokenizer: Tokenizer
    end_ids: Sequence[int]
    exclude_input_in_output: bool = True
    priority_levels: int = 0
    # From a random number on, so that a stale message hits nobody. Threads that read at the same time share it.
    _keys: Iterator[int] = field(default_factory=lambda: itertools.count(1 + secrets.randbits(48)))

    def read(self, tensors: Tensors, timeout_microseconds: int = 0) -> Request:
        """One request with all of its prompts. Raises RequestError for the first thing that is wrong."""
        input_ids = tensors.get("input_ids")
        if input_ids is None:
            raise RequestError(
                "input_ids is missing: the model tensorrt_llm takes token ids; send text to the ensemble"
            )
        if input_ids.ndim != 2 or not input_ids.shape[0]:
            raise RequestError(f"input_ids has shape {list(input_ids.shape)}; it must be [prompts, tokens]")
        from_ensemble, arrival_ns = _arrival(tensors)
        return Request(
            prompts=[self._read_row(_Row(tensors, row)) for row in range(input_ids.shape[0])],
            arrival_ns=arrival_ns or time.time_ns(),
            from_ensemble=bool(from_ensemble),
            timeout_seconds=timeout_microseconds / 1e6 if timeout_microseconds else None,
            priority=min(self._priority(_Row(tensors, row)) for row in range(input_ids.shape[0])),
        )

    def _read_row(self, row: _Row) -> Prompt:
        prompt_ids = self._prompt_ids(row)
        self._refuse_what_no_engine_gives(row)
        max_tokens = self._max_tokens(row, len(prompt_ids))
        sampling = self._sampling(row)
        num_sequences = self._num_sequences(row, sampling)
        streaming = row.flag("streaming")
        if streaming and sampling.beam_width > 1:
            raise RequestError(
                f"stream is true and beam_width is {sampling.beam_width}; beams are known only at the end, "
                "so set stream to false or beam_width to 1"
            )
        log_probs = row.flag("return_log_probs")
        if log_probs:
            self._need("log_probs", "return_log_probs")
        end_ids = self._end_ids(row)
        min_tokens = self._min_tokens(row, max_tokens)
        bad_words = self._bad_words(row)
        stop_words = self._stop_words(row)
        beams = sampling.beam_width > 1
        generations = [
            GenerationRequest(
                key=next(self._keys),
                prompt_ids=prompt_ids,
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                end_ids=end_ids,
                bad_words=bad_words,
                # Sequences of one prompt differ by their seed and are independent, so that each can be streamed.
                sampling=replace(sampling, seed=(sampling.seed + index) % 2**64),
                num_beams_returned=num_sequences if beams else 1,
                log_probs=log_probs,
                is_streamed=streaming,
                is_watched=bool(stop_words),
            )
            for index in range(1 if beams else num_sequences)
        ]
        return Prompt(
            batch_index=row.index,
            generations=generations,
            streaming=streaming,
            echo=not row.flag("exclude_input_in_output", self.exclude_input_in_output),
            keep_special_tokens=not row.flag("skip_special_tokens", True),
            stop_words=stop_words,
        )

    def _priority(self, row: _Row) -> int:
        levels = self.priority_levels
        priority = row.integer("priority", (levels + 1) // 2)  # in the middle
        if row.has("priority") and not levels:
            raise RequestError(f"priority is {priority}, but this server has no priority levels (--priority-levels)")
        if levels and not 1 <= priority <= levels:
            raise RequestError(f"priority is {priority}; it must be 1, the highest, to {levels} (--priority-levels)")
        return priority

    def _need(self, capability: Capability, what: str) -> None:
        if capability not in self.capabilities:
            raise RequestError(f"{what} is not something the engine '{self.engine_kind}' can do; leave it out")

    def _prompt_ids(self, row: _Row) -> list[int]:
        ids = row.values("input_ids")
        length = row.integer("input_lengths", len(ids))
        if not 0 <= length <= len(ids):
            raise RequestError(f"input_lengths is {length}, but input_ids has {len(ids)} values")
        ids = ids[:length]
        if length == 0:
            raise RequestError("the prompt has no tokens; send at least one")
        if length > self.limits.max_input_len:
            raise RequestError(
                f"the prompt has {length} tokens; this engine takes at most {self.limits.max_input_len} "
                "(--max-input-len of the build); shorten the prompt"
            )
        if min(ids) < 0 or max(ids) >= self.limits.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.limits.vocab_size)
            raise RequestError(
                f"input_ids holds {wrong}; token ids of this model are 0 to {self.limits.vocab_size - 1}"
            )
        return ids

    def _refuse_what_no_engine_gives(self, row: _Row) -> None:
        for name in ("return_context_logits", "return_generation_logits"):
            if row.flag(name):
                raise RequestError(f"{name} is true; this repository returns log probabilities (return_log_probs) only")

    def _max_tokens(self, row: _Row, prompt_tokens: int) -> int:
        room = self.limits.max_seq_len - prompt_tokens
        if room < 1:
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens and leaves no room for an answer: prompt and answer together "
                f"may have {self.limits.max_seq_len} (--max-seq-len of the build); shorten the prompt"
            )
        max_tokens = row.integer("request_output_len", room)
        if not 1 <= max_tokens <= room:
            raise RequestError(
                f"{_name('request_output_len')} is {max_tokens}; with a prompt of {prompt_tokens} tokens it must be "
                f"1 to {room}, since prompt and answer together may have {self.limits.max_seq_len} tokens "
                "(--max-seq-len of the build)"
            )
        return max_tokens

    def _min_tokens(self, row: _Row, max_tokens: int) -> int:
        min_tokens = row.either("min_tokens", "min_length") or 0
        if not 0 <= min_tokens <= max_tokens:
            raise RequestError(f"min_tokens is {min_tokens}; it must be 0 to max_tokens, here {max_tokens}")
        if min_tokens > 1:  # 1 is NVIDIA's default and always true
            self._need("min_tokens", "min_tokens above 1")
        return min_tokens

    def _end_ids(self, row: _Row) -> Sequence[int]:
        self._token_id(row, "pad_id")  # rows are padded by us, never by the engine: nothing else depends on it
        end_id = self._token_id(row, "end_id")
        if end_id is None:
            return self.end_ids
        if end_id == -1:
            self._need("no_end_id", "end_id -1 (never end before max_tokens)")
            return ()
        return (end_id,)

    def _token_id(self, row: _Row, name: str) -> int | None:
        if not row.has(name):
            return None
        token_id = row.integer(name, 0)
        if not -1 <= token_id < self.limits.vocab_size:
            raise RequestError(
                f"{name} is {token_id}; it must be a token id, 0 to {self.limits.vocab_size - 1}, or -1 for none"
            )
        return token_id

    def _sampling(self, row: _Row) -> Sampling:
        temperature = row.number("temperature", 1.0, at_least=0.0)
        top_k = row.integer("runtime_top_k", 0)
        if top_k < 0:
            raise RequestError(f"{_name('runtime_top_k')} is {top_k}; it must be 0 (all tokens) or more")
        top_p = row.number("runtime_top_p", 1.0, at_least=0.0, at_most=1.0)
        asked = any(row.has(name) for name in ("temperature", "runtime_top_k", "runtime_top_p"))
        beam_width = row.integer("beam_width", 1)
        if not 1 <= beam_width <= self.limits.max_beam_width:
            raise RequestError(f"beam_width is {beam_width}; this engine takes 1 to {self.limits.max_beam_width}")
        if beam_width > 1:
            self._need("beam_search", "beam_width above 1")
        length_penalty = row.number("len_penalty", 1.0)
        if length_penalty != 1.0 and beam_width == 1:
            raise RequestError(
                f"{_name('len_penalty')} is {length_penalty:g} and beam_width is 1; it only ranks beams: "
                "leave it out or set beam_width above 1"
            )
        repetition_penalty = row.number("repetition_penalty", 1.0)
        if repetition_penalty <= 0.0:
            raise RequestError(f"repetition_penalty is {repetition_penalty:g}; it must be above 0 (1 changes nothing)")
        presence_penalty = row.number("presence_penalty", 0.0, at_least=-2.0, at_most=2.0)
        frequency_penalty = row.number("frequency_penalty", 0.0, at_least=-2.0, at_most=2.0)
        if repetition_penalty != 1.0 or presence_penalty or frequency_penalty:
            self._need("penalties", "a repetition_penalty, presence_penalty or frequency_penalty")
        seed = row.either("seed", "random_seed")
        greedy = not asked or beam_width > 1 or top_k == 1 or top_p == 0.0 or temperature < _GREEDY_TEMPERATURE
        if seed is not None and not greedy:
            self._need("seed", "seed")
        return Sampling(
            temperature=temperature,
            top_k=min(top_k, self.limits.vocab_size),
            top_p=top_p,
            greedy=greedy,
            # Without a seed every request gets its own: an engine's fixed default would repeat the same "random" text.
            seed=secrets.randbits(63) if seed is None else seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            beam_width=beam_width,
            length_penalty=length_penalty,
        )

    def _num_sequences(self, row: _Row, sampling: Sampling) -> int:
        beams = sampling.beam_width > 1
        number = row.integer("num_return_sequences", sampling.beam_width)
        most = sampling.beam_width if beams else self.limits.max_batch_size
        if not 1 <= number <= most:
            rule = "beam_width" if beams else "--max-batch-size of the build"
            raise RequestError(f"num_return_sequences is {number}; it must be 1 to {most} ({rule})")
        if number > 1 and not beams and sampling.greedy:
            raise RequestError(
                f"num_return_sequences is {number}, but greedy decoding gives the same sequence every time; "
                "set temperature, top_k above 1 or top_p, or beam_width"
            )
        return number

    def _stop_words(self, row: _Row) -> list[str]:
        words = [_utf8(word, "stop_words") for word in row.values("stop_words") if word]
        # NVIDIA's form for clients that send ids; a word stops at its text, wherever token boundaries fall.
        as_ids = row.word_list("stop_words_list", self.limits.vocab_size)
        number = len(words) + len(as_ids)
        if number > _MAX_STOP_WORDS:
            raise RequestError(f"stop_words has {number} words; at most {_MAX_STOP_WORDS} can be watched for")
        words += [self.tokenizer.decode(list(ids), skip_special_tokens=False) for ids in as_ids]
        return [word for word in words if word]

    def _bad_words(self, row: _Row) -> list[tuple[int, ...]]:
        words = row.word_list("bad_words_list", self.limits.vocab_size)
        if words:
            self._need("bad_words", "bad_words")
        return words


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of every tensor. A tensor that is absent, or empty as JSON's "" makes it, has no value."""

    tensors: Tensors
    index: int

    def values(self, name: str) -> list:
        array = self.tensors.get(name)
        if array is None or not array.size:
            return []
        if array.ndim == 0 or array.shape[0] <= self.index:
            raise RequestError(f"{_name(name)} has shape {list(array.shape)}; it needs one row per prompt")
        return array[self.index].ravel().tolist()

    def has(self, name: str) -> bool:
        return bool(self.values(name))

    def _one(self, name: str):
        values = self.values(name)
        if len(values) > 1:
            raise RequestError(f"{_name(name)} has {len(values)} values for one prompt; send one")
        return values[0] if values else None

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._one(name)
        return default if value is None else bool(value)

    def integer(self, name: str, default: int) -> int:
        value = self._one(name)
        return default if value is None else int(value)

    def number(
        self, name: str, default: float, *, at_least: float | None = None, at_most: float | None = None
    ) -> float:
        value = self._one(name)
        if value is None:
            return default
        if not math.isfinite(value):
            raise RequestError(f"{_name(name)} is {value}; it must be a finite number")
        if (at_least is not None and value < at_least) or (at_most is not None and value > at_most):
            rule = f"at least {at_least:g}" if at_most is None else f"{at_least:g} to {at_most:g}"
            raise RequestError(f"{_name(name)} is {value:g}; it must be {rule}")
        return float(value)

    def either(self, name: str, old_name: str) -> int | None:
        """One value under its present or its older name; None if there is none."""
        value, old_value = self._one(name), self._one(old_name)
        if value is not None and old_value is not None and value != old_value:
            raise RequestError(
                f"{name} is {value} and {old_name} is {old_value}; they mean the same, so send one of them"
            )
        either = old_value if value is None else value
        return None if either is None else int(either)

    def word_list(self, name: str, vocab_size: int) -> list[tuple[int, ...]]:
        """NVIDIA's INT32 [2, n]: ids one word after the other, then where each word ends; -1 fills the second row."""
        array = self.tensors.get(name)
        if array is None or not array.size:
            return []
        if array.ndim != 3 or array.shape[0] <= self.index or array.shape[1] != 2:
            raise RequestError(f"{name} has shape {list(array.shape)}; it must be [prompts, 2, n]: ids, then word ends")
        ids, ends = array[self.index].tolist()
        words, start = [], 0
        for end in ends:
            if end == -1:
                break
            if not start < end <= len(ids):
                raise RequestError(f"{name} says a word ends at {end}; ends must rise and be at most {len(ids)}")
            words.append(tuple(ids[start:end]))
            start = end
        for token_id in ids[:start]:
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"{name} holds {token_id}; token ids of this model are 0 to {vocab_size - 1}")
        return words


def _arrival(tensors: Tensors) -> tuple[int, int]:
    """What preprocessing and infer say of a request, as prompt_tensors.py writes it; zeros where nobody says."""
    array = tensors.get("ARRIVAL")
    if array is None or not array.size:
        return 0, 0
    if array.shape[1:] != (2,):
        raise RequestError(f"ARRIVAL has shape {list(array.shape)}; leave it out, it is for the model preprocessing")
    return tuple(array[0].tolist())


def _name(name: str) -> str:
    return _CLIENT_NAMES.get(name, name)


def _utf8(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8: byte {error.start} is 0x{value[error.start]:02x}") from None
