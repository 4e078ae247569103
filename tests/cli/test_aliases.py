"""Other people's command lines parse as written."""

import shlex
import subprocess
from pathlib import Path

import pytest

from quantcli.algorithms import find_chain, make_steps
from quantcli.cli.aliases import ALIASES, Each, Refused, Rename, Switch, Words
from quantcli.cli.app import COMMANDS, build, parse
from quantcli.errors import UsageError

QUANTIZE = r"""
quantcli quantize \
    --model_name_or_path meta-llama/Llama-3.2-1B-Instruct \
    --algorithms awq \
    --output_path quantized-model \
    --log_level 1
"""
CAPTURE = r"""
quantcli capture-onnx-graph \
    --model_name_or_path quantized-model/model \
    --use_ort_genai True \
    --log_level 1 \
"""


def shell_words(block):
    """What a shell hands to the command, line continuations and all."""
    script = 'quantcli() { printf "%s\\0" "$@"; }\n' + block
    printed = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True).stdout
    return printed.split("\0")[:-1]


def options(command, words):
    return parse([command, *shlex.split(words)]).options


def quantize(words):
    return options("quantize", f"-m M -o O {words}")


def capture(words):
    return options("capture-onnx-graph", f"-m M {words}")


def test_documented_quantize_block_as_written():
    made = parse(shell_words(QUANTIZE)).options
    assert (made.model, made.algorithm) == ("meta-llama/Llama-3.2-1B-Instruct", "awq")
    assert made.output == Path("quantized-model")


def test_documented_capture_block_as_written_with_its_dangling_backslash():
    made = parse(shell_words(CAPTURE)).options
    assert (made.model, made.exporter, made.output) == ("quantized-model/model", "auto", Path("onnx-model"))


FINETUNE = r"""
quantcli finetune \
        --model_name_or_path quantized-model/model \
        --trust_remote_code \
        --output_path finetuned-model \
        --data_name xxyyzzz/phrase_classification \
        --text_template "<|start_header_id|>user<|end_header_id|>\n{phrase}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n{tone}" \
        --method qlora \
        --max_steps 30 \
        --log_level 1 \
"""  # noqa: E501


def test_documented_finetune_block_as_written():
    made = parse(shell_words(FINETUNE)).options
    assert (made.model, made.output) == ("quantized-model/model", Path("finetuned-model"))
    assert (made.method, made.max_steps, made.trust_remote_code) == ("qlora", 30, True)
    assert made.examples.data_name == "xxyyzzz/phrase_classification"
    assert made.examples.text_template.endswith(r"<|end_header_id|>\n{tone}")


def finetune(words):
    return parse(shell_words(f"quantcli finetune -m M --data_files D.jsonl {words}")).options


def test_finetune_flags_of_others():
    made = finetune(
        "--lora_r 64 --lora_alpha 16 --target_modules q_proj,v_proj --torch_dtype bfloat16 --max_seq_len 1024 "
        "--text_field text --max_samples 256 --eval_split held.jsonl --per_device_train_batch_size 2 "
        "--gradient_accumulation_steps 8 --num_train_epochs 2 --warmup_ratio 0.1 --learning_rate 1e-4 "
        "--use_dora --disable_telemetry --log_level 3"
    )
    assert (made.lora_r, made.lora_alpha, made.target_modules) == (64, 16, ("q_proj", "v_proj"))
    assert (made.torch_dtype, made.batch_size, made.gradient_accumulation) == ("bfloat16", 2, 8)
    assert (made.num_epochs, made.warmup, made.learning_rate, made.use_dora) == (2, 0.1, 1e-4, True)
    examples = made.examples
    assert (examples.seq_len, examples.text_field, examples.max_samples) == (1024, "text", 256)
    assert examples.eval_split == "held.jsonl"


def test_trainer_arguments_of_others_become_settings():
    made = finetune("--weight_decay 0.01 --lr_scheduler_type=cosine --gradient_checkpointing True --optim adafactor")
    assert made.settings == {
        "weight_decay": "0.01",
        "lr_scheduler_type": "cosine",
        "activation_checkpointing": "true",
        "optim": "adafactor",
    }
    assert finetune("--gradient_checkpointing False").settings == {}
    with pytest.raises(UsageError, match="--weight_decay needs a value"):
        finetune("--weight_decay")
    with pytest.raises(UsageError, match="unknown flag --weight_decays"):
        finetune("--weight_decays 1")


def test_several_algorithms_are_joined():
    assert quantize("--algorithms quarot gptq --bits 4").algorithm == "quarot,gptq"
    assert quantize("--algorithms quarot, gptq").algorithm == "quarot,gptq"
    assert quantize("--algorithms=rtn").algorithm == "rtn"


@pytest.mark.parametrize(
    ("level", "talk"), [(0, (False, True)), (1, (False, False)), (2, (True, False)), (4, (True, False))]
)
def test_log_levels(level, talk):
    said = parse(["quantize", "-m", "M", "-o", "O", "--log_level", str(level)]).talk
    assert (said.quiet, said.verbose) == talk


def test_log_level_out_of_range():
    with pytest.raises(UsageError, match="unknown --log_level '7'"):
        quantize("--log_level 7")
    with pytest.raises(UsageError, match="--log_level needs a value"):
        quantize("--log_level")


@pytest.mark.parametrize("words", ["-t feature-extraction", "--task feature-extraction"])
def test_tasks(words):
    assert capture(words).task == "feature-extraction"


@pytest.mark.parametrize(
    ("words", "exporter"),
    [
        ("--use_ort_genai", "auto"),
        ("--use_ort_genai True", "auto"),
        ("--use_ort_genai=true", "auto"),
        ("--use_ort_genai False", "torch"),
        ("--use_model_builder", "genai"),
        ("--use_dynamo_exporter", "torch"),
        ("--use_dynamo_exporter --use_ort_genai", "torch"),
        ("--use_ort_genai True --use_dynamo_exporter", "torch"),
        ("", "auto"),
    ],
)
def test_exporters(words, exporter):
    made = capture(words)
    assert (made.exporter, made.model) == (exporter, "M")


def test_switches_with_words_leave_positions_alone():
    assert quantize("--trust_remote_code True --bits 3").trust_remote_code
    assert not quantize("--trust_remote_code False").trust_remote_code
    assert quantize("--trust_remote_code --bits 3").bits == 3
    with pytest.raises(UsageError, match="takes True, False or nothing, got 'maybe'"):
        quantize("--trust_remote_code=maybe")


def test_capture_figures():
    made = capture("--int4_block_size 64 --int4_accuracy_level 4 --target_opset 21 --precision int4 --exclude_lm_head")
    assert (made.block_size, made.accuracy_level, made.target_opset, made.lm_head_bits) == (64, 4, 21, 16)
    assert capture("--torch_dtype float16").precision == "fp16"


def test_calibration_spellings():
    made = quantize("--data_name set --split test --text_field body --max_seq_len 99 --max_samples 8 --batch_size 2")
    chosen = made.calibration
    assert (chosen.data_name, chosen.data_split, chosen.text_field) == ("set", "test", "body")
    assert (chosen.seq_len, chosen.num_samples, chosen.batch_size) == (99, 8, 2)
    assert quantize("-d set").calibration.data_name == "set"


def test_file_format_as_data_name():
    chosen = quantize("-d json --data_files train.json").calibration
    assert (chosen.data, chosen.data_name) == ("train.json", None)
    with pytest.raises(UsageError, match="--data and --data-name exclude each other"):
        quantize("-d other --data_files train.json")


def test_precision_is_bits():
    assert quantize("--precision int8").bits == 8
    assert quantize("--precision uint4").bits == 4
    with pytest.raises(UsageError, match="unknown --precision 'int44', did you mean 'int4'"):
        quantize("--precision int44")


def test_every_flag_with_underscores():
    for name, command in build().commands.items():
        for param in command.params:
            for own in (o for o in param.opts if o.startswith("--") and "-" in o[2:]):
                theirs = "--" + own[2:].replace("-", "_")
                alias = ALIASES[name].get(theirs)
                assert not isinstance(alias, Refused), f"{name} {theirs}"
    made = quantize("--group_size 32 --quantize_lm_head --num_samples=3 --dry_run")
    assert (made.group_size, made.quantize_lm_head, made.calibration.num_samples, made.dry_run) == (32, True, 3, True)


def test_every_alias_leads_to_a_flag_that_exists():
    for name, table in ALIASES.items():
        known = {o for p in build().commands[name].params for o in (*p.opts, *p.secondary_opts)}
        for theirs, alias in table.items():
            match alias:
                case Words(to) | Each(to):
                    targets = [to]
                case Switch(on, off):
                    targets = [words[0] for words in (on, off) if words]
                case Rename(to, values, _):
                    targets = [to] * bool(to) + [words[0] for words in values.values() if words]
                case _:
                    targets = []
            assert set(targets) <= known, f"{name} {theirs}"
            assert theirs not in known - {"--precision"}, f"{name} {theirs} hides a flag of ours"


def test_every_command_has_aliases():
    assert set(ALIASES) == set(COMMANDS)


@pytest.mark.parametrize("command", ["quantize", "capture-onnx-graph"])
def test_what_cannot_be_served_is_refused_with_its_reason(command):
    with pytest.raises(UsageError, match=r"--adapter_path cannot be used with .*: it takes a model without adapter"):
        parse([command, "-m", "M", "-o", "O", "--adapter_path", "A"])


def test_what_is_so_anyway_is_taken_and_said(capsys):
    assert quantize("--disable_telemetry --implementation olive --task text-generation").weight_bits == 4
    said = capsys.readouterr().err
    assert "note: --disable_telemetry has nothing to do: quantcli sends nothing anywhere" in said
    with pytest.raises(UsageError, match="--implementation takes olive or ort, got 'inc'"):
        quantize("--implementation inc")


def test_values_are_never_rewritten():
    made = parse(["quantize", "-m", "M", "-o", "O", "--data", "f", "--text-template", "--use_ort_genai {a}"]).options
    assert made.calibration.text_template == "--use_ort_genai {a}"
    assert parse(["quantize", "-m", "--dry_run", "-o", "O"]).options.model == "--dry_run"


@pytest.mark.parametrize(
    ("words", "algorithm", "bits"),
    [
        ("-a quarot --w_bits 4 --w_rtn True --rotate True", "quarot,rtn", 4),
        ("--algorithms quarot --w_bits 3 --w_rtn", "quarot,rtn", 3),
        ("--algorithm=quarot --w_rtn False", "quarot,gptq", 4),
        ("-a quarot --w_bits 8", "quarot,gptq", 8),
        ("-a quarot --w_bits 16", "quarot", 4),
        ("-a quarot,awq --w_bits 3", "quarot,awq", 3),
        ("-a rtn --w_rtn True", "rtn", 4),
        ("--w_bits 3", None, 3),
    ],
)
def test_quarot_as_its_pass_was_configured(words, algorithm, bits):
    made = quantize(words)
    assert (made.algorithm, made.weight_bits) == (algorithm, bits)


def test_quarot_with_bits_of_activations_and_cache():
    made = quantize("-a quarot --w_bits 4 --w_rtn True --a_bits 4 --k_bits 4 --v_bits 4 --evaluate --set online=true")
    assert (made.simulation.a_bits, made.simulation.k_bits, made.simulation.v_bits) == (4, 4, 4)
    with pytest.raises(UsageError, match="simulated when a result is evaluated") as caught:
        quantize("-a quarot --w_bits 4 --w_rtn True --a_bits 4")
    assert "--evaluate" in caught.value.hint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-a quarot --w_bits 16 --w_rtn True", "--w_bits 16 leaves weights float"),
        ("-a gptq --w_bits 16", "that is quarot alone"),
        ("--w_rtn True", "what rounds after quarot"),
        ("-a quarot,gptq --w_rtn True", "asks for rtn, -a for gptq"),
        ("-a quarot --rotate False", "--rotate takes True"),
        ("-a quarot --w_rtn=maybe", "--w_rtn takes True, False or nothing"),
    ],
)
def test_quarot_configurations_that_contradict_themselves(words, message):
    with pytest.raises(UsageError, match=message):
        quantize(words)


GENERATE_ADAPTER = r"""
quantcli generate-adapter \
    --model_name_or_path finetuned-model/model \
    --adapter_path finetuned-model/adapter \
    --use_ort_genai \
    --output_path adapter-onnx \
    --log_level 1
"""


@pytest.mark.parametrize("more", ["", " --use_ort_genai True --adapter_type lora --adapter_format onnx_adapter"])
def test_documented_generate_adapter_block_as_written(more):
    made = parse([*shell_words(GENERATE_ADAPTER), *shlex.split(more)]).options
    assert (made.model, made.adapters) == ("finetuned-model/model", ("finetuned-model/adapter",))
    assert (made.output, made.adapter_format) == (Path("adapter-onnx"), "onnx_adapter")


def test_flags_of_adapters():
    made = options("generate-adapter", "-m M -o O -a A --adapter_format numpy --precision float32")
    assert (made.adapters, made.adapter_format) == (("A",), "npz")
    for words in ("--use_ort_genai False", "--adapter_type loha", "--adapter_format pt", "--precision float16"):
        with pytest.raises(UsageError):
            options("generate-adapter", f"-m M -o O {words}")
    made = options("convert-adapter", "-m M --output_path O --adapter_path A --adapter_format numpy")
    assert (made.adapter, made.adapter_format) == (Path("A"), "npz")


def test_arguments_of_weight_only_quantization_elsewhere(capsys):
    made = quantize(
        "-a gptq --weight_bits 4 --weight_group_size 32 --weight_sym sym --accuracy_level 4 --percdamp 0.05 "
        "--mse False --actorder False --block_size 64 --perchannel True --providers CPUExecutionProvider "
        "--layer_wise_quant True --quant_last_matmul False --nodes_to_exclude a,b c "
        "--op_types_to_quantize MatMul Gather --weight_dtype int"
    )
    assert (made.bits, made.group_size, made.symmetric) == (4, 32, True)
    assert made.settings == {"damp_percent": "0.05", "grid": "minmax", "order": "none", "block_size": "64"}
    assert make_steps(find_chain("gptq"), made.settings)[0].settings.block_size == 64
    graph = made.graph
    assert (graph.accuracy_level, graph.quantize_last_matmul, graph.layer_wise) == (4, False, True)
    assert not quantize("-a gptq --layer_wise_quant False").graph.layer_wise
    assert (graph.nodes_exclude, graph.op_types) == (("a,b", "c"), ("MatMul", "Gather"))
    said = capsys.readouterr().err
    assert "note: --block_size is how many columns gptq takes at a time; those that share a scale: --group-size" in said
    assert "note: --providers has nothing to do: graphs are run on the CPU" in said
    assert quantize("-a awq --enable_auto_scale True --enable_mse_search True").algorithm == "awq"
    assert quantize("-a rtn --ratios 0.9").settings == {"clip_ratio": "0.9"}
    assert quantize("--use_qdq_encoding").graph.encoding == "qdq"
    assert quantize("--actorder True --mse True").settings == {"order": "static", "grid": "weighted"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--perchannel False", "every row has scales of its own"),
        ("--enable_auto_scale False", "leave awq out"),
        ("--enable_mse_search False", "-a awq,rtn does not"),
        ("--providers CUDAExecutionProvider", "graphs are run on the CPU"),
        ("--percdamp", "--percdamp needs a value"),
        ("--weight_sym both", "unknown --weight_sym 'both'"),
    ],
)
def test_arguments_elsewhere_that_ask_for_what_is_not_here(words, message):
    with pytest.raises(UsageError, match=message):
        quantize(words)


def test_arguments_of_integer_graphs_in_other_tools():
    made = quantize(
        "--quant_mode static --quant_format QOperator --weight_type QInt8 --act_precision uint8 --per_channel True"
        " --reduce_range True --calibrate_method Percentile --nodes_to_exclude a b --op_types_to_quantize Conv Gemm"
        " --quant_preprocess True --user_script user_script.py --dataloader_func create --implementation ort"
    )
    assert made.algorithm == "static" and made.graph.encoding == "qoperator"
    assert made.settings == {
        "weight_type": "int8", "activation_type": "uint8", "per_channel": "true", "reduce_range": "true",
        "calibrate_method": "percentile",
    }  # fmt: skip
    assert made.graph.nodes_exclude == ("a", "b") and made.graph.op_types == ("Conv", "Gemm")
    assert made.graph.user_script == Path("user_script.py") and made.graph.data_function == "create"
    assert quantize("--activation_type QUInt16 --per_channel False").settings == {"activation_type": "uint16"}
    made = quantize(
        "--algorithms static --prepare_qnn_config True --fuse_layernorm --inputs_to_make_channel_last x z"
        " --outputs_to_make_channel_last y"
    )
    assert made.settings == {
        "preprocess": "qnn", "fuse_layernorm": "true", "inputs_to_make_channel_last": "x,z",
        "outputs_to_make_channel_last": "y",
    }  # fmt: skip
    assert quantize("--preprocess qnn --prepare_qnn_config").settings == {"preprocess": "qnn"}
    for words in ("--data_config calib", "--qnn_extra_options {}"):
        with pytest.raises(UsageError, match="cannot be used with quantize"):
            quantize(words)
