from .automodel import MODEL_MAP, AutoModelForCausalLM
from .families import GPTForCausalLM, LLaMAForCausalLM
from .modeling_utils import PretrainedConfig, PretrainedModel, SpeculativeDecodingMode

__all__ = [
    "MODEL_MAP",
    "AutoModelForCausalLM",
    "GPTForCausalLM",
    "LLaMAForCausalLM",
    "PretrainedConfig",
    "PretrainedModel",
    "SpeculativeDecodingMode",
]
