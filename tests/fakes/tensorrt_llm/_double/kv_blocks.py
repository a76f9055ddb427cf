"""Bookkeeping of the KV cache in blocks: who has how many, and which prompts have been seen before."""

from __future__ import annotations

from collections import OrderedDict


class KvBlocks:
    def __init__(self, total: int, tokens_per_block: int, *, reuses: bool) -> None:
        self.total, self.tokens_per_block, self._reuses = total, tokens_per_block, reuses
        self.allocated = self.reused = self.missed = 0  # since the start
        self._held: dict[int, int] = {}
        self._promised: dict[int, int] = {}
        self._known: OrderedDict[tuple[int, ...], None] = OrderedDict()

    @property
    def used(self) -> int:
        return sum(self._held.values())

    def needed(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def admit(self, request: int, prompt: list[int], max_tokens: int) -> int | None:
        """Promises what the request may need to its end (GUARANTEED_NO_EVICT). The number of tokens that need no
        computing; None while there is no room."""
        need = self.needed(len(prompt) + max_tokens)
        if need > self.total - sum(self._promised.values()):
            return None
        self._promised[request], self._held[request] = need, 0
        keys = [tuple(prompt[:end]) for end in range(self.tokens_per_block, len(prompt), self.tokens_per_block)]
        known = [key in self._known for key in keys] if self._reuses else []
        num_known = known.index(False) if False in known else len(known)
        self.reused += num_known
        self.missed += self.needed(len(prompt)) - num_known
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self.total:
            self._known.popitem(last=False)
        return num_known * self.tokens_per_block

    def grow(self, request: int, num_tokens: int) -> None:
        need = self.needed(num_tokens)
        self.allocated += max(0, need - self._held[request])
        self._held[request] = max(need, self._held[request])

    def release(self, request: int) -> None:
        self._promised.pop(request, None)
        self._held.pop(request, None)

    def statistics(self, allocated_before: int) -> dict[str, float]:
        lookups = self.reused + self.missed
        return {
            "maxNumBlocks": self.total,
            "freeNumBlocks": self.total - self.used,
            "usedNumBlocks": self.used,
            "tokensPerBlock": self.tokens_per_block,
            "allocTotalBlocks": self.allocated,
            "allocNewBlocks": self.allocated - allocated_before,
            "reusedBlocks": self.reused,
            "missedBlocks": self.missed,
            "cacheHitRate": self.reused / lookups if lookups else 0.0,
        }
