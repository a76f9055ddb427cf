"""The LLM for TensorRT engines. Its class is called _TrtLLM, whatever the name it is imported by."""

from ..llmapi.llm import _TrtLLM as LLM

__all__ = ["LLM"]
