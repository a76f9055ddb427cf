"""Choosing tokens from logits, as SamplingParams ask for it."""

from __future__ import annotations

from typing import Any

import numpy as np


class Sampler:
    """One request's. `params` are the fields of its SamplingParams, `end_id` -1 where it never ends."""

    def __init__(self, params: dict[str, Any], prompt: list[int], vocab_size: int, *, is_engine: bool) -> None:
        self._params = params
        self.end_id = -1 if params["ignore_eos"] else params["end_id"]
        temperature, top_k, top_p = params["temperature"], params["top_k"], params["top_p"]
        is_default = temperature is None and top_k is None and top_p is None
        self.is_greedy = is_default or top_k == 1 or 0 in (temperature, top_p)
        # The engine's runtime takes no top_k and no top_p to mean the best token, whatever the temperature.
        if is_engine and not top_k and not top_p:
            self.is_greedy = True
        self._temperature = temperature or 1.0
        self._top_k = top_k or vocab_size
        self._top_p = 1.0 if top_p is None else top_p
        self._min_p = params["min_p"] or 0.0
        # No seed is seed 0: the same request gives the same answer every time.
        self._random = np.random.default_rng(params["seed"] or 0)
        self._banned = list(params["bad_token_ids"] or ())
        self._counts = np.zeros(vocab_size, np.int64)
        self._repeated = np.zeros(vocab_size, bool)
        np.add.at(self._counts, prompt[params["prompt_ignore_length"] or 0 :], 1)
        self._repeated[prompt] = True
        self._has_penalties = any(
            params[name] not in (None, neutral)
            for name, neutral in (("repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0))
        )

    def share(self, random: np.random.Generator) -> None:
        """Draw from numbers that other requests draw from, too: the seed means nothing then."""
        self._random = random

    def is_plain(self, num_generated: int) -> bool:
        """Whether the token is the best one, and nothing else has a say."""
        is_early = num_generated < (self._params["min_tokens"] or 0)
        return self.is_greedy and not (self._has_penalties or self._banned or is_early)

    def choose(self, logits: np.ndarray, num_generated: int) -> int:
        logits = logits / self._temperature
        if self._has_penalties:
            self._penalize(logits)
        logits[self._banned] = -np.inf
        if self.end_id >= 0 and num_generated < (self._params["min_tokens"] or 0):
            logits[self.end_id] = -np.inf
        return int(logits.argmax()) if self.is_greedy else self._draw(logits)

    def note(self, token: int) -> None:
        self._counts[token] += 1
        self._repeated[token] = True

    def _penalize(self, logits: np.ndarray) -> None:
        repetition = self._params["repetition_penalty"] or 1.0
        seen = logits[self._repeated]
        logits[self._repeated] = np.where(seen < 0, seen * repetition, seen / repetition)
        logits -= (self._params["presence_penalty"] or 0.0) * (self._counts > 0)
        logits -= (self._params["frequency_penalty"] or 0.0) * self._counts

    def _draw(self, logits: np.ndarray) -> int:
        order = np.argsort(-logits, kind="stable")[: self._top_k]
        chances = np.exp(logits[order] - logits[order[0]])
        chances /= chances.sum()
        kept = max(1, int(np.searchsorted(chances.cumsum(), self._top_p)) + 1)
        chances = chances[:kept]
        chances = np.where(chances >= self._min_p * chances[0], chances, 0)
        return int(order[self._random.choice(len(chances), p=chances / chances.sum())])


def log_probabilities(logits: np.ndarray, token: int, count: int) -> dict[int, tuple[float, int]]:
    """Of the best `count` tokens, and of `token`: log probability and rank."""
    values = logits - logits.max()
    values = values - np.log(np.exp(values).sum())
    best = np.argsort(-values, kind="stable")[:count]
    found = {int(one): (float(values[one]), rank + 1) for rank, one in enumerate(best)}
    found.setdefault(token, (float(values[token]), int((values > values[token]).sum()) + 1))
    return found
