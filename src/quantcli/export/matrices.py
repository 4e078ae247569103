"""The matrices of a loaded model by name, and a model whose matrices are only named."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.errors import InputError
from quantcli.graphs.weights.checkpoint_rows import Rows
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.layout import is_transposed
from quantcli.models.linear import PackedEmbedding, PackedLinear
from quantcli.models.load import load
from quantcli.models.opened import open_checkpoint
from quantcli.models.readers import packed_names, reader_of
from quantcli.scheme import Scheme
from quantcli.tensors.affine import minmax_grid, round_to_grid
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["Matrices", "find_matrices", "load_matrices", "replace_by_names"]

_KEPT = 3  # q, k and v are read for planning and again for packing
_FLOATS = (torch.float16, torch.bfloat16)


@dataclass
class Matrices:
    """Reads matrices by module name: codes as the checkpoint has them, or rounded on demand, or values."""

    stored: dict[str, PackedLinear | Tensor] = field(default_factory=dict)
    """Packed or float [N, K], by module name."""
    embedding: str = ""
    """Module name of the input embedding."""
    head: str = ""
    """Module name of the output head; the embedding's where both are one matrix."""
    _latest: dict[str, QuantizedTensor | Tensor] = field(default_factory=dict)

    def __call__(self, name: str) -> QuantizedTensor | Tensor:
        """One matrix, unpacked; no more than the latest few are kept."""
        if name not in self._latest:
            while len(self._latest) >= _KEPT:
                del self._latest[next(iter(self._latest))]
            self._latest[name] = self._read(name)
        return self._latest[name]

    def _read(self, name: str) -> QuantizedTensor | Tensor:
        matrix = self.stored[name]
        return matrix.quantized() if isinstance(matrix, PackedLinear) else matrix

    @property
    def quantized(self) -> dict[str, int]:
        """Rows of each matrix that the graph holds as codes."""
        return {n: self.shape(n)[0] for n, m in self.stored.items() if isinstance(m, PackedLinear)}

    def owner_of(self, module: nn.Module, name: str, is_head: bool) -> str | None:
        """The name under which a module's matrix is stored; None for modules without one."""
        matrix = _matrix_of(module)
        if matrix is None or name.endswith(".packed"):
            return None
        if is_head:
            return self.head
        if name in self.stored:
            return name
        return next((n for n, other in self.stored.items() if other is matrix), self.embedding)

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a matrix."""
        matrix = self.stored[name]
        if isinstance(matrix, PackedLinear):
            return matrix.out_features, matrix.in_features
        return matrix.shape[0], matrix.shape[1]

    def stored_bits(self, name: str) -> int | None:
        """Bits of a matrix that the checkpoint has as codes; None for float."""
        matrix = self.stored[name]
        return matrix.bits if isinstance(matrix, PackedLinear) else None

    def round_linears(self, model: Any, scheme: Scheme) -> None:
        """Rounds every float linear of a model's blocks to the nearest code; embedding and head stay as they are."""
        for name, module in list(model.named_modules()):
            matrix = self.stored.get(name)
            if name not in (self.embedding, self.head) and matrix is not None and not isinstance(matrix, PackedLinear):
                model.set_submodule(name, self._rounded(name, matrix, scheme, module))

    def round_head(self, model: Any, scheme: Scheme) -> None:
        """Rounds a model's float head; one that is tied to the embedding gets codes of its own."""
        matrix, head = self.stored[self.head], model.get_output_embeddings()
        assert not isinstance(matrix, PackedLinear)
        name = next(n for n, m in model.named_modules(remove_duplicate=False) if m is head)
        self.head = name
        model.set_submodule(name, self._rounded(name, matrix, scheme, head))

    def _rounded(self, name: str, matrix: Tensor, scheme: Scheme, module: nn.Module) -> PackedLinear:
        weight = matrix.float()
        codes = round_to_grid(weight, *minmax_grid(weight, scheme), scheme)
        packed = PackedLinear.from_quantized(codes, bias=getattr(module, "bias", None))
        self.stored[name] = packed
        self._latest.pop(name, None)
        return packed


def load_matrices(folder: Path, trust_remote_code: bool) -> tuple[Any, Matrices]:
    """Loads a checkpoint, float or quantized, with its float tensors in their stored dtype.

    Returns:
        The transformers model and its matrices.

    Raises:
        InputError: the folder is no model that we can read, or damaged.
    """
    dtype = _stored_dtype(open_checkpoint(folder))
    model = load(folder, device="cpu", dtype=dtype, trust_remote_code=trust_remote_code)
    return model, find_matrices(model, folder)


def find_matrices(model: Any, folder: Path) -> Matrices:
    """The matrices of a model, with or without weights.

    Args:
        model: A transformers model.
        folder: Named in messages.

    Raises:
        InputError: it has no input embedding or no output head.
    """
    matrices = Matrices()
    owners: dict[object, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        matrix = _matrix_of(module)
        if matrix is None or name.endswith(".packed"):
            continue
        key = id(matrix) if isinstance(matrix, PackedLinear) else (matrix.data_ptr() or id(module.weight), matrix.shape)
        matrices.stored.setdefault(owners.setdefault(key, name), matrix)
        if module is model.get_input_embeddings():
            matrices.embedding = name
        if module is model.get_output_embeddings():
            matrices.head = owners[key]
    if not matrices.embedding or not matrices.head:
        raise InputError(f"{folder} has no {'output head' if matrices.embedding else 'input embedding'}")
    return matrices


def replace_by_names(model: Any, matrices: Matrices) -> None:
    """Takes the numbers out of every linear and embedding of a model and leaves `Rows` that name them."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        owner = matrices.owner_of(module, name, module is model.get_output_embeddings())
        if owner is None:
            continue
        shape = matrices.shape(owner)
        shell: nn.Module
        if isinstance(module, nn.Embedding | PackedEmbedding):
            shell = nn.Embedding(*shape, device="meta")
        else:
            shell = nn.Linear(shape[1], shape[0], bias=False, device="meta")
            shell.bias = getattr(module, "bias", None)  # type: ignore[assignment]
        del shell.weight
        shell.weight = Rows.whole(owner, *shape)
        model.set_submodule(name, shell)


def _matrix_of(module: nn.Module) -> PackedLinear | Tensor | None:
    if isinstance(module, PackedEmbedding):
        module = module.packed
    if isinstance(module, PackedLinear):
        return module
    if isinstance(module, nn.Linear | nn.Embedding):
        return module.weight.data
    if is_transposed(module):  # GPT-2's linears, stored [K, N]
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.data.T
    return None


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The one dtype of all float tensors that are no part of a packed matrix, or float32 where there are several."""
    parts: set[str] = set()
    if checkpoint.config.get("quantization_config") is not None:
        reader = reader_of(checkpoint)
        parts = {f"{name}.{part}" for name in packed_names(checkpoint, reader) for part in reader.parts}
    found = {e.dtype for n, e in checkpoint.entries.items() if e.dtype.is_floating_point and n not in parts}
    return found.pop() if len(found) == 1 and next(iter(found)) in _FLOATS else torch.float32
