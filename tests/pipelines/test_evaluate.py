"""Evaluation end to end over tiny folders: float, GPTQ and ONNX GenAI, their agreement, gates and refusals."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from quantcli.data.sources import evaluation_windows
from quantcli.errors import InputError, UsageError
from quantcli.formats import gptq
from quantcli.formats.codec import Described
from quantcli.models.load import load
from quantcli.options import EvaluateOptions
from quantcli.pipelines import evaluate
from quantcli.report.evaluation import comparison_table, evaluation_rows
from quantcli.scheme import Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs. " * 40


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    plain.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", bos_token="<end>")


def quantize(folder: Path, source: Path) -> None:
    """Rounds every linear of the blocks to 4 bits, groups of 32; plain, so that no rounder of ours is needed."""
    shutil.copytree(source, folder)
    scheme = Scheme(4, 32, lowest_zero=1)
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight
            continue
        n, k = weight.shape
        grouped = weight.view(n, -1, 32)
        scale = (grouped.amax(2) - grouped.amin(2)).div(14).half()
        zero = (-grouped.amin(2) / scale.float()).round().clamp(1, 15)
        codes = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15).view(n, k)
        q = QuantizedTensor(codes.to(torch.uint8), scale, zero.to(torch.uint8), scheme, group_index(k, scheme))
        tensors |= {f"{name.removesuffix('.weight')}.{part}": t for part, t in gptq.pack(q).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = gptq.config_for(
        Described(scheme, {}, [], desc_act=False, head=None, producer="test")
    )
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model, its quantized copy, and both as ONNX GenAI folders."""
    root = tmp_path_factory.mktemp("models")
    words = tokenizer(300)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data *= 3  # sharper distributions than a fresh model has
    model.save_pretrained(root / "float")
    words.save_pretrained(root / "float")
    quantize(root / "q4", root / "float")
    for name, precision in (("float", "fp32"), ("q4", "int4")):
        _build(root / name, root / f"{name}-onnx", precision, root / "cache")
    (root / "text.txt").write_text(TEXT)
    return root


def _build(source: Path, target: Path, precision: str, cache: Path) -> None:
    from onnxruntime_genai.models import builder

    options = ["int4_accuracy_level=0"] if precision == "int4" else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = builder.parse_extra_options(None, str(source), str(target), precision, "cpu", str(cache), options)
        builder.create_model(None, str(source), str(target), precision, "cpu", str(cache), **extra)


def run(folders: Path, model: str, reference: str | None = None, **values):
    settings = {"data": str(folders / "text.txt"), "num_samples": 3, "seq_len": 40, "device": "cpu", "speed": False}
    return evaluate.run(
        EvaluateOptions(
            str(folders / model), None if reference is None else str(folders / reference), **(settings | values)
        )
    )


def test_a_model_against_itself(folders):
    result = run(folders, "float", "float")
    assert result.kl_mean == 0
    assert result.top1_agreement == 1
    assert result.perplexity_increase == 0
    assert (result.windows, result.tokens) == (3, 3 * 39)
    assert result.bits_per_weight == 32
    assert result.quantized_bits_per_weight is None
    assert result.decode_tokens_per_second is None


def test_logits_of_the_reference_are_kept(folders, tmp_path):
    """One file per window; what a second run reads is what the first computed, and the reference is not opened."""
    kept = tmp_path / "kept"
    fresh = run(folders, "q4", "float")
    first = run(folders, "q4", "float", reference_cache=kept)
    files = sorted(kept.iterdir())
    assert [f.suffix for f in files] == [".npy"] * 3
    one, *others = files
    stamps = [f.stat().st_mtime_ns for f in others]
    one.unlink()
    second = run(folders, "q4", "float", reference_cache=kept)
    assert first.to_dict() == second.to_dict() == fresh.to_dict()
    assert sorted(kept.iterdir()) == files
    assert [f.stat().st_mtime_ns for f in others] == stamps
    other = run(folders, "q4", "q4", reference_cache=kept)
    assert other.kl_mean == 0
    assert len(list(kept.iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "shape", "pickle"])
def test_kept_logits_that_are_damaged(damage, folders, tmp_path):
    run(folders, "q4", "float", reference_cache=tmp_path)
    path = min(tmp_path.iterdir())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        np.save(path, np.zeros((3, 4), np.float32) if damage == "shape" else np.array([{}]))
    with pytest.raises(InputError, match=path.name) as caught:
        run(folders, "q4", "float", reference_cache=tmp_path)
    assert "delete it" in caught.value.hint


def test_perplexity_is_that_of_transformers(folders):
    model = load(folders / "float", device="cpu")
    windows = evaluation_windows(AutoTokenizer.from_pretrained(folders / "float"), [TEXT], 3, 40)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss for w in windows]
    assert run(folders, "float").perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


def test_quantized_against_float(folders):
    result = run(folders, "q4", "float", speed=True)
    assert 1e-4 < result.kl_mean < 0.5
    assert result.kl_99th_percentile >= result.kl_mean
    assert result.kl_standard_error > 0
    assert 0.2 < result.top1_agreement < 1
    assert result.quantized_bits_per_weight == pytest.approx(4 + 20 / 32)
    assert result.size_bytes < result.reference_size_bytes
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second > 0
    assert result.peak_memory_bytes > 0
    assert run(folders, "q4", "float").kl_mean == result.kl_mean  # the same on every run


def test_onnx_float_gives_what_torch_gives(folders):
    result = run(folders, "float-onnx", "float", speed=True)
    assert result.kl_mean < 1e-6
    assert result.top1_agreement == 1
    assert result.perplexity == pytest.approx(result.reference_perplexity, rel=1e-4)
    assert result.decode_tokens_per_second > 0


def test_onnx_quantized_gives_what_the_loader_gives(folders):
    onnx, packed = run(folders, "q4-onnx", "float"), run(folders, "q4", "float")
    # the builder rounds the float head to 4 bits as well, so these differ a little
    assert onnx.perplexity == pytest.approx(packed.perplexity, rel=0.2)
    assert onnx.quantized_bits_per_weight < 6
    assert onnx.size_bytes > 0


def test_gates_say_what_failed_and_leave_the_result(folders):
    kept = run(folders, "q4", "float", max_kl=10.0, max_perplexity_increase=10.0)
    assert kept.failures == []
    failed = run(folders, "q4", "float", max_kl=1e-6, max_perplexity_increase=-0.9)
    assert [f.split(" ")[0] for f in failed.failures] == ["KL", "perplexity"]
    assert "is above --max-kl 1e-06" in failed.failures[0]
    assert failed.perplexity == kept.perplexity
    assert json.loads(json.dumps(failed.to_dict()))["failures"] == failed.failures


def test_report(folders):
    result = run(folders, "q4", "float")
    rows = dict(evaluation_rows(result))
    assert rows["perplexity"] == f"{result.perplexity:.3f}"
    assert "where quantized" in rows["bits per weight"]
    assert "decode" not in rows
    columns, cells = comparison_table([("q4", result), ("float", run(folders, "float"))])
    assert len(columns) == len(cells[0]) == len(cells[1])
    assert cells[1][columns.index("KL")] == "–"


def test_builtin_text_needs_no_file(folders):
    assert run(folders, "float", data=None, num_samples=2).text.startswith("Python's documentation")


def test_the_folder_of_an_earlier_command(folders, tmp_path):
    shutil.copytree(folders / "q4", tmp_path / "out" / "model")
    (tmp_path / "out" / "quantcli.json").write_text("{}")
    result = evaluate.run(
        EvaluateOptions(
            str(tmp_path / "out"), data=str(folders / "text.txt"), num_samples=1, seq_len=40, device="cpu", speed=False
        )
    )
    assert result.perplexity > 1


def test_tokenizers_that_differ(folders, tmp_path):
    shutil.copytree(folders / "float", tmp_path / "other")
    tokenizer(280).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="into different tokens"):
        run(folders, "float", str(tmp_path / "other"))


def test_weights_that_are_not_numbers(folders, tmp_path):
    shutil.copytree(folders / "float", tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight of .* holds NaN"):
        run(folders, str(tmp_path / "nan"))


@pytest.mark.parametrize("model", ["float", "float-onnx"])
def test_windows_longer_than_the_model(folders, model):
    assert run(folders, model, seq_len=64, num_samples=1, speed=True).tokens == 63
    with pytest.raises(UsageError, match="--seq-len 65 is more than the 64 positions") as caught:
        run(folders, model, seq_len=65, num_samples=1)
    assert caught.value.hint == "add --seq-len 64"


def test_folders_that_cannot_be_evaluated(folders, tmp_path):
    with pytest.raises(UsageError, match="--seq-len must be 2 or more"):
        run(folders, "float", seq_len=1)
    (tmp_path / "graph").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(folders / "float-onnx" / name, tmp_path / "graph")
    with pytest.raises(InputError, match="tokenizer"):
        run(folders, str(tmp_path / "graph"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders / "float" / name, tmp_path / "graph")
    with pytest.raises(InputError, match=r"without genai_config\.json"):
        run(folders, str(tmp_path / "graph"))
    (tmp_path / "graph" / "genai_config.json").write_text("{")
    with pytest.raises(InputError, match="not a GenAI configuration"):
        run(folders, str(tmp_path / "graph"))
