"""Which part of a model a rank has."""

from __future__ import annotations

from typing import Any

from ._double.contract import bind, parameters


class Mapping:
    """Tensor parallel ranks lie side by side, pipeline stages one after another."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        vars(self).update(bind("Mapping", args, kwargs))
        product = self.tp_size * self.pp_size * self.cp_size
        if product != self.world_size:
            raise ValueError(
                "world_size must equal to tp_size * pp_size * cp_size, but got "
                f"{self.world_size} != {self.tp_size} * {self.pp_size} * {self.cp_size}"
            )
        if not 0 <= self.rank < self.world_size and not self.enable_attention_dp:
            raise ValueError(f"Rank should be an integer between 0 and {self.world_size - 1}, but got {self.rank}.")
        if self.moe_cluster_size == -1:
            self.moe_cluster_size = 1
        if self.moe_tp_size == -1:
            self.moe_tp_size = self.tp_size // (max(self.moe_ep_size, 1) * self.moe_cluster_size)
        if self.moe_ep_size == -1:
            self.moe_ep_size = self.tp_size // (self.moe_tp_size * self.moe_cluster_size)
        if self.moe_tp_size * self.moe_ep_size * self.moe_cluster_size != self.tp_size:
            raise ValueError(
                "tp_size must equal to moe_tp_size * moe_ep_size * moe_cluster_size, but got "
                f"{self.tp_size} != {self.moe_tp_size} * {self.moe_ep_size} * {self.moe_cluster_size}"
            )
        self.attn_tp_size = self.tp_size if self.attn_tp_size == -1 else self.attn_tp_size
        self.attn_cp_size = self.cp_size if self.attn_cp_size == -1 else self.attn_cp_size
        if self.attn_tp_size * self.attn_cp_size != self.tp_size * self.cp_size:
            raise ValueError("tp_size * cp_size must equal to attn_tp_size * attn_cp_size")

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp_size * self.cp_size)

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp_size % self.cp_size

    @property
    def node_rank(self) -> int:
        return self.rank // self.gpus_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.gpus_per_node

    def has_tp(self) -> bool:
        return self.tp_size > 1

    def has_pp(self) -> bool:
        return self.pp_size > 1

    def is_first_pp_rank(self) -> bool:
        return self.pp_rank == 0

    def is_last_pp_rank(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def pp_layers(self, num_layers: int) -> list[int]:
        """The layers of this rank's stage. The first stages get one more when they do not divide."""
        each, more = divmod(num_layers, self.pp_size)
        sizes = self.pp_partition or [each + (stage < more) for stage in range(self.pp_size)]
        first = sum(sizes[: self.pp_rank])
        return list(range(first, first + sizes[self.pp_rank]))

    def to_dict(self) -> dict[str, Any]:
        """Without pp_partition, as in the library."""
        return {name: getattr(self, name) for name in parameters("Mapping") if name != "pp_partition"}

    @classmethod
    def from_dict(cls, mapping: dict[str, Any]) -> Mapping:
        return cls(**mapping)
