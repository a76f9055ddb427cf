"""The registry."""

from collections.abc import Callable

MODEL_CLASS_MAPPING: dict[str, type] = {}


def register_auto_model(name: str) -> Callable[[type], type]:
    def register(model: type) -> type:
        MODEL_CLASS_MAPPING[name] = model
        return model

    return register
