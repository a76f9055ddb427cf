from __future__ import annotations

from typing import Any

from .._double.contract import Record

_SWITCHES = {"enable": True, "disable": False}


class PluginConfig(Record):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{name: self._switched(name, value) for name, value in kwargs.items()})

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, self._switched(key, value))

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        return object.__getattribute__(self, "dtype") if value == "auto" else value

    def _switched(self, name: str, value: Any) -> Any:
        if value not in ("enable", "disable") or name not in self.model_fields:
            return value
        if "bool" in self.model_fields[name].annotation:
            return _SWITCHES[value]
        return "auto" if value == "enable" else None
