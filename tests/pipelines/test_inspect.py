"""Inspection: what a folder is, its bits, its history and its digests."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

import quantcli
import small_graphs
import tiny
from quantcli.errors import InputError, UsageError
from quantcli.folder import Manifest, create_output, describe_parent, fingerprint, resolve_model_folder
from quantcli.formats import gptq
from quantcli.formats.codec import Described
from quantcli.options import EvaluateOptions, GraphOptions, QuantizeOptions
from quantcli.pipelines import evaluate, inspect, quantize
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index


def packed(n: int, k: int, bits: int, group_size: int) -> dict[str, torch.Tensor]:
    scheme = Scheme(bits, group_size, lowest_zero=1)
    groups = scheme.group_count(k)
    return gptq.pack(
        QuantizedTensor(
            torch.zeros(n, k, dtype=torch.uint8),
            torch.ones(n, groups, dtype=torch.float16),
            torch.ones(n, groups, dtype=torch.uint8),
            scheme,
            group_index(k, scheme),
        )
    )


def float_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(
        {"a.weight": torch.zeros(8, 16), "b.weight": torch.zeros(4, 4, dtype=torch.bfloat16)},
        folder / "model.safetensors",
    )
    return folder


def gptq_files(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    four, eight = Scheme(4, 32), Scheme(8, 16)
    config = gptq.config_for(Described(four, {"b": eight}, [], desc_act=False, head=None, producer="test"))
    config["quantcli"] = {"embedding": {"name": "e", "bits": 8, "group_size": 16, "sym": False}}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    tensors = {"norm.weight": torch.ones(64, dtype=torch.float16)}
    for name, parts in {
        "a": packed(32, 64, 4, 32),
        "b": packed(16, 50, 8, 16),  # no multiple of a word, nor of a group
        "e": packed(100, 64, 8, 16),
    }.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def histogram(found: inspect.Inspection) -> dict[str, tuple[int, int]]:
    return {row.label: (row.tensors, row.parameters) for row in found.histogram}


def test_float_checkpoint(tmp_path):
    found = inspect.run(float_folder(tmp_path / "f"))
    assert found.what == "float checkpoint"
    assert found.format == "safetensors, bfloat16, float32"
    assert found.model_type == "llama"
    assert found.parameters == 8 * 16 + 16
    assert histogram(found) == {"bfloat16": (1, 16), "float32": (1, 128)}
    assert found.quantized_bits_per_weight is None
    assert found.history == found.files == []
    assert found.size_bytes == (tmp_path / "f" / "model.safetensors").stat().st_size


def test_gptq_checkpoint(tmp_path):
    found = inspect.run(gptq_files(tmp_path / "q"))
    assert found.what == "GPTQ checkpoint"
    assert "bits 4, group_size 32" in found.format
    assert histogram(found) == {"4-bit": (1, 32 * 64), "8-bit": (2, 16 * 50 + 100 * 64), "float16": (1, 64)}
    four = next(row for row in found.histogram if row.label == "4-bit")
    assert 8 * four.size_bytes / four.parameters == 4 + 20 / 32
    assert 8 < found.quantized_bits_per_weight < 10
    assert json.loads(json.dumps(found.to_dict()))["intact"] is True


@pytest.mark.parametrize(
    ("algorithm", "settings", "operator"),
    [
        ("dynamic", {}, "MatMulInteger"),
        ("static", {}, "DequantizeLinear"),
        ("static", {"encoding": "qoperator"}, "QLinearMatMul"),
    ],
)
def test_graphs_of_integers(algorithm, settings, operator, tmp_path):
    """Each weight counts once, as what it stands for."""
    source = small_graphs.mlp(tmp_path / "net.onnx")
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32))
    graph = GraphOptions(calibration_inputs=tmp_path / "x.npz" if algorithm == "static" else None)
    output, before = tmp_path / "q", inspect.run(source, nodes=True)
    quantize.run(QuantizeOptions(str(source), output, algorithm=algorithm, settings=settings, graph=graph))
    for place in (output, output / "model/net.onnx"):
        found = inspect.run(place)
        eight = next(row for row in found.histogram if row.label == "8-bit")
        assert eight.parameters >= 32 * 64 + 64 * 16
        assert before.parameters <= found.parameters < before.parameters + 100  # scales of activations
        assert found.operators[operator] >= 1 and found.intact and found.history[0].command == "quantize"
        assert found.size_bytes == sum(p.stat().st_size for p in (output / "model").iterdir())
    assert [(n.name, n.op_type, n.weight, n.shape) for n in before.nodes] == [
        ("up", "MatMul", "w1", (32, 64)),
        ("down", "MatMul", "w2", (64, 16)),
    ]
    assert before.operators == {"MatMul": 2, "Add": 1, "Relu": 1}


def test_weights_in_constant_nodes_are_weights(tmp_path):
    plain, in_nodes = (
        inspect.run(small_graphs.cnn(tmp_path / name, in_constants=name == "b.onnx"), nodes=True)
        for name in ("a.onnx", "b.onnx")
    )
    assert plain.histogram == in_nodes.histogram and plain.nodes == in_nodes.nodes
    assert "Constant" in in_nodes.operators


def test_nodes_of_a_checkpoint_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--nodes has nothing to list"):
        inspect.run(float_folder(tmp_path / "f"), nodes=True)


def test_awq_and_unread_formats(tmp_path):
    folder = float_folder(tmp_path / "q")
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    save_file(
        {
            "a.qweight": torch.zeros(64, 4, dtype=torch.int32),
            "a.qzeros": torch.zeros(2, 4, dtype=torch.int32),
            "a.scales": torch.ones(2, 32, dtype=torch.float16),
        },
        folder / "model.safetensors",
    )
    found = inspect.run(folder)
    assert found.what == "AWQ checkpoint"
    assert histogram(found) == {"4-bit": (1, 64 * 32)}
    config = {"quant_method": "hqq"}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    assert inspect.run(folder).what == "HQQ checkpoint"


def make_output(target: Path, parent: Path, command: str) -> Path:
    with create_output(target, plan={}) as output:
        gptq_files(output.model)
        manifest = Manifest(
            kind="checkpoint",
            command=command,
            options={"bits": 4},
            parent=describe_parent(resolve_model_folder(parent), fingerprint(resolve_model_folder(parent))),
            metrics={"kl": 0.1},
        )
        return output.commit(manifest)


def test_history_follows_parents_that_are_still_the_same(tmp_path):
    start = float_folder(tmp_path / "f")
    first = make_output(tmp_path / "q", start, "quantize")
    second = make_output(tmp_path / "r", first, "finetune")
    for folder in (second, second / "model"):
        found = inspect.run(folder)
        assert [(s.command, s.parent) for s in found.history] == [("finetune", "q"), ("quantize", "f")]
    assert found.history[0].metrics == {"kl": 0.1}
    (first / "model" / "config.json").write_text("{}")
    assert [s.command for s in inspect.run(second).history] == ["finetune"]


def test_digests_name_every_file(tmp_path):
    folder = make_output(tmp_path / "q", float_folder(tmp_path / "f"), "quantize")
    assert {f.name: f.state for f in inspect.run(folder).files} == {
        "model/config.json": "ok",
        "model/model.safetensors": "ok",
    }
    config = folder / "model" / "config.json"
    config.write_text(config.read_text() + " ")
    (folder / "notes.txt").write_text("mine")
    found = inspect.run(folder)
    assert {f.name: f.state for f in found.files} == {
        "model/config.json": "changed",
        "model/model.safetensors": "ok",
        "notes.txt": "extra",
    }
    assert not found.intact
    weights = folder / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the size stays
    weights.write_bytes(content)
    assert {f.name: f.state for f in inspect.run(folder).files}["model/model.safetensors"] == "changed"


def test_a_missing_file_is_named(tmp_path):
    folder = make_output(tmp_path / "q", float_folder(tmp_path / "f"), "quantize")
    manifest = json.loads((folder / "quantcli.json").read_text())
    manifest["files"]["model/tokenizer.json"] = {"size_bytes": 1, "sha256": "0"}
    (folder / "quantcli.json").write_text(json.dumps(manifest))
    found = inspect.run(folder)
    assert [f.name for f in found.files if f.state == "missing"] == ["model/tokenizer.json"]
    assert not found.intact


def constant(name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))


def graph_folder(folder: Path) -> Path:
    """MatMulNBits over 64 x 32 in 4 bits, a quantized table of 100 x 32 in 8 bits, a float bias and a shape."""
    folder.mkdir(parents=True)
    ids = ir.Value(name="ids", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64))
    weights = [
        constant("codes", np.zeros((64, 2, 8), np.uint8)),
        constant("scales", np.ones((64, 2), np.float32)),
        constant("table", np.zeros((100, 32), np.uint8)),
        constant("table_scales", np.ones((100, 2), np.float32)),
        constant("bias", np.ones(64, np.float32)),
        constant("cos_cache", np.ones((64, 8), np.float32)),
        constant("shape", np.array([2, 64])),
    ]
    codes, scales, table, table_scales, bias, cos, shape = weights
    rows = ir.node(
        "GatherBlockQuantized",
        [table, ids, table_scales],
        {"bits": 8, "block_size": 16},
        domain="com.microsoft",
        name="look_up",
    )
    product = ir.node(
        "MatMulNBits",
        [rows.outputs[0], codes, scales],
        {"K": 32, "N": 64, "bits": 4, "block_size": 16},
        domain="com.microsoft",
        name="product",
    )
    total = ir.node("Add", [product.outputs[0], bias])
    reshaped = ir.node("Reshape", [total.outputs[0], shape])
    rotated = ir.node("Sum", [reshaped.outputs[0], cos])
    graph = ir.Graph(
        [ids],
        rotated.outputs,
        nodes=[rows, product, total, reshaped, rotated],
        initializers=weights,
        opset_imports={"": 21, "com.microsoft": 1},
        name="g",
    )
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx", external_data="model.onnx.data")
    return folder


def test_onnx_graph(tmp_path):
    folder = graph_folder(tmp_path / "g")
    found = inspect.run(folder)
    assert found.what == "ONNX model"
    assert found.format == "ONNX, ai.onnx 21, com.microsoft 1"
    assert histogram(found) == {"4-bit": (1, 64 * 32), "8-bit": (1, 100 * 32), "float32": (1, 64)}
    four = next(row for row in found.histogram if row.label == "4-bit")
    assert four.size_bytes == 64 * 32 // 2 + 64 * 2 * 4
    assert found.size_bytes == sum((folder / n).stat().st_size for n in ("model.onnx", "model.onnx.data"))
    (folder / "genai_config.json").write_text('{"model": {"type": "llama"}}')
    again = inspect.run(folder)
    assert (again.what, again.model_type) == ("ONNX Runtime GenAI folder", "llama")


def test_what_is_no_model(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        inspect.run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="it is empty"):
        inspect.run(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="is not an ONNX graph"):
        inspect.run(tmp_path / "broken")
    graph = graph_folder(tmp_path / "g")
    (graph / "genai_config.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        inspect.run(graph)


def test_compressed_tensors_and_olive(tmp_path):
    source = tiny.checkpoint(tmp_path / "f")
    options = {"algorithm": "rtn", "bits": 3, "group_size": 32, "format": "compressed-tensors", "device": "cpu"}
    quantize.run(QuantizeOptions(str(source), tmp_path / "q", **options))
    found = inspect.run(tmp_path / "q")
    assert found.what == "COMPRESSED-TENSORS checkpoint"
    assert "compressed-tensors (pack-quantized)" in found.format
    three = next(row for row in found.histogram if row.label == "3-bit")
    linears = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3)
    assert (three.tensors, three.parameters) == (14, linears)
    assert found.quantized_bits_per_weight == pytest.approx(3 + 19 / 32, rel=0.01)
    assert evaluate.run(EvaluateOptions(str(tmp_path / "q"), str(source), seq_len=16, num_samples=2, speed=False))

    config = {"quant_method": "olive", "bits": 4, "group_size": 16, "symmetric": True, "overrides": {"b": {"bits": 8}}}
    folder = float_folder(tmp_path / "o")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    byte, half = torch.uint8, torch.float16
    tensors = {"a.qweight": torch.zeros(8, 16, dtype=byte), "a.scales": torch.ones(8, 2, dtype=half)}
    tensors |= {"b.qweight": torch.zeros(8, 16, dtype=byte), "b.scales": torch.ones(8, 1, dtype=half)}
    save_file(tensors, folder / "model.safetensors")
    found = inspect.run(folder)
    assert found.what == "OLIVE checkpoint"
    assert histogram(found) == {"4-bit": (1, 8 * 32), "8-bit": (1, 8 * 16)}


def packed_scheme(layout, bits, kind, **more):
    weights = {"num_bits": bits, "type": kind, "strategy": "channel", "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, **more}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


EIGHT_BITS = {"num_bits": 8, "type": "int", "dynamic": True}
UNREAD = {
    "gemv": (
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"},
        {"qweight": torch.zeros(16, 4, dtype=torch.int32), "qzeros": torch.zeros(16, 1, dtype=torch.int32)},
        "4-bit",
    ),
    "int8": (
        packed_scheme("marlin-24", 8, "int", input_activations=EIGHT_BITS),
        {"weight": torch.zeros(16, 32, dtype=torch.int8), "weight_scale": torch.ones(16, 1)},
        "8-bit",
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"weight": torch.zeros(16, 32).to(torch.float8_e4m3fn), "weight_scale_inv": torch.ones(1, 1)},
        "8-bit",
    ),
    "nvfp4": (
        packed_scheme("mxfp6-pack-quantized", 4, "float"),
        {
            "weight_packed": torch.zeros(16, 16, dtype=torch.uint8),
            "weight_scale": torch.ones(16, 2).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.ones(1),
        },
        "4-bit",
    ),
    "cache": (
        packed_scheme("pack-quantized", 4, "int") | {"kv_cache_scheme": {"num_bits": 8, "strategy": "attn_head"}},
        {"weight_packed": torch.zeros(16, 4, dtype=torch.int32), "weight_scale": torch.ones(16, 1)},
        "4-bit",
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_not_read_is_described_all_the_same(tmp_path, name):
    """Scales are no parameters, codes count by their own width, and the layout has its name."""
    config, parts, label = UNREAD[name]
    tensors = {f"model.layers.0.up_proj.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors | {"norm.weight": torch.ones(16, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    found = inspect.run(tmp_path)
    assert histogram(found) == {label: (1, 16 * 32), "bfloat16": (1, 16)}
    assert sum(row.size_bytes for row in found.histogram) == sum(t.nbytes for t in tensors.values()) + 32
    assert found.parameters == 16 * 33 and not found.opens
    assert {"int8": "marlin-24", "nvfp4": "mxfp6-pack", "gemv": "gemv"}.get(name, "") in found.format


@pytest.mark.parametrize("name", ["int8", "nvfp4"])
def test_loading_what_is_not_read_names_the_layout(tmp_path, name):
    config, parts, _ = UNREAD[name]
    save_file({f"model.layers.0.up_proj.{part}": t for part, t in parts.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    with pytest.raises(InputError, match=f"compressed-tensors checkpoint of layout '{config['format']}'"):
        quantcli.load(tmp_path)
