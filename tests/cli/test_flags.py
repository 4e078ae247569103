"""Every field of every options dataclass has a flag with its docstring as help, and every flag reaches its field."""

import dataclasses
import hashlib
from pathlib import Path

import pytest

from quantcli.cli.app import COMMANDS, help_text, parse
from quantcli.cli.command import Request
from quantcli.cli.docs import field_docs
from quantcli.cli.flags import flags_of, parse_size
from quantcli.errors import UsageError
from quantcli.options import (
    CalibrationOptions,
    CaptureOptions,
    ConfigurationFile,
    ConvertAdapterOptions,
    EvaluateOptions,
    ExampleOptions,
    FinetuneOptions,
    GenerateAdapterOptions,
    GenerateOptions,
    GraphEvaluationOptions,
    GraphOptions,
    Override,
    QuantizeOptions,
    SimulationOptions,
)
from quantcli.options.goals import Goal

BASE = {
    "quantize": ["-m", "M", "-o", "O"],
    "capture-onnx-graph": ["-m", "M"],
    "evaluate": ["-m", "M"],
    "finetune": ["-m", "M", "--data-files", "D.jsonl"],
    "convert-adapter": ["-m", "M", "-o", "O", "--adapter-path", "P"],
    "generate": ["-m", "M", "-p", "P"],
    "generate-adapter": ["-m", "M", "-o", "O"],
    "inspect": ["F"],
    "tune": ["-m", "M", "-o", "O"],
    "backends": ["install", "inc"],
    "compare": ["-m", "M", "--with", "ours,gptqmodel"],
    "algorithms": [],
}
COMMAND_OPTIONS = (
    QuantizeOptions,
    CaptureOptions,
    EvaluateOptions,
    FinetuneOptions,
    GenerateOptions,
    GenerateAdapterOptions,
    ConvertAdapterOptions,
)
NESTED = {
    "calibration": CalibrationOptions,
    "simulation": SimulationOptions,
    "examples": ExampleOptions,
    "graph": GraphOptions,
    "pair": GraphEvaluationOptions,
}
SIMULATION = {
    "simulation.a_bits": (["--a-bits", "4"], 4),
    "simulation.k_bits": (["--k-bits", "3"], 3),
    "simulation.v_bits": (["--v-bits", "8"], 8),
    "simulation.a_symmetric": (["--a-bits", "4", "--a-asym"], False),
    "simulation.a_clip_ratio": (["--a-bits", "4", "--a-clip-ratio", "0.5"], 0.5),
    "simulation.kv_symmetric": (["--k-bits", "4", "--kv-sym"], True),
    "simulation.kv_group_size": (["--v-bits", "4", "--kv-group-size", "32"], 32),
    "simulation.kv_clip_ratio": (["--v-bits", "4", "--kv-clip-ratio", "0.5"], 0.5),
}
PASS = Path(__file__).with_name("gptq_pass.json")
# field: words on the command line, value in the options
GIVEN = {
    "quantize": {
        "model": (["--model", "other"], "other"),
        "output": (["--output", "there"], Path("there")),
        "algorithm": (["-a", "rtn"], "rtn"),
        "preset": (["--preset", "best"], "best"),
        "settings": (["--set", "refit=true", "--set", "grid-steps=9"], {"refit": "true", "grid_steps": "9"}),
        "config": (
            ["--config", str(PASS), "-a", "gptq"],
            ConfigurationFile(PASS.name, hashlib.sha256(PASS.read_bytes()).hexdigest()),
        ),
        "bits": (["--bits", "3"], 3),
        "group_size": (["--group-size", "-1"], -1),
        "target_bits": (["--target-bits", "3.5"], 3.5),
        "target_size": (["--target-size", "60MB"], 60_000_000),
        "mixed_bits": (["--target-bits", "3.5", "--mixed-bits", "2,4", "--mixed-bits", "8"], (2, 4, 8)),
        "symmetric": (["--sym"], True),
        "quantize_lm_head": (["--quantize-lm-head"], True),
        "quantize_embeddings": (["--quantize-embeddings"], True),
        "exclude": (["--exclude", "a.*b", "--exclude", "c"], ("a.*b", "c")),
        "overrides": (
            ["--override", "x=bits=8", "--override", "y=sym=true"],
            (Override("x", bits=8), Override("y", symmetric=True)),
        ),
        "format": (["--format", "awq"], "awq"),
        "readers": (["--for", "vllm", "--for", "peft"], ("vllm", "peft")),
        "float_model": (["--float-model", "F"], "F"),
        "kv_cache": (["--kv-cache", "fp8"], "fp8"),
        "activations": (["--activations", "dynamic"], "dynamic"),
        "gguf_type": (["--gguf-type", "Q4_K_M"], "q4_k_m"),
        "backend": (["--backend", "gptqmodel"], "gptqmodel"),
        "timeout": (["--backend", "gptqmodel", "--timeout", "2h"], 7200.0),
        "correct_earlier": (["--correct-earlier"], True),
        "allow_partial": (["--allow-partial"], True),
        "dtype": (["--dtype", "float16"], "float16"),
        "device": (["--device", "cpu"], "cpu"),
        "max_memory": (["--max-memory", "4GB"], 4_000_000_000),
        "trust_remote_code": (["--trust-remote-code"], True),
        "evaluate": (["--evaluate"], True),
        "force": (["--force"], True),
        "dry_run": (["--dry-run"], True),
        **{field: (["--evaluate", *words], value) for field, (words, value) in SIMULATION.items()},
        "calibration.data": (["--data", "file.txt"], "file.txt"),
        "calibration.data_name": (["--data-name", "set"], "set"),
        "calibration.data_split": (["--data-name", "set", "--data-split", "test"], "test"),
        "calibration.text_field": (["--data", "f.jsonl", "--text-field", "body"], "body"),
        "calibration.text_template": (["--data", "f.jsonl", "--text-template", "{a} {b}"], "{a} {b}"),
        "calibration.use_chat_template": (["--data", "f.jsonl", "--use-chat-template"], True),
        "calibration.num_samples": (["--num-samples", "7"], 7),
        "calibration.seq_len": (["--seq-len", "33"], 33),
        "calibration.batch_size": (["--batch-size", "2"], 2),
        "calibration.moe_calibration": (["--moe-calibration", "all"], "all"),
        "calibration.seed": (["--seed", "5"], 5),
        "graph.encoding": (["--encoding", "qdq"], "qdq"),
        "graph.accuracy_level": (["--accuracy-level", "4"], 4),
        "graph.op_types": (["--op-types", "MatMul,Gather", "--op-types", "Gemm"], ("MatMul", "Gather", "Gemm")),
        "graph.nodes_include": (["--nodes-include", "a,b", "--nodes-include", "c"], ("a,b", "c")),
        "graph.nodes_exclude": (["--nodes-exclude", "a.*"], ("a.*",)),
        "graph.quantize_last_matmul": (["--no-quantize-last-matmul"], False),
        "graph.layer_wise": (["--layer-wise"], True),
        "graph.calibration_inputs": (["--calibration-inputs", "x"], Path("x")),
        "graph.image_spec": (["--calibration-inputs", "x", "--image-spec", "size=8x8"], "size=8x8"),
        "graph.user_script": (["--user-script", "s.py", "--data-function", "f"], Path("s.py")),
        "graph.data_function": (["--user-script", "s.py", "--data-function", "f"], "f"),
        "graph.calibration_cache": (["--calibration-cache", "c.json"], Path("c.json")),
        "graph.debug_activations": (["--debug-activations"], True),
        "graph.exclude_worst": (["--exclude-worst", "2"], 2),
        "graph.min_sqnr": (["--min-sqnr", "20"], 20.0),
        "graph.faster": (["--faster"], True),
        "graph.smaller_only": (["--smaller-only"], True),
    },
    "capture-onnx-graph": {
        "model": (["--model", "other"], "other"),
        "output": (["-o", "there"], Path("there")),
        "exporter": (["--exporter", "torch"], "torch"),
        "precision": (["--precision", "int4"], "int4"),
        "task": (["--task", "fill-mask"], "fill-mask"),
        "target_opset": (["--exporter", "torch", "--target-opset", "21"], 21),
        "block_size": (["--precision", "int4", "--block-size", "64"], 64),
        "accuracy_level": (["--accuracy-level", "0"], 0),
        "lm_head_bits": (["--lm-head-bits", "8"], 8),
        "trust_remote_code": (["--trust-remote-code"], True),
        "force": (["--force"], True),
    },
    "evaluate": {
        "model": (["--model", "other"], "other"),
        "reference": (["--reference", "R"], "R"),
        "reference_cache": (["--reference", "R", "--reference-cache", "C"], Path("C")),
        "data": (["--data", "t.txt"], "t.txt"),
        "text_field": (["--data", "t.jsonl", "--text-field", "body"], "body"),
        "num_samples": (["--num-samples", "3"], 3),
        "seq_len": (["--seq-len", "64"], 64),
        "max_kl": (["--reference", "R", "--max-kl", "0.2"], 0.2),
        "max_perplexity_increase": (["--reference", "R", "--max-perplexity-increase", "0.05"], 0.05),
        "speed": (["--no-speed"], False),
        "device": (["--device", "cuda:1"], "cuda:1"),
        **SIMULATION,
        "pair.user_script": (["--user-script", "s.py", "--metric-function", "f"], Path("s.py")),
        "pair.data_function": (["--user-script", "s.py", "--data-function", "f"], "f"),
        "pair.metric_function": (["--user-script", "s.py", "--metric-function", "f"], "f"),
        "pair.lower_is_better": (["--user-script", "s.py", "--metric-function", "f", "--lower-is-better"], True),
        "pair.image_spec": (["--image-spec", "size=8x8"], "size=8x8"),
        "pair.batch_size": (["--batch-size", "4"], 4),
        "pair.min_sqnr": (["--min-sqnr", "20"], 20.0),
        "pair.max_loss": (["--user-script", "s.py", "--metric-function", "f", "--max-loss", "0.1"], 0.1),
        "trust_remote_code": (["--trust-remote-code"], True),
    },
    "finetune": {
        "model": (["--model", "other"], "other"),
        "output": (["-o", "there"], Path("there")),
        "method": (["--method", "qlora"], "qlora"),
        "lora_r": (["--lora-r", "8"], 8),
        "lora_alpha": (["--lora-alpha", "16"], 16.0),
        "lora_dropout": (["--lora-dropout", "0.1"], 0.1),
        "target_modules": (["--target-modules", "q_proj, v_proj"], ("q_proj", "v_proj")),
        "torch_dtype": (["--torch-dtype", "bfloat16"], "bfloat16"),
        "max_steps": (["--max-steps", "30"], 30),
        "num_epochs": (["--num-epochs", "0.5"], 0.5),
        "learning_rate": (["--learning-rate", "1e-3"], 1e-3),
        "batch_size": (["--batch-size", "2"], 2),
        "gradient_accumulation": (["--gradient-accumulation", "4"], 4),
        "warmup": (["--warmup", "10"], 10.0),
        "use_dora": (["--use-dora"], True),
        "init_lora": (["--init-lora", "loftq"], "loftq"),
        "float_model": (["--init-lora", "loftq", "--float-model", "F"], "F"),
        "eval_steps": (["--eval-steps", "5"], 5),
        "early_stopping": (["--early-stopping", "3"], 3),
        "save_steps": (["--save-steps", "10"], 10),
        "resume": (["--resume"], True),
        "settings": (["--set", "weight-decay=0.01"], {"weight_decay": "0.01"}),
        "seed": (["--seed", "7"], 7),
        "copy_base": (["--copy-base"], True),
        "device": (["--device", "cuda:1"], "cuda:1"),
        "trust_remote_code": (["--trust-remote-code"], True),
        "force": (["--force"], True),
        "examples.data_files": (["--data-files", "E.csv"], ("D.jsonl", "E.csv")),
        "examples.data_name": ([], None),
        "examples.data_split": ([], "train"),
        "examples.text_field": (["--text-field", "body"], "body"),
        "examples.text_template": (["--text-template", "{a} {b}"], "{a} {b}"),
        "examples.use_chat_template": (["--use-chat-template"], True),
        "examples.completion_only": (["--text-template", "{a} {b}", "--completion-only"], True),
        "examples.seq_len": (["--seq-len", "64"], 64),
        "examples.max_samples": (["--max-samples", "100"], 100),
        "examples.packing": (["--packing"], True),
        "examples.eval_split": (["--eval-split", "20"], "20"),
    },
    "generate": {
        "model": (["--model", "other"], "other"),
        "prompt": (["--prompt", "hello"], "hello"),
        "adapter": (["--adapter", "tone"], "tone"),
        "use_chat_template": (["--use-chat-template"], True),
        "max_new_tokens": (["--max-new-tokens", "7"], 7),
        "temperature": (["--temperature", "0.5"], 0.5),
        "top_p": (["--temperature", "1", "--top-p", "0.9"], 0.9),
        "seed": (["--temperature", "1", "--seed", "5"], 5),
        "device": (["--device", "cpu"], "cpu"),
        "trust_remote_code": (["--trust-remote-code"], True),
    },
    "generate-adapter": {
        "model": (["--model", "other"], "other"),
        "output": (["--output", "there"], Path("there")),
        "adapters": (["--adapter-path", "a=A", "--adapter-path", "B"], ("a=A", "B")),
        "adapter_format": (["--adapter-format", "npz"], "npz"),
        "only_adapted": (["--only-adapted"], True),
        "trust_remote_code": (["--trust-remote-code"], True),
        "force": (["--force"], True),
    },
    "convert-adapter": {
        "model": (["--model", "other"], "other"),
        "adapter": (["--adapter-path", "L"], Path("L")),
        "output": (["--output", "there"], Path("there")),
        "adapter_format": (["--adapter-format", "npz"], "npz"),
        "force": (["--force"], True),
    },
    "inspect": {"folder": ([], Path("F")), "nodes": (["--nodes"], True)},
    "algorithms": {"name": (["gptq"], "gptq")},
    "backends": {
        "action": ([], "install"),
        "name": ([], "inc"),
        "installer": (["--installer", "pip"], "pip"),
        "torch_index": (["--torch-index", "https://here"], "https://here"),
    },
}


def shared(*prefixes):
    return {field: given for field, given in GIVEN["quantize"].items() if field.startswith(prefixes)}


GIVEN["tune"] = shared("calibration.", "graph.") | {
    "model": (["--model", "other"], "other"),
    "output": (["--output", "there"], Path("there")),
    "space": (["--space", str(PASS)], PASS),
    "predefined": (["--set", "woq"], "woq"),
    "algorithm": (["-a", "gptq"], "gptq"),
    "metric": (["--metric", "kl"], "kl"),
    "goals": (["--goal", "kl<=0.05", "--goal", "size<=60MB"], (Goal.parse("kl<=0.05"), Goal.parse("size<=60MB"))),
    "minimize": (["--minimize", "latency"], "latency"),
    "lower_is_better": (["--metric", "score.py:loss", "--lower-is-better"], True),
    "trials": (["--trials", "7"], 7),
    "timeout": (["--timeout", "1h"], 3600.0),
    "sampler": (["--sampler", "tpe"], "tpe"),
    "stop_at_first": (["--goal", "kl<=0.05", "--stop-at-first"], True),
    "prune": (["--no-prune"], False),
    "eval_data": (["--eval-data", "t.txt"], "t.txt"),
    "eval_samples": (["--eval-samples", "3"], 3),
    "eval_seq_len": (["--eval-seq-len", "64"], 64),
    "ray": (["--ray", "local"], "local"),
    "ray_cpus": (["--ray", "local", "--ray-cpus", "2"], 2.0),
    "ray_gpus": (["--ray", "local", "--ray-gpus", "0.5"], 0.5),
    "ray_memory": (["--ray", "local", "--ray-memory", "4GB"], 4_000_000_000),
    "device": (["--device", "cpu"], "cpu"),
    "trust_remote_code": (["--trust-remote-code"], True),
    "force": (["--force"], True),
    "dry_run": (["--dry-run"], True),
}
GIVEN["compare"] = shared("calibration.") | {
    "model": (["--model", "other"], "other"),
    "entrants": (["--with", "autoawq"], ("ours", "gptqmodel", "autoawq")),
    "output": (["-o", "there"], Path("there")),
    "algorithm": (["-a", "awq"], "awq"),
    "bits": (["--bits", "3"], 3),
    "group_size": (["--group-size", "32"], 32),
    "symmetric": (["--sym"], True),
    "eval_data": (["--eval-data", "t.txt"], "t.txt"),
    "eval_samples": (["--eval-samples", "3"], 3),
    "timeout": (["--timeout", "90s"], 90.0),
    "max_memory": (["--max-memory", "4GB"], 4_000_000_000),
    "trust_remote_code": (["--trust-remote-code"], True),
    "force": (["--force"], True),
}


def leaves(owner, prefix=""):
    for field in dataclasses.fields(owner):
        if field.name in NESTED:
            yield from leaves(NESTED[field.name], f"{field.name}.")
        else:
            yield prefix + field.name


def request(*argv):
    parsed = parse(argv)
    assert isinstance(parsed, Request)
    return parsed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_is_listed_here(name):
    assert set(GIVEN[name]) == set(leaves(COMMANDS[name].options))


@pytest.mark.parametrize(("name", "field"), [(n, f) for n, fields in GIVEN.items() for f in fields])
def test_the_flag_reaches_its_field_and_no_other(name, field):
    words, value = GIVEN[name][field]
    untouched, given = request(name, *BASE[name]).options, request(name, *BASE[name], *words).options
    for path in leaves(COMMANDS[name].options):
        before, after = get(untouched, path), get(given, path)
        if path == field:
            assert after == value
            assert type(after) is type(value)
        elif not any(flag in words for flag in spellings(name, path)):
            assert after == before


def get(options, path):
    for step in path.split("."):
        options = getattr(options, step)
    return options


def spellings(name, path):
    return next(f.names for f in flags_of(COMMANDS[name]) if ".".join(f.path) == path)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_docstring_of_the_field(name):
    text = " ".join(help_text(name, 100).split())
    for flag in flags_of(COMMANDS[name]):
        assert flag.help, f"{name}: {flag.name} has no docstring"
        squeezed = text.replace("- ", "-")
        assert flag.help.replace("- ", "-") in squeezed, flag.name


@pytest.mark.parametrize(
    "owner", [*COMMAND_OPTIONS, CalibrationOptions, ExampleOptions, SimulationOptions, GraphOptions, Override]
)
def test_every_options_field_has_a_docstring(owner):
    assert set(field_docs(owner)) == {f.name for f in dataclasses.fields(owner)}


def test_defaults_are_those_of_the_dataclass():
    assert request("quantize", "-m", "M", "-o", "O").options == QuantizeOptions("M", Path("O"))
    assert request("capture-onnx-graph", "-m", "M").options == CaptureOptions("M")
    assert request("evaluate", "-m", "M").options == EvaluateOptions("M")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_speak_json_quietly_or_at_length(name):
    talk = request(name, *BASE[name], "--json", "-q").talk
    assert (talk.json, talk.quiet, talk.verbose) == (True, True, False)
    assert request(name, *BASE[name], "-v").talk.verbose
    with pytest.raises(UsageError, match="--quiet and --verbose exclude each other"):
        parse([name, *BASE[name], "-q", "-v"])


def test_examples_come_from_the_hub_or_from_files():
    examples = request("finetune", "-m", "M", "-d", "json", "--data_files", "a.jsonl,b.csv").options.examples
    assert (examples.data_files, examples.data_name) == (("a.jsonl", "b.csv"), None)
    examples = request("finetune", "-m", "M", "--data-name", "org/set", "--data-split", "test").options.examples
    assert (examples.data_name, examples.data_split) == ("org/set", "test")
    for words, message in [
        ([], "--data-files and --data-name are both missing"),
        (["--data-name", "n", "--data-files", "f.csv"], "--data-files and --data-name exclude each other"),
        (["--data-files", "f.csv", "--data-split", "test"], "--data-split would have no effect on files"),
        (["--data-files", "f.csv", "--completion-only"], "--completion-only needs to know what the completion is"),
    ]:
        with pytest.raises(UsageError, match=message):
            parse(["finetune", "-m", "M", *words])


def test_bits_to_mix_are_whole_numbers():
    with pytest.raises(UsageError, match=r"--mixed-bits '3,four' are not whole numbers"):
        parse(["quantize", "-m", "M", "-o", "O", "--target-bits", "3.5", "--mixed-bits", "3,four"])


def test_shorthands_are_settings():
    options = request("quantize", "-m", "M", "-o", "O", "--damp-percent", "0.05", "--desc-act").options
    assert options.settings == {"damp_percent": "0.05", "order": "desc_act"}
    with pytest.raises(UsageError, match=r"damp_percent is given twice: '0\.1' and '0\.05'"):
        parse(["quantize", "-m", "M", "-o", "O", "--damp-percent", "0.05", "--set", "damp_percent=0.1"])


def test_shorthands_name_options_that_gptq_has():
    from quantcli.algorithms import find, make_options

    made = make_options(find("gptq"), {"damp_percent": "0.05", "order": "desc_act"})
    assert (made.damp_percent, made.order) == (0.05, "desc_act")


@pytest.mark.parametrize("word", ["damp", "=1", "damp="])
def test_settings_that_are_not_key_and_value(word):
    with pytest.raises(UsageError, match="not of the form KEY=VALUE"):
        parse(["quantize", "-m", "M", "-o", "O", "--set", word])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("4g", 4 * 10**9),
        ("500 MB", 5 * 10**8),
        ("1.5GiB", 3 * 2**29),
        ("2KiB", 2048),
        ("12345", 12345),
        ("1T", 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4XB", "-1GB", "4iB", "0", "1e9", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError, match="size"):
        parse_size(text)
