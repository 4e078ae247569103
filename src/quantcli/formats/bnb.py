"""bitsandbytes' 4-bit checkpoints, nf4 and fp4, as transformers writes and opens them.

For a linear with K inputs and N outputs, in blocks of B of the flattened [N, K] matrix:

- weight             [ceil(N*K/2), 1] uint8 (or the same bytes as another dtype): two codes a byte, the first one high;
- weight.absmax      [ceil(N*K/B)] float32: what the codebook is multiplied by; uint8 codes with double quantization;
- weight.quant_map   [16] float32: the codebook;
- weight.quant_state.bitsandbytes__nf4 (or fp4) uint8: JSON of shape, dtype, block size and, with double quantization,
  the mean that was taken away (nested_offset);
- weight.nested_absmax [runs of 256 absmax] and weight.nested_quant_map [256] float32: double quantization.

Blocks know no rows: where B does not divide K they cross from one row into the next. We read that, and write only
blocks that divide K.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.formats.codec import Codec, Described, Held
from quantcli.scheme import Scheme
from quantcli.tensors.codebook import VALUES
from quantcli.tensors.quantized import NestedScale, QuantizedTensor, group_index

__all__ = ["BLOCK_SIZES", "CODEC", "PARTS", "State", "pack", "read_state", "to_quantized", "unpack"]

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATES = {name: f"weight.quant_state.bitsandbytes__{name}" for name in VALUES}
PARTS = (
    "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", *_STATES.values(),
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """What the tensors beside the codes say of one linear."""

    codebook: str
    """nf4 or fp4."""
    shape: tuple[int, int]
    """(N, K)."""
    block_size: int
    table: Tensor
    """[16] float32: the value of each code."""
    absmax: Tensor
    """[ceil(N K / B)] float32, expanded where it is stored as codes."""
    nested: NestedScale | None
    """How absmax is stored, where it is codes; they are [1, ceil(N K / B)]."""

    @property
    def crosses_rows(self) -> bool:
        """Whether some block holds weights of two rows."""
        return bool(self.shape[1] % self.block_size)

    @property
    def scheme(self) -> Scheme:
        """The grid, where blocks do not cross rows."""
        return Scheme(4, self.block_size, codebook=self.codebook, double_quant=self.nested is not None)


def pack(tensor: QuantizedTensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The stored tensors of one linear.

    Args:
        tensor: On a codebook, with blocks that divide K.
        dtype: What others dequantize it to, where they are not told otherwise.
    """
    name, (rows, columns) = tensor.scheme.codebook, tensor.shape
    if name is None or tensor.codebook is None:
        raise AssertionError("only nf4 and fp4 are stored so, which have no whole zero points nor others")
    codes = tensor.codes.reshape(-1)
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    parts = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.quant_map": tensor.codebook.clone()}
    nested = tensor.nested
    if nested is None:
        parts["weight.absmax"] = tensor.scale.reshape(-1).contiguous()
    else:
        parts["weight.absmax"] = nested.codes.reshape(-1).contiguous()
        parts["weight.nested_absmax"] = nested.absmax
        parts["weight.nested_quant_map"] = nested.code_map.clone()  # one object for all linears; files share nothing
    state = _state(tensor.scheme, rows, columns, dtype, None if nested is None else nested.offset)
    parts[_STATES[name]] = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    return parts


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """Reads one linear whose blocks do not cross rows.

    Raises:
        InputError: they do, or the tensors do not fit together.
    """
    state = read_state(tensors)
    columns = state.shape[1]
    if state.crosses_rows or scheme.columns_per_group(columns) != state.block_size:
        raise InputError(f"blocks of {state.block_size} are no groups of {scheme.group_size} in rows of {columns}")
    return to_quantized(tensors["weight"], state, scheme)


def to_quantized(weight: Tensor, state: State, scheme: Scheme) -> QuantizedTensor:
    """Codes and scales by row, of packed bytes whose blocks do not cross rows."""
    rows, columns = state.shape
    packed = weight.reshape(-1).view(torch.uint8)
    codes = torch.stack([packed >> 4, packed & 15], 1).view(-1)[: rows * columns]
    scale = state.absmax.view(rows, -1)
    nested = state.nested
    if nested is not None:
        nested = NestedScale(nested.codes.view(rows, -1), nested.absmax, nested.code_map, nested.offset, nested.size)
    return QuantizedTensor(
        codes=codes.view(rows, columns).contiguous(),
        scale=scale,
        zero=torch.zeros(scale.shape, dtype=torch.uint8, device=scale.device),
        scheme=scheme,
        group=group_index(columns, scheme, scale.device),
        codebook=state.table,
        nested=nested,
    )


def read_state(tensors: Mapping[str, Tensor]) -> State:
    """What the tensors of one linear say, once they are known to fit together: kernels do not check bounds.

    Raises:
        InputError: a tensor is missing or of another size, or the JSON holds what cannot be.
    """
    found = [name for name, part in _STATES.items() if part in tensors]
    for part in ("weight", "weight.absmax", "weight.quant_map"):
        if part not in tensors:
            raise InputError(f"{part} is missing")
    if len(found) != 1:
        raise InputError("weight.quant_state.bitsandbytes__nf4 or __fp4 is missing")
    (name,) = found
    values = _parse(tensors[_STATES[name]])
    shape, block_size = values.get("shape"), values.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)):
        raise InputError(f"weight.quant_state says shape {shape!r}, expected [outputs, inputs]")
    if block_size not in BLOCK_SIZES:
        raise InputError(
            f"weight.quant_state says blocksize {block_size!r}: {', '.join(map(str, BLOCK_SIZES))} are read"
        )
    assert isinstance(block_size, int)
    if values.get("quant_type", name) != name:
        raise InputError(f"weight.quant_state says quant_type {values['quant_type']!r}, its name says {name}")
    count, stored = shape[0] * shape[1], tensors["weight"].numel() * tensors["weight"].element_size()
    if stored != -(-count // 2):
        raise InputError(f"weight has {stored} bytes, expected {-(-count // 2)} for {shape}")
    blocks = -(-count // block_size)
    _check_size("weight.absmax", tensors["weight.absmax"], blocks)
    table = _finite("weight.quant_map", tensors["weight.quant_map"], 16)
    nested = None
    if "weight.nested_absmax" in tensors:
        nested = _read_nested(tensors, values, blocks)
        absmax = nested.expand().reshape(-1)
        if not bool(torch.isfinite(absmax).all()):
            raise InputError("weight.absmax expands to numbers that are not finite")
    else:
        absmax = _finite("weight.absmax", tensors["weight.absmax"], blocks)
    return State(name, (shape[0], shape[1]), block_size, table, absmax, nested)


def _state(scheme: Scheme, rows: int, columns: int, dtype: torch.dtype, offset: float | None) -> bytes:
    """The JSON of one linear, its keys in bitsandbytes' order."""
    values: dict[str, Any] = {
        "quant_type": scheme.codebook,
        "blocksize": scheme.columns_per_group(columns),
        "dtype": _dtype_name(dtype),
        "shape": [rows, columns],
    }
    if offset is not None:
        values |= {"nested_blocksize": NestedScale.size, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(values).encode()


def _read_nested(tensors: Mapping[str, Tensor], values: Mapping[str, Any], blocks: int) -> NestedScale:
    codes, size, offset = tensors["weight.absmax"], values.get("nested_blocksize"), values.get("nested_offset")
    if codes.dtype != torch.uint8 or "weight.nested_quant_map" not in tensors:
        raise InputError(f"weight.nested_absmax is there, but absmax is {codes.dtype} or nested_quant_map is missing")
    if type(size) is not int or size < 1:
        raise InputError(f"weight.quant_state says nested_blocksize {size!r}, expected a positive number")
    if not isinstance(offset, int | float) or not math.isfinite(offset):
        raise InputError(f"weight.quant_state says nested_offset {offset!r}, expected a number")
    if values.get("nested_dtype", "float32") != "float32":
        raise InputError(f"weight.quant_state says nested_dtype {values['nested_dtype']!r}: float32 is read")
    runs = _finite("weight.nested_absmax", tensors["weight.nested_absmax"], -(-blocks // size))
    code_map = _finite("weight.nested_quant_map", tensors["weight.nested_quant_map"], 256)
    return NestedScale(codes.reshape(1, -1), runs, code_map, float(offset), size)


def _parse(state: Tensor) -> dict[str, Any]:
    try:
        values = json.loads(bytes(state.reshape(-1).to(torch.uint8).tolist()).decode())
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"weight.quant_state is not JSON ({type(error).__name__})") from error
    if not isinstance(values, dict):
        raise InputError(f"weight.quant_state holds a {type(values).__name__}, expected an object")
    return values


def _finite(part: str, tensor: Tensor, count: int) -> Tensor:
    """The tensor as [count] float32."""
    _check_size(part, tensor, count)
    if not (tensor.is_floating_point() and bool(torch.isfinite(tensor).all())):
        raise InputError(f"{part} ({tensor.dtype}) are not finite numbers")
    return tensor.reshape(-1).float()


def _check_size(part: str, tensor: Tensor, count: int) -> None:
    if tensor.numel() != count:
        raise InputError(f"{part} has {tensor.numel()} numbers, expected {count}")


def _refuse(held: Held) -> str | None:
    scheme = held.scheme
    if scheme.codebook not in VALUES:
        return "it holds nf4 and fp4, nothing else"
    if not held.ordered:
        return "it holds blocks of neighbouring weights only"
    if held.expert:
        return "its readers keep experts float; leave them out with --exclude"
    size = scheme.columns_per_group(held.columns)
    if size not in BLOCK_SIZES:
        return f"blocks of {size} are not a power of two from {BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
    if held.columns % size:
        fitting = [b for b in BLOCK_SIZES if held.columns % b == 0]
        what = f"--group-size {fitting[-1]} does" if fitting else "none does, leave it float with --exclude"
        return f"blocks of {size} do not divide {held.columns} inputs and would cross rows; {what}"
    return None


def _config(described: Described) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": described.default.codebook,
        "bnb_4bit_use_double_quant": described.default.double_quant,
        "bnb_4bit_compute_dtype": _dtype_name(described.dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(described.float_linears),
        "llm_int8_threshold": 6.0,
        "meta": {"quantizer": [described.producer]},
    }


def _dtype_name(dtype: torch.dtype) -> str:
    # bitsandbytes knows no wider float than float32
    return str(dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32).removeprefix("torch.")


def _packed_bytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Exact in float32 without double quantization; else the JSON may be a few bytes longer or shorter."""
    blocks = rows * scheme.group_count(columns)
    scales = 4 * blocks
    if scheme.double_quant:
        scales = blocks + 4 * -(-blocks // NestedScale.size) + 4 * 256
    state = _state(scheme, rows, columns, torch.float32, 0.01234567890123456 if scheme.double_quant else None)
    return -(-rows * columns // 2) + scales + 4 * 16 + len(state)


CODEC = Codec(
    name="bnb",
    lowest_zero=0,
    refuse=_refuse,
    pack=pack,
    unpack=unpack,
    config=_config,
    packed_bytes=_packed_bytes,
    takes_dtype=True,
    codebooks=True,
)
