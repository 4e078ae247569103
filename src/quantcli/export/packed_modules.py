"""Modules that hold a quantized matrix as the runtime's operators want it, and name the operator while they are traced.

So torch.onnx writes a quantized model without ever dequantizing it: `com.microsoft::MatMulNBits` for a linear,
`com.microsoft::GatherBlockQuantized` for an embedding.
"""

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from quantcli.export.matrices import Matrices
from quantcli.graphs.weights.blocks import BlockLayout, plan_blocks
from quantcli.graphs.weights.matmul_nbits import Placement
from quantcli.graphs.weights.rows import RowRange
from quantcli.models.linear import PackedEmbedding
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["PackedBlocks", "find_placements", "replace_quantized"]

_OWNER = "quantcli.module"  # marks the nodes that stand for a module


class PackedBlocks(nn.Module):
    """A quantized matrix as the operators want it."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    index: Tensor | None

    def __init__(self, path: str, name: str, tensor: QuantizedTensor, bias: Tensor | None = None):
        super().__init__()
        self.path = path
        self.name, (self.rows, self.columns) = name, tensor.shape
        self.layout: BlockLayout = plan_blocks(tensor.group, tensor.scheme.bits)
        self.register_buffer("codes", torch.from_numpy(self.layout.codes(tensor)))
        self.register_buffer("scales", torch.from_numpy(self.layout.scales(tensor)))
        self.register_buffer("zeros", torch.from_numpy(self.layout.zeros(tensor)))
        self.register_buffer("index", None)
        self.bias = nn.Parameter(bias.float(), requires_grad=False) if bias is not None else None

    def placement(self, node: ir.Node) -> Placement:
        """Where the exporter put it; initializers of equal values may have become one."""
        at = (1, 2, 3) if node.op_type == "MatMulNBits" else (0, 2, 3)
        codes, scales, zeros = (node.inputs[i] for i in at)
        if codes is None or scales is None or zeros is None:
            raise AssertionError(f"torch.onnx lost an input of {node.name}")
        whole = (RowRange(self.name, 0, self.rows),)
        return Placement(str(codes.name), whole, self.columns, self.layout, str(scales.name), str(zeros.name))


class _Linear(PackedBlocks):
    """`x @ W.T + bias` as MatMulNBits."""

    def __init__(self, path: str, name: str, tensor: QuantizedTensor, bias: Tensor | None = None):
        super().__init__(path, name, tensor, bias)
        if self.layout.columns is not None:
            self.index = torch.from_numpy(self.layout.columns.clip(min=0))

    def forward(self, x: Tensor) -> Tensor:
        inputs = x if self.index is None else x.index_select(-1, self.index)
        attributes: dict[str, Any] = {
            "K": self.layout.width,
            "N": self.rows,
            "bits": self.layout.bits,
            "block_size": self.layout.block_size,
            "accuracy_level": 0,
        }
        out = torch.onnx.ops.symbolic(
            "com.microsoft::MatMulNBits",
            (inputs, self.codes, self.scales, self.zeros),
            attributes,
            dtype=torch.float32,
            shape=(*x.shape[:-1], self.rows),
            version=1,
            metadata_props={_OWNER: self.path},
        )
        return out if self.bias is None else out + self.bias


class _Embedding(PackedBlocks):
    """A table lookup as GatherBlockQuantized."""

    def __init__(self, path: str, name: str, tensor: QuantizedTensor, scale: float | Tensor | None):
        super().__init__(path, name, tensor)
        self.codes = self.codes.reshape(self.rows, -1)
        self.scale = None if scale is None else float(scale)
        length = self.layout.blocks * self.layout.block_size
        if length != self.columns or self.layout.columns is not None:
            self.index = torch.from_numpy(self.layout.inverse(self.columns))

    def forward(self, ids: Tensor) -> Tensor:
        length = self.layout.blocks * self.layout.block_size
        attributes: dict[str, Any] = {
            "bits": self.layout.bits,
            "block_size": self.layout.block_size,
            "gather_axis": 0,
            "quantize_axis": 1,
        }
        out = torch.onnx.ops.symbolic(
            "com.microsoft::GatherBlockQuantized",
            (self.codes, ids, self.scales, self.zeros),
            attributes,
            dtype=torch.float32,
            shape=(*ids.shape, length),
            version=1,
            metadata_props={_OWNER: self.path},
        )
        out = out if self.index is None else out.index_select(-1, self.index)
        return out if self.scale is None else out * self.scale


def replace_quantized(model: Any, matrices: Matrices) -> dict[str, PackedBlocks]:
    """Puts packed blocks where the matrices are codes; the new modules by their path."""
    placed: dict[str, PackedBlocks] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        owner = matrices.owner_of(module, name, module is model.get_output_embeddings())
        if owner is None:
            continue
        matrix = matrices(owner)
        if not isinstance(matrix, QuantizedTensor):
            continue
        if isinstance(module, nn.Embedding | PackedEmbedding):
            new: PackedBlocks = _Embedding(name, owner, matrix, getattr(module, "embed_scale", None))
        else:
            new = _Linear(name, owner, matrix, getattr(module, "bias", None))
        placed[name] = new
        model.set_submodule(name, new)
    return placed


def find_placements(graph: ir.Graph, blocks: dict[str, PackedBlocks]) -> list[Placement]:
    """Where a traced graph has what `replace_quantized` put into the model."""
    nodes = {n.metadata_props[_OWNER]: n for n in graph.all_nodes() if _OWNER in n.metadata_props}
    missing = sorted(set(blocks) - set(nodes))
    if missing:
        raise AssertionError(f"torch.onnx lost {missing[0]}")
    return [module.placement(nodes[name]) for name, module in blocks.items()]
