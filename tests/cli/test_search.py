"""Olive's configurations as searches: which keys are chosen from what, and what a workflow says of metric and goals."""

import json

import pytest

import small_graphs
from quantcli.cli import app
from quantcli.cli.app import parse, search_space
from quantcli.errors import UsageError

SCRIPT = """
import numpy as np

def calibration_reader(data_dir, batch_size):
    random = np.random.default_rng(0)
    return [({"x": random.normal(size=(1, 3, 12, 12)).astype(np.float32)}, 0) for _ in range(3)]

def eval_accuracy(model, data_dir, batch_size, device, execution_providers):
    session = model.prepare_session()
    found = model.run_session(session, {"x": np.ones((1, 3, 12, 12), np.float32)})
    return float(np.tanh(np.abs(found[0]).sum()))
"""
WORKFLOW = {
    "input_model": {"type": "ONNXModel", "model_path": "cnn.onnx"},
    "systems": {"local": {"type": "LocalSystem", "accelerators": [{"device": "cpu"}]}},
    "data_configs": [
        {
            "name": "calib_data_config",
            "user_script": "user_script.py",
            "dataloader_config": {"type": "calibration_reader", "batch_size": 1},
        }
    ],
    "evaluators": {
        "common": {
            "metrics": [
                {
                    "name": "accuracy",
                    "type": "custom",
                    "sub_types": [
                        {
                            "name": "accuracy_custom",
                            "priority": 1,
                            "higher_is_better": True,
                            "goal": {"type": "max-degradation", "value": 0.2},
                        }
                    ],
                    "user_config": {
                        "user_script": "user_script.py",
                        "evaluate_func": "eval_accuracy",
                        "evaluate_func_kwargs": {"batch_size": 1},
                    },
                },
                {"name": "latency", "type": "latency", "sub_types": [{"name": "avg", "priority": 2}]},
            ]
        }
    },
    "passes": {
        "quantization": {
            "type": "OnnxQuantization",
            "per_channel": "SEARCHABLE_VALUES",
            "calibrate_method": ["MinMax", "Percentile"],
            "data_config": "calib_data_config",
        }
    },
    "search_strategy": {"execution_order": "joint", "sampler": "tpe", "max_samples": 3, "seed": 0},
    "evaluator": "common",
    "target": "local",
    "output_dir": "out",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_graphs.cnn(tmp_path / "cnn.onnx")
    (tmp_path / "user_script.py").write_text(SCRIPT)
    return tmp_path


def test_a_workflow_says_model_output_metric_goal_and_how_to_search(here):
    """Nothing but the file is given, and its loader and its metric are the user's own script."""
    (here / "flow.json").write_text(json.dumps(WORKFLOW))
    asked = parse(["tune", "--config", "flow.json"]).options
    assert (asked.model, str(asked.output), asked.metric) == ("cnn.onnx", "out", "user_script.py:eval_accuracy")
    assert [str(g) for g in asked.goals] == ["eval_accuracy>=reference-0.2"] and asked.minimize == "latency"
    assert (asked.sampler, asked.trials) == ("tpe", 3)
    assert parse(["tune", "--config", "flow.json", "--trials", "9", "-o", "T"]).options.trials == 9
    assert app.run(["tune", "--config", "flow.json", "-q"]) == 0
    found = json.loads((here / "out" / "tuning.json").read_text())
    assert len(found["trials"]) == 3 and all(t["state"] == "complete" for t in found["trials"])
    assert {"eval_accuracy", "latency"} <= set(found["best"]["figures"]) and not found["failures"]
    assert {"per_channel", "calibrate_method"} == set(found["best"]["point"])


def dimensions(here, said, *words):
    (here / "pass.json").write_text(json.dumps(said))
    space = search_space(parse(["tune", "-m", "cnn.onnx", "-o", "T", "-c", "pass.json", *words]).options)
    return {d.name: d.values for d in space.dimensions}, list(space.points())


def test_which_keys_are_chosen(here):
    both = (False, True)
    static = {"quant_mode": "static", "per_channel": "SEARCHABLE_VALUES", "reduce_range": True}
    assert dimensions(here, {"type": "OnnxQuantization", **static})[0] == {"per_channel": both}
    none = {"type": "OnnxQuantization", "per_channel": "DEFAULT_VALUE"}
    assert dimensions(here, none)[0] == {}
    assert dimensions(here, {"type": "OnnxQuantization", "disable_search": True})[0] == {}
    found, points = dimensions(here, {"type": "onnxquantization", "quant_mode": ["dynamic", "static"],
                                      "calibrate_method": "SEARCHABLE_VALUES"})  # fmt: skip
    assert found["calibrate_method"] == ("MinMax", "Entropy", "Percentile")
    assert points[0] == {"quant_mode": "dynamic"} and len(points) == 4
    # a choice that has a meaning with static alone is none where the mode is dynamic
    dynamic = {"type": "OnnxQuantization", "quant_mode": "dynamic", "quant_format": "SEARCHABLE_VALUES"}
    assert dimensions(here, dynamic)[0] == {}
    assert dimensions(here, {"type": "Rtn", "bits": [3, 4], "lm_head": True})[0] == {"bits": (3, 4)}
    nested = {"approach": "weight_only", "weight_only_config": {"bits": 4, "algorithm": ["rtn", "gptq"]}}
    assert dimensions(here, {"type": "IncStaticQuantization", **nested})[0] == {
        "weight_only_config.algorithm": ("rtn", "gptq")
    }
    one = {"type": "IncStaticQuantization", "calibration_sampling_size": [8], "reduce_range": True}
    assert dimensions(here, one)[0] == {}


def test_inc_with_nothing_chosen(here):
    found, points = dimensions(here, {"type": "IncQuantization", "data_config": "x"})
    assert found["approach"] == ("static", "dynamic", "weight_only") and len(points) == 4 + 2 + 4


def test_keys_without_values_to_search_say_so(here):
    with pytest.raises(UsageError, match='Rtn: "bits" has no documented values to search'):
        dimensions(here, {"type": "Rtn", "bits": "SEARCHABLE_VALUES"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"evaluator": "comon"}, "'comon' is not defined, did you mean 'common'?"),
        ({"search_strategy": {"sampler": "grid"}}, "unknown sampler 'grid'"),
        ({"search_strategy": {"max_sample": 3}}, "has no key 'max_sample', did you mean 'max_samples'?"),
        ({"evaluators": {"common": {"metrics": [{"type": "acuracy"}]}}}, "unknown metric type 'acuracy', did you mean"),
        ({"evaluators": {"common": {"metrics": [{"type": "custom"}]}}}, 'names no "evaluate_func"'),
    ],
)
def test_what_a_workflow_cannot_say(here, change, said):
    (here / "flow.json").write_text(json.dumps(WORKFLOW | change))
    with pytest.raises(UsageError) as refused:
        parse(["tune", "-c", "flow.json"])
    assert said in refused.value.message


def test_a_metric_by_type(here):
    subs = [{"name": "accuracy_score", "priority": 1, "goal": {"type": "percent-max-degradation", "value": 2}}]
    size = {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes"}]}
    metrics = [{"name": "accuracy", "type": "accuracy", "sub_types": subs}, size]
    (here / "flow.json").write_text(json.dumps(WORKFLOW | {"evaluators": {"common": {"metrics": metrics}}}))
    asked = parse(["tune", "-c", "flow.json"]).options
    assert (asked.metric, asked.minimize) == ("accuracy", "size")
    assert [str(g) for g in asked.goals] == ["accuracy>=reference*0.98"]
