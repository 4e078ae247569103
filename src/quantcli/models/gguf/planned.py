"""What a GGUF file will hold, before a weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass

from quantcli.models.gguf.names import GgufTensor
from quantcli.models.gguf.vocabulary import Vocabulary

__all__ = ["GgufPlan"]


@dataclass(frozen=True)
class GgufPlan:
    """What a file will hold."""

    tensors: tuple[GgufTensor, ...]
    types: Mapping[str, str]
    """Block type by module path; modules without stay float."""
    vocabulary: Vocabulary
    notes: tuple[str, ...]
    """What llama.cpp does otherwise, and which tensors get other types than the mix says."""
