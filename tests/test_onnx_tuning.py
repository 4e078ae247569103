"""`autotune` from Python: the script that users of Intel's tool have, with the import changed."""

import numpy as np
import onnx
import onnxruntime
import pytest

import onnx_graphs
from quantcli.errors import InputError, UsageError
from quantcli.graphs.model.files import save_graph

SCRIPT = """
from quantcli.onnx import config
from quantcli.onnx import tuning

tune_config = tuning.TuningConfig(config_set=config.get_woq_tuning_config())
best_model = tuning.autotune(
    model_input=model,
    tune_config=tune_config,
    eval_fn=eval_fn,
    calibration_data_reader=data_reader,
)
"""
NAMES = ["RTN_G32ASYM", "GPTQ_G32ASYM", "GPTQ_G32ASYM_DISABLE_LAST_MATMUL", "GPTQ_G128ASYM", "AWQ_G32ASYM"]
N = onnx_graphs.N
BATCHES = [{"x": np.random.default_rng(n).standard_normal((32, 128)).astype(np.float32)} for n in range(3)]


class Reader:
    def __init__(self):
        self.rest = iter(BATCHES)

    def get_next(self):
        return next(self.rest, None)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    random = np.random.default_rng(0)
    weights = {"a": random.standard_normal((128, 96)), "b": random.standard_normal((96, 40))}
    nodes = [N("LayerNormalization", "x gain", "n", "norm"), N("MatMul", "n a", "h", "first")]
    nodes += [N("Relu", "h", "r", "relu"), N("MatMul", "r b", "y", "head")]
    arrays = {n: w.astype(np.float32) for n, w in (weights | {"gain": np.ones(128)}).items()}
    path = tmp_path_factory.mktemp("autotune") / "net.onnx"
    save_graph(onnx_graphs.graph_model(nodes, arrays), path)
    return path


def script(**names):
    exec(SCRIPT, names)
    return names["best_model"]


def products(proto):
    return [node.op_type for node in proto.graph.node if "MatMul" in node.op_type]


def closeness(seen):
    """An eval_fn: the float graph has 1, and a graph loses what its outputs do."""

    def eval_fn(path):
        session = onnxruntime.InferenceSession(path)
        got = np.concatenate([session.run(None, batch)[0] for batch in BATCHES])
        seen.setdefault("float", got)
        wanted = seen["float"]
        score = 1 - float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
        seen.setdefault("scores", []).append(score)
        return score

    return eval_fn


def test_the_best_of_five_where_none_is_good_enough(model):
    """All run, in order; the one with a product in float is closest, and that is what comes back."""
    seen = {}
    found = script(model=model, eval_fn=closeness(seen), data_reader=Reader())
    assert isinstance(found, onnx.ModelProto)
    scores = seen["scores"][1:]
    assert len(scores) == len(NAMES) and max(scores) == scores[2] < 0.99
    assert sorted(products(found)) == ["MatMul", "MatMulNBits"]
    assert scores[1] > scores[0], "gptq sees the inputs"


def test_it_stops_at_the_first_that_is_good_enough(model):
    from quantcli.onnx import config, tuning

    seen = {}
    enough = tuning.TuningConfig(config.get_woq_tuning_config(), tolerable_loss=0.5)
    found = tuning.autotune(str(model), enough, closeness(seen), calibration_data_reader=Reader())
    assert len(seen["scores"]) == 2 and products(found) == ["MatMulNBits", "MatMulNBits"]
    assert [str(c) for c in config.get_woq_tuning_config()] == NAMES


def test_lists_are_several_and_a_graph_in_memory_is_judged_in_memory(model):
    from quantcli.onnx import config, tuning

    kinds = []

    def eval_fn(proto, word):
        kinds.append((type(proto), word))
        return -float(len(proto.SerializeToString()))

    config_set = config.RTNConfig(weight_bits=[8, 4], weight_sym=[True, False])
    assert [c.weight_bits for c in config.expand(config_set)] == [8, 8, 4, 4]
    given = onnx.load(model)
    before = given.SerializeToString()
    found = tuning.autotune(given, tuning.TuningConfig(config_set, max_trials=3, tolerable_loss=-0.99), eval_fn, ("w",))
    assert kinds == [(onnx.ModelProto, "w")] * 4 and given.SerializeToString() == before
    assert {a.i for n in found.graph.node for a in n.attribute if a.name == "bits"} == {4}, "the smallest is the best"


@pytest.mark.parametrize(
    ("eval_fn", "said"),
    [
        (lambda path: 1 / 0, "failed on the float graph: ZeroDivisionError"),
        (lambda path: float("nan"), "gave nan for the float graph"),
        (lambda path: 1.0 if path.endswith("net.onnx") and "tune-" not in path else None, "gave NoneType for RTN_G32"),
    ],
)
def test_a_function_that_fails_is_named(model, eval_fn, said):
    with pytest.raises(InputError, match=said):
        script(model=str(model), eval_fn=eval_fn, data_reader=Reader())


def test_what_cannot_be_is_refused_before_anything_is_tried(model):
    from quantcli.onnx import config, tuning

    called = []
    for bad in (config.RTNConfig(weight_bits=[4, 9]), config.RTNConfig(weight_dtype="nf4"), [], ["RTN"]):
        with pytest.raises(UsageError):
            tuning.autotune(model, tuning.TuningConfig(bad), called.append)
    assert not called
