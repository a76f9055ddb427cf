from .._double.contract import Record
from .._double.records import KvCacheConfig, PeftCacheConfig, SchedulerConfig

__all__ = ["CalibConfig", "ExtendedRuntimePerfKnobConfig", "KvCacheConfig", "PeftCacheConfig", "SchedulerConfig"]


class CalibConfig(Record):
    pass


class ExtendedRuntimePerfKnobConfig(Record):
    pass
