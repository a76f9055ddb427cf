"""Configuration and base class of models that are converted for TensorRT."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from .._double import calibration, checkpoints, machine
from .._double.contract import bind, checked, parameters
from .._double.records import QuantConfig, SpeculativeDecodingMode
from ..mapping import Mapping

__all__ = ["PretrainedConfig", "PretrainedModel", "QuantConfig", "SpeculativeDecodingMode"]


class PretrainedConfig:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name, value in bind("PretrainedConfig", args, kwargs).items():
            setattr(self, name, value)
        for name in kwargs.keys() - parameters("PretrainedConfig").keys() - parameters("GPTConfig").keys():
            machine.log("W", f"Implicitly setting {type(self).__name__}.{name} = {kwargs[name]}")
        if not isinstance(self.mapping, Mapping):
            self.mapping = Mapping(**(self.mapping or {}))
        if not isinstance(self.quantization, QuantConfig):
            self.quantization = QuantConfig(**(self.quantization or {}))

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> PretrainedConfig:
        return cls(**config)

    @classmethod
    def from_json_file(cls, config_file: str) -> PretrainedConfig:
        return cls.from_dict(json.loads(Path(config_file).read_text()))

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str) -> PretrainedConfig:
        return cls.from_json_file(f"{ckpt_dir}/config.json")

    def to_dict(self) -> dict[str, Any]:
        mapping = self.mapping.to_dict()
        del mapping["rank"]  # one config.json serves all ranks
        return {**vars(self), "mapping": mapping, "quantization": self.quantization.model_dump("json")}

    def to_json_file(self, config_file: str) -> None:
        Path(config_file).write_text(json.dumps(self.to_dict(), indent=4))

    def set_rank(self, rank: int) -> None:
        self.mapping = Mapping(**{**self.mapping.to_dict(), "rank": rank})

    def for_each_rank(self) -> Iterator[PretrainedConfig]:
        for rank in range(self.mapping.world_size):
            one = copy.deepcopy(self)
            one.set_rank(rank)
            yield one


class PretrainedModel:
    """`weights` are those of one rank: the double's own attribute."""

    config_class: type[PretrainedConfig] | None = None
    quantizes_natively = False

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.weights: checkpoints.Weights = {}
        self.was_built = False

    @classmethod
    @checked("PretrainedModel.from_checkpoint")
    def from_checkpoint(cls, ckpt_dir: str, rank: Any, config: Any, preprocess_weights_hook: Any) -> PretrainedModel:
        config = config or PretrainedConfig.from_checkpoint(ckpt_dir)
        if rank is not None:
            config.set_rank(rank)
        file = Path(ckpt_dir) / f"rank{config.mapping.rank // config.mapping.cp_size}.safetensors"
        assert file.is_file()
        model = cls(config)
        model.weights = checkpoints.parse_safetensors(file.read_bytes())
        checkpoints.check_layout(config, config.mapping)
        return model

    @checked("PretrainedModel.save_checkpoint")
    def save_checkpoint(self, output_dir: str, save_config: bool) -> None:
        save_file(self.weights, f"{output_dir}/rank{self.config.mapping.rank}.safetensors")
        if save_config:
            self.config.to_json_file(f"{output_dir}/config.json")

    @classmethod
    @checked("PretrainedModel.quantize")
    def quantize(cls, hf_model_dir: str, output_dir: str, dtype: str, mapping: Any, quant_config: Any, **kwargs: Any):
        if cls.config_class is None:
            raise NotImplementedError(f"{cls.__name__} has not implemented the quantize() method")
        calibration.quantize(
            hf_model_dir,
            output_dir,
            dtype=dtype,
            mapping=mapping or Mapping(),
            quant_config=quant_config or QuantConfig(),
            class_name=cls.__name__,
            is_native_possible=cls.quantizes_natively,
            **{name: kwargs[name] for name in ("device", "calib_dataset", "calib_batches")},
        )
