"""Trains a small CNN on drawn digits and writes it as an ONNX graph, with samples to calibrate and to test on.

    python scripts/train_digits.py FOLDER             # FOLDER/cnn.onnx, uneven.onnx, calibrate.npz (x), test.npz (x, y)
    python scripts/train_digits.py FOLDER --test Q    # accuracy of both, and of the graph folder Q

Digits of a 5x7 font are shifted, scaled in brightness, and hidden in noise; no data is needed. `uneven.onnx` is the
same function with channels of very different size, as depthwise networks have them after long training
(https://arxiv.org/abs/1906.04721, figure 2): what one scale per tensor finds hard.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

SIZE = 16
_FONT = (
    "0e11131519110e", "040c040404040e", "0e11010204081f", "1f02040201110e", "02060a121f0202",
    "1f101e0101110e", "0608101e11110e", "1f010204080808", "0e11110e11110e", "0e11110f01020c",
)  # fmt: skip


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, 1, 16, 16] float32 and their digits [count] int64."""
    random = np.random.default_rng(seed)
    digits = random.integers(0, 10, count)
    images = random.normal(scale=0.45, size=(count, 1, SIZE, SIZE)).astype(np.float32)
    for image, digit in zip(images, digits, strict=True):
        rows = bytes.fromhex(_FONT[digit])
        glyph = np.array([[row >> (4 - i) & 1 for i in range(5)] for row in rows], np.float32).repeat(2, 0).repeat(2, 1)
        top, left = random.integers(0, SIZE - 13), random.integers(0, SIZE - 9)
        image[0, top : top + 14, left : left + 10] += glyph * random.uniform(0.6, 1.6)
    return images, digits


def _layer(inputs: int, outputs: int, **convolution: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **convolution), nn.BatchNorm2d(outputs), nn.ReLU()]


def train(seed: int = 0, epochs: int = 2, count: int = 4000) -> nn.Sequential:
    """The network of drawn digits in evaluation mode; seconds on a CPU."""
    return fit(*draw(count, seed + 1), seed, epochs)


def fit(images: np.ndarray, digits: np.ndarray, seed: int = 0, epochs: int = 2) -> nn.Sequential:
    """The network of images [count, 1, size, size] float32, size a multiple of 4, and digits [count] int64."""
    torch.manual_seed(seed)
    inputs, labels = torch.from_numpy(images), torch.from_numpy(digits)
    layers = [*_layer(1, 16), *_layer(16, 16, groups=16), *_layer(16, 32, stride=2), *_layer(32, 32, groups=32)]
    pixels = (images.shape[-1] // 4) ** 2
    model = nn.Sequential(*layers, *_layer(32, 32, stride=2), nn.Flatten(), nn.Linear(32 * pixels, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def make_uneven(model: nn.Sequential, spread: float = 1.5, seed: int = 0) -> None:
    """Multiplies each channel behind a batch norm by a random factor, and divides what reads it; in place."""
    torch.manual_seed(seed)
    norms = [m for m in model if isinstance(m, nn.BatchNorm2d)]
    readers = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)][1:]
    with torch.no_grad():
        for norm, reader in zip(norms, readers, strict=True):
            factors = torch.exp(spread * torch.randn(norm.num_features))
            norm.weight *= factors
            norm.bias *= factors
            if isinstance(reader, nn.Linear):
                reader.weight /= factors.repeat_interleave(reader.in_features // len(factors))
            else:
                across = factors.view(-1, 1, 1, 1) if reader.groups > 1 else factors.view(1, -1, 1, 1)
                reader.weight /= across


def write_onnx(model: nn.Sequential, path: Path, size: int = SIZE) -> None:
    """The network of images of this size as exporters write it in training mode: batch norms stand on their own."""
    weights: list[ir.Value] = []
    nodes: list[ir.Node] = []
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("n", 1, size, size)))
    value = x

    def weight(name: str, tensor: Tensor) -> ir.Value:
        array = tensor.detach().numpy()
        found = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        found.dtype, found.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
        weights.append(found)
        return found

    for index, module in enumerate(model):
        name = f"{type(module).__name__.lower().rstrip('2d')}{index}"
        if isinstance(module, nn.Conv2d):
            kernel = {"pads": [1, 1, 1, 1], "strides": list(module.stride), "group": module.groups}
            node = ir.node("Conv", [value, weight(f"{name}.weight", module.weight)], kernel, name=name)
        elif isinstance(module, nn.BatchNorm2d):
            parameters = (module.weight, module.bias, module.running_mean, module.running_var)
            inputs = [weight(f"{name}.{i}", p) for i, p in enumerate(parameters) if p is not None]
            node = ir.node("BatchNormalization", [value, *inputs], {"epsilon": module.eps}, name=name)
        elif isinstance(module, nn.Linear):
            inputs = [weight(f"{name}.weight", module.weight), weight(f"{name}.bias", module.bias)]
            node = ir.node("Gemm", [value, *inputs], {"transB": 1}, name=name)
        else:
            node = ir.node({"ReLU": "Relu"}.get(type(module).__name__, "Flatten"), [value], name=name)
        nodes.append(node)
        value = node.outputs[0]
        value.name = f"{name}.output"
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(("n", 10))
    graph = ir.Graph([x], [value], nodes=nodes, initializers=weights, opset_imports={"": 17}, name="digits")
    ir.save(ir.Model(graph, ir_version=8), path)


def accuracy(path: Path, images: np.ndarray, digits: np.ndarray) -> float:
    """Share of images that a graph file gets right."""
    import onnxruntime

    (scores,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": images})
    return float((scores.argmax(1) == digits).mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, or tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--test", type=Path, metavar="FOLDER", help="what quantcli wrote; nothing is trained")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.test is None:
        model = train()
        write_onnx(model, options.folder / "cnn.onnx")
        make_uneven(model)
        write_onnx(model, options.folder / "uneven.onnx")
        np.savez(options.folder / "calibrate.npz", x=draw(256, 1001)[0])
        images, digits = draw(4000, 1002)
        np.savez(options.folder / "test.npz", x=images, y=digits)
    with np.load(options.folder / "test.npz") as samples:
        graphs = [options.folder / "cnn.onnx", options.folder / "uneven.onnx"]
        graphs += sorted((options.test / "model").glob("*.onnx")) if options.test else []
        for path in graphs:
            print(f"{path}: {accuracy(path, samples['x'], samples['y']):.2%}")


if __name__ == "__main__":
    main()
