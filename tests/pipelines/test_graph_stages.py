"""Calibration of a graph in steps: what they hold, and that their number changes nothing."""

import json

import numpy as np
import pytest
import torch

import tiny
from onnx_graphs import N, graph_model
from quantcli.algorithms import find_chain, make_steps
from quantcli.data.feeds import ReaderFeeds
from quantcli.graphs.calibration.moment_stages import levels_of
from quantcli.graphs.calibration.partition_runs import Stream
from quantcli.graphs.calibration.second_moments import collect_moments, combine
from quantcli.graphs.calibration.token_inputs import TokenFeeds
from quantcli.graphs.model.files import open_graph, save_graph
from quantcli.graphs.walk.matrices import Selection, find_targets, other_matrix, prepare, read_matrix
from quantcli.options import CalibrationOptions, CaptureOptions, GraphOptions, Override, QuantizeOptions
from quantcli.pipelines import capture
from quantcli.pipelines.graph.plan import scheme_target
from quantcli.pipelines.graph.solve import GraphWork, solve_graph
from quantcli.pipelines.graph.stages import Room, plan_stages
from quantcli.pipelines.quantize_graph import run
from quantcli.progress import Silent

WIDTH = 32


def products(model):
    prepare(model)
    return find_targets(model.graph, Selection(last_product=False))[0]


def decoder(depth, width, inner):
    """The products of a language model, without what stands between them; weights that take no memory."""
    nodes, weights, x = [], {}, "x"
    for b in range(depth):
        for name, rows, columns in (("q", width, width), ("o", width, width), ("g", width, inner), ("d", inner, width)):
            weights[f"{name}{b}"] = np.broadcast_to(np.float32(0), (rows, columns))
            nodes.append(N("MatMul", f"{x} {name}{b}", f"{name}y{b}", f"{name}{b}"))
            x = f"{name}y{b}"
        nodes.append(N("Add", f"{x} qy{b}", f"x{b}", f"add{b}"))
        x = f"x{b}"
    return graph_model([*nodes, N("MatMul", f"{x} q0", "y", "last")], weights)


def test_seven_billion_weights_do_not_need_all_hessians():
    model = decoder(32, 4096, 11008)
    prepare(model)
    found, _ = find_targets(model.graph, Selection())
    stages = plan_stages(model.graph, found, Room())
    assert stages.total_bytes == 4 * (32 * (3 * 4096**2 + 11008**2) + 4096**2)
    assert stages.peak_bytes == 4 * 11008**2 == max(Room().hessian_bytes, 4 * 11008**2)
    blocks = plan_stages(model.graph, found, Room(hessian_bytes=1 << 30), held_out=False)
    assert len(blocks.names) == pytest.approx(32 * 0.687 / 1, abs=12)
    assert blocks.peak_bytes <= 1 << 30
    assert [n for stage in blocks.names for n in stage] == [n for stage in stages.names for n in stage]
    assert plan_stages(model.graph, found, Room(), held_out=True, layer_wise=True).peak_bytes == 4 * 4 * 11008**2


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A captured graph, and batches for it."""
    folder = tmp_path_factory.mktemp("language")
    tiny.checkpoint(folder / "m", tie_word_embeddings=False)
    capture.run(CaptureOptions(str(folder / "m"), folder / "float"))
    (folder / "text.txt").write_text(tiny.words(2000))
    return folder


def from_the_beginning(work, feeds):
    """The same literally: at each level the whole graph runs anew, float and as far as it is quantized."""
    solved, graph = {}, work.model.graph
    for names in levels_of(graph, work.found):
        current = work.model.clone()
        for target in work.found:
            if target.name in solved:
                tensor = other_matrix(graph, target, solved[target.name].dequantize().numpy)
                current.graph.initializers[target.name].const_value = tensor
        widths = {n: t.columns for t in work.found for n in t.inputs if n in names}
        runs = [Stream(model, work.folder, feeds, [names]) for model in (current, work.model)]
        seen = collect_moments(runs[0], 0, widths, reference=runs[1] if solved else None)
        settings = work.step.settings
        for name in names:
            members = [t for t in work.found if t.inputs == (name,)]
            stacked = torch.cat([torch.from_numpy(read_matrix(graph, t)) for t in members])
            scheme = work.targets[members[0].name].scheme
            together = work.step.algorithm.run(stacked, scheme, settings, combine([seen[name]]))
            first = 0
            for target in members:
                solved[target.name] = together.rows(first, first + target.rows)
                first += target.rows
    return solved


@pytest.mark.parametrize("room", [Room(), Room(0, 0)], ids=["memory", "disk"])
def test_layer_wise_is_as_if_the_graph_ran_from_its_beginning(room, language_model, tmp_path):
    source = language_model / "float" / "model"
    model = open_graph(source / "model.onnx")
    found = products(model)
    rows = torch.randint(0, tiny.VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(0))
    size = json.loads((source / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    feeds = ReaderFeeds(list(TokenFeeds(model.graph, rows, axes={"kv_cache_dim": size})))
    options = QuantizeOptions("", tmp_path, bits=3, group_size=16)
    (step,) = make_steps(find_chain("gptq"), {})
    targets = {t.name: scheme_target(t, options) for t in found}
    work = GraphWork(model, source, found, targets, step, layer_wise=True, room=room)
    wanted = from_the_beginning(work, feeds)
    results, _ = solve_graph(work, feeds, Silent(), spill=tmp_path)
    assert results.keys() == wanted.keys()
    for name, tensor in results.items():
        other = wanted[name]
        assert (tensor.codes != other.codes).float().mean() < 1e-3  # sums in another order may tip a code
        torch.testing.assert_close(tensor.scale, other.scale, rtol=1e-4, atol=1e-6)
    assert not list(tmp_path.iterdir())


def test_the_plan_says_what_is_held(language_model):
    text = CalibrationOptions(data=str(language_model / "text.txt"), num_samples=4, seq_len=32)

    def plan(memory=None, **graph):
        asked = QuantizeOptions(
            str(language_model / "float"), language_model / "none", algorithm="gptq", dry_run=True, calibration=text,
            max_memory=memory, graph=GraphOptions(**graph),
        )  # fmt: skip
        made = run(asked)
        return dict(made.rows())["statistics"], made.to_dict()["statistics"]

    said, values = plan()
    assert values["steps"] == 1 and values["kept_bytes"] == 0
    assert said.startswith(f"{values['hessians']} Hessians, ") and said.endswith("; each node runs once per batch")
    one, parted = plan(memory=1)
    assert parted["steps"] == values["hessians"] and parted["hessian_bytes"] == values["hessian_bytes"]
    assert parted["step_hessian_bytes"] < values["hessian_bytes"]
    assert parted["kept_bytes"] > 0 and "kept between steps, 0.0 MB of it in memory" in one
    both, twice = plan(layer_wise=True)
    assert "each node runs twice per batch" in both and both.endswith("in memory")
    assert twice["hessian_bytes"] == 2 * values["hessian_bytes"]


def test_kernels_are_quantized_before_anything_is_seen(tmp_path):
    """With --layer-wise, what reads a quantized convolution sees what it makes, and corrects it."""
    random = np.random.default_rng(0)
    k = random.standard_normal((WIDTH, 3, 3, 3)).astype(np.float32)
    a = (random.standard_normal((WIDTH, 8)) / WIDTH**0.5).astype(np.float32)
    nodes = [
        N("Conv", "x k", "c", "conv"),
        N("Relu", "c", "r", "relu"),
        N("GlobalAveragePool", "r", "p", "pool"),
        N("Flatten", "p", "f", "flat"),
        N("MatMul", "f a", "y", "product"),
    ]
    model = graph_model(nodes, {"k": k, "a": a}, ranks={"x": 4})
    (tmp_path / "source").mkdir()
    save_graph(model, tmp_path / "source" / "net.onnx")
    feeds = [{"x": random.standard_normal((64, 3, 5, 5)).astype(np.float32)} for _ in range(3)]
    prepare(model)
    found, _ = find_targets(model.graph, Selection(op_types=("MatMul", "Conv")))
    options = QuantizeOptions("", tmp_path, bits=2, group_size=16, overrides=(Override("^a$", bits=8),))
    (step,) = make_steps(find_chain("gptq"), {})
    targets = {t.name: scheme_target(t, options) for t in found}
    errors = []
    for layer_wise in (False, True):
        work = GraphWork(model, tmp_path / "source", found, targets, step, layer_wise=layer_wise)
        results, _ = solve_graph(work, ReaderFeeds(feeds), Silent(), spill=tmp_path)
        made = model.clone()
        for target in found:
            tensor = other_matrix(model.graph, target, results[target.name].dequantize().numpy)
            made.graph.initializers[target.name].const_value = tensor
        outputs = [next(Stream(m, tmp_path, feeds[:1], [["y"]]).run(0))["y"] for m in (made, model)]
        errors.append(np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[1]))
    assert errors[1] < 0.8 * errors[0], errors
