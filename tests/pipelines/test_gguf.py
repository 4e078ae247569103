"""`--format gguf`: one file that says what was computed, is read again, and is refused where it would be wrong."""

import json
import shutil
from dataclasses import replace

import gguf
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import gguf_models
import tiny
from quantcli.errors import InputError, UsageError
from quantcli.models.gguf.names import regroup, ungroup
from quantcli.models.gguf.vocabulary import read_vocabulary
from quantcli.models.linear import PackedEmbedding, QuantizedLinear
from quantcli.models.load import load
from quantcli.models.opened import open_checkpoint
from quantcli.options import CalibrationOptions, EvaluateOptions, Override, QuantizeOptions
from quantcli.pipelines import evaluate, inspect, quantize

_SPLIT_AT_X = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def source(root):
    def made(family):
        folder = root / family
        return folder if folder.exists() else gguf_models.save(family, folder)

    return made


def run(model, output, **values):
    options = {"algorithm": "rtn", "format": "gguf", "device": "cpu"} | values
    quantize.run(QuantizeOptions(str(model), output, **options))
    (path,) = (output / "model").glob("*.gguf")
    return path


def stored(path):
    """What any reader sees, by llama.cpp's names."""
    return {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("family", gguf_models.FAMILIES)
def test_the_file_holds_what_we_load(source, tmp_path, family):
    """Every number of the file, put where llama.cpp's names say, is one of the model that we open."""
    path = run(source(family), tmp_path / "Q", gguf_type="q4_k_m")
    assert [p.name for p in (tmp_path / "Q" / "model").glob("*.safetensors")] == []
    checkpoint = open_checkpoint(tmp_path / "Q" / "model")
    model, seen = load(tmp_path / "Q", device="cpu"), stored(path)
    state = {n: p for n, p in model.named_parameters() if not p.is_meta}
    packed = {f"{n}.weight": m.dequantize() for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    packed |= {f"{n}.weight": m.packed.dequantize() for n, m in model.named_modules() if isinstance(m, PackedEmbedding)}
    for name, (tensor, _) in checkpoint._places.items():
        module = name.removesuffix(".blocks")
        wanted = f"{module}.weight" if module != name else name
        ours = packed.get(wanted, state.get(wanted))
        theirs = seen[tensor.name]
        if tensor.stacked:
            theirs = theirs[tensor.sources.index(wanted)]
        theirs = ungroup(theirs, tensor.heads) if tensor.heads else theirs
        theirs = theirs - tensor.shift
        if tensor.transposed and wanted not in packed:
            theirs = theirs.T
        assert ours is not None, name
        torch.testing.assert_close(ours.detach().float().reshape(theirs.shape), theirs.float(), rtol=0, atol=1e-7)


def test_nothing_is_left_float_that_has_a_type(source, tmp_path):
    path = run(source("llama-tied"), tmp_path / "Q")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {name for name, kind in types.items() if kind == "F32"} == {n for n in types if "norm" in n}
    assert types["token_embd.weight"] == "Q6_K"  # the output head, too
    assert path.name == "llama-tied-Q4_K_M.gguf"


def test_defaults_follow_the_grid(source, tmp_path):
    model = source("llama")
    cases = {
        "q4_0": {"symmetric": True},
        "q5_0": {"bits": 5, "symmetric": True},
        "q2_k": {"bits": 2},
        "q3_k_m": {"bits": 3},
        "q5_k_m": {"bits": 5},
        "q6_k": {"bits": 6},
        "q8_0": {"bits": 8, "group_size": 32},
        "q4_k_m": {"readers": ("llama.cpp",), "format": None},
    }
    for mix, values in cases.items():
        plan = quantize.run(
            QuantizeOptions(str(model), tmp_path / mix, algorithm="kquant", dry_run=True, **{"format": "gguf"} | values)
        )
        assert plan.options.gguf_type == mix
        assert plan.opens["llama.cpp"] is None
        assert plan.opens["vllm"] is not None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 64}, "--group-size 64 does not go with GGUF's q4_k_m"),
        ({"gguf_type": "q4_k_m", "bits": 3}, "--bits 3 does not go with GGUF's q4_k_m"),
        ({"gguf_type": "q4_k_m", "symmetric": True}, "--sym does not go with"),
        ({"gguf_type": "q4_k_m", "format": "gptq"}, "--gguf-type is a choice of --format gguf"),
        ({"bits": 7}, "GGUF has no type of 7 bits"),
        ({"target_bits": 3.5, "algorithm": "kquant"}, "its own mixes of types"),
        ({"algorithm": "hqq"}, "format gguf cannot hold what hqq makes"),
        ({"algorithm": "gptq", "settings": {"order": "desc_act"}}, "order=desc_act"),
        ({"algorithm": "gptq", "settings": {"order": "dynamic"}}, "order=dynamic"),
        ({"overrides": (Override("q_proj", group_size=64),)}, "their own groups"),
        ({"overrides": (Override("q_proj", bits=7),)}, "GGUF has no type of 7 bits"),
        ({"exclude": ("nothing",)}, "no linear is named like"),
        ({"readers": ("vllm",)}, "vllm does not open this as gguf"),
    ],
)
def test_flags_that_have_no_effect_are_refused(source, tmp_path, values, message):
    with pytest.raises(UsageError, match=message):
        run(source("llama"), tmp_path / "Q", **values)
    assert not (tmp_path / "Q").exists()


def test_overrides_and_exclusions(source, tmp_path):
    values = {"overrides": (Override("q_proj", bits=8),), "exclude": ("lm_head", "embed_tokens", r"layers\.1\.mlp")}
    path = run(source("llama"), tmp_path / "Q", gguf_type="q4_k_s", **values)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert {types[n] for n in ("output.weight", "token_embd.weight", "blk.1.ffn_up.weight")} == {"BF16"}
    model = load(tmp_path / "Q", device="cpu")
    assert isinstance(model.lm_head, torch.nn.Linear)
    assert model(torch.arange(3, 20)[None]).logits.isfinite().all()


def test_rows_that_no_block_fits_are_told_of(tmp_path):
    config = {"hidden_size": 96, "intermediate_size": 80, "num_attention_heads": 6}
    gguf_models.save("llama", tmp_path / "M", **config)
    said = tiny.Warnings()
    asked = QuantizeOptions(str(tmp_path / "M"), tmp_path / "Q", algorithm="rtn", format="gguf")
    with pytest.raises(InputError, match="rows of 80 fit no block"):
        quantize.run(asked)
    quantize.run(replace(asked, allow_partial=True), said)
    assert any("rows of 96 are no blocks of 256: q5_0 in place of q4_k" in line for line in said.said)
    assert any("rows of 80 fit no block: left float in 2 tensors" in line for line in said.said)
    (path,) = (tmp_path / "Q" / "model").glob("*.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (types["blk.0.attn_q.weight"], types["blk.0.ffn_down.weight"]) == ("Q5_0", "BF16")


def test_gptq_is_better_and_is_judged_as_it_is_read(source, tmp_path):
    model, said = source("llama"), {}
    calibration = CalibrationOptions(str(gguf_models.text(tmp_path)), num_samples=4, seq_len=64)
    for algorithm in ("rtn", "gptq"):
        more = {"calibration": calibration} if algorithm == "gptq" else {}
        run(model, tmp_path / algorithm, algorithm=algorithm, gguf_type="q2_k", **more)
        judged = EvaluateOptions(str(tmp_path / algorithm), str(model), data=str(tmp_path / "text.txt"), seq_len=64)
        said[algorithm] = evaluate.run(judged).kl_mean
    assert said["gptq"] < 0.7 * said["rtn"]


def test_inspect_tells_types_and_readers(source, tmp_path):
    path = run(source("qwen3"), tmp_path / "Q")
    for where in (tmp_path / "Q", path):
        found = inspect.run(where)
        assert found.what == "GGUF file"
        assert found.model_type == "qwen3"
        assert found.size_bytes == path.stat().st_size
        assert (found.opens["llama.cpp"], found.opens["quantcli"]) == (None, None)
        assert found.opens["transformers"] == "it does not read gguf"
        assert found.intact
    assert 4.4 < found.quantized_bits_per_weight < 5.2


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2", "qwen3"])
def test_a_file_alone_is_read(source, tmp_path, family):
    path = run(source(family), tmp_path / "Q")
    (tmp_path / "alone").mkdir()
    shutil.copy(path, tmp_path / "alone" / "m.gguf")
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected = load(tmp_path / "Q", device="cpu")(ids).logits
        assert torch.equal(load(tmp_path / "alone", device="cpu")(ids).logits, expected)
        assert torch.equal(load(tmp_path / "alone" / "m.gguf", device="cpu")(ids).logits, expected)


def test_a_file_alone_whose_numbers_are_not_all_known_is_refused(source, tmp_path):
    path = run(source("gemma3"), tmp_path / "Q")
    (tmp_path / "alone").mkdir()
    shutil.copy(path, tmp_path / "alone")
    with pytest.raises(InputError, match="sliding_window, which is not read"):
        load(tmp_path / "alone")


def test_types_that_we_do_not_write_are_dequantized(source, tmp_path):
    path = run(source("llama"), tmp_path / "Q", exclude=("q_proj",), dtype="float32")
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(tmp_path / "Q" / "other.tmp", "llama")
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if "attn_q" in tensor.name:
            kind = gguf.GGMLQuantizationType.MXFP4
            data = gguf.quants.quantize(data, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.unlink()
    (tmp_path / "Q" / "other.tmp").rename(tmp_path / "Q" / "model" / "other.gguf")
    model, seen = load(tmp_path / "Q", device="cpu"), stored(tmp_path / "Q" / "model" / "other.gguf")
    expected = ungroup(seen["blk.0.attn_q.weight"], 4)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.dequantize(), expected)
    assert "mxfp4" in inspect.run(tmp_path / "Q" / "model").format


def test_damaged_files_are_named(source, tmp_path):
    path = run(source("llama"), tmp_path / "Q")
    whole = path.read_bytes()
    for length in (0, 20, 3000, len(whole) - 1000):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"damaged|lacks"):
            load(tmp_path / "Q")


def test_rows_are_regrouped_and_back():
    rows = torch.arange(24)
    assert regroup(rows, 2).tolist()[:4] == [0, 6, 1, 7]
    assert torch.equal(ungroup(regroup(rows, 2), 2), rows)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("gemma3", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("qwen2", {"head_dim": 32}, "4 heads of 32"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled otherwise"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of type dynamic"),
    ],
)
def test_models_that_llama_cpp_computes_otherwise_are_refused(tmp_path, family, settings, message):
    gguf_models.save(family, tmp_path / "M", **settings)
    with pytest.raises(InputError, match=message):
        run(tmp_path / "M", tmp_path / "Q")


def test_unknown_families_and_tokenizers_are_refused(tmp_path):
    tiny.checkpoint(tmp_path / "opt", "opt", ffn_dim=96, word_embed_proj_dim=64)
    with pytest.raises(InputError, match="opt is not written as GGUF"):
        run(tmp_path / "opt", tmp_path / "Q")
    tiny.checkpoint(tmp_path / "llama", "llama")
    with pytest.raises(InputError, match="its tokenizer is a WordLevel"):
        run(tmp_path / "llama", tmp_path / "Q")


def test_sliding_windows_that_llama_cpp_does_not_compute_are_told_of(tmp_path):
    gguf_models.save("mistral", tmp_path / "M", sliding_window=16)
    said = tiny.Warnings()
    quantize.run(QuantizeOptions(str(tmp_path / "M"), tmp_path / "Q", algorithm="rtn", format="gguf"), said)
    assert any("no sliding window: beyond 16 tokens" in line for line in said.said)


def _with_tokenizer(folder, tokenizer, **names):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def test_vocabularies(source, tmp_path):
    found = read_vocabulary(source("llama"), gguf_models.VOCABULARY)
    assert (found.model, found.cut, len(found.tokens)) == ("gpt2", "gpt-2", gguf_models.VOCABULARY)
    assert found.kinds[:3] == [3, 3, 3] and found.kinds[-1] == 5  # control, and a row without a token
    assert found.chat_template == gguf_models.TEMPLATE
    assert found.special == {"bos": 1, "eos": 2, "padding": 0}
    pieces = read_vocabulary(
        _with_tokenizer(tmp_path / "pieces", gguf_models.sentencepiece_bpe(), bos_token="<s>"), gguf_models.VOCABULARY
    )
    assert (pieces.model, pieces.flags["add_space_prefix"], pieces.notes) == ("llama", True, ())
    assert pieces.kinds[3:259] == [6] * 256
    unigrams = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0))
    unigrams.pre_tokenizer = pre_tokenizers.Metaspace()
    found = read_vocabulary(_with_tokenizer(tmp_path / "unigrams", unigrams), 4)
    assert (found.model, found.scores[:3], found.kinds) == ("t5", [0.0, -1.0, -2.0], [2, 1, 1, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": _SPLIT_AT_X}, "cuts text by x"),
        ({"normalizer": {"type": "Lowercase"}}, "normalized by Lowercase"),
    ],
)
def test_tokenizers_that_llama_cpp_has_no_name_for_are_refused(source, tmp_path, change, message):
    shutil.copytree(source("llama"), tmp_path / "M")
    path = tmp_path / "M" / "tokenizer.json"
    facts = json.loads(path.read_text())
    if "pre_tokenizer" in change:
        byte_level = facts["pre_tokenizer"]["pretokenizers"][-1] | {"use_regex": False}
        change = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [change["pre_tokenizer"], byte_level]}}
    path.write_text(json.dumps(facts | change))
    with pytest.raises(InputError, match=message):
        run(tmp_path / "M", tmp_path / "Q")


def test_more_tokens_than_rows_are_refused(source):
    with pytest.raises(InputError, match="the embedding 100 rows"):
        read_vocabulary(source("llama"), 100)


def test_transformers_opens_a_file_too(source, tmp_path):
    """Another reader of names and rows than ours."""
    path = run(source("qwen2"), tmp_path / "Q", gguf_type="q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        expected, found = load(tmp_path / "Q", device="cpu")(ids).logits, theirs(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
