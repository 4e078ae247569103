"""Other people's spellings, rewritten to ours before the command line is parsed.

One table per command. Every flag of ours may also be written with underscores (`--group_size 64`), and switches written
that way may carry a True or False (`--trust_remote_code True`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from quantcli.algorithms import KEEP_FLOAT, find_chain
from quantcli.errors import UsageError, nearest

__all__ = [
    "ALIASES",
    "Alias",
    "Dropped",
    "Each",
    "Refused",
    "Rename",
    "Rewritten",
    "Setting",
    "Switch",
    "Words",
    "apply",
    "describe",
    "rewrite",
]


@dataclass(frozen=True)
class Rename:
    """A flag with one value that has another name here, and perhaps other words for its values."""

    to: str
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Their word to our words, the flag included; a word that is not here is passed on, unless `only`."""
    only: bool = False
    follow: str | None = None
    """The rounder that it means where the algorithm named is a transform alone."""


@dataclass(frozen=True)
class Words:
    """A flag that took several words; ours takes them joined by commas."""

    to: str


@dataclass(frozen=True)
class Each:
    """A flag that took several words; ours is given once for each."""

    to: str


@dataclass(frozen=True)
class Setting:
    """A flag with one value that is a KEY of --set here."""

    key: str
    said: str = ""


@dataclass(frozen=True)
class Switch:
    """A flag that is bare or carries True or False."""

    on: tuple[str, ...]
    off: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rounder:
    """A switch that says which rounder follows a transform; bare or with True or False."""

    on: str
    off: str


@dataclass(frozen=True)
class Dropped:
    """A flag that asks for what is so anyway; taken, and said."""

    why: str
    value: bool = False
    only: tuple[str, ...] = ()
    """The values that ask for nothing else."""


@dataclass(frozen=True)
class Always:
    """A switch, bare or with True, that asks for what is so anyway; False cannot be served."""

    why: str


@dataclass(frozen=True)
class Refused:
    """A flag that we know and cannot serve."""

    why: str
    hint: str | None = None


Alias = Rename | Words | Each | Setting | Switch | Rounder | Dropped | Always | Refused

_BITS = {f"{sign}int{bits}": ("--bits", str(bits)) for bits in range(1, 9) for sign in ("", "u")}
_SHOWN = 5
_GENAI, _TORCH = ("--exporter", "genai"), ("--exporter", "torch")

_EVERYWHERE: dict[str, Alias] = {
    "--log_level": Rename(
        "", {"0": ("--verbose",), "1": (), "2": ("--quiet",), "3": ("--quiet",), "4": ("--quiet",)}, only=True
    ),
    "--disable_telemetry": Dropped("quantcli sends nothing anywhere"),
    "--save_config_file": Dropped("the options are always kept in quantcli.json"),
    "--account_name": Refused("there is no shared cache in the cloud"),
    "--container_name": Refused("there is no shared cache in the cloud"),
}
_CHECKPOINT: dict[str, Alias] = {
    "--model_name_or_path": Rename("--model"),
    "--output_path": Rename("--output"),
    "-t": Dropped("the task is text generation", value=True, only=("text-generation", "text-generation-with-past")),
    "--task": Dropped("the task is text generation", value=True, only=("text-generation", "text-generation-with-past")),
    "--adapter_path": Refused("it takes a model without adapter", "merge the adapter into the model first"),
    "--model_script": Refused("only Hugging Face checkpoints are read, never a script"),
    "--script_dir": Refused("only Hugging Face checkpoints are read, never a script"),
    "--test": Refused("there is no test mode", "try a small model, or --dry-run"),
}
_ADAPTER: dict[str, Alias] = {
    "--adapter_path": Rename("--adapter-path"),
    "--adapter_type": Dropped("adapters are LoRA", value=True, only=("lora",)),
    "--adapter_format": Rename("--adapter-format", {"numpy": ("--adapter-format", "npz")}),
}

_TRUE = ("True", "true")
# arguments of weight-only quantization of ONNX graphs in other tools
_GRAPHS: dict[str, Alias] = {
    "--weight_dtype": Dropped("codes are integers; -a nf4 and fp4 are not", value=True, only=("int",)),
    "--weight_bits": Rename("--bits"),
    "--weight_group_size": Rename("--group-size"),
    "--weight_sym": Rename("", {"sym": ("--sym",), "asym": ("--asym",)}, only=True),
    "--is_symmetric": Switch(("--sym",), ("--asym",)),
    "--quant_last_matmul": Switch(("--quantize-last-matmul",), ("--no-quantize-last-matmul",)),
    "--op_types_to_quantize": Words("--op-types"),
    "--nodes_to_include": Each("--nodes-include"),
    "--nodes_to_exclude": Each("--nodes-exclude"),
    "--providers": Dropped("graphs are run on the CPU", value=True, only=("CPUExecutionProvider",)),
    "--layer_wise_quant": Switch(("--layer-wise",)),
    "--ratios": Setting("clip_ratio", "--ratios is for all weights; for some: --override 'REGEX=clip_ratio=0.9'"),
    "--enable_auto_scale": Dropped("awq searches scales; leave awq out for none", value=True, only=_TRUE),
    "--enable_mse_search": Dropped("kquant behind awq searches ranges; -a awq,rtn does not", value=True, only=_TRUE),
    "--percdamp": Setting("damp_percent"),
    "--block_size": Setting(
        "block_size", "--block_size is how many columns gptq takes at a time; those that share a scale: --group-size"
    ),
    "--actorder": Switch(("--set", "order=static"), ("--set", "order=none")),
    "--mse": Switch(("--set", "grid=weighted"), ("--set", "grid=minmax")),
    "--perchannel": Dropped("every row has scales of its own", value=True, only=_TRUE),
}

_TYPES = ("int4", "uint4", "int8", "uint8", "int16", "uint16")
_ORT_WORDS = {kind: f"Q{'UInt' if kind[0] == 'u' else 'Int'}{kind.lstrip('uint')}" for kind in _TYPES}
_METHODS = {"MinMax": "minmax", "Entropy": "entropy", "Percentile": "percentile", "Distribution": "distribution"}
# arguments of dynamic and static quantization of ONNX graphs in other tools
_INTEGERS: dict[str, Alias] = {
    "--quant_mode": Rename("", {"static": ("-a", "static"), "dynamic": ("-a", "dynamic")}, only=True),
    "--quant_format": Rename("", {"QDQ": ("--encoding", "qdq"), "QOperator": ("--encoding", "qoperator")}, only=True),
    "--weight_type": Rename("--weight-type", {o: ("--weight-type", k) for k, o in _ORT_WORDS.items()}),
    "--activation_type": Rename("--activation-type", {o: ("--activation-type", k) for k, o in _ORT_WORDS.items()}),
    "--act_precision": Rename("--activation-type", {k: ("--activation-type", k) for k in _TYPES}, only=True),
    "--calibrate_method": Rename("--calibrate-method", {k: ("--calibrate-method", v) for k, v in _METHODS.items()}),
    "--nodes_to_quantize": Each("--nodes-include"),
    "--quant_preprocess": Dropped("graphs are always prepared", value=True, only=_TRUE),
    "--dataloader_func": Rename("--data-function"),
    "--data_config": Refused("samples have flags of their own", "use --calibration-inputs, --user-script or --data"),
    "--prepare_qnn_config": Switch(("--preprocess", "qnn")),
    "--qnn_extra_options": Refused("options of QNN have flags of their own", "see `quantcli algorithms static`"),
    "--inputs_to_make_channel_last": Words("--inputs-to-make-channel-last"),
    "--outputs_to_make_channel_last": Words("--outputs-to-make-channel-last"),
}

ALIASES: dict[str, dict[str, Alias]] = {
    "quantize": {
        **_EVERYWHERE,
        **_CHECKPOINT,
        "--algorithms": Words("--algorithm"),
        "--precision": Rename("--bits", _BITS, only=True),
        "--implementation": Dropped(
            "dynamic and static are onnxruntime's, the other algorithms our own", value=True, only=("olive", "ort")
        ),
        "--use_qdq_encoding": Switch(("--encoding", "qdq"), ("--encoding", "nbits")),
        "-d": Rename("--data-name"),
        "--data_files": Rename("--data"),
        "--split": Rename("--data-split"),
        "--subset": Refused("subsets of hub data sets are not supported", "download the rows and give --data FILE"),
        "--max_seq_len": Rename("--seq-len"),
        "--max_samples": Rename("--num-samples"),
        "--lm_head": Switch(("--quantize-lm-head",)),
        "--embeds": Switch(("--quantize-embeddings",)),
        "--w_bits": Rename("--bits", {"16": ()}, follow="gptq"),
        "--w_rtn": Rounder("rtn", "gptq"),
        "--rotate": Dropped("quarot rotates", value=True, only=("True", "true")),
        **_GRAPHS,
        **_INTEGERS,
    },
    "finetune": {
        **_EVERYWHERE,
        **_CHECKPOINT,
        "--data": Rename("--data-files"),
        "-d": Rename("--data-name"),
        "--split": Rename("--data-split"),
        "--train_split": Rename("--data-split"),
        "--subset": Refused("subsets of hub data sets are not supported", "download the rows and give --data-files"),
        "--train_subset": Refused(
            "subsets of hub data sets are not supported", "download the rows and give --data-files"
        ),
        "--eval_subset": Refused(
            "subsets of hub data sets are not supported", "download the rows and give --eval-split FILE"
        ),
        "--max_seq_len": Rename("--seq-len"),
        "--num_train_epochs": Rename("--num-epochs"),
        "--per_device_train_batch_size": Rename("--batch-size"),
        "--gradient_accumulation_steps": Rename("--gradient-accumulation"),
        "--warmup_steps": Rename("--warmup"),
        "--warmup_ratio": Rename("--warmup"),
        "--gradient_checkpointing": Switch(("--set", "activation_checkpointing=true")),
        **{
            f"--{key}": Setting(key)
            for key in ("weight_decay", "max_grad_norm", "lr_scheduler_type", "optim", "adam_beta1", "adam_beta2")
        },
    },
    "capture-onnx-graph": {
        **_EVERYWHERE,
        **{flag: alias for flag, alias in _CHECKPOINT.items() if flag != "--task"},
        "-t": Rename("--task"),
        "--use_ort_genai": Switch(("--exporter", "auto"), _TORCH),  # a GenAI folder, which both exporters write
        "--use_model_builder": Switch(_GENAI, _TORCH),
        "--use_dynamo_exporter": Switch(_TORCH, _GENAI),
        "--use_mobius_builder": Refused("that builder is not supported", "use --exporter genai or torch"),
        "--int4_block_size": Rename("--block-size"),
        "--int4_accuracy_level": Rename("--accuracy-level"),
        "--torch_dtype": Rename(
            "--precision", {"float32": ("--precision", "fp32"), "float16": ("--precision", "fp16")}
        ),
        "--conversion_device": Dropped("the graph is made on the CPU", value=True, only=("cpu",)),
        "--exclude_lm_head": Switch(("--lm-head-bits", "16")),
        "--exclude_embeds": Refused("the graph takes token ids", None),
        "--enable_cuda_graph": Refused("the graph is made for the CPU provider"),
        "--extra_mb_options": Refused("options of the builder have flags of their own here"),
        "--fixed_param_dict": Refused("the graph's shapes stay dynamic"),
        "--past_key_value_name": Refused("the cache inputs have the names that ONNX Runtime GenAI expects"),
    },
    "evaluate": {
        **_EVERYWHERE,
        "--model_name_or_path": Rename("--model"),
        "--data_files": Rename("--data"),
        "--max_seq_len": Rename("--seq-len"),
        "--max_samples": Rename("--num-samples"),
    },
    "generate": {
        **_EVERYWHERE,
        "--model_name_or_path": Rename("--model"),
        "--adapter_name": Rename("--adapter"),
        "--max_length": Refused("it counts the prompt too", "use --max-new-tokens"),
    },
    "convert-adapter": {
        **_EVERYWHERE,
        "--model_name_or_path": Rename("--model"),
        "--output_path": Rename("--output"),
        "-a": Rename("--adapter-path"),
        **_ADAPTER,
    },
    "generate-adapter": {
        **_EVERYWHERE,
        **{flag: _CHECKPOINT[flag] for flag in ("--model_name_or_path", "--output_path", "-t", "--task")},
        "--use_ort_genai": Always("what it writes is a folder for ONNX Runtime GenAI"),
        "-a": Rename("--adapter-path"),
        **_ADAPTER,
        "--precision": Dropped(
            "a float model stays float32, a quantized one keeps its codes", value=True, only=("float32", "fp32")
        ),
    },
    "inspect": dict(_EVERYWHERE),
    "tune": {
        **_EVERYWHERE,
        **{flag: _CHECKPOINT[flag] for flag in ("--model_name_or_path", "--output_path")},
        "--data_files": Rename("--data"),
        "--max_seq_len": Rename("--seq-len"),
        "--max_samples": Rename("--num-samples"),
    },
    "algorithms": dict(_EVERYWHERE),
    "backends": dict(_EVERYWHERE),
    "compare": {**_EVERYWHERE, **{flag: _CHECKPOINT[flag] for flag in ("--model_name_or_path", "--output_path")}},
}


@dataclass(frozen=True)
class Rewritten:
    """Arguments in our spelling."""

    args: list[str]
    """What the parser gets."""
    notes: list[str]
    """What was dropped, and why."""


def rewrite(command: str, args: Sequence[str], flags: Mapping[str, bool]) -> Rewritten:
    """Rewrites the arguments that follow the command's name.

    Args:
        command: Name of the subcommand.
        args: What follows it.
        flags: Its own flags, each with whether it takes a value.

    Raises:
        UsageError: a known flag of others that we cannot serve, or a value that it cannot have.
    """
    table = ALIASES.get(command, {})
    args = _without_file_format_name(list(args)) if "--data-name" in flags else list(args)
    if "--use_dynamo_exporter" in args and command == "capture-onnx-graph":
        # they ask for the torch exporter *and* GenAI's configuration, which our torch exporter writes anyway
        args = _without_switch(args, "--use_ort_genai")
    out: list[str] = []
    notes: list[str] = []
    meant: str | None = None
    asked: str | None = None
    keeps_float = False
    at = 0
    while at < len(args):
        word = args[at]
        if word == "--":
            return Rewritten([*_with_rounder(out, meant, asked, keeps_float), *args[at:]], notes)
        at += 1
        name, equals, inline = word.partition("=")
        if name in flags and (name in table or "_" not in name):
            out.append(word)
            if flags[name] and not equals and at < len(args):
                out.append(args[at])  # a value is never a flag, whatever it looks like
                at += 1
            continue
        alias = table.get(name) or _own_spelling(name, flags)
        if alias is None:
            out.append(word)
            continue
        values = [inline] if equals else _values(alias, args[at:])
        at += 0 if equals else len(values)
        if isinstance(alias, Rounder):
            asked = alias.off if _is_false(name, values) else alias.on
            continue
        if isinstance(alias, Rename) and alias.follow and values:
            meant = None if values[0] in alias.values else alias.follow
            keeps_float = meant is None
        out += apply(alias, name, values, command, notes)
    return Rewritten(_with_rounder(out, meant, asked, keeps_float), notes)


def describe(alias: Alias) -> str:
    """What becomes of it, in Markdown."""
    match alias:
        case Refused(why, hint):
            return f"refused: {why}" + (f"; {hint}" if hint else "")
        case Dropped(why, _, only):
            return f"taken{f' with {_or(only)}' if only else ''}, nothing to do: {why}"
        case Always(why):
            return f"taken, bare or with True, nothing to do: {why}"
        case Switch(on, off):
            return f"{_code(on)}; False: {_code(off)}"
        case Rounder(on, off):
            return f"`-a quarot` becomes `-a quarot,{on}`; False: `-a quarot,{off}`"
        case Words(to):
            return f"{_code([to])}, several words joined by commas"
        case Each(to):
            return f"{_code([to])}, once for each word"
        case Setting(key, _):
            return f"`--set {key}=VALUE`"
        case Rename(to, words, _, follow):
            parts = [_code([to])] if to else []
            parts += [f"{word}: {_code(ours)}" for word, ours in list(words.items())[:_SHOWN]]
            parts += [f"`-a quarot` becomes `-a quarot,{follow}`"] if follow else []
            return "; ".join([*parts, "and so on"] if len(words) > _SHOWN else parts)


def _code(words: Sequence[str]) -> str:
    return f"`{' '.join(words)}`" if words else "no flag"


def _or(words: Sequence[str]) -> str:
    return " or ".join(words)


def _own_spelling(name: str, flags: Mapping[str, bool]) -> Alias | None:
    """Our flag written with underscores."""
    own = name.replace("_", "-")
    if not name.startswith("--") or "_" not in name or own not in flags:
        return None
    return Rename(own) if flags[own] else Switch((own,))


def _values(alias: Alias, following: Sequence[str]) -> list[str]:
    """The words after a flag that belong to it."""
    if isinstance(alias, Words | Each):
        end = next((i for i, w in enumerate(following) if w.startswith("-")), len(following))
        return list(following[:end])
    if isinstance(alias, Switch | Rounder | Always):
        return [following[0]] if following and following[0].lower() in ("true", "false") else []
    takes_one = isinstance(alias, Rename | Setting) or (isinstance(alias, Dropped) and alias.value)
    return list(following[:1]) if takes_one else []


def apply(
    alias: Rename | Words | Each | Setting | Switch | Dropped | Always | Refused,
    name: str,
    values: list[str],
    command: str,
    notes: list[str],
) -> list[str]:
    """Our words for another's flag with its values.

    Args:
        alias: What becomes of it.
        name: The flag, or the key of a configuration, as errors call it.
        values: What it was given.
        command: What it was given to, as errors call it.
        notes: Gets what there is to say.

    Raises:
        UsageError: a value that it cannot have, or it cannot be served at all.
    """
    match alias:
        case Refused(why, hint):
            raise UsageError(f"{name} cannot be used with {command}: {why}", hint=hint)
        case Dropped(why, takes_value, only):
            other = [value for value in values if value not in only]
            if takes_value and (other or not values):
                got = repr(other[0]) if other else "nothing"
                raise UsageError(f"{name} takes {_or(only)}, got {got}: {why}", hint=f"leave {name} out")
            notes.append(f"{name} has nothing to do: {why}")
            return []
        case Always(why):
            if _is_false(name, values):
                raise UsageError(f"{name} False cannot be used with {command}: {why}", hint=f"leave {name} out")
            notes.append(f"{name} has nothing to do: {why}")
            return []
        case Switch(on, off):
            return list(off if _is_false(name, values) else on)
        case Words(to):
            return [to, ",".join(w.strip(",") for w in values)] if values else [to]
        case Each(to):
            return [part for word in values for part in (to, word)] or [to]
        case Setting(key, said):
            if not values:
                raise UsageError(f"{name} needs a value", hint=f"write {name} VALUE, or --set {key}=VALUE")
            notes += [said] if said else []
            return ["--set", f"{key}={values[0]}"]
        case Rename(to, words, only):
            if not values:
                if to:
                    return [to]  # the parser says that the value is missing
                raise UsageError(f"{name} needs a value", hint=f"one of {', '.join(words)}")
            if values[0] in words:
                return list(words[values[0]])
            if only:
                raise UsageError(f"unknown {name} {values[0]!r}, {nearest(values[0], words)}")
            return [to, values[0]]


def _is_false(name: str, values: Sequence[str]) -> bool:
    """What a switch carries."""
    if values and values[0].lower() not in ("true", "false"):
        raise UsageError(f"{name} takes True, False or nothing, got {values[0]!r}")
    return bool(values) and values[0].lower() == "false"


def _with_rounder(args: list[str], meant: str | None, asked: str | None, keeps_float: bool) -> list[str]:
    """Adds to a transform alone the rounder that --w_bits means or --w_rtn asks for.

    Raises:
        UsageError: the flags and the algorithm contradict each other.
    """
    if not (meant or asked or keeps_float):
        return args
    if asked and keeps_float:
        raise UsageError("--w_bits 16 leaves weights float, --w_rtn says how to round them", hint="leave one out")
    at = next((i + 1 for i, word in enumerate(args[:-1]) if word in ("-a", "--algorithm")), None)
    at = next((i for i, word in enumerate(args) if word.startswith("--algorithm=")), at)
    chain = None if at is None else find_chain(args[at].removeprefix("--algorithm="))
    rounds = chain is None or chain[-1] is not KEEP_FLOAT
    if keeps_float:
        if rounds:
            raise UsageError("--w_bits 16 leaves weights float: that is quarot alone", hint="add -a quarot")
        return args
    rounder = asked or meant
    if at is not None and not rounds:
        return [*args[:at], f"{args[at]},{rounder}", *args[at + 1 :]]
    if asked and chain is None:
        raise UsageError("--w_rtn says what rounds after quarot", hint=f"write -a quarot,{asked}, or -a {asked}")
    if asked and chain is not None and chain[-1].name != asked:
        raise UsageError(f"--w_rtn asks for {asked}, -a for {chain[-1].name}", hint="leave one out")
    return args


def _without_file_format_name(args: list[str]) -> list[str]:
    """Drops the `json` of `-d json --data_files FILE`: the file's own name says its format."""
    if not any(a.partition("=")[0] in ("--data_files", "--data-files") for a in args):
        return args
    for i, (flag, value) in enumerate(pairwise(args)):
        if flag in ("-d", "--data_name", "--data-name") and value in ("json", "csv", "parquet", "text"):
            return args[:i] + args[i + 2 :]
    return args


def _without_switch(args: list[str], name: str) -> list[str]:
    out: list[str] = []
    skip = False
    for i, word in enumerate(args):
        if skip and word.lower() in ("true", "false"):
            skip = False
            continue
        skip = word == name
        if not skip and not word.startswith(name + "="):
            out.append(args[i])
    return out
