import numpy as np
import onnx_ir as ir
import pytest
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

import small_graphs
from quantcli.graphs.activations.weight_extremes import with_stand_ins
from quantcli.graphs.calibration.tensor_ranges import RangeOptions, measure_ranges, tensors_of, write_ranges
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.rewrite.gemms import split_gemms
from quantcli.graphs.rewrite.prepare import prepare


class Reader:
    def __init__(self):
        self.left = [{"x": np.random.default_rng(0).normal(size=(4, 3, 12, 12)).astype(np.float32)}]

    def get_next(self):
        return self.left.pop() if self.left else None


def dynamic(weight_type, per_channel, **extra):
    def run(source, made):
        types = ["MatMul"] if per_channel else ["MatMul", "Conv"]
        options = {"per_channel": per_channel, "op_types_to_quantize": types, "extra_options": extra}
        quantize_dynamic(source, made, weight_type=weight_type, use_external_data_format=True, **options)

    return run


def static(weight_type, per_channel, form=QuantFormat.QDQ, reduce_range=False, **extra):
    def run(source, made):
        options = {"per_channel": per_channel, "reduce_range": reduce_range, "extra_options": extra}
        # of the graph that was measured, beside it or beside the folder of the stand-ins
        cache = next(p / "ranges.json" for p in source.parents if (p / "ranges.json").exists())
        options |= {"activation_type": QuantType.QUInt8, "calibration_cache_path": cache}
        quantize_static(source, made, None, form, weight_type=weight_type, use_external_data_format=True, **options)

    return run


@pytest.mark.parametrize(
    "run",
    [
        dynamic(QuantType.QUInt8, False),
        dynamic(QuantType.QInt8, True),
        dynamic(QuantType.QInt8, True, WeightSymmetric=False),
        static(QuantType.QUInt8, False),
        static(QuantType.QInt8, True),
        static(QuantType.QInt8, True, QuantFormat.QOperator, True),
        static(QuantType.QUInt8, True, WeightSymmetric=True),
        static(QuantType.QInt4, True),
    ],
)
def test_the_same_bits_as_without(run, tmp_path):
    """What onnxruntime makes of the whole weights; of stand-ins alone where every weight is large."""
    small_graphs.cnn(tmp_path / "f.onnx", uneven=True)
    prepare(tmp_path / "f.onnx", tmp_path / "prepared.onnx", opset=21)
    model = open_graph(tmp_path / "prepared.onnx")
    names = {str(n.name) for n in model.graph}
    split_gemms(model, names)
    save_graph(model, tmp_path / "ready.onnx")
    how, seen = RangeOptions(), []
    tensors = tensors_of(model, {n.op_type for n in model.graph})
    found = measure_ranges(tmp_path / "ready.onnx", tensors, Reader(), how)
    write_ranges(tmp_path / "ranges.json", found, tmp_path / "ready.onnx", how)

    def watched(source, made):
        seen.append(sum(v.const_value.size for v in open_graph(source).graph.initializers.values()))
        run(source, made)

    with_stand_ins(tmp_path / "ready.onnx", tmp_path / "plain.onnx", names, watched)
    with_stand_ins(tmp_path / "ready.onnx", tmp_path / "kept.onnx", names, watched, large_bytes=0)
    assert seen[1] < seen[0] / 5
    one, other = (ir.load(tmp_path / name).graph for name in ("plain.onnx", "kept.onnx"))
    assert [n.op_type for n in one] == [n.op_type for n in other]
    assert set(one.initializers) == set(other.initializers)
    assert any(name.endswith("_quantized") for name in one.initializers)
    for name, value in one.initializers.items():
        found = other.initializers[name].const_value
        assert (found.dtype, found.shape) == (value.const_value.dtype, value.const_value.shape), name
        np.testing.assert_array_equal(found.numpy(), value.const_value.numpy(), err_msg=name)
