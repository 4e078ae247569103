"""torch.onnx with a KV cache, for architectures that the GenAI model builder does not know.

Quantized linears are exported as MatMulNBits with the checkpoint's codes: a module that holds the packed blocks and
says `com.microsoft::MatMulNBits` while it is traced. So a quantized model is never dequantized here either.
"""

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quantcli.errors import InputError, first_line
from quantcli.export.matrices import Matrices
from quantcli.graphs.model.files import save_graph
from quantcli.graphs.weights.blocks import BlockLayout, plan_blocks
from quantcli.graphs.weights.matmul_nbits import Placement
from quantcli.graphs.weights.rows import RowRange
from quantcli.json_files import read_json
from quantcli.models.linear import PackedEmbedding
from quantcli.tensors.quantized import QuantizedTensor

__all__ = ["OPSETS", "export"]

OPSETS = (18, 23)
_DEFAULT_OPSET = 20
_OWNER = "quantcli.module"  # marks the nodes that stand for a module


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
    config = model.config.get_text_config()
    if any(getattr(config, n, None) for n in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise InputError(
            f"model type {config.model_type!r} is a mixture of experts, whose routing --exporter torch cannot trace"
        )
    model.float().eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    model.config.use_cache = True
    blocks = _replace_quantized(model, matrices)
    shape = _cache_shape(model)
    program = _trace(folder, model, shape, opset or _DEFAULT_OPSET)
    save_graph(program.model, target / "model.onnx")
    (target / "genai_config.json").write_text(json.dumps(_genai_config(folder, model, shape), indent=4) + "\n")
    found = {n.metadata_props[_OWNER]: n for n in program.model.graph if _OWNER in n.metadata_props}
    missing = sorted(set(blocks) - set(found))
    if missing:
        raise AssertionError(f"torch.onnx lost {missing[0]}")
    return [module.placement(found[name]) for name, module in blocks.items()]


class _Blocks(nn.Module):
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


class _Linear(_Blocks):
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


class _Embedding(_Blocks):
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


class _Flat(nn.Module):
    """The model with its cache as plain tensors."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
        cache = DynamicCache()  # without the config: every layer keeps its whole past, the masks do the windows
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits, *[t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]


def _replace_quantized(model: Any, matrices: Matrices) -> dict[str, _Blocks]:
    """Puts packed blocks where the matrices are codes; the new modules by their path."""
    placed: dict[str, _Blocks] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        owner = matrices.owner_of(module, name, module is model.get_output_embeddings())
        if owner is None:
            continue
        matrix = matrices(owner)
        if not isinstance(matrix, QuantizedTensor):
            continue
        if isinstance(module, nn.Embedding | PackedEmbedding):
            new: _Blocks = _Embedding(name, owner, matrix, getattr(module, "embed_scale", None))
        else:
            new = _Linear(name, owner, matrix, getattr(module, "bias", None))
        placed[name] = new
        model.set_submodule(name, new)
    return placed


def _cache_shape(model: Any) -> tuple[int, int, int]:
    """Layers, key-value heads and head size, as the model's own cache has them.

    Raises:
        InputError: the model keeps something else than keys and values of one shape.
    """
    cache = DynamicCache()
    try:
        with torch.no_grad():
            model_inputs = torch.zeros(1, 2, dtype=torch.long)
            _shape_probe(model, model_inputs, cache)
        shapes = {tuple(t.shape) for layer in cache.layers for t in (layer.keys, layer.values)}
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        raise InputError(
            f"model type {model.config.model_type!r} keeps no plain key-value cache: --exporter torch cannot take it"
        ) from error
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise InputError(
            f"model type {model.config.model_type!r} has layers whose caches differ in shape: --exporter torch cannot "
            "take it"
        )
    _, heads, _, size = shapes.pop()
    return len(cache.layers), heads, size


def _shape_probe(model: Any, ids: Tensor, cache: DynamicCache) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        model(input_ids=ids, past_key_values=cache, use_cache=True)


def _trace(folder: Path, model: Any, shape: tuple[int, int, int], opset: int) -> Any:
    layers, heads, size = shape
    names = [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    past = tuple(torch.zeros(2, heads, 3, size) for _ in names)
    ids = torch.zeros(2, 4, dtype=torch.long)
    positions = torch.arange(3, 7).expand(2, 4).contiguous()
    dynamic = torch.export.Dim.DYNAMIC
    both, cached = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings(), torch.no_grad(), _only_errors():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                _Flat(model),
                (ids, torch.ones(2, 7, dtype=torch.long), positions, *past),
                dynamo=True,
                input_names=["input_ids", "attention_mask", "position_ids", *names],
                output_names=["logits", *(n.replace("past_key_values", "present") for n in names)],
                dynamic_shapes=(both, both, both, tuple(cached for _ in names)),
                opset_version=opset,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"torch.onnx cannot export {folder} (model type {model.config.model_type!r}): {first_line(error)}"
        ) from error


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


def _genai_config(folder: Path, model: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    config = model.config.get_text_config()
    layers, heads, size = shape
    path = folder / "generation_config.json"
    generation = read_json(path, dict[str, Any], "a generation configuration") if path.is_file() else {}

    def token(name: str, default: int | None = None) -> Any:
        found = generation.get(name)
        return found if found is not None else getattr(config, name, None) if hasattr(config, name) else default

    end = token("eos_token_id")
    pad = token("pad_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    context = int(getattr(config, "max_position_embeddings", None) or 2048)
    return {
        "model": {
            "bos_token_id": token("bos_token_id") if token("bos_token_id") is not None else first_end or 0,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": size,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": layers,
                "num_key_value_heads": heads,
            },
            "eos_token_id": end if end is not None else 0,
            "pad_token_id": pad if pad is not None else first_end or 0,
            "type": "decoder",
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": generation.get("repetition_penalty", 1.0),
            "temperature": generation.get("temperature", 1.0),
            "top_k": generation.get("top_k", 50),
            "top_p": generation.get("top_p", 1.0),
        },
    }
