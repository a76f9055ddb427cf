"""A generation request as the arguments of TensorRT-LLM's SamplingParams, and its output as steps.

Read in `tensorrt_llm/sampling_params.py` of 1.2.1: unset values mean the runtime's defaults, seed 0 among them; setting
`end_id` keeps the library from adding end and stop tokens of its own; instances are changed by the engine, so each
request has its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from generation import GenerationRequest, RequestError, Step


def sampling_arguments(request: GenerationRequest) -> dict[str, Any]:
    """Raises RequestError for bad words of several tokens, which the library takes as text only."""
    sampling = request.sampling
    arguments: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "end_id": request.end_ids[0] if request.end_ids else 0,  # without one the library asks a tokenizer
        "ignore_eos": not request.end_ids,
        "seed": sampling.seed,
        "detokenize": False,
    }
    if request.end_ids[1:]:
        arguments["stop_token_ids"] = list(request.end_ids[1:])
    if request.min_tokens > 1:  # 1 is the runtime's default
        arguments["min_tokens"] = request.min_tokens
    if not sampling.greedy:
        # All three, always: with temperature alone the engines' decoder is greedy, since its own top_p is 0.
        arguments |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    for name, neutral in (("repetition_penalty", 1.0), ("presence_penalty", 0.0), ("frequency_penalty", 0.0)):
        if (value := getattr(sampling, name)) != neutral:
            arguments[name] = value
    if request.bad_words:
        arguments["bad_token_ids"] = [_only_token(word) for word in request.bad_words]
    if request.log_probs:
        arguments["logprobs"] = 1
    return arguments


def _only_token(word: Sequence[int]) -> int:
    if len(word) > 1:
        raise RequestError(
            f"bad_words holds a word of {len(word)} tokens {list(word)}; with TensorRT-LLM it must be one token: "
            "leave it out"
        )
    return word[0]


class SequenceReader:
    """What is new in the output of one request. The library changes one object in place and hands it out each time."""

    def __init__(self, request: GenerationRequest):
        self._request = request
        self._num_read = 0

    def read(self, completion: Any, *, is_over: bool) -> Step | None:
        """The tokens since the last call, or None. `completion` is the library's CompletionOutput.

        Raises RequestError when the library ended the request for a reason of its own.
        """
        token_ids = completion.token_ids
        end = len(token_ids)
        # The token that ends a sequence is in the output of some releases and not in that of others.
        if end > self._num_read and token_ids[end - 1] in self._request.end_ids:
            end -= 1
        new = [int(token_id) for token_id in token_ids[self._num_read : end]]
        log_probs = self._log_probs(completion, new) if self._request.log_probs else None
        self._num_read = max(self._num_read, end)
        reason = self._finish_reason(completion) if is_over else ""
        return Step(new, log_probs, reason) if new or reason else None

    def _finish_reason(self, completion: Any) -> Any:
        match completion.finish_reason:
            case "stop" | "length" as reason:
                return reason
            case None:  # over without saying why
                return "length" if self._num_read >= self._request.max_tokens else "stop"
            case other:
                raise RequestError(f"TensorRT-LLM ended the request ({other}); send it again")

    def _log_probs(self, completion: Any, token_ids: Sequence[int]) -> list[float]:
        """One per token. The library gives numbers, or for each position a table by token id."""
        entries = (completion.logprobs or [])[self._num_read : self._num_read + len(token_ids)]
        if len(entries) != len(token_ids):
            raise RequestError(
                f"TensorRT-LLM gave {len(entries)} log probabilities for {len(token_ids)} tokens; "
                "send the request without return_log_probs"
            )
        return [_log_prob(entry, token_id) for entry, token_id in zip(entries, token_ids, strict=True)]


def _log_prob(entry: Any, token_id: int) -> float:
    if not isinstance(entry, dict):
        return float(entry)
    if token_id not in entry:
        raise RequestError(
            f"TensorRT-LLM gave no log probability for token {token_id}, which it sampled; "
            "send the request without return_log_probs, or greedy"
        )
    return float(entry[token_id].logprob)
