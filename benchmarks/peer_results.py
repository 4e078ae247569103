"""Reads what peers write: a GPTQ checkpoint as it is, others as a float checkpoint of the same values."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantcli.formats.bitpack import unpack_rows
from quantcli.models.load import load

__all__ = ["read_result", "readable_folder"]


def readable_folder(result: Path, source: Path, target: Path) -> Path:
    """A folder that `quantcli evaluate` reads.

    Args:
        result: What a worker wrote; the checkpoint is in result/model.
        source: The float model that it was made from: its config.json and tokenizer are used.
        target: Folder for dequantized weights, where they are needed.

    Returns:
        result/model where it is a GPTQ checkpoint, else target.
    """
    folder = result / "model"
    config = json.loads((folder / "config.json").read_text())
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    if method == "gptq":
        return folder
    readers = {"olive": _olive, "compressed-tensors": _compressed_tensors}
    if method not in readers:
        raise SystemExit(f"{folder}: quant_method {method!r} is not one of gptq, {', '.join(readers)}")
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    weights = readers[method](stored, quantization)
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja", ".model", ".txt") and "safetensors" not in file.name:
            shutil.copy(file, target)
    _check_names(weights, source)
    save_file({n: w.float().contiguous() for n, w in weights.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def read_result(result: Path, source: Path, target: Path) -> Any:
    """The same as a transformers model."""
    return load(readable_folder(result, source, target), device="cpu")


def _olive(stored: dict[str, Tensor], quantization: dict[str, Any]) -> dict[str, Tensor]:
    """Qweight [N, K*b/8] uint8 along K, lowest bits first; scales [N, G]; qzeros the same way, absent if symmetric."""
    bits = int(quantization["bits"])

    def codes(packed: Tensor) -> Tensor:
        parts = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(1)

    weights = {n: t for n, t in stored.items() if not n.endswith((".qweight", ".scales", ".qzeros"))}
    for name in (n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")):
        scales = stored[f"{name}.scales"].float()
        packed_zeros = stored.get(f"{name}.qzeros")
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if packed_zeros is not None:
            zeros = codes(packed_zeros)[:, : scales.shape[1]].float()
        weights[f"{name}.weight"] = _dequantized(codes(stored[f"{name}.qweight"]), scales, zeros)
    return weights


def _compressed_tensors(stored: dict[str, Tensor], quantization: dict[str, Any]) -> dict[str, Tensor]:
    """weight_packed [N, K*b/32] int32 along K; weight_scale [N, G]; weight_zero_point packed along N, absent if sym."""
    (group,) = quantization["config_groups"].values()
    bits = int(group["weights"]["num_bits"])
    parts = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
    weights = {n: t for n, t in stored.items() if not n.endswith(parts)}
    for name in (n.removesuffix(".weight_packed") for n in stored if n.endswith(".weight_packed")):
        if f"{name}.weight_g_idx" in stored:
            raise SystemExit(f"{name}: groups in another order than the columns are not read")
        rows, columns = stored[f"{name}.weight_shape"].tolist()
        codes = unpack_rows(stored[f"{name}.weight_packed"].T.contiguous(), bits, columns).T
        scales = stored[f"{name}.weight_scale"].float()
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if f"{name}.weight_zero_point" in stored:
            zeros = unpack_rows(stored[f"{name}.weight_zero_point"], bits, rows).float()
        weights[f"{name}.weight"] = _dequantized(codes, scales, zeros)
    return weights


def _dequantized(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Codes [N, K], scales and zeros [N, G] to [N, K] float32."""
    width = codes.shape[1] // scales.shape[1]
    if width * scales.shape[1] != codes.shape[1]:
        raise SystemExit(f"{scales.shape[1]} groups do not divide {codes.shape[1]} columns")
    return (codes.float() - zeros.repeat_interleave(width, 1)) * scales.repeat_interleave(width, 1)


def _check_names(weights: dict[str, Tensor], source: Path) -> None:
    """Every tensor of the float model must have come back in its shape, and no other."""
    shapes: dict[str, list[int]] = {}
    for file in source.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            shapes |= {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
    if weights.keys() - shapes.keys() == {"lm_head.weight"}:  # written twice where it is the embedding
        del weights["lm_head.weight"]
    wrong = [n for n in weights.keys() | shapes.keys() if n not in weights or list(weights[n].shape) != shapes.get(n)]
    if wrong:
        raise SystemExit(f"{len(wrong)} tensors differ from the float model's: {sorted(wrong)[:4]}")
