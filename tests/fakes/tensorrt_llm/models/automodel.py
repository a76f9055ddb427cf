from __future__ import annotations

from typing import Any

from .._double.contract import ENTRIES, checked
from .families import CLASSES, class_of
from .modeling_utils import PretrainedModel

MODEL_MAP = {architecture: CLASSES[name] for architecture, name in ENTRIES["MODEL_MAP"]["entries"].items()}


class AutoModelForCausalLM:
    @staticmethod
    @checked("AutoModelForCausalLM.get_trtllm_model_class")
    def get_trtllm_model_class(hf_model_or_dir: Any, trust_remote_code: bool, has_speculative_model: bool) -> type:
        return class_of(hf_model_or_dir)

    @staticmethod
    @checked("AutoModelForCausalLM.from_hugging_face")
    def from_hugging_face(hf_model_or_dir: Any, **arguments: Any) -> PretrainedModel:
        found = class_of(hf_model_or_dir)
        if not hasattr(found, "from_hugging_face"):
            raise NotImplementedError(f"{found.__name__} has not implemented from_hugging_face() method")
        return found.from_hugging_face(hf_model_or_dir, **arguments)
