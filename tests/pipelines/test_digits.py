"""Accuracy of a trained CNN in float, dynamic and static: what the flags do to a network that does something."""

import numpy as np
import pytest

from quantcli.cli import app
from train_digits import accuracy, draw, make_uneven, train, write_onnx


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    model = train(epochs=2, count=2000)
    write_onnx(model, folder / "cnn.onnx")
    make_uneven(model)
    write_onnx(model, folder / "uneven.onnx")
    np.savez(folder / "calibrate.npz", x=draw(128, 1001)[0])
    return folder


def scored(place, name, *words, turned=False):
    samples = ["--calibration-inputs", place / "calibrate.npz", "--batch-size", "32"] if "static" in words else []
    argv = ["quantize", "-m", place / f"{name}.onnx", "-o", place / "q", "--force", "--quiet", *words, *samples]
    assert app.run([str(word) for word in argv]) == 0
    images, digits = draw(1000, 1002)
    return accuracy(place / "q" / "model" / f"{name}.onnx", np.moveaxis(images, 1, -1) if turned else images, digits)


@pytest.mark.parametrize("words", [
    ["-a", "dynamic"],
    ["-a", "static"],
    ["-a", "static", "--calibrate-method", "entropy", "--encoding", "qoperator"],
    ["-a", "static", "--calibrate-method", "percentile", "--per-channel"],
    ["-a", "static", "--bits", "4", "--equalize", "--bias-correction"],
], ids=" ".join)  # fmt: skip
def test_integers_are_as_good_as_floats(words, place):
    before = accuracy(place / "cnn.onnx", *draw(1000, 1002))
    assert before > 0.93
    assert scored(place, "cnn", *words) > before - 0.02


def test_equalization_saves_a_network_of_uneven_channels(place):
    before = accuracy(place / "uneven.onnx", *draw(1000, 1002))
    assert before == pytest.approx(accuracy(place / "cnn.onnx", *draw(1000, 1002)), abs=0.003)
    assert scored(place, "uneven", "-a", "static", "--min-sqnr", "0") < 0.5
    assert scored(place, "uneven", "-a", "static", "--equalize") > before - 0.02


@pytest.mark.parametrize("words", [
    [], ["--activation-type", "uint16", "--weight-type", "int4", "--per-channel"],
    ["--calibrate-method", "percentile", "--equalize", "--inputs-to-make-channel-last", "x"],
], ids=" ".join)  # fmt: skip
def test_digits_for_qnn(words, place):
    before = accuracy(place / "cnn.onnx", *draw(1000, 1002))
    turned = "--inputs-to-make-channel-last" in words
    assert scored(place, "cnn", "-a", "static", "--preprocess", "qnn", *words, turned=turned) > before - 0.02
