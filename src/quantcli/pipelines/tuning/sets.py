"""Spaces by name, in the words of `quantize`."""

from collections.abc import Mapping
from typing import Any

__all__ = ["predefined_set"]

Objects = list[dict[str, Any]]

_HEAD: Mapping[str, dict[str, Any]] = {"checkpoint": {"quantize_lm_head": True}, "onnx": {}}
_LAST_FLOAT: Mapping[str, dict[str, Any]] = {"checkpoint": {}, "onnx": {"quantize_last_matmul": False}}
_TYPES = (("uint8", "uint8"), ("int8", "int8"), ("uint8", "int8"))


def predefined_set(name: str, model: str) -> Objects:
    """The objects of a space.

    Args:
        name: One of `options.SETS` but mixed, whose bits are chosen by a goal.
        model: checkpoint or onnx.
    """
    return {"woq": _woq, "weights": _weights, "integers": _integers}[name](model)


def _woq(model: str) -> Objects:
    """What Intel's tool tries, in its order: 4 bits with zero points, the output head too."""

    def one(name: str, algorithm: str, group_size: int, last: bool = True) -> dict[str, Any]:
        head = _HEAD[model] if last else _LAST_FLOAT[model]
        return {
            "name": name, "algorithm": algorithm, "bits": 4, "group_size": group_size, "symmetric": False, **head
        }  # fmt: skip

    return [
        one("RTN_G32ASYM", "rtn", 32),
        one("GPTQ_G32ASYM", "gptq", 32),
        one("GPTQ_G32ASYM_DISABLE_LAST_MATMUL", "gptq", 32, last=False),
        one("GPTQ_G128ASYM", "gptq", 128),
        one("AWQ_G32ASYM", "awq", 32),
    ]


def _weights(model: str) -> Objects:
    return [{"algorithm": ["kquant", "gptq", "awq,gptq"], "bits": [3, 4, 8], "group_size": [32, 64, 128]}]


def _integers(model: str) -> Objects:
    """Dynamic and static quantization with what onnxruntime has for each."""
    found: Objects = [
        {"name": "dynamic", "algorithm": "dynamic", "weight_type": ["int8", "uint8"], "per_channel": [False, True]}
    ]
    for activation, weight in _TYPES:
        found.append(
            {
                "name": f"static_{activation}_{weight}",
                "algorithm": "static",
                "activation_type": activation,
                "weight_type": weight,
                "per_channel": [False, True],
                "calibrate_method": ["minmax", "entropy", "percentile"],
            }
        )
    return found
