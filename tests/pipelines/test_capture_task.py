import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as t

from families import save
from quantcli.errors import InputError, UsageError
from quantcli.folder import read_manifest
from quantcli.models.tasks import find_task
from quantcli.options import CaptureOptions, QuantizeOptions
from quantcli.pipelines import capture, quantize

VOCABULARY = 272  # unlike any layer size
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IMAGE = {k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")} | {
    "image_size": 24,
    "patch_size": 8,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
}


def clip() -> t.CLIPConfig:
    text = t.CLIPTextConfig(**TEXT | {"eos_token_id": 2, "bos_token_id": 1}, projection_dim=48)
    return t.CLIPConfig(
        text_config=text.to_dict(), vision_config=t.CLIPVisionConfig(**IMAGE).to_dict(), projection_dim=48
    )


MODELS = {
    "bert": (lambda: t.BertModel(t.BertConfig(**TEXT)), "feature-extraction", ["model"]),
    "bert-classifier": (
        lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT, num_labels=3)),
        "text-classification",
        ["model"],
    ),
    "roberta": (lambda: t.RobertaForMaskedLM(t.RobertaConfig(**TEXT)), "fill-mask", ["model"]),
    "vit": (
        lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE, num_labels=5)),
        "image-classification",
        ["model"],
    ),
    "clip": (lambda: t.CLIPModel(clip()), "feature-extraction", ["text_model", "vision_model"]),
    "clip-vision": (
        lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**IMAGE, projection_dim=48)),
        "feature-extraction",
        ["model"],
    ),
    "llama-classifier": (
        lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**TEXT, num_labels=3)),
        "text-classification",
        ["model"],
    ),
    "t5": (
        lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
                       decoder_start_token_id=0)
        ),
        "text2text-generation",
        ["encoder", "decoder"],
    ),
    "bart": (
        lambda: t.BartForConditionalGeneration(t.BartConfig(**BART)),
        "text2text-generation",
        ["encoder", "decoder"],
    ),
    "whisper": (
        lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(**BART, bos_token_id=1, num_mel_bins=16, max_source_positions=30, max_target_positions=64)
        ),
        "automatic-speech-recognition",
        ["encoder", "decoder"],
    ),
}  # fmt: skip


def write(name: str, folder: Path) -> t.PreTrainedModel:
    """A model whose blocks matter to its outputs."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save(model, folder)
    return model


def captured(folder: Path, output: Path, **options):
    return capture.run(CaptureOptions(model=str(folder), output=output, **options))


QUICK = ("bert-classifier", "clip", "t5", "whisper")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.large) for n in MODELS])
def test_every_kind(name, tmp_path):
    model = write(name, tmp_path / "m")
    result = captured(tmp_path / "m", tmp_path / "o")
    _, task, names = MODELS[name]
    assert result.task == task and list(result.errors) == names and max(result.errors.values()) < 1e-4
    assert sorted(p.stem for p in (tmp_path / "o" / "model").glob("*.onnx")) == sorted(names)
    assert json.loads((tmp_path / "o" / "model" / "config.json").read_text())["model_type"] == model.config.model_type
    assert read_manifest(tmp_path / "o").options["task"] == task
    assert (tmp_path / "o" / "model" / "tokenizer.json").is_file()


def test_an_encoder_goes_on_to_integers(tmp_path):
    model = write("bert", tmp_path / "m")
    captured(tmp_path / "m", tmp_path / "o")
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()
    feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": np.zeros_like(ids.numpy())}

    def run(folder: Path) -> np.ndarray:
        session = onnxruntime.InferenceSession(folder / "model" / "model.onnx", providers=["CPUExecutionProvider"])
        return session.run(["last_hidden_state"], feed)[0]

    np.testing.assert_allclose(run(tmp_path / "o"), wanted, atol=1e-4)
    for name in ("dynamic", "static"):
        quantize.run(QuantizeOptions(str(tmp_path / "o"), tmp_path / name, name))
        found = run(tmp_path / name)
        cosine = (found * wanted).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(wanted, axis=-1)
        assert cosine.min() > 0.95 and not np.array_equal(found, wanted)


CONFIGS = [
    ({"architectures": ["BertForTokenClassification"], "model_type": "bert"}, "token-classification"),
    ({"model_type": "bert"}, "feature-extraction"),
    ({"model_type": "t5"}, "text2text-generation"),
    ({"model_type": "whisper"}, "automatic-speech-recognition"),
    ({"model_type": "llama"}, "text-generation"),
    ({"architectures": None, "model_type": "gpt2"}, "text-generation"),
    ({"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}, "feature-extraction"),
    ({"architectures": ["MyOwn"], "model_type": "mine"}, "text-generation"),
]


@pytest.mark.parametrize(("config", "task"), CONFIGS, ids=lambda v: str(v)[:40])
def test_the_task_is_found(config, task):
    assert find_task(config) == task


REFUSED = [
    ({"task": "feature-extractoin"}, UsageError, "did you mean 'feature-extraction'"),
    ({"task": "text-classification"}, InputError, r"lacks tensor classifier\.bias, classifier\.weight that"),
    ({"precision": "int4"}, UsageError, "--precision is for text-generation"),
    ({"exporter": "genai"}, UsageError, "--exporter genai is for text-generation"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_does_not_fit_is_refused(options, error, message, tmp_path):
    write("bert", tmp_path / "m")
    with pytest.raises(error, match=message):
        captured(tmp_path / "m", tmp_path / "o", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
