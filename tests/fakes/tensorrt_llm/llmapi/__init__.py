from .._double.records import (
    AttentionDpConfig,
    BatchingType,
    CapacitySchedulerPolicy,
    ContextChunkingPolicy,
    CudaGraphConfig,
    DraftTargetDecodingConfig,
    DynamicBatchConfig,
    EagleDecodingConfig,
    GuidedDecodingParams,
    KvCacheConfig,
    LookaheadDecodingConfig,
    MedusaDecodingConfig,
    MTPDecodingConfig,
    NGramDecodingConfig,
    QuantAlgo,
    QuantConfig,
    SamplingParams,
    SchedulerConfig,
)
from ..executor.result import CompletionOutput, RequestOutput
from ..executor.utils import RequestError
from .llm import LLM

__all__ = [
    "LLM",
    "AttentionDpConfig",
    "BatchingType",
    "CapacitySchedulerPolicy",
    "CompletionOutput",
    "ContextChunkingPolicy",
    "CudaGraphConfig",
    "DraftTargetDecodingConfig",
    "DynamicBatchConfig",
    "EagleDecodingConfig",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "LookaheadDecodingConfig",
    "MTPDecodingConfig",
    "MedusaDecodingConfig",
    "NGramDecodingConfig",
    "QuantAlgo",
    "QuantConfig",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
]

try:
    from ..builder import BuildConfig
    from .llm_args import CalibConfig, ExtendedRuntimePerfKnobConfig
except ImportError:  # a release without the engine backend
    pass
else:
    __all__ += ["BuildConfig", "CalibConfig", "ExtendedRuntimePerfKnobConfig"]
