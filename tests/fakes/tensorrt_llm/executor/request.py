from .._double.records import LoRARequest

__all__ = ["LoRARequest"]
