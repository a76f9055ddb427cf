from .._double.records import QuantAlgo

__all__ = ["QuantAlgo"]

try:
    from .quantize_by_modelopt import quantize_and_export
except ImportError:  # a release without the engine backend
    pass
else:
    __all__ += ["quantize_and_export"]
