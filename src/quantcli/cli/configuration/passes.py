"""Pass configurations of Olive in the words of our command line: the one table.

A key that is not given, null, empty or "DEFAULT_VALUE" leaves our own default, which may be another than theirs.
"""

from collections.abc import Mapping

from quantcli.cli.aliases import Refused, Rename, Setting, Switch, Words
from quantcli.cli.configuration.keys import (
    Data,
    Key,
    Keys,
    Missing,
    Names,
    Nested,
    Overrides,
    Pass,
    Together,
    Variants,
    only,
)

__all__ = ["AIMET", "NVMO", "OTHER_TYPES", "PASSES"]

_GRAPH_DATA = "add --calibration-inputs FOLDER of samples, or --data FILE, text for a language model"
_TUNING = Refused("it is for a search", "use `quantcli tune`, or choose values and leave it out")


def _choice(key: str, *values: str) -> Key:
    return Key("text", Rename(f"--set {key}", {v: ("--set", f"{key}={v}") for v in values}, only=True))


def _setting_switch(on: str, off: str) -> Key:
    return Key("true or false", Switch(("--set", on), ("--set", off)))


_BITS = Key("whole number", Rename("--bits"))
_GROUP = Key("whole number", Rename("--group-size"))
_SYM = Key("true or false", Switch(("--sym",), ("--asym",)))
_DAMP = Key("number", Setting("damp_percent"))
_DATA_CONFIG = Key("any", Data())
_MODULES = Key("list of texts", Names("--exclude"))
_HEAD = Key("true or false", Switch(("--quantize-lm-head",)))
_OVERRIDES = Key("object", Overrides())
_SAMPLES = Key("whole number", Rename("--num-samples"))
_ROWS = Key("whole number", Rename("--batch-size"))
_PLACEMENT = Key("any", Refused("blocks and linears are found by the model's own layout", "leave it out"))
_TYPES = {
    "fp16": ("--dtype", "float16"),
    "bf16": ("--dtype", "bfloat16"),
    "fp32": ("--dtype", "float32"),
}
_STORED_TYPE = Key("text", Rename("--dtype", _TYPES, only=True))
_ORDERS = {
    ("True", "True"): ("--set", "order=static"),
    ("True", "False"): ("--set", "order=desc_act"),
    ("True", None): ("--set", "order=desc_act"),
    ("False", "True"): ("--set", "order=none"),
    ("False", "False"): ("--set", "order=dynamic"),
    ("False", None): ("--set", "order=dynamic"),
    (None, "True"): ("--set", "order=none"),
    (None, "False"): ("--set", "order=dynamic"),
}
_ORDER = {
    "desc_act": Key("true or false", Together(("static_groups",), _ORDERS)),
    "static_groups": Key("true or false", None),
}
_SEQUENTIAL = only("true or false", "linears are always quantized in the order in which inputs reach them", "True")

_FILES: Keys = {
    "save_as_external_data": only("true or false", "weights always stand in a file of their own", "True"),
    "all_tensors_to_one_file": only("true or false", "weights always stand in one file", "True"),
    "external_data_name": Key(
        "text", Refused("the file of weights is called as the graph, with .data", "leave it out")
    ),
    "convert_attribute": only("true or false", "attributes stay in the graph", "False"),
}
_OLIVE: Keys = {
    "bits": _BITS,
    "group_size": _GROUP,
    "sym": _SYM,
    "lm_head": _HEAD,
    "embeds": Key("true or false", Switch(("--quantize-embeddings",))),
    "overrides": _OVERRIDES,
    "modules_to_not_convert": _MODULES,
    "moe": only("true or false", "experts are quantized as other linears are", "True"),
    "quantize_vision": only("true or false", "language models are quantized", "False"),
}
_CPU = only("list of texts", "graphs are run on the CPU", "CPUExecutionProvider", "cpu")
_NODES: Keys = {
    "nodes_to_exclude": Key("list of texts", Names("--nodes-exclude", whole=True)),
    "nodes_to_include": Key("list of texts", Names("--nodes-include", whole=True)),
}
_BLOCKS: Keys = {
    "block_size": _GROUP,
    "axis": only("whole number", "blocks lie along the inputs", "0"),
    "is_symmetric": _SYM,
    "accuracy_level": Key("whole number", Rename("--accuracy-level")),
    **_NODES,
    **_FILES,
}
_WEIGHTS = ("int8", "uint8", "int16", "int4", "uint4")


def _weight_type(*kinds: str) -> Key:
    """A type of weights, in onnxruntime's words, too: int8 or QInt8."""
    long = {f"Q{kind.replace('uint', 'UInt').replace('int', 'Int')}": kind for kind in kinds}
    words = {word: ("--weight-type", kind) for word, kind in (*zip(kinds, kinds, strict=True), *long.items())}
    return Key("text", Rename("--weight-type", words, only=True))


_SIGNED = ("--activation-type", "int8", "--weight-type", "int8")  # onnxruntime has it no other way
_ACTIVATION_WORDS = {
    **{kind: ("--activation-type", kind) for kind in ("uint8", "int16", "uint16")},
    **{f"Q{kind}": ("--activation-type", kind.lower()) for kind in ("UInt8", "Int16", "UInt16")},
    "int8": _SIGNED,
    "QInt8": _SIGNED,
}
_ACTIVATION_TYPE = Key("text", Rename("--activation-type", _ACTIVATION_WORDS, only=True))
_CALIBRATORS = {name: ("--calibrate-method", name.lower()) for name in ("MinMax", "Entropy", "Percentile")}
_ENCODINGS = {"QDQ": ("--encoding", "qdq"), "QOperator": ("--encoding", "qoperator")}
_WEIGHT_GRID = _setting_switch("weight_grid=sym", "weight_grid=asym")
_ACTIVATION_GRID = _setting_switch("activation_symmetric=true", "activation_symmetric=false")
_TYPES_LEFT_OUT = Key("list of texts", Refused("operators are chosen, not left out", "use op_types_to_quantize"))
_REDUCE_RANGE = Key("true or false", Switch(("--reduce-range",)))
_DYNAMIC: Keys = {
    "precision": _weight_type("int8", "uint8"),
    "weight_type": _weight_type("int8", "uint8"),
    "per_channel": Key("true or false", Switch(("--per-channel",))),
    "reduce_range": _REDUCE_RANGE,
    "weight_symmetric": _WEIGHT_GRID,
    "op_types_to_quantize": Key("list of texts", Words("--op-types")),
    "op_types_to_exclude": _TYPES_LEFT_OUT,
    "nodes_to_quantize": Key("list of texts", Names("--nodes-include", whole=True)),
    "nodes_to_exclude": Key("list of texts", Names("--nodes-exclude", whole=True)),
    "quant_preprocess": only("true or false", "graphs are always prepared", "True"),
    **_FILES,
}
_STATIC: Keys = {
    **_DYNAMIC,
    "precision": _weight_type(*_WEIGHTS),
    "weight_type": _weight_type(*_WEIGHTS),
    "data_config": _DATA_CONFIG,
    "calibrate_method": Key("text", Rename("--calibrate-method", _CALIBRATORS, only=True)),
    "quant_format": Key("text", Rename("--encoding", _ENCODINGS, only=True)),
    "activation_type": _ACTIVATION_TYPE,
    "activation_symmetric": _ACTIVATION_GRID,
    "calibration_providers": _CPU,
    "extra_options": Key(
        "object",
        Nested(
            {
                "ActivationSymmetric": _ACTIVATION_GRID,
                "WeightSymmetric": _WEIGHT_GRID,
                "CalibPercentile": Key("number", Setting("percentile")),
            }
        ),
    ),
    "min_real_range": Key("number", Refused("ranges are as measured", "leave it out")),
    "tensor_quant_overrides": Key("object", Refused("tensors have no settings of their own", "use nodes_to_exclude")),
    "prepare_qdq_config": only("true or false", "QDQ is always written so that runtimes can fuse it", "True"),
}
_INC: Keys = {
    "device": only("text", "graphs are run on the CPU", "cpu"),
    "backend": only("text", "graphs are run on the CPU", "default"),
    "domain": only("text", "the graph itself is looked at", "auto"),
    "quant_level": only("text", "the graph itself is looked at", "auto"),
    "recipes": Key("object", Refused("recipes have flags of their own", "use -a smoothquant,static or --equalize")),
    "excluded_precisions": only("list of texts", "nothing is made bf16", "bf16"),
    "tuning_criterion": Key("object", _TUNING),
    "metric": Key("object", _TUNING),
    "op_type_dict": Key("object", Refused("operators have no settings of their own", "use --nodes-exclude")),
    "data_config": _DATA_CONFIG,
    "calibration_sampling_size": _SAMPLES,
    **_FILES,
}
_ALGORITHMS = {name: ("-a", name.lower()) for name in ("rtn", "gptq", "awq", "RTN", "GPTQ", "AWQ")}
_WEIGHT_ONLY: Keys = {
    "bits": _BITS,
    "group_size": _GROUP,
    "scheme": Key("text", Rename("", {"sym": ("--sym",), "asym": ("--asym",)}, only=True)),
    "algorithm": Key("text", Rename("-a", _ALGORITHMS, only=True)),
}
_NO_WEIGHT_ONLY = Key("object", Refused("it is for weights alone", 'add "approach": "weight_only"'))
_INC_PASSES = {
    "static": Pass(
        ("-a", "static"),
        {
            **_INC,
            "reduce_range": _REDUCE_RANGE,
            "quant_format": _STATIC["quant_format"],
            "weight_only_config": _NO_WEIGHT_ONLY,
        },
        data_hint=_GRAPH_DATA,
    ),
    "dynamic": Pass(
        ("-a", "dynamic"),
        {
            **_INC,
            "reduce_range": _REDUCE_RANGE,
            "quant_format": only("text", "dynamic quantization has operators on integers", "QOperator"),
            "weight_only_config": _NO_WEIGHT_ONLY,
        },
        data_hint=_GRAPH_DATA,
    ),
    "weight_only": Pass(
        ("-a", "rtn"),
        {
            **_INC,
            "quant_format": only("text", "MatMulNBits is an operator on integers", "QOperator"),
            "weight_only_config": Key("object", Nested(_WEIGHT_ONLY)),
        },
        data_hint=_GRAPH_DATA,
    ),
}


_AWQ_METHODS = {
    ("awq", None): ("-a", "awq"),
    ("awq", "awq_lite"): ("-a", "awq,rtn"),
    ("awq", "awq_clip"): ("-a", "kquant"),
    (None, "awq_lite"): ("-a", "awq,rtn"),
    (None, "awq_clip"): ("-a", "kquant"),
    ("rtn", None): ("-a", "rtn"),
    ("rtn", "rtn"): ("-a", "rtn"),
    ("rtn", "rtn_dq"): ("-a", "rtn"),
    (None, "rtn"): ("-a", "rtn"),
    (None, "rtn_dq"): ("-a", "rtn"),
    ("dynamic", None): ("-a", "dynamic"),
}
NVMO: Keys = {
    "precision": Key("text", Rename("--bits", {"int4": ("--bits", "4"), "int8": ("--bits", "8")}, only=True)),
    "algorithm": Key("text", Together(("calibration", "calibration_method"), _AWQ_METHODS)),
    "calibration": Key("text", None),
    "calibration_method": Key("text", None),
    "calibration_providers": _CPU,
    "tokenizer_dir": only("text", "the tokenizer beside the graph is used"),
    "use_random_calibration_data": only("true or false", "text is used", "False"),
    "calibration_params": Key(
        "object",
        Nested(
            {
                "calib_size": _SAMPLES,
                "batch_size": _ROWS,
                "dataset": Key("text", Refused("the text has a flag of its own", "use --data FILE or --data-name")),
            }
        ),
    ),
    "int4_block_size": _GROUP,
    "nodes_to_exclude": Key("list of texts", Names("--nodes-exclude")),
    "enable_mixed_quant": Key(
        "true or false", Refused("8-bit layers are named here", "leave it out, and add --override 'NAME=bits=8'")
    ),
    "layers_8bit": Key("text", Refused("they have a flag of their own", "use --override 'NAME=bits=8'")),
    "trust_remote_code": only("true or false", "it is a flag: --trust-remote-code", "False"),
    **_FILES,
}
_QUAROT: Keys = {
    "rotate_mode": _choice("rotate_mode", "hadamard", "random"),
    "seed": Key("whole number", Setting("rotation_seed")),
    "rotation_seed": Key("whole number", Setting("rotation_seed")),
    "rotate": only("true or false", "quarot rotates", "True"),
    "input_model_dtype": _STORED_TYPE,
    "w_bits": Key("whole number", Rename("--w_bits")),
    "w_rtn": Key("true or false", Rename("--w_rtn")),
    "w_gptq": Key("true or false", Rename("--w_rtn", {"True": ("--w_rtn", "False"), "False": ()})),
    "w_asym": Key("true or false", Switch(("--asym",), ("--sym",))),
    "w_groupsize": _GROUP,
    "gptq_damping": _DAMP,
    "gptq_opt_scales": _setting_switch("grid=weighted", "grid=minmax"),
    "a_bits": Key("whole number", Rename("--a-bits")),
    "a_asym": Key("true or false", Switch(("--a-asym",), ("--a-sym",))),
    "a_clip_ratio": Key("number", Rename("--a-clip-ratio")),
    "a_groupsize": only("whole number", "activations have one grid per token", "-1"),
    "k_bits": Key("whole number", Rename("--k-bits")),
    "v_bits": Key("whole number", Rename("--v-bits")),
    **{f"{n}_clip_ratio": Key("number", Rename("--kv-clip-ratio")) for n in "kv"},
    **{f"{n}_groupsize": Key("whole number", Rename("--kv-group-size")) for n in "kv"},
    "s_bits": only("whole number", "scores of attention stay float", "16"),
    "calibration_data_config": _DATA_CONFIG,
    "data_config": _DATA_CONFIG,
    "calibration_nsamples": _SAMPLES,
    "calibration_batch_size": _ROWS,
}
_TECHNIQUE: Keys = {
    "name": Key("text", Missing('leave "techniques" out for plain static quantization')),
    **{
        key: Key("any", None)
        for key in (
            *("block_size", "op_types", "bitwidth", "decompressed_bw", "nodes_to_exclude"),
            *("data_config", "num_candidates", "num_iterations"),
        )
    },
}
AIMET: Keys = {
    "techniques": Key("list of objects", Nested(_TECHNIQUE)),
    "precision": _weight_type(*_WEIGHTS),
    "activation_type": _ACTIVATION_TYPE,
    "quant_scheme": Key("text", Rename("", {"min_max": ("--calibrate-method", "minmax")}, only=True)),
    "data_config": _DATA_CONFIG,
    "config_file": Key("text", Refused("there are no files of rules for AIMET", "leave it out")),
    "calibration_providers": _CPU,
    "op_types_to_exclude": _TYPES_LEFT_OUT,
    "tensor_precision_overrides": _STATIC["tensor_quant_overrides"],
    "tie_kv_cache_io": only("true or false", "inputs and outputs of a cache have grids of their own", "False"),
    **_FILES,
}
_AUTO_GPTQ: Keys = {
    "bits": _BITS,
    "group_size": _GROUP,
    "sym": _SYM,
    "damp_percent": _DAMP,
    **_ORDER,
    "true_sequential": _SEQUENTIAL,
    "layers_block_name": _PLACEMENT,
    "outside_layer_modules": _PLACEMENT,
    "inside_layer_modules": _PLACEMENT,
    "data_config": _DATA_CONFIG,
}

_BLOCK_ALGORITHMS = {
    "DEFAULT": ("-a", "rtn"),
    "RTN": ("-a", "rtn"),
    "HQQ": ("-a", "hqq"),
    "GPTQ": ("-a", "gptq"),
}

PASSES: Mapping[str, Pass | Variants] = {
    "GptqQuantizer": Pass(("-a", "gptq"), _AUTO_GPTQ),
    "GptqModel": Pass(
        ("-a", "gptq"),
        {
            **{name: key for name, key in _AUTO_GPTQ.items() if not name.endswith(("_modules", "_name"))},
            "lm_head": _HEAD,
            "device": Key("text", Rename("--device")),
            "dynamic": Key("object", Refused("layers have other settings by --override", "leave it out")),
            "rotation": Key("text", Refused("a rotation is a pass before it", 'add {"type": "QuaRot"}')),
        },
    ),
    "Gptq": Pass(
        ("-a", "gptq"),
        {
            **_OLIVE,
            "damp_percent": _DAMP,
            "desc_act": _setting_switch("order=desc_act", "order=dynamic"),
            "data_config": _DATA_CONFIG,
        },
    ),
    "AutoAWQQuantizer": Pass(
        ("-a", "awq"),
        {
            "bits": _BITS,
            "w_bit": _BITS,
            "q_group_size": _GROUP,
            "zero_point": Key("true or false", Switch(("--asym",), ("--sym",))),
            "version": Key("text", Rename("--format", {"gemm": ("--format", "awq")}, only=True)),
            "duo_scaling": _setting_switch("duo_scaling=true", "duo_scaling=false"),
            "modules_to_not_convert": _MODULES,
            "export_compatible": only("true or false", "scales are always folded into what stands before", "False"),
            "input_model_dtype": _STORED_TYPE,
            "data_config": _DATA_CONFIG,
        },
    ),
    "QuaRot": Pass(("-a", "quarot"), _QUAROT, ("--set", "online=true", "--evaluate")),
    "SpinQuant": Pass(
        ("-a", "spinquant"),
        {
            "rotate_mode": _choice("rotate_mode", "hadamard", "random"),
            "seed": Key("whole number", Setting("rotation_seed")),
            "a_bits": Key("whole number", Setting("a_bits")),
            "a_symmetric": only("true or false", "it trains against asymmetric grids", "False"),
            "a_per_token": only("true or false", "every token has a grid", "True"),
            "training_args": Key("object", Refused("training has options of its own", "use --set steps=100")),
            "data_config": _DATA_CONFIG,
        },
    ),
    "Rtn": Pass(("-a", "rtn"), _OLIVE),
    "KQuant": Pass(("-a", "kquant"), _OLIVE),
    "OnnxBlockWiseRtnQuantization": Pass(
        ("-a", "rtn", "--op-types", "MatMul,Gemm,Gather"), {"bits": _BITS, **_BLOCKS}, data_hint=_GRAPH_DATA
    ),
    "OnnxHqqQuantization": Pass(("-a", "hqq"), {"bits": _BITS, **_BLOCKS}, data_hint=_GRAPH_DATA),
    "OnnxKQuantQuantization": Pass(
        ("-a", "kquant"), {"bits": _BITS, "customized_weight_config": _OVERRIDES, **_BLOCKS}, data_hint=_GRAPH_DATA
    ),
    "OnnxBnb4Quantization": Pass(
        ("-a", "nf4"),
        {
            "precision": Key("text", Rename("-a", {n: ("-a", n) for n in ("nf4", "fp4")}, only=True)),
            "quant_type": Key("text", Rename("-a", {n: ("-a", n) for n in ("nf4", "fp4")}, only=True)),
            "quantized_modules": Key("list of texts", Names("--nodes-include")),
            "nodes_to_exclude": _NODES["nodes_to_exclude"],
            **_FILES,
        },
        data_hint=_GRAPH_DATA,
    ),
    "OnnxMatMul4Quantizer": Pass(
        ("-a", "rtn"),
        {
            "bits": _BITS,
            "precision": Key("text", Rename("--bits", {"int4": ("--bits", "4"), "int8": ("--bits", "8")}, only=True)),
            "algorithm": Key("text", Rename("-a", _BLOCK_ALGORITHMS, only=True)),
            "data_config": _DATA_CONFIG,
            **_BLOCKS,
        },
        data_hint=_GRAPH_DATA,
    ),
    "OnnxQuantization": Variants(
        "quant_mode",
        "static",
        {
            "static": Pass(("-a", "static"), _STATIC, data_hint=_GRAPH_DATA),
            "dynamic": Pass(("-a", "dynamic"), {**_DYNAMIC, "data_config": _DATA_CONFIG}, data_hint=_GRAPH_DATA),
        },
    ),
    "OnnxStaticQuantization": Pass(("-a", "static"), _STATIC, data_hint=_GRAPH_DATA),
    "OnnxDynamicQuantization": Pass(("-a", "dynamic"), _DYNAMIC, data_hint=_GRAPH_DATA),
    "IncQuantization": Variants("approach", "static", _INC_PASSES),
    "IncStaticQuantization": Variants(
        "approach", "static", {name: _INC_PASSES[name] for name in ("static", "weight_only")}
    ),
    "IncDynamicQuantization": Variants(
        "approach", "dynamic", {name: _INC_PASSES[name] for name in ("dynamic", "weight_only")}
    ),
    "NVModelOptQuantization": Pass(("-a", "awq"), NVMO, data_hint=_GRAPH_DATA),
    "AimetQuantization": Pass(("-a", "static"), AIMET, data_hint=_GRAPH_DATA),
}
"""Type of pass to what it means here."""

_CAPTURE = "run `quantcli capture-onnx-graph -m MODEL -o GRAPH` first, and give this the passes behind it"
_TRAIN = "quantcli finetune -m MODEL -o FOLDER --data-files FILE"
OTHER_TYPES: Mapping[str, Refused] = {
    "LoRA": Refused("it trains an adapter", f"{_TRAIN} --method lora"),
    "QLoRA": Refused("it trains an adapter", f"{_TRAIN} --method qlora"),
    "DoRA": Refused("it trains an adapter", f"{_TRAIN} --use-dora"),
    "LoftQ": Refused("it trains an adapter", f"{_TRAIN} --method qlora --init-lora loftq"),
    **{name: Refused("it trains an adapter, and only LoRA is known", _TRAIN) for name in ("LoHa", "LoKr")},
    **{
        name: Refused("it makes a graph of a checkpoint", _CAPTURE)
        for name in ("OnnxConversion", "ModelBuilder", "MobiusBuilder", "OptimumConversion")
    },
    "ExtractAdapters": Refused("it takes adapters out of a graph", "use `quantcli generate-adapter`"),
    "MatMulNBitsToQDQ": Refused("QDQ is written at once", "leave the pass out, and add --encoding qdq"),
    **{
        name: Refused("it is no quantization", "leave the pass out: graphs are prepared as they need it")
        for name in (
            *("OrtTransformersOptimization", "OnnxPeepholeOptimizer", "GraphSurgeries", "OnnxModelOptimizer"),
            *("OnnxFloatToFloat16", "DynamicToFixedShape", "QNNPreprocess", "OrtSessionParamsTuning"),
        )
    },
    "AutoClip": Refused("ranges are searched while rounding", 'use {"type": "KQuant"}, or -a awq'),
    "SelectiveMixedPrecision": Refused("bits are chosen by a target", "leave the pass out, and add --target-bits 4.5"),
    "QuantizationAwareTraining": Refused("quantcli does not train through rounding", 'use {"type": "GptqQuantizer"}'),
}
"""Types that are no quantization here, and what to do."""
