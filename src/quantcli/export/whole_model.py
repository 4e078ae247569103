"""torch.onnx for models that answer in one pass: encoders of text, images and sound, classifiers, towers of two.

Inputs are those that the model's own `forward` has a name for; outputs are the tensors that it names.
"""

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quantcli.errors import InputError, first_line
from quantcli.export.torch_exporter import trace
from quantcli.export.traceable import make_traceable
from quantcli.graphs.model.files import save_graph
from quantcli.graphs.model.session import open_session, run_sample

__all__ = ["LARGEST_ERROR", "Graph", "example_of", "graphs_of", "write"]

LARGEST_ERROR = 0.001
"""Norm of the difference of an output to the model's own over its norm."""
_TOKENS, _SAMPLES = (7, 5), 2600
_FRAMES = "input_features"


@dataclass(frozen=True)
class Graph:
    """One graph of a model."""

    name: str
    """Its file is NAME.onnx."""
    run: Callable[..., Any]
    """Takes tensors by name, gives an object or mapping of named tensors."""
    example: Mapping[str, Tensor]
    """Its inputs."""
    free: Mapping[str, Mapping[int, Any]]
    """Axes that may have any length, by input."""
    output: str | None = None
    """Name of what `run` gives where that is one tensor."""


class _Named(nn.Module):
    """A model as tensors in, tensors out."""

    def __init__(self, model: nn.Module, graph: Graph, outputs: tuple[str, ...]):
        super().__init__()
        self.model, self.graph, self.outputs = model, graph, outputs

    def forward(self, *tensors: Tensor) -> Any:
        found = _named_tensors(self.graph, self.graph.run(**dict(zip(self.graph.example, tensors, strict=True))))
        return tuple(found[name] for name in self.outputs)


def graphs_of(model: Any, folder: Path, task: str) -> list[Graph]:
    """The graphs that a model is written as: one, or one for each tower where it has two.

    Raises:
        InputError: nothing says what it takes.
    """
    if hasattr(model, "get_text_features") and hasattr(model, "get_image_features"):
        text, vision = example_of(model, folder, "input_ids"), example_of(model, folder, "pixel_values")
        return [
            Graph("text_model", model.get_text_features, *text, output="text_embeds"),
            Graph("vision_model", model.get_image_features, *vision, output="image_embeds"),
        ]
    encoder = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    if encoder is not model and task != "feature-extraction":
        raise InputError(
            f"{type(model).__name__} answers {task} through its decoder, which is not captured",
            hint="add --task feature-extraction for its encoder",
        )
    return [Graph("model", encoder, *example_of(encoder, folder, encoder.main_input_name))]


def example_of(model: Any, folder: Path, main: str) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Inputs of two rows for a model whose main input is `main`, and their free axes.

    Raises:
        InputError: nothing says what they look like.
    """
    free = torch.export.Dim.DYNAMIC
    random = torch.Generator().manual_seed(0)
    if main == "input_ids":
        return _text(model, random, free)
    if main == "pixel_values":
        shape = (2, *_image_shape(model.config, folder))
        return {main: torch.randn(shape, generator=random)}, {main: {0: free}}
    if main == "input_values" and not hasattr(model.config, "num_mel_bins"):
        return {main: torch.randn(2, _SAMPLES, generator=random)}, {main: {0: free, 1: free}}
    if main in ("input_values", _FRAMES):
        config = model.config
        bins: Any = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", 80)
        if main == "input_values":  # a spectrogram as an image
            return {main: torch.randn(2, config.max_length, bins, generator=random)}, {main: {0: free}}
        positions: int | None = getattr(config, "max_source_positions", None)
        if positions is not None:
            return {main: torch.randn(2, bins, 2 * positions, generator=random)}, {main: {0: free}}
    raise InputError(f"{type(model).__name__} takes {main!r}, of which nothing says what it looks like")


def _text(model: Any, random: torch.Generator, free: Any) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    config = model.config.get_text_config()
    ids = torch.randint(2, config.vocab_size, (2, _TOKENS[0]), generator=random)
    mask = torch.ones_like(ids)
    mask[1, _TOKENS[1] :] = 0
    known = {"input_ids": ids, "attention_mask": mask}
    takes = inspect.signature(model.forward).parameters
    if "token_type_ids" in takes and getattr(config, "type_vocab_size", 0) > 1:
        known["token_type_ids"] = torch.zeros_like(ids)
    return known, {name: {0: free, 1: free} for name in known}


def _image_shape(config: Any, folder: Path) -> tuple[int, int, int]:
    """Channels, height, width."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    path = folder / "preprocessor_config.json"
    if size is None and path.is_file():
        said = json.loads(path.read_text())
        said = said.get("crop_size") if said.get("do_center_crop") and said.get("crop_size") else said.get("size")
        size = (said["height"], said["width"]) if isinstance(said, dict) and "height" in said else said
        size = size.get("shortest_edge") if isinstance(size, dict) else size
    if size is None:
        raise InputError(
            f"{folder} does not say how large its images are",
            hint="write image_size into config.json, or size into preprocessor_config.json",
        )
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return getattr(vision, "num_channels", 3), height, width


def _named_tensors(graph: Graph, found: Any) -> dict[str, Tensor]:
    """The tensors among what a model gives."""
    if graph.output is not None:
        found = getattr(found, "pooler_output", found) if not isinstance(found, Tensor) else found
        return {graph.output: found}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def write(model: Any, graphs: list[Graph], target: Path, opset: int | None) -> Iterator[tuple[Graph, float]]:
    """Writes each graph and runs it beside the model; gives the largest error of its outputs as they are made.

    Raises:
        InputError: it cannot be traced, or computes something else.
    """
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        config.use_cache, config.return_dict = False, True
    make_traceable(model)
    for graph in graphs:
        try:
            with torch.no_grad():
                outputs = tuple(_named_tensors(graph, graph.run(**graph.example)))
        except Exception as error:  # whatever model code raises
            raise InputError(f"{type(model).__name__} does not run: {first_line(error)}") from error
        program = trace(
            _Named(model, graph, outputs),
            tuple(graph.example.values()),
            inputs=list(graph.example),
            outputs=outputs,
            dynamic_shapes=tuple(dict(graph.free[name]) for name in graph.example),
            opset=opset,
            what=type(model).__name__,
        )
        path = target / f"{graph.name}.onnx"
        save_graph(program, path)
        yield graph, _compare(graph, path, outputs)


def _compare(graph: Graph, path: Path, outputs: tuple[str, ...]) -> float:
    """The largest relative error of a written graph on the example and on another size, beside the model.

    Raises:
        InputError: it is more than arithmetic explains.
    """
    session = open_session(path)
    worst = 0.0
    for number, feed in enumerate((graph.example, _other_size(graph))):
        with torch.no_grad():
            wanted = _named_tensors(graph, graph.run(**feed))
        found = run_sample(session, {name: value.numpy() for name, value in feed.items()}, number)
        for name, value in zip(outputs, found, strict=True):
            expected = wanted[name].float().numpy()
            if value.shape != expected.shape:
                raise InputError(f"{path.name} gives {name} of shape {value.shape}, the model {expected.shape}")
            error = float(np.linalg.norm(value - expected)) / max(float(np.linalg.norm(expected)), 1e-12)
            worst = max(worst, error)
            if not error <= LARGEST_ERROR:
                raise InputError(
                    f"{path.name} computes something else than the checkpoint: {name} differs by {error:.1%}"
                )
    return worst


def _other_size(graph: Graph) -> dict[str, Tensor]:
    """The example with one more row, and twice as long where it may be."""
    made = {}
    for name, value in graph.example.items():
        longer = torch.cat([value, value[:1]])
        made[name] = torch.cat([longer, longer.flip(1)], 1) if 1 in graph.free[name] else longer
    return made
