from ._double.records import LoraConfig

__all__ = ["LoraConfig"]
