"""Accuracy of a trained CNN in integers, as the table of docs/int8.md.

    python benchmarks/integers.py

Trains the network of scripts/train_digits.py (seconds), quantizes it and its twin of uneven channels with each set of
flags, and scores both on the same images.
"""

import io
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from running import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

VARIANTS = {
    "`dynamic`": ("-a", "dynamic"),
    "`static` (minmax)": ("-a", "static"),
    "… `--calibrate-method entropy`": ("-a", "static", "--calibrate-method", "entropy"),
    "… `--calibrate-method percentile`": ("-a", "static", "--calibrate-method", "percentile"),
    "… `--per-channel`": ("-a", "static", "--per-channel"),
    "… `--equalize`": ("-a", "static", "--equalize"),
    "… `--equalize --bias-correction`": ("-a", "static", "--equalize", "--bias-correction"),
    "… `--bits 4`": ("-a", "static", "--bits", "4"),
    "… `--bits 4 --per-channel`": ("-a", "static", "--bits", "4", "--per-channel"),
    "… `--bits 4 --equalize`": ("-a", "static", "--bits", "4", "--equalize"),
}
GRAPHS = ("cnn", "uneven")


def main() -> None:
    import numpy as np

    import train_digits
    from quantcli.cli import app

    with tempfile.TemporaryDirectory(prefix="quantcli-integers-") as scratch:
        place = Path(scratch)
        model = train_digits.train()
        train_digits.write_onnx(model, place / "cnn.onnx")
        train_digits.make_uneven(model)
        train_digits.write_onnx(model, place / "uneven.onnx")
        np.savez(place / "calibrate.npz", x=train_digits.draw(256, 1001)[0])
        images, digits = train_digits.draw(4000, 1002)

        def scored(name: str, flags: tuple[str, ...]) -> float:
            samples = ("--calibration-inputs", str(place / "calibrate.npz"), "--batch-size", "32")
            words = ["quantize", "-m", str(place / f"{name}.onnx"), "-o", str(place / "Q"), "--force", "--quiet"]
            with redirect_stdout(io.StringIO()):
                code = app.run([*words, *flags, *(samples if "static" in flags else ())])
            if code:
                raise SystemExit(f"quantcli {' '.join([*words, *flags])} failed")
            return train_digits.accuracy(place / "Q" / "model" / f"{name}.onnx", images, digits)

        print("| `quantize -a …` | cnn.onnx | uneven.onnx |\n|---|---|---|")
        floats = [train_digits.accuracy(place / f"{name}.onnx", images, digits) for name in GRAPHS]
        print("| float32 | " + " | ".join(f"{a:.2%}" for a in floats) + " |")
        for label, flags in VARIANTS.items():
            print(f"| {label} | " + " | ".join(f"{scored(name, flags):.2%}" for name in GRAPHS) + " |", flush=True)


if __name__ == "__main__":
    main()
