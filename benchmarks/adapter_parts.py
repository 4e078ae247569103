"""Where the time of an adapter goes: a chain of products that take one, and nothing else, in ONNX Runtime.

    python benchmarks/adapter_parts.py --width 576 --rank 8

Each place is y + (x @ A) @ B as `adapters.slots` writes it. Differences between the lines: nodes that run on nothing
(rank 0), reading the matrices (constants), and handing them over as inputs at every run. The fastest of many short runs
counts, so that a machine that others use shows it too.
"""

import argparse
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from quantcli.adapters.files import write_adapter


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--width", type=int, default=576, help="inputs and outputs of each product")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--places", type=int, default=150, help="products in the chain")
    parser.add_argument("--seconds", type=float, default=30, help="how long to run")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    values = {
        name: (0.01 * random.standard_normal(shape)).astype(np.float32)
        for number in range(args.places)
        for name, shape in ((f"A{number}", (args.width, args.rank)), (f"B{number}", (args.rank, args.width)))
    }
    empty = {name: v[:, :0] if name[0] == "A" else v[:0] for name, v in values.items()}
    taking = _session(_chain(args.width, args.places, empty, inputs=True))
    cases = {
        "products without places": (_session(_chain(args.width, args.places, {}, inputs=False)), None),
        "places, no adapter": (taking, None),
        "the adapter as constants": (_session(_chain(args.width, args.places, values, inputs=False)), None),
        "the adapter as inputs": (taking, _adapter(values)),
    }
    best = dict.fromkeys(cases, float("inf"))
    feed, end = {"x": random.standard_normal((1, 1, args.width)).astype(np.float32)}, time.time() + args.seconds
    while time.time() < end:
        for name, (session, options) in cases.items():
            begin = time.perf_counter()
            session.run(None, feed, options)
            best[name] = min(best[name], time.perf_counter() - begin)
    first = best["products without places"]
    print(f"rank {args.rank}, {args.places} products of {args.width} x {args.width}, one thread")
    print("| chain | microseconds | per place |\n|---|---|---|")
    for name, seconds in best.items():
        print(f"| {name} | {1e6 * seconds:.0f} | {1e6 * (seconds - first) / args.places:.2f} |")


def _chain(width: int, places: int, values: Mapping[str, np.ndarray], inputs: bool) -> ir.Model:
    """Relu stands for the product: it takes next to no time itself."""
    x = _value("x", ("batch", "length", width))
    given, constants, nodes = [x], [], []
    for number in range(places):
        node = ir.node("Relu", [x])
        nodes.append(node)
        x = node.outputs[0]
        if not values:
            continue
        a, b = _value(f"A{number}", (width, f"rank_{number}")), _value(f"B{number}", (f"rank_{number}", width))
        for value in (a, b):
            value.const_value = ir.Tensor(np.ascontiguousarray(values[value.name]), name=value.name)
            constants.append(value)
        down = ir.node("MatMul", [node.inputs[0], a])
        up = ir.node("MatMul", [down.outputs[0], b])
        total = ir.node("Add", [x, up.outputs[0]])
        nodes += [down, up, total]
        x = total.outputs[0]
    x.dtype = ir.DataType.FLOAT
    given += constants if inputs else []
    graph = ir.Graph(given, [x], nodes=nodes, initializers=constants, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


def _value(name: str, shape: tuple[int | str, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def _session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _adapter(values: Mapping[str, np.ndarray]) -> ort.RunOptions:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "parts.onnx_adapter"
        write_adapter(path, values, "onnx_adapter")
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(path))
        options.add_active_adapter(adapter)
        _kept.append(adapter)  # the options only borrow it
    return options


_kept: list[ort.LoraAdapter] = []

if __name__ == "__main__":
    main()
