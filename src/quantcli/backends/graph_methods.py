"""The backends that take ONNX graphs, and what each can be asked for."""

from dataclasses import replace

from quantcli.backends.backend import Backend, Method, Setting

__all__ = ["AIMET", "INC", "NVMO", "ONNXRUNTIME"]

_DATA = frozenset({"calibration", "calibration_inputs", "image_spec", "user_script", "data_function"})
_NODES = frozenset({"nodes_include", "nodes_exclude", "exclude", "op_types"})
_TYPES = ("int8", "uint8", "int16", "uint16", "int4", "uint4")
_BLOCKS = (16, 32, 64, 128, 256)
_WEIGHT_TYPE = Setting("int8", "integers of weights", choices=_TYPES)
_PER_CHANNEL = Setting(False, "a scale for each output channel of weights")
_REDUCE_RANGE = Setting(False, "7 bits of weights, for processors without VNNI")
_STATIC = {
    "weight_type": _WEIGHT_TYPE,
    "activation_type": Setting("uint8", "integers of activations", choices=_TYPES),
    "calibrate_method": Setting("minmax", "how ranges are found", choices=("minmax", "entropy", "percentile")),
    "per_channel": _PER_CHANNEL,
    "reduce_range": _REDUCE_RANGE,
}
_ACCURACY = frozenset({"accuracy_level"})
_SLIP = "GPTQ of onnxruntime 1.31 reads its Hessian at the wrong index: no error is compensated; our own -a gptq does"

_HQQ = Method(
    "MatMulNBits, half-quadratic",
    (4, 2),
    group_size=32,
    group_sizes=_BLOCKS,
    symmetric=False,
    grids=(False,),
    takes=_NODES | _ACCURACY,
)
ONNXRUNTIME = Backend(
    "onnxruntime",
    "onnxruntime",
    "its own quantize_static, quantize_dynamic and MatMulNBits quantizers",
    "onnx",
    {
        "static": Method(
            "integers, ranges of activations measured",
            (8, 4, 16),
            calibrates=True,
            takes=_DATA | _NODES | {"encoding"},
            settings=_STATIC,
        ),
        "dynamic": Method(
            "integers, ranges of activations at run time",
            (8,),
            takes=_NODES,
            settings={
                "weight_type": Setting("int8", _WEIGHT_TYPE.help, choices=("int8", "uint8")),
                "per_channel": _PER_CHANNEL,
                "reduce_range": _REDUCE_RANGE,
            },
        ),
        "rtn": Method(
            "MatMulNBits, round to nearest",
            (4, 2, 8),
            group_size=32,
            group_sizes=_BLOCKS,
            symmetric=False,
            takes=_NODES | _ACCURACY,
        ),
        "hqq": _HQQ,
        "kquant": replace(_HQQ, summary="MatMulNBits, searched scales", bits=(4,)),
        "gptq": Method(
            "MatMulNBits, GPTQ",
            (4,),
            calibrates=True,
            group_size=32,
            group_sizes=_BLOCKS,
            symmetric=False,
            takes=_DATA | _NODES | _ACCURACY,
            settings={"damp_percent": Setting(0.01, "share of the mean diagonal that is added", least=0)},
            warning=_SLIP,
        ),
    },
    imports=("onnxruntime.quantization",),
    packages=("onnxruntime", "onnx", "numpy"),
    own_environment=False,
)

_INC_WEIGHTS = {"group_size": 32, "group_sizes": (*_BLOCKS, -1), "symmetric": False}
INC = Backend(
    "inc",
    "onnx-neural-compressor",
    "Intel's compressor for ONNX: static, dynamic, weights alone",
    "onnx",
    {
        "static": Method(
            "integers, ranges of activations measured",
            (8,),
            calibrates=True,
            takes=_DATA | _NODES | {"encoding"},
            settings={name: s for name, s in _STATIC.items() if name != "calibrate_method"}
            | {
                "calibrate_method": Setting(
                    "minmax", "how ranges are found", choices=("minmax", "entropy", "percentile")
                )
            },
        ),
        "dynamic": Method(
            "integers, ranges of activations at run time",
            (8,),
            takes=_NODES,
            settings={"per_channel": _PER_CHANNEL, "reduce_range": _REDUCE_RANGE},
        ),
        "rtn": Method(
            "MatMulNBits, round to nearest",
            (4,),
            takes=frozenset({"accuracy_level"}),
            **_INC_WEIGHTS,  # type: ignore[arg-type]
        ),
        "gptq": Method(
            "MatMulNBits, GPTQ",
            (4,),
            calibrates=True,
            takes=_DATA | _ACCURACY,
            warning="GPTQ of onnx-neural-compressor 1.0 gives what round-to-nearest gives; our own -a gptq, without "
            "--backend, compensates errors",
            **_INC_WEIGHTS,  # type: ignore[arg-type]
        ),
        "awq": Method(
            "MatMulNBits, AWQ",
            (4,),
            calibrates=True,
            takes=_DATA | _ACCURACY,
            warning="AWQ of onnx-neural-compressor 1.0 scales weights without dividing inputs where they are shared: "
            "results were wrong (relative error 3.4); our own -a awq, without --backend, is exact",
            **_INC_WEIGHTS,  # type: ignore[arg-type]
        ),
    },
    imports=("onnx_neural_compressor.quantization",),
    packages=("onnx-neural-compressor", "onnxruntime", "onnx"),
    size_mb=1470,
)

_INT4 = {"group_size": 128, "group_sizes": (32, 64, 128), "symmetric": True, "grids": (True,), "opset": 21}
NVMO = Backend(
    "nvmo",
    "nvidia-modelopt",
    "NVIDIA's ModelOpt: int4 with DequantizeLinear, int8, fp8",
    "onnx",
    {
        "awq_lite": Method(
            "int4, AWQ's scales",
            (4,),
            calibrates=True,
            takes=_DATA | {"nodes_exclude"},
            aliases=("awq", "awq,rtn"),
            **_INT4,  # type: ignore[arg-type]
        ),
        "awq_clip": Method(
            "int4, clipped ranges",
            (4,),
            calibrates=True,
            takes=_DATA | {"nodes_exclude"},
            aliases=("kquant",),
            **_INT4,  # type: ignore[arg-type]
        ),
        "rtn_dq": Method(
            "int4, round to nearest",
            (4,),
            takes=frozenset({"nodes_exclude"}),
            aliases=("rtn",),
            **_INT4,  # type: ignore[arg-type]
        ),
        "int8": Method(
            "integers, ranges of activations measured",
            (8,),
            calibrates=True,
            takes=_DATA | {"nodes_exclude", "op_types"},
            aliases=("static",),
            settings={"calibrate_method": Setting("entropy", "how ranges are found", choices=("entropy", "max"))},
        ),
        "fp8": Method(
            "8-bit floats (e4m3), for TensorRT",
            (8,),
            calibrates=True,
            takes=_DATA | {"nodes_exclude", "op_types"},
            optimized=False,
            warning="onnxruntime 1.31 runs 8-bit floats on the CPU without graph optimizations only: by them a product "
            "becomes an operator that takes integers only",
        ),
    },
    imports=("modelopt.onnx.quantization",),
    packages=("nvidia-modelopt", "onnxruntime", "onnx"),
    size_mb=1550,
)

_AIMET_DATA = _DATA | {"nodes_exclude"}
_AIMET_TYPES = {
    "activation_type": Setting("uint8", "integers of activations", choices=("uint8", "int8", "uint16", "int16")),
    "quant_scheme": Setting("min_max", "how ranges are found", choices=("min_max", "tf_enhanced")),
}
AIMET = Backend(
    "aimet",
    "aimet-onnx",
    "Qualcomm's AIMET: static integers, and weights refined for them",
    "onnx",
    {
        "static": Method(
            "integers, ranges of activations measured",
            (8, 4, 16),
            calibrates=True,
            takes=_AIMET_DATA,
            opset=21,
            settings=_AIMET_TYPES,
        ),
        "lpbq": Method(
            "blocks with integer scales over per-channel ones",
            (4,),
            calibrates=True,
            group_size=64,
            group_sizes=(16, 32, 64, 128),
            takes=_AIMET_DATA,
            opset=21,
            settings=_AIMET_TYPES,
        ),
        "seqmse": Method(
            "ranges of weights searched layer after layer",
            (4, 8),
            calibrates=True,
            takes=_AIMET_DATA,
            opset=21,
            settings=_AIMET_TYPES | {"num_candidates": Setting(20, "ranges that are tried", least=1)},
        ),
        "adaround": Method(
            "rounding learned layer after layer",
            (4, 8),
            calibrates=True,
            takes=_AIMET_DATA,
            opset=21,
            settings=_AIMET_TYPES | {"num_iterations": Setting(10000, "steps per layer", least=1)},
        ),
    },
    imports=("aimet_onnx",),
    packages=("aimet-onnx", "onnxruntime", "onnx", "torch"),
    size_mb=1950,
)
