"""How much of a model a plan quantizes, and what it leaves float for which reason: nothing stays float in silence."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from quantcli.errors import InputError
from quantcli.models.layout import Layout, is_linear
from quantcli.options import QuantizeOptions
from quantcli.pipelines.planning.target import Target

__all__ = ["LeftFloat", "Share", "count_share", "require_share"]

_ENOUGH = 0.95
"""Of matrix parameters; what is below it was hardly meant."""
_SMALL = 32
"""Rows or columns of a parameter below which it is no matrix worth quantizing: kernels, state space parameters."""
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class LeftFloat:
    """Matrices of one kind that stay float."""

    kind: str
    """Last part of their names, or the class that has them."""
    reason: str
    count: int
    parameters: int
    counts: bool
    """Whether it is a matrix that one would expect to be quantized."""
    example: str
    """Path of the first."""


@dataclass(frozen=True)
class Share:
    """What is quantized of the matrices between embedding and head."""

    quantized: int
    matrices: int
    quantized_parameters: int
    parameters: int
    left: tuple[LeftFloat, ...]
    """What is not, by kind; the embedding, the head and what is too small to be a matrix too, which do not count."""

    @property
    def fraction(self) -> float:
        """Of matrix parameters."""
        return self.quantized_parameters / self.parameters if self.parameters else 1.0

    @property
    def words(self) -> str:
        """One line for people."""
        percent = f"{self.fraction:.1%}" if self.quantized == self.matrices or self.fraction < 0.999 else "99.9%"
        return f"{self.quantized} of {self.matrices} matrices, {percent} of matrix parameters quantized"

    def rows(self) -> list[tuple[str, str]]:
        """For people: the line, then what stays float."""
        left = [
            ("left float", f"{one.kind} ({one.count}, {one.parameters:,} parameters): {one.reason}")
            for one in self.left
        ]
        return [("share", self.words), *left]

    def to_dict(self) -> dict[str, Any]:
        """For manifests."""
        return asdict(self) | {"fraction": round(self.fraction, 4), "words": self.words}


def count_share(
    skeleton: Any, layout: Layout, targets: Mapping[str, Target], embedding: Target | None, options: QuantizeOptions
) -> Share:
    """Counts the matrices of a model, by what becomes of them.

    Args:
        skeleton: The model, its experts taken apart.
        layout: Its parts.
        targets: What is quantized, by module path.
        embedding: The embedding, where it is quantized.
        options: Tell what was left out on purpose.
    """
    counted: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    apart: dict[tuple[str, str], list[tuple[str, int]]] = defaultdict(list)
    quantized = quantized_parameters = 0
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    for path, module in skeleton.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if parameter.ndim < 2 or full in tied:
                continue
            if path in targets and name == "weight":
                if path != layout.head:
                    quantized, quantized_parameters = quantized + 1, quantized_parameters + parameter.numel()
                continue
            if embedding is not None and path == embedding.name:
                continue
            kind, reason, counts = _classify(path, name, module, layout, options)
            (counted if counts else apart)[kind, reason].append((full, parameter.numel()))
    left = [
        LeftFloat(kind, reason, len(found), sum(size for _, size in found), kinds is counted, found[0][0])
        for kinds in (counted, apart)
        for (kind, reason), found in kinds.items()
    ]
    missed = [size for found in counted.values() for _, size in found]
    return Share(
        quantized, quantized + len(missed), quantized_parameters, quantized_parameters + sum(missed), tuple(left)
    )


def _classify(
    path: str, name: str, module: nn.Module, layout: Layout, options: QuantizeOptions
) -> tuple[str, str, bool]:
    """Kind and reason of a parameter that stays float, and whether it counts as a matrix."""
    leaf, what = path.rpartition(".")[2], type(module).__name__
    inside = path.startswith(tuple(block + "." for block in layout.blocks))
    if path == layout.head:
        return "output head", "--quantize-lm-head quantizes it", False
    if isinstance(module, nn.Embedding) or path == layout.embedding:
        return "embeddings", "--quantize-embeddings quantizes the input's", False
    parameter = getattr(module, name)
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1:
        return "depth-wise convolutions", "a few weights per channel", False
    if any(re.search(pattern, path) for pattern in options.exclude):
        return leaf, "--exclude", True
    if (
        "router" in what.lower()
        or "gate" in what.lower()
        or (is_linear(module) and path not in layout.linears and inside)
    ):
        return f"routers ({leaf})", "which expert is chosen hangs on little differences", True
    if path in layout.linears:
        return leaf, f"rows of {parameter.shape[-1]} fit no block of the format", True
    if not is_linear(module) and min(parameter.shape[-2:]) < _SMALL:
        return f"{what}.{name}", "no matrix: small, and used in a way of its own", False
    if not path.startswith(_text_root(layout)):
        return "what is not the language model's", "towers for images and sound, projections, heads", False
    if not inside:
        return f"{what} outside the blocks", "the text's own blocks are quantized", True
    if isinstance(module, _CONVOLUTIONS):
        return "convolutions", "no format of checkpoints holds them", True
    return f"{what}.{name}", "no linear: the class uses it in a way of its own", True


def _text_root(layout: Layout) -> str:
    """Path of the module that holds both embedding and blocks, with its dot."""
    pairs = zip(layout.embedding.split("."), layout.blocks[0].split("."), strict=False)
    return "".join(f"{a}." for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def require_share(share: Share, options: QuantizeOptions, model: str) -> None:
    """Refuses a plan that leaves more float than anyone means to.

    Raises:
        InputError: it quantizes too little of the matrices, and neither --exclude nor --allow-partial says so.
    """
    if options.allow_partial or options.exclude or share.fraction >= _ENOUGH:
        return
    most = max((one for one in share.left if one.counts), key=lambda one: one.parameters)
    raise InputError(
        f"only {share.words} of {model}: {most.kind} stay float ({most.reason})",
        hint="add --allow-partial to quantize this much, or name what stays float with --exclude",
    )
