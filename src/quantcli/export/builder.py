"""The ONNX Runtime GenAI model builder used as a library: it knows the architectures, we bring the weights.

The builder reads a model whose matrices are only named (`graphs.weights.checkpoint_rows`) and builds its float graph
from it; the rewrite (`graphs.weights.matmul_nbits`) then puts in what the checkpoint holds. So a checkpoint of any
bits, groups or order of columns goes the same way, nothing is dequantized, and no more than a few matrices at a time
are unpacked.
"""

import io
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantcli.errors import InputError, first_line
from quantcli.export.matrices import Matrices, find_matrices, replace_by_names
from quantcli.folder import write_json
from quantcli.graphs.model.files import save_graph
from quantcli.graphs.walk.products import record_products
from quantcli.graphs.weights.checkpoint_rows import Rows
from quantcli.graphs.weights.matmul_nbits import Placement, Rewriter
from quantcli.models.checkpoint import copy_companions, read_config
from quantcli.models.marks import is_marked
from quantcli.models.skeleton import build_skeleton, load_config

__all__ = ["GRAPH", "build", "build_half_precision", "try_architecture"]

GRAPH = "model.onnx"
_LARGE = 1 << 24  # numbers that are no matter of norms and biases
_SETTINGS = (
    "hf_token=false",
    "shared_embeddings=false",  # the rewrite shares the table, without the builder's Transpose of it
    "windowed_kv_cache=false",  # genai 0.18 fails on prompts longer than a window whose cache is cut
)


@dataclass
class _Intercepted:
    """What the builder made."""

    ledger: dict[str, Rows] = field(default_factory=dict)
    """Initializers that are only named."""
    graph: Any = None
    """The onnx_ir model before it is written."""
    loaded: bool = False
    """Whether it took our model rather than opening the folder itself."""


def build(
    folder: Path, target: Path, model: Any, matrices: Matrices, accuracy_level: int, trust_remote_code: bool
) -> list[Placement]:
    """Writes model.onnx, its data, genai_config.json and the tokenizer.

    Args:
        folder: The checkpoint.
        target: An existing folder to write to.
        model: The loaded checkpoint; its matrices are replaced by names.
        matrices: Its matrices.
        accuracy_level: Attribute of every MatMulNBits.
        trust_remote_code: Run model code that the folder brings along.

    Returns:
        Where every matrix is.

    Raises:
        InputError: the builder does not know the architecture or does something to a weight that we cannot follow.
    """
    _refuse_false_heads(model)
    scale = getattr(model.get_input_embeddings(), "embed_scale", None)
    replace_by_names(model, matrices)
    with _intercept(model) as made, _unmarked(folder) as readable:
        _run_builder(readable, target, "fp32", "cpu", trust_remote_code)
    if matrices.quantized and not made.loaded:
        raise _unsupported(model.config, "reads its weights by itself")
    if scale is not None:
        _restore_embedding_scale(made.graph.graph, float(scale))
    placements = Rewriter(made.graph.graph, made.ledger, matrices, accuracy_level).run()
    record_products(made.graph, placements, outside=(matrices.embedding, matrices.head))
    made.graph.graph.sort()
    save_graph(made.graph, target / GRAPH)
    return placements


def try_architecture(folder: Path, trust_remote_code: bool) -> None:
    """Builds the graph of a model like the checkpoint's, with few layers and without weights: seconds at any size.

    Raises:
        InputError: the builder does not know the architecture, or fails on its settings.
    """
    config = load_config(folder, trust_remote_code)
    _keep_few_layers(config.get_text_config(decoder=True))
    with TemporaryDirectory() as scratch:
        small, target = Path(scratch) / "model", Path(scratch) / "graph"
        small.mkdir()
        target.mkdir()
        copy_companions(folder, small)
        config.save_pretrained(small)
        model = build_skeleton(small, config, trust_remote_code)
        matrices = find_matrices(model, folder)
        _refuse_false_heads(model)
        replace_by_names(model, matrices)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta and parameter.numel() < _LARGE:  # else fused experts: the builder finds no numbers
                    setattr(module, name, nn.Parameter(torch.zeros(parameter.shape), requires_grad=False))
        with _intercept(model) as made:
            _run_builder(small, target, "fp32", "cpu", trust_remote_code)
        if not made.loaded:
            raise _unsupported(model.config, "reads its weights by itself")


def _keep_few_layers(config: Any) -> None:
    """As many layers as it takes to have one of each kind."""
    count = 1
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = getattr(config, name, None)
        if isinstance(kinds, list) and kinds:
            count = max(count, max(kinds.index(kind) for kind in set(kinds)) + 1)
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:count])
    config.num_hidden_layers = min(count, config.num_hidden_layers)


def build_half_precision(folder: Path, target: Path, trust_remote_code: bool) -> None:
    """Writes a float16 graph for CUDA: the CPU has no float16 kernels for what the builder emits."""
    _run_builder(folder, target, "fp16", "cuda", trust_remote_code)


def _run_builder(folder: Path, target: Path, precision: str, provider: str, trust_remote_code: bool) -> None:
    said = io.StringIO()
    scratch = target / ".cache"
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from onnxruntime_genai.models import builder

            settings = [*_SETTINGS, *(["hf_remote=true"] if trust_remote_code else [])]
            with _as_float(builder):
                options = builder.parse_extra_options(
                    None, str(folder), str(target), precision, provider, str(scratch), settings
                )
            config = options["hf_details"]["hf_config"]
            _say_plainly(config)
            builder.create_model(None, str(folder), str(target), precision, provider, str(scratch), **options)
    except NotImplementedError as error:
        raise _unsupported(config, "it is not in its list") from error
    except Exception as error:  # it asks configurations for what they may not have, and checks little
        # a KeyError's text is the key alone
        reason = f"it finds no entry {error} of its own" if isinstance(error, KeyError) else first_line(error)
        kind = read_config(folder).get("model_type")
        raise InputError(
            f"the GenAI model builder cannot take this model of type {kind!r}: {reason}", hint="add --exporter torch"
        ) from error
    finally:
        if scratch.is_dir() and not any(scratch.iterdir()):
            scratch.rmdir()


@contextmanager
def _unmarked(folder: Path) -> Iterator[Path]:
    """The folder as the builder can open it: a mark of ours hides the model type; its weights come from us anyway."""
    if not is_marked(json.loads((folder / "config.json").read_text())):
        yield folder
        return
    with TemporaryDirectory() as scratch:
        copy_companions(folder, Path(scratch))
        write_json(Path(scratch) / "config.json", read_config(folder))
        yield Path(scratch)


@contextmanager
def _as_float(builder: Any) -> Iterator[None]:
    """Takes the quantization_config out of every configuration that the builder reads, and names the architecture.

    It knows some methods and refuses others at sight; ours is a float graph that the rewrite fills. It goes by
    `architectures`, which a configuration may leave out.
    """
    original = builder.get_hf_details

    def get_hf_details(*args: Any, **kwargs: Any) -> Any:
        details = original(*args, **kwargs)
        if hasattr(details["hf_config"], "quantization_config"):
            del details["hf_config"].quantization_config
        config = details["hf_config"]
        if not config.architectures and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        return details

    builder.get_hf_details = get_hf_details
    try:
        yield
    finally:
        builder.get_hf_details = original


@contextmanager
def _intercept(model: Any) -> Iterator[_Intercepted]:
    """Lets the builder take our model, notes what it does with named weights, and keeps the graph from being written.

    The builder offers no hook for either, so three methods of its base class are replaced while it runs.
    """
    said = io.StringIO()
    with redirect_stdout(said):
        from onnxruntime_genai.models import builder
    base, made = builder.Model, _Intercepted()
    original = base.make_initializer

    def load_weights(self: Any, input_path: str) -> Any:
        made.loaded = True
        return model

    def make_initializer(self: Any, tensor: Any, /, name: str, **kwargs: Any) -> None:
        if isinstance(tensor, Rows):
            made.ledger[name] = tensor
        original(self, tensor, name, **kwargs)

    def save_model(self: Any, out_dir: str) -> None:
        made.graph = self.model

    saved = base.load_weights, base.make_initializer, base.save_model
    base.load_weights, base.make_initializer, base.save_model = load_weights, make_initializer, save_model
    try:
        yield made
    finally:
        base.load_weights, base.make_initializer, base.save_model = saved


def _restore_embedding_scale(graph: ir.Graph, scale: float) -> None:
    """Gemma multiplies its embedding by the root of the hidden size, which the builder rounds to two decimals."""
    for node in graph:
        if node.name == "/model/embed_tokens/Mul":
            name = "model.embed_tokens.scale"
            value = ir.Value(name=name, const_value=ir.Tensor(np.array(scale, np.float32), name=name))
            graph.register_initializer(value)
            node.replace_input_with(1, value)


def _say_plainly(config: Any) -> None:
    """Puts into words of the builder what it would miss: windows of every layer, Gemma 3's two rotary bases."""
    if getattr(config, "sliding_window", None) and getattr(config, "layer_types", None) is None:
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    nested = getattr(config, "rope_parameters", None)
    if not isinstance(nested, dict) or not {"full_attention", "sliding_attention"} <= set(nested):
        return
    if config.model_type != "gemma3_text" or any(p.get("rope_type") != "default" for p in nested.values()):
        raise _unsupported(config, "rotary embeddings that differ by layer type are scaled")
    config.rope_parameters = dict(nested["full_attention"])
    config.rope_local_base_freq = nested["sliding_attention"]["rope_theta"]


def _refuse_false_heads(model: Any) -> None:
    """The builder takes any linear with as many outputs as there are tokens for the head, and says nothing."""
    head, tokens = model.get_output_embeddings(), model.config.get_text_config().vocab_size
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "PackedLinear"
        if is_linear and module is not head and module.out_features == tokens and not name.endswith(".packed"):
            raise InputError(
                f"{name} has as many outputs as there are tokens ({tokens}): the GenAI builder would take it for the "
                "output head",
                hint="add --exporter torch",
            )


def _unsupported(config: Any, reason: str) -> InputError:
    return InputError(
        f"the GenAI model builder does not support model type {config.model_type!r} ({reason})",
        hint="add --exporter torch",
    )
