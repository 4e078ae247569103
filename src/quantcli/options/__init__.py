"""What each command was asked to do: frozen, checked once, passed whole.

A field's docstring is its help text on the command line. `None` means "inherit"; `pipelines` resolve it in one place.
"""

from quantcli.options.adapters import ADAPTER_FORMATS, ConvertAdapterOptions, GenerateAdapterOptions
from quantcli.options.backends import BACKEND_ACTIONS, BACKEND_INSTALLERS, BackendsOptions, CompareOptions
from quantcli.options.calibration import BUILTIN, MOE_CALIBRATIONS, SELF, CalibrationOptions
from quantcli.options.capture import CaptureOptions
from quantcli.options.configuration import ConfigurationFile
from quantcli.options.evaluate import EvaluateOptions, GraphEvaluationOptions
from quantcli.options.examples import ExampleOptions
from quantcli.options.finetune import DTYPES, INITS, METHODS, FinetuneOptions
from quantcli.options.generate import GenerateOptions
from quantcli.options.goals import COSTS, METRICS, Goal, Metric
from quantcli.options.graph import GRAPH_ENCODINGS, GRAPH_OP_TYPES, GraphOptions
from quantcli.options.overrides import Override
from quantcli.options.quantize import (
    ACTIVATIONS,
    FORMATS,
    GGUF_TYPES,
    GRAPH_READERS,
    KV_CACHES,
    MIXED_BITS,
    PRESETS,
    READER_NAMES,
    QuantizeOptions,
)
from quantcli.options.simulation import FLOAT_BITS, SimulationOptions
from quantcli.options.tune import SAMPLERS, SETS, TuneOptions

__all__ = [
    "ACTIVATIONS",
    "ADAPTER_FORMATS",
    "BACKEND_ACTIONS",
    "BACKEND_INSTALLERS",
    "BUILTIN",
    "COSTS",
    "DTYPES",
    "FLOAT_BITS",
    "FORMATS",
    "GGUF_TYPES",
    "GRAPH_ENCODINGS",
    "GRAPH_OP_TYPES",
    "GRAPH_READERS",
    "INITS",
    "KV_CACHES",
    "METHODS",
    "METRICS",
    "MIXED_BITS",
    "MOE_CALIBRATIONS",
    "PRESETS",
    "READER_NAMES",
    "SAMPLERS",
    "SELF",
    "SETS",
    "BackendsOptions",
    "CalibrationOptions",
    "CaptureOptions",
    "CompareOptions",
    "ConfigurationFile",
    "ConvertAdapterOptions",
    "EvaluateOptions",
    "ExampleOptions",
    "FinetuneOptions",
    "GenerateAdapterOptions",
    "GenerateOptions",
    "Goal",
    "GraphEvaluationOptions",
    "GraphOptions",
    "Metric",
    "Override",
    "QuantizeOptions",
    "SimulationOptions",
    "TuneOptions",
]
