"""bitsandbytes itself, where it is installed: the same codes, and either side opens what the other writes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tiny
from quantcli.formats import bnb, bnb_int8
from quantcli.models.codebook_linear import CodebookLinear
from quantcli.models.int8_linear import Int8Linear
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, EvaluateOptions, QuantizeOptions
from quantcli.pipelines import evaluate, inspect, quantize
from quantcli.scheme import Scheme
from quantcli.tensors import vectorwise
from quantcli.tensors.codebook import VALUES, codebook, dynamic_map, round_to_codebook

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional
TOKENS = torch.tensor([[3, 50, 7, 99, 12, 0, 45]])
NAMES = pytest.mark.parametrize("name", VALUES)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def opened(folder, **more):
    """As transformers and bitsandbytes open it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **more).eval()


def odd_weights(rows, columns, dtype, name):
    weight = 0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns))
    weight[0, : columns // 2] = 0
    table = codebook(name).sort().values
    middles = (table[:-1] + table[1:]) / 2  # half way between two values, and a block that reaches 1
    weight[1, :16] = torch.cat([middles, torch.ones(1)])
    weight[2, 0] = weight[2].abs().max() * 40
    return weight.to(dtype)


def test_the_tables_are_theirs():
    for name in VALUES:
        assert torch.equal(codebook(name), functional.get_4bit_type(name, device="cpu"))
    assert torch.equal(dynamic_map(), functional.create_dynamic_map())


@NAMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 256, 4096])
def test_the_codes_are_theirs(name, dtype, size):
    weight = odd_weights(8, 4096, dtype, name)
    packed, state = functional.quantize_4bit(weight, blocksize=size, quant_type=name)
    stored = bnb.pack(round_to_codebook(weight, Scheme(4, size, codebook=name)), dtype)
    assert torch.equal(stored["weight"], packed)
    theirs = state.as_dict(packed=True)
    assert {f"weight.{k}" for k in theirs} == stored.keys() - {"weight"}
    for key, value in theirs.items():
        assert torch.equal(stored[f"weight.{key}"], value), key
    assert torch.equal(bnb.unpack(stored, Scheme(4, size, codebook=name)).dequantize(dtype),
                       functional.dequantize_4bit(packed, state))  # fmt: skip


@NAMES
def test_double_quantization_is_theirs_but_for_ties(name):
    """Their CPU code looks 8-bit codes up in 65536 steps, ours takes the nearest: they differ half way between two."""
    weight, scheme = odd_weights(256, 4096, torch.float32, name), Scheme(4, 64, codebook=name, double_quant=True)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=name, compress_statistics=True)
    ours = round_to_codebook(weight, scheme)
    stored, theirs = bnb.pack(ours), {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    assert torch.equal(stored["weight"], packed) and stored.keys() - {"weight"} == theirs.keys()
    for part in stored.keys() - {"weight", "weight.absmax"}:
        assert torch.equal(stored[part], theirs[part]), part
    codes, others = stored["weight.absmax"].long(), theirs["weight.absmax"].long()
    differing = codes != others
    assert differing.float().mean() < 0.01 and int((codes - others).abs().max()) <= 1
    table = dynamic_map()
    largest = ours.nested.absmax.repeat_interleave(256)
    x = (weight.view(-1, 64).abs().amax(1) - ours.nested.offset) / largest
    middle = (table[codes] + table[others]) / 2
    assert ((x - middle).abs()[differing] < 1 / 65535).all()
    # and what they stored expands to the same numbers here
    read = bnb.read_state(theirs | {"weight": packed})
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(read.absmax, absmax)


CASES = {
    "nf4": {"algorithm": "nf4"},
    "fp4": {"algorithm": "fp4"},
    "nf4-double": {"algorithm": "nf4", "settings": {"double_quant": "true"}},
    "fp4-double": {"algorithm": "fp4", "settings": {"double_quant": "true"}},
    "some-float": {"algorithm": "nf4", "exclude": ("o_proj", r"layers\.1\.mlp\.up_proj")},
    "head": {"algorithm": "nf4", "quantize_lm_head": True},
    "bfloat16": {"algorithm": "nf4", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_opens_what_we_write(tmp_path, case):
    source = tiny.checkpoint(tmp_path / "f")
    options = {"group_size": 32, "device": "cpu", "dtype": "keep"} | CASES[case]
    quantize.run(QuantizeOptions(str(source), tmp_path / "q", **options))
    ours, theirs = load(tmp_path / "q", device="cpu"), opened(tmp_path / "q" / "model")
    packed = {n: m for n, m in ours.named_modules() if isinstance(m, CodebookLinear)}
    assert packed.keys() == {n for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    for name, module in packed.items():
        weight = theirs.get_submodule(name).weight
        expected = functional.dequantize_4bit(weight.data, weight.quant_state).float()
        half = CASES[case].get("dtype") == "bfloat16"
        torch.testing.assert_close(module.dequantize(), expected, rtol=2**-8 if half else 0, atol=0)
    if case == "bfloat16":  # they compute in it
        assert theirs.config.quantization_config.bnb_4bit_compute_dtype == torch.bfloat16
    else:
        torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)


def test_a_tied_head_and_transposed_linears(tmp_path):
    for model_type, settings in (("gpt2", {}), ("llama", {"tie_word_embeddings": True})):
        source = tiny.checkpoint(tmp_path / model_type, model_type, **settings)
        output = tmp_path / f"{model_type}-q"
        quantize.run(QuantizeOptions(str(source), output, algorithm="nf4", group_size=32, device="cpu", dtype="keep"))
        torch.testing.assert_close(
            logits(opened(output / "model")), logits(load(output, device="cpu")), rtol=1e-4, atol=1e-5
        )


@NAMES
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_we_open_what_transformers_writes(tmp_path, name, double_quant, dtype, model_type):
    """Blocks of 64 cross rows of 96, which our own files never do."""
    source = tiny.checkpoint(tmp_path / "f", model_type, dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=double_quant
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config).eval()
    model.save_pretrained(tmp_path / "q")
    tiny.save_tokenizer(tmp_path / "q")
    ours = load(tmp_path / "q", device="cpu")
    count = 0
    for module_name, module in ours.named_modules():
        if isinstance(module, CodebookLinear):
            weight = model.get_submodule(module_name).weight
            expected = functional.dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(module.dequantize(dtype), expected)
            count += 1
    assert count == len([n for n in load_file(tmp_path / "q" / "model.safetensors") if n.endswith(".quant_map")])
    if dtype == torch.float32:
        torch.testing.assert_close(logits(ours), logits(model), rtol=1e-4, atol=1e-5)
    found = inspect.run(tmp_path / "q")
    assert found.histogram[0].label == "4-bit" and found.histogram[0].tensors == count
    result = evaluate.run(EvaluateOptions(str(tmp_path / "q"), num_samples=1, seq_len=16, speed=False))
    assert result.perplexity > 1


@pytest.fixture
def their_constant(monkeypatch):
    """Their CPU kernel's 1 / 127 ** 2, 1.8e-5 too large: with it, both sides turn the same codes."""
    monkeypatch.setattr(vectorwise, "_UNIT", 6.200124e-05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int8_codes_are_theirs(dtype):
    weight = odd_weights(8, 4096, dtype, "nf4")
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    stored = bnb_int8.pack(vectorwise.round_rows(weight))
    assert torch.equal(stored["weight"], codes) and torch.equal(stored["SCB"], largest)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 6.0])
def test_int8_folders_open_on_both_sides(tmp_path, their_constant, model_type, threshold):
    source = tiny.checkpoint(tmp_path / "f", model_type)
    (tmp_path / "text.txt").write_text(tiny.words(200))
    options = QuantizeOptions(
        str(source), tmp_path / "q", algorithm="llm-int8", settings={"threshold": str(threshold)}, dtype="keep",
        calibration=CalibrationOptions(str(tmp_path / "text.txt"), num_samples=1, seq_len=16), device="cpu",
    )  # fmt: skip
    quantize.run(options)
    theirs, ours = opened(tmp_path / "q" / "model"), load(tmp_path / "q", device="cpu")
    packed = {n for n, m in ours.named_modules() if isinstance(m, Int8Linear)}
    assert packed == {n for n, m in theirs.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-5)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    made = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=config).eval()
    made.save_pretrained(tmp_path / "theirs")
    tiny.save_tokenizer(tmp_path / "theirs")
    read = load(tmp_path / "theirs", device="cpu")
    assert all(isinstance(read.get_submodule(n), Int8Linear) for n in packed)
    torch.testing.assert_close(logits(made), logits(read), rtol=1e-4, atol=1e-5)
