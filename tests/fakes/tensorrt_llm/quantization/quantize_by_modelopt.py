from __future__ import annotations

from typing import Any

from .._double import calibration
from .._double.contract import checked
from .._double.records import QuantAlgo, QuantConfig
from ..mapping import Mapping
from ..models import MODEL_MAP  # noqa: F401 - absent where the engine backend is

_ALGORITHMS = {
    "full_prec": None,
    "fp8": QuantAlgo.FP8,
    "fp8_pc_pt": QuantAlgo.FP8_PER_CHANNEL_PER_TOKEN,
    "nvfp4": QuantAlgo.NVFP4,
    "int8_sq": QuantAlgo.W8A8_SQ_PER_CHANNEL,
    "int4_awq": QuantAlgo.W4A16_AWQ,
    "w4a8_awq": QuantAlgo.W4A8_AWQ,
    "int8_wo": QuantAlgo.W8A16,
    "int4_wo": QuantAlgo.W4A16,
}
_KV_ALGORITHMS = {None: None, "int8": QuantAlgo.INT8, "fp8": QuantAlgo.FP8}


@checked("quantize_and_export")
def quantize_and_export(**arguments: Any) -> None:
    tp_size, pp_size, cp_size = (arguments[f"{name}_size"] for name in ("tp", "pp", "cp"))
    calibration.export(
        arguments["model_dir"],
        arguments["output_dir"],
        dtype=arguments["dtype"],
        mapping=Mapping(tp_size * pp_size * cp_size, tp_size=tp_size, pp_size=pp_size, cp_size=cp_size),
        quant_config=QuantConfig(
            _ALGORITHMS[arguments["qformat"]],
            _KV_ALGORITHMS[arguments["kv_cache_dtype"]],
            group_size=arguments["awq_block_size"],
        ),
        device=arguments["device"],
        calib_dataset=arguments["calib_dataset"],
        calib_batches=arguments["calib_size"],
    )
