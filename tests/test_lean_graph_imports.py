"""Graphs are quantized without torch and what belongs to it, which take seconds and hundreds of MB to import."""

import json
import subprocess
import sys

import numpy as np
import pytest

from small_graphs import cnn, mlp

HEAVY = ["torch", "sympy.core", "transformers", "safetensors", "tokenizers", "scipy", "numba"]
SCRIPT = f"""
import sys, json
from quantcli.cli.app import run
code = run(sys.argv[1:])
print(json.dumps([code, sorted(set({HEAVY!r}) & set(sys.modules))]))
"""


def loaded_after(*argv):
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, argv)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def samples(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "flags",
    [
        ("-a", "dynamic"),
        ("-a", "rtn"),
        ("-a", "rtn", "--sym", "--group-size", "32", "--override", "fc=clip_ratio=0.9"),
        ("-a", "rtn", "--encoding", "qdq", "--bits", "8"),
        ("-a", "static", "--calibration-inputs", "SAMPLES"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("draw", [cnn, mlp], ids=["cnn", "mlp"])
def test_nothing_heavy_is_imported(draw, flags, tmp_path, samples):
    draw(tmp_path / "m.onnx")
    import onnx

    value = onnx.load(tmp_path / "m.onnx").graph.input[0]
    shape = [d.dim_value or 2 for d in value.type.tensor_type.shape.dim]
    random = np.random.default_rng(0)
    for number in range(2):
        np.savez(samples / f"{number}.npz", **{value.name: random.standard_normal(shape).astype(np.float32)})
    words = [str(samples) if word == "SAMPLES" else word for word in flags]
    (code, heavy), said = loaded_after("quantize", "-m", tmp_path / "m.onnx", "-o", tmp_path / "Q", *words)
    assert code == 0, said
    assert heavy == []
