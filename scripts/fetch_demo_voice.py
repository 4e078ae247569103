"""Fetches a voice detector from PyPI: `fetch_demo_voice.py [FOLDER]`, where vad.onnx goes.

Its convolutions and an LSTM stand in branches of an If, one for each sampling rate; opset 16.
"""

import shutil
import sys
from pathlib import Path

from wheel_member import demo_folder, fetched, made_from

REQUIREMENT = "silero-vad==6.2.3"
MEMBER = "silero_vad/data/silero_vad.onnx"
SHA256 = "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3"


def main(folder: Path | None = None) -> Path:
    """Fetches unless the folder holds the verified graph."""
    folder = folder or demo_folder("silero-vad")

    def make(made: Path) -> None:
        with fetched(REQUIREMENT, MEMBER, SHA256) as graph:
            shutil.copyfile(graph, made / "vad.onnx")

    made_from(folder, SHA256, Path(__file__).read_text(), make=make)
    return folder


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:2])))
