"""torch.onnx with a KV cache, for architectures that the GenAI model builder does not know.

Quantized linears are exported as MatMulNBits with the checkpoint's codes (`export.packed_modules`), so a quantized
model is never dequantized here either.
"""

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quantcli.errors import InputError, first_line
from quantcli.export.genai_folder import write_genai_config
from quantcli.export.matrices import Matrices
from quantcli.export.packed_modules import find_placements, replace_quantized
from quantcli.export.plain_cache import PlainCache, read_cache
from quantcli.export.traceable import make_traceable
from quantcli.graphs.model.files import save_graph
from quantcli.graphs.weights.matmul_nbits import Placement

__all__ = ["OPSETS", "export", "trace"]

OPSETS = (18, 23)
_DEFAULT_OPSET = 20
_BATCH, _NEW, _PAST = 2, 4, 3  # of the example that is traced: unlike each other, none is 1


def export(folder: Path, target: Path, model: Any, matrices: Matrices, opset: int | None) -> list[Placement]:
    """Writes model.onnx, its data and genai_config.json.

    Args:
        folder: The checkpoint.
        target: An existing folder to write to.
        model: The loaded checkpoint; its quantized modules are replaced.
        matrices: Its matrices.
        opset: ONNX opset, or None for the default.

    Raises:
        InputError: torch cannot trace the architecture.
    """
    model.float().eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    model.config.use_cache = True
    cache = read_cache(model)
    blocks = replace_quantized(model, matrices)
    make_traceable(model)
    past = cache.names("past_key_values")
    dynamic = torch.export.Dim.DYNAMIC
    both, cached = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    takes_positions = "position_ids" in inspect.signature(type(model).forward).parameters
    tokens = {
        "input_ids": torch.zeros(_BATCH, _NEW, dtype=torch.long),
        "attention_mask": torch.ones(_BATCH, _PAST + _NEW, dtype=torch.long),
    }
    if takes_positions:
        tokens["position_ids"] = torch.arange(_PAST, _PAST + _NEW).expand(_BATCH, _NEW).contiguous()
    program = trace(
        _Flat(model, cache, list(tokens)),
        (*tokens.values(), *cache.zeros(_BATCH, _PAST)),
        inputs=[*tokens, *past],
        outputs=["logits", *cache.names("present")],
        dynamic_shapes=(*(both for _ in tokens), *(cached for _ in past)),
        opset=opset,
        what=f"{folder} (model type {model.config.model_type!r})",
    )
    placements = find_placements(program.graph, blocks)
    save_graph(program, target / "model.onnx")
    write_genai_config(folder, target, model, cache, list(tokens))
    return placements


class _Flat(nn.Module):
    """The model with its cache as plain tensors."""

    def __init__(self, model: Any, cache: PlainCache, names: Sequence[str]):
        super().__init__()
        self.model, self.cache, self.names = model, cache, tuple(names)

    def forward(self, *tensors: Tensor) -> Any:
        known, past = tensors[: len(self.names)], tensors[len(self.names) :]
        named = dict(zip(self.names, known, strict=True))
        out = self.model(**named, past_key_values=self.cache.fill(past), use_cache=True)
        kept = out.past_key_values
        return out.logits, *self.cache.flatten(getattr(kept, "self_attention_cache", kept))


def trace(
    module: nn.Module,
    example: tuple[Tensor, ...],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: Any,
    opset: int | None,
    what: str,
) -> Any:
    """The onnx_ir model of a module.

    Args:
        module: Takes and gives tensors only.
        example: What it is traced with; a size of 1 or 0 would be taken for a constant.
        inputs: Names of its inputs.
        outputs: Names of its outputs.
        dynamic_shapes: Which axes of each tensor of the example are free.
        opset: ONNX opset, or None for the default.
        what: Named in the message.

    Raises:
        InputError: torch cannot trace it.
    """
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings(), torch.no_grad(), _only_errors():
            warnings.simplefilter("ignore")
            # bounds that model code sets to lengths (a table of positions) are left to the runtime
            traced = torch.export.export(
                module,
                example,
                dynamic_shapes=(dynamic_shapes,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
            program = torch.onnx.export(
                traced,
                dynamo=True,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=opset or _DEFAULT_OPSET,
            )
    except Exception as error:  # tracing runs model code, which raises whatever it likes
        raise InputError(f"torch.onnx cannot export {what}: {_cause(error)}") from error
    assert program is not None
    return program.model


def _cause(error: BaseException) -> str:
    """The first line of what went wrong at the bottom: torch wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextmanager
def _only_errors() -> Iterator[None]:
    """Its log goes past redirected streams, and warns of every operator of packages that are not there."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
