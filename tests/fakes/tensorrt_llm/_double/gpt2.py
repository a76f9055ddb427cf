"""GPT-2 in numpy, computed as its ranks would: partial sums side by side, stages one after another, a KV cache each.

Weights may be float16; everything is computed in float32. All sequences that generate go through the matrices at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checkpoints import Weights

_FIRST_SLOTS = 8
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))),
    "relu": lambda x: np.maximum(x, 0),
}


@dataclass(frozen=True)
class _Part:
    """What one rank has of one layer. Matrices are transposed: rows are inputs."""

    qkv: tuple[np.ndarray, np.ndarray]
    dense: np.ndarray
    fc: tuple[np.ndarray, np.ndarray]
    proj: np.ndarray


@dataclass(frozen=True)
class _Layer:
    norms: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    parts: list[_Part]
    biases: tuple[np.ndarray, np.ndarray]  # added once, to the sums of the parts


class Gpt2:
    """A slot is the place of one sequence in the caches."""

    def __init__(self, config: dict[str, Any], ranks: list[Weights], tp_size: int, max_seq_len: int) -> None:
        self._head_size = config["hidden_size"] // config["num_attention_heads"]
        self._epsilon = config["norm_epsilon"]
        self._activation = _ACTIVATIONS[config["hidden_act"]]
        self._vocab_size = config["vocab_size"]
        stages = [ranks[first : first + tp_size] for first in range(0, len(ranks), tp_size)]
        self._layers = [layer for stage in stages for layer in _layers(stage)]
        first, last = stages[0], stages[-1]
        axis = config["embedding_sharding_dim"] if config["use_parallel_embedding"] else None
        tokens, positions = (
            [_float(part[f"transformer.{name}_embedding.weight"]) for part in first] for name in ("vocab", "position")
        )
        self._tokens = tokens[0] if axis is None else np.concatenate(tokens, axis)
        self._positions = positions[0] if axis is None else np.concatenate(positions, axis)
        self._last_norm = _float(last[0]["transformer.ln_f.weight"]), _float(last[0]["transformer.ln_f.bias"])
        head = np.concatenate([_float(part["lm_head.weight"]) for part in last])
        self._head = np.ascontiguousarray(head[: self._vocab_size].T)
        self._max_seq_len = min(max_seq_len, len(self._positions))
        self._caches: list[list[list[np.ndarray]]] = []  # layer, rank, keys and values: (slot, head, position, size)
        self._num_slots = 0

    def prefill(self, slot: int, tokens: list[int], start: int) -> np.ndarray:
        """The logits after the last of `tokens`, which follow `start` others in the slot. Shape (vocabulary,)."""
        self._make_room(slot + 1)
        count, end = len(tokens), start + len(tokens)
        is_future = np.arange(end)[None, :] > np.arange(start, end)[:, None]

        def attend(cache: list[np.ndarray], query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
            keys, values = (array[slot] for array in cache)
            keys[:, start:end], values[:, start:end] = key.swapaxes(0, 1), value.swapaxes(0, 1)
            scores = query.swapaxes(0, 1) @ keys[:, :end].swapaxes(1, 2)
            scores[:, is_future] = -np.inf
            return (_softmax(scores) @ values[:, :end]).swapaxes(0, 1).reshape(count, -1)

        hidden = self._run(self._tokens[tokens] + self._positions[start:end], attend)
        return hidden[-1] @ self._head

    def decode(self, slots: list[int], tokens: list[int], positions: list[int]) -> np.ndarray:
        """One more token for each of `slots`, at the given positions. Logits of shape (slots, vocabulary)."""
        # All slots up to the last are computed, so that no cache is copied; idle ones write where nobody reads.
        count, end = max(slots) + 1, max(positions) + 1
        row_tokens, row_positions = np.zeros(count, np.int64), np.full(count, self._max_seq_len)
        row_tokens[slots], row_positions[slots] = tokens, positions
        rows = np.arange(count)
        is_empty = (np.arange(end)[None, :] > row_positions[:, None])[:, None, None, :]

        def attend(cache: list[np.ndarray], query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
            keys, values = cache
            keys[rows, :, row_positions], values[rows, :, row_positions] = key, value
            scores = query[:, :, None] @ keys[:count, :, :end].swapaxes(2, 3)
            np.copyto(scores, -np.inf, where=is_empty)
            return (_softmax(scores) @ values[:count, :, :end]).reshape(count, -1)

        places = self._positions[np.minimum(row_positions, len(self._positions) - 1)]
        return (self._run(self._tokens[row_tokens] + places, attend) @ self._head)[slots]

    def _run(self, hidden: np.ndarray, attend: Callable[..., np.ndarray]) -> np.ndarray:
        for layer, caches in zip(self._layers, self._caches, strict=True):
            normed = self._norm(hidden, *layer.norms[0])
            total = layer.biases[0]
            for part, cache in zip(layer.parts, caches, strict=True):
                qkv = (normed @ part.qkv[0] + part.qkv[1]).reshape(len(hidden), 3, -1, self._head_size)
                total = total + attend(cache, qkv[:, 0] * self._head_size**-0.5, qkv[:, 1], qkv[:, 2]) @ part.dense
            hidden = hidden + total
            normed = self._norm(hidden, *layer.norms[1])
            total = layer.biases[1]
            for part in layer.parts:
                total = total + self._activation(normed @ part.fc[0] + part.fc[1]) @ part.proj
            hidden = hidden + total
        return self._norm(hidden, *self._last_norm)

    def _norm(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self._epsilon) * weight + bias

    def _make_room(self, num_slots: int) -> None:
        if num_slots <= self._num_slots:
            return
        slots = max(num_slots, 2 * self._num_slots, _FIRST_SLOTS)
        old, self._caches = self._caches, []
        for number, layer in enumerate(self._layers):
            self._caches.append([])
            for rank, part in enumerate(layer.parts):
                heads = len(part.dense) // self._head_size
                shape = (slots, heads, self._max_seq_len + 1, self._head_size)
                new = [np.zeros(shape, np.float32) for _ in range(2)]
                for array, before in zip(new, old[number][rank] if old else (), strict=False):
                    array[: self._num_slots] = before
                self._caches[-1].append(new)
        self._num_slots = slots


def _layers(stage: list[Weights]) -> list[_Layer]:
    layers = []
    while f"transformer.layers.{len(layers)}.attention.qkv.weight" in stage[0]:
        prefix = f"transformer.layers.{len(layers)}."

        def get(part: Weights, name: str, prefix: str = prefix) -> np.ndarray:
            return np.ascontiguousarray(_float(part[prefix + name]).T)

        parts = [
            _Part(
                qkv=(get(part, "attention.qkv.weight"), get(part, "attention.qkv.bias")),
                dense=get(part, "attention.dense.weight"),
                fc=(get(part, "mlp.fc.weight"), get(part, "mlp.fc.bias")),
                proj=get(part, "mlp.proj.weight"),
            )
            for part in stage
        ]
        norms = tuple(
            (get(stage[0], f"{name}_layernorm.weight"), get(stage[0], f"{name}_layernorm.bias"))
            for name in ("input", "post")
        )
        biases = get(stage[0], "attention.dense.bias"), get(stage[0], "mlp.proj.bias")
        layers.append(_Layer(norms=norms, parts=parts, biases=biases))
    return layers


def _float(tensor: np.ndarray) -> np.ndarray:
    return tensor.astype(np.float32)


def _softmax(scores: np.ndarray) -> np.ndarray:
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores
