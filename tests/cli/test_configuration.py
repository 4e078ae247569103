"""`quantize --config`: files of all shapes, each key of the table, flags beside the file, and files that cannot be."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantcli.algorithms import find_chain, make_steps
from quantcli.cli import app
from quantcli.cli.aliases import Dropped, Refused, Rename
from quantcli.cli.app import parse
from quantcli.cli.command import Request
from quantcli.cli.configuration.keys import Data, Missing, Nested, Together, Variants
from quantcli.cli.configuration.passes import OTHER_TYPES, PASSES
from quantcli.cli.configuration.workflows import DATA, INPUT_MODEL, SYSTEM, WORKFLOW
from quantcli.errors import UsageError

ALL = {
    f"{name}:{chosen}" if chosen else name: (variant, {"type": name} | ({spec.key: chosen} if chosen else {}))
    for name, spec in PASSES.items()
    for chosen, variant in (spec.passes.items() if isinstance(spec, Variants) else [("", spec)])
}
"""Every pass of the table, variants one by one, with the object that names it."""


@pytest.fixture
def options(tmp_path):
    """Options of a configuration, which is JSON values or text, and of flags beside it."""

    def read(config, flags="", model="-m M -o O"):
        path = tmp_path / "pass.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        made = parse(["quantize", *shlex.split(model), "--config", str(path), *shlex.split(flags)])
        assert isinstance(made, Request)
        return made.options

    return read


def refused(config, options, flags=""):
    with pytest.raises(UsageError) as caught:
        options(config, flags)
    assert caught.value.hint, caught.value
    assert "\n" not in caught.value.message
    return caught.value.message


def test_one_pass(options):
    made = options({"type": "GptqQuantizer", "bits": 3, "group_size": 32, "sym": True, "damp_percent": 0.05})
    assert (made.algorithm, made.bits, made.group_size, made.symmetric) == ("gptq", 3, 32, True)
    assert made.settings == {"damp_percent": "0.05"}


def test_the_file_is_kept_by_name_and_digest(options, tmp_path):
    made = options({"type": "Rtn"})
    assert made.config.name == "pass.json"
    assert made.config.sha256 == hashlib.sha256((tmp_path / "pass.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "text",
    [
        '{"type": "Rtn", "bits": 3}',
        '{"type": "rtn", "config": {"bits": 3}}',
        '\ufeff{"type": "Rtn", // the name of it\n "bits": 3}',
        '/* of\n two lines */ "rtn": {"type": "Rtn", "bits": 3 /* no // comment */},\n',
        '{"a pass": {"type": "Rtn", "bits": 3}}',
        '{"passes": {"q": {"type": "Rtn", "bits": 3}}}',
        '{"passes": {"q": [{"type": "Rtn", "bits": [3]}]}}',
    ],
)
def test_shapes_of_files(text, options):
    made = options(text)
    assert (made.algorithm, made.bits) == ("rtn", 3)


def test_slashes_in_strings_are_no_comments(options):
    made = options('"q": {"type": "OnnxHqqQuantization", "nodes_to_exclude": ["/lm_head//MatMul", "a\\"/*b*/"]} // end')
    assert made.graph.nodes_exclude == ("^/lm_head//MatMul$", '^a"/\\*b\\*/$')


def test_defaults(options):
    said = {"type": "Gptq", "bits": "DEFAULT_VALUE", "group_size": None, "overrides": {}, "modules_to_not_convert": []}
    made = options(said)
    assert (made.bits, made.group_size, made.exclude, made.overrides) == (None, None, (), ())


@pytest.mark.parametrize(
    ("keys", "order"),
    [
        ({"desc_act": True}, "desc_act"),
        ({"desc_act": False}, "dynamic"),
        ({"desc_act": True, "static_groups": True}, "static"),
        ({"desc_act": False, "static_groups": True}, "none"),
        ({"static_groups": True, "desc_act": None}, "none"),
        ({}, None),
    ],
)
def test_order_of_gptq(keys, order, options):
    assert options({"type": "GptqQuantizer", **keys}).settings.get("order") == order


def test_layers_by_name(options):
    made = options(
        {
            "type": "Gptq",
            "modules_to_not_convert": ["lm_head", "mlp.gate"],
            "overrides": {"layers.0.mlp": {"bits": 8, "symmetric": True}, "re:o_proj$": {"group_size": 32}},
        }
    )
    assert made.exclude == ("lm_head", r"mlp\.gate")
    first, second = made.overrides
    assert (first.pattern, first.bits, first.symmetric) == (r"layers\.0\.mlp", 8, True)
    assert (second.pattern, second.group_size, second.bits) == ("o_proj$", 32, None)


@pytest.mark.parametrize(
    ("keys", "algorithm", "bits"),
    [
        ({"rotate_mode": "random"}, "quarot", None),
        ({"w_bits": 4, "w_rtn": True}, "quarot,rtn", 4),
        ({"w_bits": 3, "w_rtn": False}, "quarot,gptq", 3),
        ({"w_bits": 4, "w_gptq": True}, "quarot,gptq", 4),
        ({"w_bits": 16}, "quarot", None),
    ],
)
def test_quarot(keys, algorithm, bits, options):
    made = options({"type": "QuaRot", **keys})
    assert (made.algorithm, made.bits, made.evaluate) == (algorithm, bits, False)


def test_quarot_that_rounds_activations_rotates_online_and_evaluates(options):
    made = options({"type": "QuaRot", "w_bits": 16, "a_bits": 8, "k_bits": 4, "k_groupsize": 32, "v_bits": 16})
    assert (made.simulation.a_bits, made.simulation.k_bits, made.simulation.kv_group_size) == (8, 4, 32)
    assert (made.algorithm, made.evaluate, made.settings) == ("quarot", True, {"online": "true"})
    assert options({"type": "QuaRot", "w_bits": 4, "a_bits": 16}).evaluate is False
    made = options({"type": "QuaRot", "w_bits": 4, "a_bits": 4}, "--set online=false --a-bits 8")
    assert (made.settings, made.simulation.a_bits) == ({"online": "false"}, 8)


@pytest.mark.parametrize(
    ("config", "algorithm", "more"),
    [
        ({"type": "OnnxQuantization"}, "static", {}),
        ({"type": "OnnxDynamicQuantization", "precision": "int8"}, "dynamic", {"weight_type": "int8"}),
        ({"type": "OnnxQuantization", "quant_mode": "dynamic"}, "dynamic", {}),
        ({"type": "OnnxStaticQuantization", "activation_type": "QUInt16"}, "static", {"activation_type": "uint16"}),
        ({"type": "IncDynamicQuantization", "quant_format": "QOperator"}, "dynamic", {}),
        ({"type": "IncQuantization", "approach": "weight_only", "weight_only_config": {"algorithm": "AWQ"}}, "awq", {}),
        ({"type": "IncStaticQuantization", "approach": "weight_only"}, "rtn", {}),
        ({"type": "NVModelOptQuantization", "calibration_method": "awq_clip"}, "kquant", {}),
        ({"type": "OnnxMatMul4Quantizer", "algorithm": "HQQ", "block_size": 32}, "hqq", {}),
        ({"type": "OnnxBnb4Quantization", "precision": "fp4"}, "fp4", {}),
        ({"type": "AimetQuantization", "techniques": [], "precision": "int8"}, "static", {"weight_type": "int8"}),
    ],
)  # fmt: skip
def test_types_of_several_algorithms(config, algorithm, more, options):
    made = options(config)
    assert (made.algorithm, made.settings) == (algorithm, more)


def test_passes_in_a_row(options):
    passes = {"rotate": {"type": "QuaRot", "rotate_mode": "random"}, "round": {"type": "GptqQuantizer", "bits": 3}}
    made = options({"passes": passes})
    assert (made.algorithm, made.bits, made.settings) == ("quarot,gptq", 3, {"rotate_mode": "random"})
    made = options(json.dumps(passes)[1:-1])
    assert made.algorithm == "quarot,gptq"
    passes = {"a": {"type": "SpinQuant"}, "b": {"type": "AutoAWQQuantizer", "bits": 3}, "c": {"type": "Gptq"}}
    assert options({"passes": passes}).algorithm == "spinquant,awq,gptq"


WORKFLOW_FILE = {
    "input_model": {"type": "HfModel", "model_path": "models/tiny", "load_kwargs": {"trust_remote_code": False}},
    "systems": {
        "local": {
            "type": "LocalSystem",
            "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
        }
    },
    "data_configs": [
        {
            "name": "wiki",
            "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "json", "data_files": "wiki.jsonl", "split": "train"},
            "pre_process_data_config": {"text_cols": ["body"], "max_seq_len": 256, "max_samples": 32},
            "dataloader_config": {"batch_size": 2},
        }
    ],
    "passes": {"gptq": {"type": "GptqQuantizer", "data_config": "wiki", "disable_search": True}},
    "host": "local",
    "target": "local",
    "output_dir": "made",
    "log_severity_level": 0,
    "no_artifacts": True,
}  # fmt: skip


def test_a_whole_workflow(options, tmp_path, capsys):
    made = options(WORKFLOW_FILE, model="")
    assert (made.model, made.output, made.algorithm) == ("models/tiny", Path("made"), "gptq")
    chosen = made.calibration
    assert (chosen.data, chosen.data_name, chosen.text_field) == ("wiki.jsonl", None, "body")
    assert (chosen.seq_len, chosen.num_samples, chosen.batch_size) == (256, 32, 2)
    said = capsys.readouterr().err
    assert 'pass.json: "host", "target", "type" have nothing to do: it runs where it is called' in said
    assert "note: pass.json says --model models/tiny --output made --verbose -a gptq" in said
    assert options(WORKFLOW_FILE, "-q", model="").model == "models/tiny"
    assert capsys.readouterr().err == ""


def test_a_graph_in_a_folder_and_data_of_a_script(options):
    config = {
        "input_model": {"type": "ONNXModel", "config": {"model_path": "graphs", "onnx_file_name": "cnn.onnx"}},
        "data_configs": {
            "calib": {
                "user_script": "user_script.py",
                "dataloader_config": {"type": "create", "params": {"batch_size": 4}},
            }
        },
        "passes": {"q": {"type": "OnnxStaticQuantization", "data_config": "calib"}},
    }  # fmt: skip
    made = options(config, model="-o O")
    assert made.model == "graphs/cnn.onnx"
    assert (made.graph.user_script, made.graph.data_function) == (Path("user_script.py"), "create")
    assert made.calibration.batch_size == 4


def test_data_in_place_of_a_name(options):
    data = {"name": "d", "load_dataset_config": {"params": {"data_name": "org/set", "split": "test"}}}
    made = options({"type": "SpinQuant", "data_config": data})
    assert (made.calibration.data_name, made.calibration.data_split) == ("org/set", "test")


def test_flags_win(options, capsys):
    config = {"type": "GptqQuantizer", "bits": 3, "sym": True, "desc_act": True, "damp_percent": 0.05}
    made = options(config, "--bits 2 --asym --damp-percent 0.1 --set gptq.order=none")
    assert (made.bits, made.symmetric) == (2, False)
    assert made.settings == {"damp_percent": "0.1", "gptq.order": "none"}
    assert options(config, "--target-bits 3.5").bits is None
    made = options({"type": "Gptq", "modules_to_not_convert": ["a"]}, "--exclude b")
    assert made.exclude == ("b",)
    capsys.readouterr()
    made = options(config, "-a rtn")
    assert (made.algorithm, made.bits, made.settings) == ("rtn", 3, {})
    assert "--set damp_percent=0.05 is left out: it is not of -a rtn" in capsys.readouterr().err
    assert options(config, "--preset best").preset == "best"


def test_flags_of_data_win(options, capsys):
    made = options(WORKFLOW_FILE, "--data other.txt --num-samples 4")
    chosen = made.calibration
    assert (chosen.data, chosen.text_field, chosen.num_samples, chosen.seq_len) == ("other.txt", None, 4, 256)
    assert made.model == "M"
    assert '"input_model" is not read, --model is given' in capsys.readouterr().err
    static = {"type": "OnnxStaticQuantization", "data_config": WORKFLOW_FILE["data_configs"][0]}
    made = options(static, "--calibration-inputs samples")
    assert made.calibration.data is None and made.calibration.seq_len == 512
    assert made.graph.calibration_inputs == Path("samples")


def test_data_that_nobody_defined(options):
    message = refused({"type": "GptqQuantizer", "data_config": "wikitext2_train"}, options)
    assert "\"data_config\" names 'wikitext2_train', which is not defined here" in message
    for flags in ("--data f.txt", "--data self", "--data-name org/set"):
        assert options({"type": "GptqQuantizer", "data_config": "wikitext2_train"}, flags).algorithm == "gptq"


def test_data_for_what_reads_none(options, capsys):
    made = options({"type": "OnnxQuantization", "quant_mode": "dynamic", "data_config": "calib"})
    assert made.algorithm == "dynamic"
    assert "-a dynamic reads no data, what it says of data has nothing to do" in capsys.readouterr().err
    weights = {"type": "IncQuantization", "approach": "weight_only", "calibration_sampling_size": [8]}
    assert options(weights).calibration.num_samples == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "is empty"),
        ("// nothing\n", "is empty"),
        ("bits: 4", "is not JSON"),
        ('{"type": "Rtn",\n\n "bits": }', "line 3"),
        ("[1]", "holds a list, expected an object"),
        ("4", "holds a number"),
        ("null", "holds a null"),
        ('"Rtn"', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"type": "Rtn", "bits": ' + "9" * 5000 + "}", "is not JSON"),
        ('{"type": "Rtn", "bits": NaN}', "NaN is not a value"),
        ('{"type": "Rtn", "bits": 3, "bits": 4}', "'bits' is given twice"),
        ("{}", 'neither "type" nor "passes"'),
        ('{"bits": 4}', 'neither "type" nor "passes"'),
        ({"type": 4}, 'has no "type"'),
        ({"type": "GptqQuantiser"}, "did you mean 'GptqQuantizer'"),
        ({"type": "Rtn", "bit": 4}, "Rtn has no key 'bit', did you mean 'bits'"),
        ({"type": "Rtn", "bits": "four"}, "\"bits\" is a whole number, got 'four'"),
        ({"type": "Rtn", "bits": True}, '"bits" is a whole number, got True'),
        ({"type": "Rtn", "bits": 99}, "bits must be 1 to 8, got 99"),
        ({"type": "Rtn", "bits": [3, 4]}, "choose among them is a search"),
        ({"type": "Rtn", "bits": "SEARCHABLE_VALUES"}, "asks for a search"),
        ({"type": "Rtn", "sym": "yes"}, "\"sym\" is true or false, got 'yes'"),
        ({"type": "Rtn", "moe": False}, '"moe" takes True, got \'False\''),
        ({"type": "Rtn", "overrides": {"a": {"bit": 8}}}, "has no key 'bit', did you mean 'bits'"),
        ({"type": "Rtn", "overrides": {"a": 8}}, "says nothing of 'a'"),
        ({"type": "Rtn", "overrides": {"re:(": {"bits": 8}}}, "is not a regular expression"),
        ({"type": "Gptq", "damp_percent": 10**400}, "is a number"),
        ({"type": "QuaRot", "rotate_mode": "hadamart"}, "did you mean 'hadamard'"),
        ({"type": "QuaRot", "k_clip_ratio": 0.9, "v_clip_ratio": 0.8, "k_bits": 4}, "says both --kv-clip-ratio"),
        ({"type": "QuaRot", "w_bits": 16, "w_rtn": True}, "leaves weights float"),
        ({"type": "QuaRot", "rotate": False}, '"rotate" takes True'),
        ({"type": "OnnxQuantization", "quant_mode": "both"}, 'unknown "quant_mode" \'both\''),
        ({"type": "OnnxDynamicQuantization", "calibrate_method": "MinMax"}, "has no key 'calibrate_method'"),
        ({"type": "OnnxStaticQuantization", "calibration_providers": ["CPUExecutionProvider", "X"]}, "got 'X'"),
        ({"type": "OnnxStaticQuantization", "save_as_external_data": False}, "file of their own"),
        ({"type": "IncStaticQuantization", "weight_only_config": {"bits": 4}}, "it is for weights alone"),
        ({"type": "NVModelOptQuantization", "algorithm": "rtn", "calibration": "awq_lite"}, "'awq_lite' beside"),
        ({"type": "NVModelOptQuantization", "algorithm": "gptq"}, "unknown \"algorithm\" 'gptq'"),
        ({"type": "NVModelOptQuantization", "calibration": "rtn", "calibration_method": "rtn"}, "are the same"),
        ({"type": "AimetQuantization", "techniques": [{"name": "lpbq", "block_size": 64}]}, "lpbq is not in quantcli"),
        ({"type": "Rtn", "config": {"bits": 3}, "bits": 3}, '"config" is an object'),
        ({"type": "Rtn", "evaluator": "common"}, "evaluators are for a search"),
        ({"a": {"type": "Gptq"}, "b": {"type": "Rtn"}}, "passes a, b cannot follow each other: gptq rounds"),
        ({"a": {"type": "QuaRot", "w_bits": 4}, "b": {"type": "Gptq"}}, "cannot follow each other"),
        ({"passes": {"a": {"type": "SpinQuant"}, "b": {"type": "QuaRot"}, "c": {"type": "Rtn"}}}, "cannot follow"),
        ({"passes": {}}, "it has no passes"),
        ({"passes": []}, "it has no passes"),
        ({"passes": {"a": [{"type": "Rtn"}, {"type": "Gptq"}]}}, "has 2 versions"),
        ({"passes": {"a": "Rtn"}}, "is an object of objects by name"),
        ({"passes": {"a": {"type": "Rtn"}}, "search_strategy": {"sampler": "tpe"}}, "it is for a search"),
        ({"passes": {"a": {"type": "Rtn"}}, "input_model": "m"}, '"input_model" is an object'),
        ({"passes": {"a": {"type": "Rtn"}}, "data_configs": [{"name": "x"}] * 2}, "are called 'x'"),
        ({"passes": {"a": {"type": "Rtn"}}, "pases": {}}, "did you mean 'passes'"),
        ({"passes": {"a": {"type": "Rtn"}}, "systems": {"s": {"type": "Docker"}}}, "got 'Docker'"),
        ({"passes": {"a": {"type": "Rtn"}}, "systems": {"s": {"accelerators": [{"device": "gpu"}]}}}, "got 'gpu'"),
        ({"passes": {"a": {"type": "Rtn"}}, "data_configs": [{"type": "x"}]}, 'a list of objects with a "name"'),
        ({"type": "Gptq", "data_config": 4}, '"data_config" is an object'),
        ({"type": "Gptq", "data_config": {"load_dataset_config": {"subset": "x"}}}, "subsets of hub data sets"),
        ({"type": "Gptq", "data_config": {"pre_process_data_config": {"strategy": "x"}}}, '"strategy" takes'),
        ({"type": "Gptq", "data_config": {"load_dataset_config": {"data_files": "a", "data_name": "b"}}}, "exclude"),
    ],
)  # fmt: skip
def test_files_that_cannot_be(config, message, options):
    assert message in refused(config, options)


@pytest.mark.parametrize("name", OTHER_TYPES)
def test_types_that_are_something_else(name, options):
    message = refused({"passes": {"first": {"type": name}}}, options)
    assert f"pass 'first' is {name}, which quantize does not run" in message


def test_files_that_are_not_there(tmp_path):
    for path, message in (("missing.json", "No such file"), (".", "Is a directory")):
        with pytest.raises(UsageError, match=message) as caught:
            parse(["quantize", "-m", "M", "-o", "O", "-c", str(tmp_path / path)])
        assert caught.value.hint
    (tmp_path / "large.json").write_bytes(b" " * (1 << 20) + b"{}")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, message in (("large.json", "larger than 1 MiB"), ("binary.json", "is not JSON")):
        with pytest.raises(UsageError, match=message):
            parse(["quantize", "-m", "M", "-o", "O", f"--config={tmp_path / name}"])


def test_exit_code_and_one_line(tmp_path, capsys):
    (tmp_path / "bad.json").write_text('{"type": "Rtn", "bit": 4}')
    assert app.run(["quantize", "-m", "M", "-o", "O", "--config", str(tmp_path / "bad.json")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["error", "hint"]


def test_the_flag_itself(options, tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"type": "Rtn"}')
    path = str(tmp_path / "a.json")
    for words, message in (
        (["-c", path, "--config", path], "--config is given twice"),
        (["--config"], "--config needs a value"),
        (["-qc", path], "its flag stands in one word with others"),
        (["-c", path, "-a", "rtm"], "^unknown algorithm 'rtm'"),
        (["-c", path, "--bitz", "3"], "^unknown flag --bitz"),
    ):
        with pytest.raises(UsageError, match=message):
            parse(["quantize", "-m", "M", "-o", "O", *words])
    made = parse(["quantize", "-mM", "-oO", f"-c{path}", "-ahqq"]).options
    assert (made.model, made.algorithm, made.config.name) == ("M", "hqq", "a.json")
    assert parse(["quantize", "-c", "missing.json", "--help"]) == 0
    assert parse(["quantize", "-m", "--config", "-o", "O"]).options.model == "--config"
    assert "--config FILE" in capsys.readouterr().out


SAMPLES = {
    "whole number": [32], "number": [0.5], "true or false": [True, False], "text": ["a"], "any": ["a"],
    "list of texts": [["a", "b"]], "object": [{"a": {"bits": 8}}], "list of objects": [[{"name": "a"}]],
}  # fmt: skip


def samples(name, key):
    """Values that a key takes."""
    match key.to:
        case Rename(_, values, True):
            return list(values)
        case Dropped(_, True, only):
            return [{"True": True, "False": False}.get(v, int(v) if re.fullmatch(r"-?\d+", v) else v) for v in only]
        case Together() | None:  # for tests of their own
            return []
        case Nested(inner) if key.kind == "object":
            return [{name: value} for name, found in inner.items() for value in samples(name, found)]
    return [4] if "bit" in name or name == "accuracy_level" else [99.9] if "ile" in name else SAMPLES[key.kind]


BESIDE = {
    "a_clip_ratio": {"a_bits": 4},
    "a_asym": {"a_bits": 4},
    "k_clip_ratio": {"k_bits": 4},
    "k_groupsize": {"k_bits": 4},
    "v_clip_ratio": {"v_bits": 4},
    "v_groupsize": {"v_bits": 4},
    "gptq_damping": {"w_bits": 4},
    "gptq_opt_scales": {"w_bits": 4},
    "extra_options": {"calibrate_method": "Percentile"},
}
"""Without these, keys would have no effect and be refused."""
NOTHING_NEW = (False, "nf4", "DEFAULT", "RTN", {"algorithm": "rtn"}, {"algorithm": "RTN"})
"""Values that say what a pass means anyway."""


@pytest.mark.parametrize("name", ALL)
def test_every_key_means_words_that_parse_or_says_why_not(name, options, capsys):
    spec, base = ALL[name]
    for key, found in spec.keys.items():
        for value in samples(key, found):
            config = base | {k: v for k, v in BESIDE.get(key, {}).items() if k in spec.keys} | {key: value}
            inside = value[0] if isinstance(value, list) else value
            inner = found.to.keys[next(iter(inside))] if isinstance(found.to, Nested) else found
            capsys.readouterr()
            if isinstance(inner.to, Refused | Missing):
                refused(config, options, "--data f.txt")
                continue
            made = options(config, "--data f.txt")
            make_steps(find_chain(made.algorithm), made.settings)
            said = capsys.readouterr().err
            words = shlex.split(said.splitlines()[-1].removeprefix("note: pass.json says "))
            new = "nothing to do" in said or words != list(spec.words)
            assert new or value in NOTHING_NEW or isinstance(inner.to, Data), (key, value)


@pytest.mark.parametrize(
    ("name", "key"),
    [(name, key) for name, (spec, _) in ALL.items() for key, k in spec.keys.items() if isinstance(k.to, Together)],
)
def test_two_keys_that_say_something_together(name, key, options):
    spec, base = ALL[name]
    together = spec.keys[key].to
    values = {"True": True, "False": False}
    for (first, second), words in together.words.items():
        for other in together.other:
            pair = {k: values.get(v, v) for k, v in ((key, first), (other, second)) if v is not None}
            made = options(base | pair)
            assert words == ("-a", made.algorithm) or words == ("--set", f"order={made.settings['order']}")


KEYS = sorted(
    {k for spec, _ in ALL.values() for k in spec.keys} | {*DATA, *INPUT_MODEL, *SYSTEM, *WORKFLOW, "type", "config"}
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 130)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "int4", "DEFAULT_VALUE", "SEARCHABLE_VALUES", "a b", "-1", "--force", *PASSES]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_file_ends_in_a_traceback(data, options):
    name = data.draw(st.sampled_from(sorted(ALL)))
    spec, base = ALL[name]
    keys = st.dictionaries(st.sampled_from(sorted(spec.keys)), VALUES, max_size=3)
    config = base | data.draw(keys)
    if data.draw(st.booleans()):
        config = {"passes": {"q": config}} | data.draw(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3))
    try:
        made = options(config, "--data f.txt")
    except UsageError as error:
        assert error.hint and "\n" not in error.message
    else:
        assert made.config.name == "pass.json"
