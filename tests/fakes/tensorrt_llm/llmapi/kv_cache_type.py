from .._double.records import KVCacheType

__all__ = ["KVCacheType"]
