"""ONNX graphs from Python: quantizers in the shape of onnxruntime's, and a search in the shape of Intel's.

from quantcli.onnx import GPTQWeightOnlyQuantConfig, MatMulNBitsQuantizer
from quantcli.onnx import config, tuning
"""

from quantcli.onnx.quantizer import (
    AWQWeightOnlyQuantConfig,
    CalibrationDataReader,
    DefaultWeightOnlyQuantConfig,
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulBnb4Quantizer,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
    WeightOnlyQuantConfig,
)

__all__ = [
    "AWQWeightOnlyQuantConfig",
    "CalibrationDataReader",
    "DefaultWeightOnlyQuantConfig",
    "GPTQWeightOnlyQuantConfig",
    "HQQWeightOnlyQuantConfig",
    "KQuantWeightOnlyQuantConfig",
    "MatMulBnb4Quantizer",
    "MatMulNBitsQuantizer",
    "RTNWeightOnlyQuantConfig",
    "WeightOnlyQuantConfig",
]
