"""Adapters that begin with what rounding took away (LoftQ, Li et al., https://arxiv.org/abs/2310.08659).

Plain LoRA begins as the quantized model. Here A and B begin as the best approximation of rank r to the residual
W - Q of each linear, by its singular value decomposition, so that training begins nearer to the float model.

Left out: LoftQ's alternation, which rounds W - B A anew. The base stays the one that was given.

Symbols: K inputs, N outputs, r rank, W the float weight [N, K], Q the quantized one [N, K].
"""

from typing import Any

import torch
from torch import Tensor

from quantcli.errors import InputError
from quantcli.finetune.lora import PackedLoraLinear
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.conversion import as_in_model
from quantcli.models.layout import is_transposed
from quantcli.models.skeleton import build_skeleton, disk_name
from quantcli.progress import Progress

__all__ = ["begin_with_residuals", "require_same_model"]

_SAME = 2e-2  # a norm or bias may have been cast to another half precision
_EXTRA, _ITERATIONS = 16, 4


def require_same_model(base: Checkpoint, source: Checkpoint) -> None:
    """Refuses a float model that the base was not rounded from: norms and biases tell, which rounding leaves alone.

    Raises:
        InputError: it is quantized itself, another model, or its weights were scaled or rotated before rounding.
    """
    if source.config.get("quantization_config") is not None:
        raise InputError(f"--float-model {source.folder} is quantized itself", hint="give the model it was made from")
    hint = "give the very model that the base was rounded from; awq, smoothquant and quarot change it before"
    if base.config.get("model_type") != source.config.get("model_type"):
        raise InputError(
            f"--float-model {source.folder} is a {source.config.get('model_type')}, the base a "
            f"{base.config.get('model_type')}",
            hint=hint,
        )
    vectors = [
        n for n, e in source.entries.items() if len(e.shape) == 1 and n in base.entries and e.dtype.is_floating_point
    ]
    if not vectors:
        raise InputError(f"{source.folder} and the base share no norm by which to tell whether they belong together")
    for name in vectors:
        mine, theirs = base.read(name).float(), source.read(name).float()
        if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=_SAME, atol=_SAME * 1e-2):
            raise InputError(f"--float-model {source.folder} is not what the base holds: {name} differs", hint=hint)


def begin_with_residuals(
    adapted: Any, source: Checkpoint, seed: int, progress: Progress, trust_remote_code: bool = False
) -> float:
    """Sets A [r, K] and B [N, r] of every adapter beside a packed linear so that scaling B A is nearest to W - Q.

    Args:
        adapted: A model with adapters, as `finetune.lora.add_lora` makes it; changed in place.
        source: The float model that its base was rounded from.
        seed: Of the randomized decomposition.
        progress: Told of each linear.
        trust_remote_code: As in `models.load`.

    Returns:
        The share of the residuals' squared norm, over all linears, that the adapters took up.

    Raises:
        InputError: a weight is missing, has another shape, or is nowhere near the base's.
    """
    skeleton = build_skeleton(source.folder, trust_remote_code=trust_remote_code)
    source = as_in_model(source, skeleton)
    inner = adapted.get_base_model()
    layers = {n: m for n, m in inner.named_modules() if isinstance(m, PackedLoraLinear)}
    before = after = 0.0
    with progress.track("residuals", len(layers)) as task, torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name, layer in layers.items():
            weight = _float_weight(skeleton, source, name)
            quantized = layer.get_base_layer().dequantize()
            weight = weight.to(quantized.device)
            if weight.shape != quantized.shape:
                raise InputError(
                    f"{source.folder}: {name} is {list(weight.shape)}, in the base {list(quantized.shape)}"
                )
            residual = weight - quantized
            if residual.norm() >= weight.norm():
                raise InputError(
                    f"{source.folder}: {name} is nowhere near what the base holds",
                    hint="give the very model that the base was rounded from",
                )
            a, b = _factors(residual, layer.r["default"])
            scaling = layer.scaling["default"]
            for target, value in ((layer.lora_A, a), (layer.lora_B, b)):
                parameter = target["default"].weight
                parameter.copy_((value / scaling**0.5).to(parameter.dtype))
            before += float(residual.square().sum())
            after += float((residual - b @ a).square().sum())
            task.advance(1)
    return 1 - after / before if before else 0.0


def _factors(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r] whose product is nearest to the residual [N, K]; rows of zeros past its own rank."""
    wanted = min(rank, *residual.shape)
    # a few more directions and power iterations make the leading ones as good as exact, at a small part of the cost
    u, s, v = torch.svd_lowrank(residual, q=min(wanted + _EXTRA, *residual.shape), niter=_ITERATIONS)
    root = s[:wanted].sqrt()
    a = residual.new_zeros(rank, residual.shape[1])
    b = residual.new_zeros(residual.shape[0], rank)
    a[:wanted], b[:, :wanted] = root[:, None] * v[:, :wanted].T, u[:, :wanted] * root
    return a, b


def _float_weight(skeleton: Any, source: Checkpoint, name: str) -> Tensor:
    """W [N, K] float32 of a linear, whichever way round it is stored."""
    stored = disk_name(f"{name}.weight", skeleton, source.entries)
    if stored is None:
        raise InputError(f"{source.folder} has no weight for {name}")
    weight = source.read(stored).float()
    return weight.T.contiguous() if is_transposed(skeleton.get_submodule(name)) else weight
