"""bitsandbytes' 8-bit checkpoints, LLM.int8(), as transformers writes and opens them.

For a linear with K inputs and N outputs:

- weight         [N, K] int8: codes in [-127, 127];
- SCB            [N] float32: largest magnitude of each row; a weight is code * SCB / 127;
- weight_format  [] uint8: 0, rows in order.

`llm_int8_threshold` of the configuration is what makes an activation an outlier at run time.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats.codec import Codec, Described, Held, require, require_scales
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor
from quantcli.tensors.vectorwise import SCHEME, codes_of, with_codes

__all__ = ["CODEC", "PARTS", "THRESHOLD", "check", "pack", "threshold_of", "unpack"]

PARTS = ("weight", "SCB", "weight_format")
THRESHOLD = 6.0
"""Where a configuration does not say."""


def pack(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The stored tensors of one linear on the codebook int8."""
    codes, largest = codes_of(tensor)
    return {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Reads one linear.

    Raises:
        InputError: the tensors do not fit together.
    """
    if scheme != SCHEME:
        raise InputError(f"weight is int8 with one scale per row, not {scheme}")
    return with_codes(*check(tensors))


def check(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Codes [N, K] int8 and largest magnitudes [N] float32, once they are known to fit together.

    Raises:
        InputError: a tensor is missing, of another shape or dtype, or rows are not in order.
    """
    codes = require(tensors, "weight", (None, None), torch.int8)
    largest = require_scales(tensors, "SCB", (len(codes),))
    order = tensors.get("weight_format")
    if order is not None and (order.numel() != 1 or int(order) != 0):
        raise InputError(f"weight_format is {order.flatten().tolist()}: 0, rows in order, is read")
    return codes, largest.float()


def threshold_of(config: Mapping[str, Any]) -> float:
    """From which magnitude on an activation is an outlier.

    Raises:
        InputError: a quantization_config says what cannot be.
    """
    value = config.get("llm_int8_threshold", THRESHOLD)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InputError(f"llm_int8_threshold is {value!r}, expected a number from 0 on")
    return float(value)


def _refuse(held: Held) -> str | None:
    if held.scheme.codebook != "int8":
        return "it holds LLM.int8() codes, -a llm-int8 makes them"
    if not held.ordered:
        return "it holds one scale per row only"
    if held.expert:
        return "its readers keep experts float; leave them out with --exclude"
    return None


def _config(described: Described) -> dict[str, Any]:
    threshold = THRESHOLD if described.outlier_threshold is None else described.outlier_threshold
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(described.float_linears),
        "llm_int8_threshold": threshold,
        "meta": {"quantizer": [described.producer]},
    }


CODEC = Codec(
    name="bnb-int8",
    lowest_zero=0,
    refuse=_refuse,
    pack=pack,
    unpack=unpack,
    config=_config,
    packed_bytes=lambda rows, columns, scheme: rows * columns + 4 * rows + 1,
    codebooks=True,
)
