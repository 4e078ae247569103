"""Weight-only quantization of ONNX graphs from Python, in the shape of onnxruntime's MatMulNBitsQuantizer.

    from quantcli.onnx import GPTQWeightOnlyQuantConfig, MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer("model.onnx", bits=4, algo_config=GPTQWeightOnlyQuantConfig(reader))
    quantizer.process()
    quantizer.model.save_model_to_file("model.int4.onnx", use_external_data_format=True)

Scripts for onnxruntime's class run with this one. What is different: every config takes the quantizer's `bits`,
`block_size` and `is_symmetric` (of which onnxruntime's RTN, k-quant and GPTQ take 4 bits whatever is asked for), 1 to 8
bits, QDQ for all of them, `nodes_to_include` names the only nodes to quantize, and GPTQ is one.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import onnx
import onnx_ir as ir

from quantcli.algorithms import find_chain, make_steps
from quantcli.data.feeds import ReaderFeeds
from quantcli.errors import InputError, UsageError
from quantcli.graphs.model.files import open_graph
from quantcli.graphs.model.opset import convert_opset, prove_conversion, with_known_opset
from quantcli.graphs.walk.matrices import Selection, find_targets, prepare
from quantcli.graphs.weights.replace import needed_opset, replace_matrices
from quantcli.options import GraphOptions, Override, QuantizeOptions
from quantcli.pipelines.graph.plan import lacks_codebook_blocks, scheme_target, weight_encoding
from quantcli.pipelines.graph.solve import GraphWork, solve_graph
from quantcli.pipelines.planning.steps import check_ranges
from quantcli.progress import Progress, Silent
from quantcli.report.layer import LayerReport

__all__ = [
    "AWQWeightOnlyQuantConfig",
    "CalibrationDataReader",
    "DefaultWeightOnlyQuantConfig",
    "GPTQWeightOnlyQuantConfig",
    "HQQWeightOnlyQuantConfig",
    "KQuantWeightOnlyQuantConfig",
    "MatMulBnb4Quantizer",
    "MatMulNBitsQuantizer",
    "RTNWeightOnlyQuantConfig",
    "WeightOnlyQuantConfig",
]

_ENCODINGS = {"QOperator": "nbits", "QDQ": "qdq", "nbits": "nbits", "qdq": "qdq"}
_AXES = {"MatMul": 0, "Gather": 1}


class CalibrationDataReader(Protocol):
    """Gives calibration inputs; onnxruntime's class of that name is one."""

    def get_next(self) -> dict[str, Any] | None:
        """Arrays by input name, or None at the end."""


@dataclass(kw_only=True)
class WeightOnlyQuantConfig(ABC):
    """What all algorithms share."""

    quant_format: Any = "QOperator"
    """QOperator (MatMulNBits) or QDQ (DequantizeLinear with blocks): onnxruntime's QuantFormat, or the name."""
    op_types_to_quantize: Iterable[str] | None = None
    """MatMul, Gemm, Gather. Default: the quantizer's, or MatMul."""
    quant_axes: Mapping[str, int] | None = None
    """Blocks run along what is summed over; other axes are refused."""
    customized_weight_config: Mapping[str, Mapping[str, Any]] | None = None
    """By the name of a node: bits, group_size, scheme (sym or asym)."""
    quant_last_matmul: bool = True
    """Quantize products with no other product behind them, such as a language model's output head."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further options of our algorithms, as `quantcli algorithms NAME` lists them."""

    @abstractmethod
    def chain(self) -> tuple[str, dict[str, Any]]:
        """Our algorithms, joined by commas, and their settings."""


@dataclass
class DefaultWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """Round to nearest, with all that the quantizer knows too; None is what the quantizer says."""

    block_size: int | None = None
    """Columns that share a scale."""
    is_symmetric: bool | None = None
    """Whether zero points are fixed in the middle."""
    accuracy_level: int | None = None
    """Attribute of MatMulNBits."""
    bits: int | None = None
    """1 to 8."""
    channel_wised_quantize: bool = False
    """One scale per output row."""

    def chain(self) -> tuple[str, dict[str, Any]]:
        """Round to nearest."""
        return "rtn", {}


@dataclass
class RTNWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """Round to nearest."""

    ratios: Mapping[str, float] | None = None
    """Share of the range that the grid spans, by the name of a weight."""

    def chain(self) -> tuple[str, dict[str, Any]]:
        """Round to nearest."""
        return "rtn", {}


@dataclass
class KQuantWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """A weighted search of each block's range, with the inputs' sizes where there is a reader."""

    ratios: Mapping[str, float] | None = None
    """As of RTN; here they are refused, as the search tries them all."""
    calibration_data_reader: CalibrationDataReader | None = None
    """Gives calibration inputs; None for a search without data."""

    def chain(self) -> tuple[str, dict[str, Any]]:
        """k-quant."""
        if self.ratios:
            raise UsageError("kquant searches ranges, it takes no ratios", hint="use RTNWeightOnlyQuantConfig for them")
        return "kquant", {}


@dataclass
class HQQWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """Half-quadratic quantization; None is what the quantizer says."""

    block_size: int | None = None
    """Columns that share a scale."""
    bits: int | None = None
    """1 to 8."""
    axis: int = 1
    """Only 1: blocks along the columns."""

    def chain(self) -> tuple[str, dict[str, Any]]:
        """HQQ with whole zero points, unless the settings say otherwise."""
        if self.axis != 1:
            raise UsageError(f"HQQ has blocks along axis 1 only, got {self.axis}")
        return "hqq", {"zero": "integer"}


@dataclass
class GPTQWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """GPTQ; None is our own default, which is the better one."""

    calibration_data_reader: CalibrationDataReader | None = None
    """Gives calibration inputs."""
    percdamp: float = 0.01
    """Share of the Hessian's mean diagonal that is added to it."""
    block_size: int = 128
    """Columns between two feedbacks; results do not depend on it."""
    actorder: bool | None = None
    """Columns by falling importance, groups as they are: costs nothing at run time. Default: true."""
    mse: bool | None = None
    """Search the range of each block under the Hessian's diagonal. Default: true."""
    perchannel: bool = True
    """Only true."""
    layer_wise: bool = False
    """Quantize in the order in which inputs flow: each matrix corrects the error of those before it."""

    def chain(self) -> tuple[str, dict[str, Any]]:
        """GPTQ with the settings that mean the same."""
        if not self.perchannel:
            raise UsageError("GPTQ has scales of each row and block, perchannel=False does not apply")
        return "gptq", {
            "damp_percent": self.percdamp,
            "block_size": self.block_size,
            "order": "none" if self.actorder is False else "static",
            "grid": "minmax" if self.mse is False else "weighted",
        }


@dataclass
class AWQWeightOnlyQuantConfig(WeightOnlyQuantConfig):
    """Scales of inputs, folded into norms and earlier products, then a rounder."""

    calibration_data_reader: CalibrationDataReader | None = None
    """Gives calibration inputs."""
    enable_auto_scale: bool = True
    """Search the scales."""
    enable_mse_search: bool = True
    """Search each block's range, weighted by the inputs (k-quant); false: round to nearest."""
    rounder: str | None = None
    """Another rounder to follow, as gptq."""

    def chain(self) -> tuple[str, dict[str, Any]]:
        """AWQ and what follows."""
        rounder = self.rounder or ("kquant" if self.enable_mse_search else "rtn")
        return f"awq,{rounder}" if self.enable_auto_scale else rounder, {}


class MatMulNBitsQuantizer:
    """Quantizes the weights of a graph; `model` holds the result after `process()`."""

    def __init__(
        self,
        model: onnx.ModelProto | str | Path,
        bits: int = 4,
        block_size: int = 128,
        is_symmetric: bool = False,
        accuracy_level: int | None = None,
        nodes_to_exclude: Iterable[str] | None = None,
        nodes_to_include: Iterable[str] | None = None,
        quant_format: Any = "QOperator",
        op_types_to_quantize: Iterable[str] | None = None,
        quant_axes: Mapping[str, int] | None = None,
        channel_wised_quantize: bool = False,
        algo_config: WeightOnlyQuantConfig | None = None,
        progress: Progress | None = None,
    ):
        """Opens the graph; a ModelProto is not changed.

        Args:
            model: The float graph, or the path of its file.
            bits: 1 to 8.
            block_size: Columns that share a scale, -1 for one per row.
            is_symmetric: Whether zero points are fixed in the middle.
            accuracy_level: Attribute of MatMulNBits, 0 to 4.
            nodes_to_exclude: Names of nodes that stay float.
            nodes_to_include: Names of the only nodes to quantize.
            quant_format: QOperator or QDQ, for the default config.
            op_types_to_quantize: For the default config. Default: MatMul.
            quant_axes: For the default config.
            channel_wised_quantize: One scale per row.
            algo_config: The algorithm; default: round to nearest.
            progress: Told what happens.

        Raises:
            UsageError: options that do not go together.
            InputError: the file is no ONNX graph.
        """
        config = algo_config or DefaultWeightOnlyQuantConfig(
            quant_format=quant_format, op_types_to_quantize=op_types_to_quantize, quant_axes=quant_axes
        )
        axes = config.quant_axes or quant_axes
        if axes is not None and any(_AXES.get(name) != axis for name, axis in dict(axes).items()):
            raise UsageError(f"quant_axes {dict(axes)} cannot be had, blocks run along {_AXES}")
        named = getattr(config.quant_format, "name", config.quant_format)
        if named not in _ENCODINGS:
            raise UsageError(f"quant_format is QOperator or QDQ, got {named!r}")
        level = _own(config, "accuracy_level", accuracy_level)
        if channel_wised_quantize or getattr(config, "channel_wised_quantize", False):
            block_size = -1
        elif not isinstance(config, GPTQWeightOnlyQuantConfig):  # whose block size is another
            block_size = _own(config, "block_size", block_size)
        chain, settings = config.chain()
        self._graph = GraphOptions(
            encoding=_ENCODINGS[named],
            accuracy_level=level or 0,
            op_types=tuple(config.op_types_to_quantize or op_types_to_quantize or ("MatMul",)),
            nodes_include=_exactly(nodes_to_include),
            nodes_exclude=_exactly(nodes_to_exclude),
            quantize_last_matmul=config.quant_last_matmul,
        )
        self._encoding = weight_encoding(self._graph)
        self._options = QuantizeOptions(
            model="",
            output=Path(),
            bits=_own(config, "bits", bits),
            group_size=block_size,
            symmetric=bool(_own(config, "is_symmetric", is_symmetric)),
            overrides=(*_overrides(config.customized_weight_config), *_ratios(getattr(config, "ratios", None))),
        )
        self._steps = make_steps(
            find_chain(chain, "onnx"), {k: _text(v) for k, v in {**settings, **config.settings}.items()}
        )
        check_ranges(self._options, self._steps[-1])
        self._reader = getattr(config, "calibration_data_reader", None)
        self._source, self._progress = model, progress or Silent()
        self.algo_config = config
        self.model: Any = None
        """onnxruntime's ONNXModel, with `.model` (ModelProto) and `save_model_to_file`; None before `process()`."""
        self.layers: list[LayerReport] = []
        """What became of each matrix."""
        self.kept: dict[str, str] = {}
        """Why matrices stayed float, by initializer."""

    def process(self) -> None:
        """Quantizes.

        Raises:
            UsageError: schemes that neither the algorithm nor the encoding has; a reader that is missing.
            InputError: the graph or its calibration inputs cannot be read or run, or no weight can be quantized.
        """
        from onnxruntime.quantization.onnx_model import ONNXModel

        *transforms, step = self._steps
        for algorithm in (s.algorithm for s in self._steps):
            if algorithm.calibration == "required" and self._reader is None:
                raise UsageError(f"{algorithm.name} needs calibration inputs", hint="give a calibration_data_reader")
        feeds = None if self._reader is None else ReaderFeeds.drain(self._reader)
        model, folder = self._open()
        graph = self._graph
        stacks, last = self._encoding == "qdq", graph.quantize_last_matmul
        selection = Selection(graph.op_types, graph.nodes_include, graph.nodes_exclude, stacks, last)
        found, self.kept = find_targets(model.graph, selection)
        codebook = step.algorithm.codebook
        if codebook is not None:
            found = [t for t in found if not lacks_codebook_blocks(model, t, self._options, self.kept)]
        if not found:
            raise InputError(
                "the graph has no weight to quantize" + "".join(f"; {w}" for w in [*self.kept.values()][:1])
            )
        targets = {t.name: scheme_target(t, self._options, codebook) for t in found}
        for bits in {t.scheme.bits for t in targets.values()}:
            if bits not in step.algorithm.bits:
                raise UsageError(f"{step.algorithm.name} does not make {bits} bits")
        wanted = needed_opset(self._encoding, (t.scheme.bits for t in targets.values()))
        if model.opset_imports.get("", 0) < wanted:
            older, model = model, convert_opset(model, wanted)
            self._progress.note(str(prove_conversion(older, model, folder)))
            found = [t for t in find_targets(model.graph, selection)[0] if t.name in targets]
        layer_wise = getattr(self.algo_config, "layer_wise", False)
        scaling = transforms[0] if transforms else None
        work = GraphWork(model, folder, found, targets, step, scaling, layer_wise=layer_wise)
        with TemporaryDirectory(prefix="quantcli-") as spill:
            results, self.layers = solve_graph(work, feeds, self._progress, spill=Path(spill))
        replace_matrices(model, found, results.__getitem__, self._encoding, graph.accuracy_level)
        ir.external_data.load_to_model(model)  # what stays float belongs to the result, wherever that is saved
        self.model = ONNXModel(ir.to_proto(model))

    def _open(self) -> tuple[ir.Model, Path]:
        if isinstance(self._source, onnx.ModelProto):
            model, folder = ir.from_proto(self._source), Path()
        else:
            model, folder = open_graph(Path(self._source)), Path(self._source).parent
        model, oldest = with_known_opset(model)
        if oldest is not None:
            self._progress.note(str(prove_conversion(oldest, model, folder)))
        for said in prepare(model):
            self._progress.note(said)
        return model, folder


class MatMulBnb4Quantizer(MatMulNBitsQuantizer):
    """NF4 or FP4 into MatMulBnb4, in the shape of onnxruntime's class of this name."""

    FP4, NF4 = 0, 1

    def __init__(
        self,
        model: onnx.ModelProto | str | Path,
        quant_type: int,
        block_size: int,
        nodes_to_exclude: Iterable[str] | None = None,
    ):
        """Opens the graph; a ModelProto is not changed.

        Args:
            model: The float32 graph, or the path of its file.
            quant_type: FP4 or NF4.
            block_size: Columns that share a scale.
            nodes_to_exclude: Names of nodes that stay float.

        Raises:
            UsageError: another type.
            InputError: the file is no ONNX graph.
        """
        if quant_type not in (self.FP4, self.NF4):
            raise UsageError(f"quant_type is {self.FP4} (FP4) or {self.NF4} (NF4), got {quant_type}")
        config = _CodebookConfig("nf4" if quant_type == self.NF4 else "fp4")
        super().__init__(model, block_size=block_size, nodes_to_exclude=nodes_to_exclude, algo_config=config)


@dataclass
class _CodebookConfig(WeightOnlyQuantConfig):
    name: str

    def chain(self) -> tuple[str, dict[str, Any]]:
        return self.name, {}


def _own(config: WeightOnlyQuantConfig, name: str, otherwise: Any) -> Any:
    value = getattr(config, name, None)
    return otherwise if value is None else value


def _exactly(names: Iterable[str] | None) -> tuple[str, ...]:
    return tuple(f"^{re.escape(name)}$" for name in names or ())


def _overrides(given: Mapping[str, Mapping[str, Any]] | None) -> tuple[Override, ...]:
    found = []
    for name, values in (given or {}).items():
        unknown = set(values) - {"bits", "group_size", "scheme"}
        scheme = values.get("scheme")
        if unknown or scheme not in (None, "sym", "asym"):
            raise UsageError(
                f"customized_weight_config of {name}: bits, group_size, scheme (sym, asym); got {dict(values)}"
            )
        symmetric = None if scheme is None else scheme == "sym"
        found.append(Override(f"^{re.escape(name)}$", values.get("bits"), values.get("group_size"), symmetric))
    return tuple(found)


def _ratios(given: Mapping[str, float] | None) -> tuple[Override, ...]:
    return tuple(Override(f"^{re.escape(name)}$", clip_ratio=ratio) for name, ratio in (given or {}).items())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
