import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3Config,
)

from quantcli.errors import InputError, UsageError
from quantcli.folder import read_manifest
from quantcli.formats import gptq
from quantcli.formats.codec import Codec, Described
from quantcli.formats.codecs import CODECS
from quantcli.graphs.weights.accuracy_level import count_by_bits
from quantcli.models.load import load
from quantcli.options import CaptureOptions, QuantizeOptions
from quantcli.pipelines import quantize
from quantcli.pipelines.capture import run
from quantcli.progress import Silent
from quantcli.scheme import PER_CHANNEL, Scheme
from quantcli.tensors.quantized import QuantizedTensor, group_index

VOCAB = 260  # unlike any layer size: the builder takes a linear with that many outputs for the head
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


class Heard(Silent):
    """Keeps what was said."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)


@dataclass
class Plan:
    """What is quantized, and how."""

    scheme: Scheme = field(default_factory=lambda: Scheme(4, 32))
    exceptions: dict[str, Scheme] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    desc_act: bool = False
    head: Scheme | None = None
    embedding: Scheme | None = None


def write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)


def write_float(folder: Path, config, tie: bool = False, dtype=torch.float32) -> Path:
    torch.manual_seed(0)
    config.tie_word_embeddings = tie
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():  # livelier than the usual initialisation: logits far apart
        if parameter.ndim == 2:
            parameter.data.mul_(4)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def random_codes(rows: int, columns: int, scheme: Scheme, desc_act: bool, seed: int) -> QuantizedTensor:
    """Codes that no rounder would make: every code, zero and sign of scale occurs."""
    random = torch.Generator().manual_seed(seed)
    groups = scheme.group_count(columns)
    codes = torch.randint(0, scheme.levels, (rows, columns), generator=random, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=random) + 0.5) * 0.3 / scheme.levels
    if scheme.symmetric:
        zero = torch.full((rows, groups), scheme.middle, dtype=torch.uint8)
        scale = scale * (torch.randint(0, 2, scale.shape, generator=random) * 2 - 1)
    else:
        zero = torch.randint(1, scheme.levels, (rows, groups), generator=random, dtype=torch.uint8)
    group = group_index(columns, scheme)
    if desc_act:
        group = group[torch.randperm(columns, generator=random)]
    return QuantizedTensor(codes, scale.to(torch.float16), zero, scheme, group)


def write_quantized(folder: Path, source: Path, plan: Plan, codec: Codec = gptq.CODEC) -> Path:
    """Replaces the linears of a float checkpoint by random codes."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    embedding = "model.embed_tokens"
    wanted: dict[str, Scheme] = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if tensor.ndim == 2 and ".layers." in name and module not in plan.excluded:
            wanted[module] = plan.exceptions.get(module, plan.scheme)
    if plan.head is not None:
        wanted["lm_head"] = plan.head
        config["tie_word_embeddings"] = False
    if plan.embedding is not None:
        wanted[embedding] = plan.embedding
    for seed, (module, scheme) in enumerate(wanted.items()):
        old = tensors.pop(f"{module}.weight", tensors.get(f"{embedding}.weight"))
        # q, k and v see one order of columns, as every solver that shares their Hessian gives them
        order = 7 if module.endswith(("q_proj", "k_proj", "v_proj")) else seed
        codes = random_codes(*old.shape, scheme, plan.desc_act and module not in ("lm_head", embedding), order)
        tensors.update({f"{module}.{part}": t for part, t in codec.pack(codes).items()})
    exceptions = {n: s for n, s in plan.exceptions.items()} | ({"lm_head": plan.head} if plan.head else {})
    config["quantization_config"] = codec.config(
        Described(
            plan.scheme,
            exceptions,
            list(plan.excluded),
            desc_act=plan.desc_act,
            head="lm_head" if plan.head else None,
            producer="test",
            float_linears=[*plan.excluded, *([] if plan.head else ["lm_head"])],
        )
    )
    if plan.embedding is not None:
        settings = {"bits": plan.embedding.bits, "group_size": plan.embedding.group_size, "sym": False}
        config["quantization_config"]["quantcli"] = {"embedding": {"name": embedding, **settings}}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return write_float(tmp_path_factory.mktemp("float") / "llama", LlamaConfig(**SMALL))


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return write_float(tmp_path_factory.mktemp("float") / "tied", LlamaConfig(**SMALL), tie=True)


def onnx_logits(folder: Path, tokens: list[int], split: int) -> np.ndarray:
    """Logits of a text that is read in two pieces, the second through the cache."""
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(tokens) + 2, do_sample=False)
    generator = og.Generator(model, parameters)
    out = []
    for piece in (tokens[:split], tokens[split:]):
        generator.append_tokens(np.asarray([piece], np.int32))
        out.append(np.asarray(generator.get_output("logits"))[0])
    return np.concatenate(out)


def assert_same_function(checkpoint: Path, onnx_folder: Path) -> None:
    tokens = torch.randint(2, VOCAB - 2, (40,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = load(checkpoint, device="cpu", dtype="float32")(tokens[None]).logits[0].numpy()
    found = onnx_logits(onnx_folder, tokens.tolist(), 33)
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def capture(model: Path, output: Path, heard: Heard | None = None, **options):
    return run(CaptureOptions(model=str(model), output=output, **options), heard)


PLANS = {
    "2 bits": Plan(Scheme(2, 32)),
    "3 bits": Plan(Scheme(3, 32)),
    "4 bits symmetric": Plan(Scheme(4, 32, symmetric=True)),
    "5 bits": Plan(Scheme(5, 16)),
    "6 bits": Plan(Scheme(6, 32)),
    "7 bits": Plan(Scheme(7, 32, symmetric=True)),
    "8 bits": Plan(Scheme(8, 32)),
    "per channel": Plan(Scheme(4, PER_CHANNEL)),
    "ragged": Plan(Scheme(4, 64)),  # 96 = 64 + 32, 160 = 2 * 64 + 32
    "no power of two": Plan(Scheme(4, 40)),
    "odd group": Plan(Scheme(3, 23)),
    "order of columns": Plan(Scheme(4, 32), desc_act=True),
    "order of columns, ragged": Plan(Scheme(3, 64, symmetric=True), desc_act=True),
    "overrides": Plan(
        Scheme(4, 32),
        exceptions={
            "model.layers.0.self_attn.k_proj": Scheme(8, 16),
            "model.layers.1.self_attn.v_proj": Scheme(2, 32),
            "model.layers.1.mlp.down_proj": Scheme(3, PER_CHANNEL, symmetric=True),
        },
        excluded=("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"),
    ),
    "head": Plan(Scheme(4, 32), head=Scheme(8, 32)),
    "embedding": Plan(Scheme(4, 32), embedding=Scheme(8, 64)),
    "embedding, ragged": Plan(Scheme(4, 32), embedding=Scheme(4, 40), head=Scheme(4, 64)),
}


@pytest.mark.parametrize("name", PLANS)
def test_quantized_checkpoint_keeps_its_codes(name, llama, tmp_path):
    checkpoint = write_quantized(tmp_path / "q", llama, PLANS[name])
    result = capture(checkpoint, tmp_path / "o", accuracy_level=0)
    assert result.accuracy_level == 0 and result.sample is not None
    assert_same_function(checkpoint, tmp_path / "o" / "model")
    assert not list(tmp_path.glob("o.partial*"))


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_every_format_of_the_same_codes_is_captured_alike(llama, tmp_path, symmetric):
    plan = Plan(Scheme(4, 32, symmetric), excluded=("model.layers.0.self_attn.o_proj",))
    uniform = [CODECS[name] for name in ("gptq", "awq", "compressed-tensors")]
    tokens = torch.randint(2, VOCAB - 2, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    found = {}
    for codec in uniform:
        checkpoint = write_quantized(tmp_path / codec.name, llama, plan, codec)
        capture(checkpoint, tmp_path / f"{codec.name}-onnx", accuracy_level=0)
        found[codec.name] = onnx_logits(tmp_path / f"{codec.name}-onnx" / "model", tokens, 13)
        if codec is not gptq.CODEC:
            assert_same_function(checkpoint, tmp_path / f"{codec.name}-onnx" / "model")
    for name, logits in found.items():
        np.testing.assert_array_equal(logits, found["gptq"], err_msg=name)


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(head=Scheme(4, 32)), Plan(embedding=Scheme(8, 32))], ids=["float head", "head", "embedding"]
)
def test_tied_checkpoint(plan, tied, tmp_path):
    checkpoint = write_quantized(tmp_path / "q", tied, plan)
    capture(checkpoint, tmp_path / "o", accuracy_level=0)
    assert_same_function(checkpoint, tmp_path / "o" / "model")


def test_tied_table_is_stored_once(tied, llama, tmp_path):
    once = capture(tied, tmp_path / "once")
    twice = capture(llama, tmp_path / "twice")
    assert twice.size_bytes - once.size_bytes > 0.95 * VOCAB * SMALL["hidden_size"] * 4
    assert_same_function(tied, tmp_path / "once" / "model")


def test_containers(llama, tmp_path):
    plan = PLANS["overrides"]
    capture(write_quantized(tmp_path / "q", llama, plan), tmp_path / "o", accuracy_level=0)
    # layer 0: q 4, k 8, o, gate, down 4, v and up float; layer 1: q+k 4, v 2, o, gate, up 4, down 3 in 4; head float
    assert count_by_bits(tmp_path / "o" / "model" / "model.onnx") == {"2": 1, "4": 9, "8": 1, "float": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_checkpoint(dtype, tmp_path):
    source = write_float(tmp_path / "f", LlamaConfig(**SMALL), dtype=dtype)
    result = capture(source, tmp_path / "o")
    assert result.accuracy_level is None and result.flip_rate is None and set(result.nodes) == {"float"}
    assert_same_function(source, tmp_path / "o" / "model")


ARCHITECTURES = {
    "mistral": MistralConfig(**SMALL, sliding_window=8),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "phi3": Phi3Config(**SMALL, sliding_window=8, original_max_position_embeddings=512),
    "gemma3": Gemma3TextConfig(
        **SMALL, head_dim=32, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}


@pytest.mark.parametrize(
    ("name", "exporter"), [*((name, "genai") for name in ARCHITECTURES), ("gemma3", "torch"), ("phi3", "torch")]
)
def test_architectures(name, exporter, tmp_path):
    source = write_float(tmp_path / "f", ARCHITECTURES[name])
    checkpoint = write_quantized(tmp_path / "q", source, Plan(Scheme(3, 48)))
    capture(checkpoint, tmp_path / "o", accuracy_level=0, exporter=exporter)
    assert_same_function(checkpoint, tmp_path / "o" / "model")


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_float_checkpoint_rounded(precision, llama, tmp_path):
    result = capture(llama, tmp_path / "o", precision=precision, block_size=16, accuracy_level=0)
    assert result.nodes == {"float": 1, precision[3:]: 10}
    tokens = list(range(10, 40))
    with torch.no_grad():
        wanted = load(llama, device="cpu")(torch.tensor([tokens])).logits[0].numpy()
    found = onnx_logits(tmp_path / "o" / "model", tokens, 20)
    error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    low, high = {"int4": (0.01, 0.5), "int8": (0.0005, 0.03)}[precision]
    assert low < error < high


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_head_bits(bits, tied, tmp_path):
    result = capture(tied, tmp_path / "o", lm_head_bits=bits)
    assert result.nodes == ({"float": 11} if bits == 16 else {"float": 10, str(bits): 1})


def test_head_of_the_checkpoint_keeps_its_bits(llama, tmp_path):
    checkpoint = write_quantized(tmp_path / "q", llama, PLANS["head"])
    with pytest.raises(UsageError, match="output head has 8 bits"):
        capture(checkpoint, tmp_path / "o", lm_head_bits=4)
    assert sorted(os.listdir(tmp_path)) == ["q"]
    capture(checkpoint, tmp_path / "o", lm_head_bits=8, accuracy_level=0)


def test_accuracy_level_is_chosen_by_measurement(llama, tmp_path):
    checkpoint, heard = write_quantized(tmp_path / "q", llama, Plan(Scheme(4, 32))), Heard()
    result = capture(checkpoint, tmp_path / "o", heard)
    check = read_manifest(tmp_path / "o").metrics["accuracy_check"]
    assert result.flip_rate == check["flip_rate"] and check["positions"] == 400
    faster = check["int8_tokens_per_second"] >= 1.05 * check["exact_tokens_per_second"]
    assert result.accuracy_level == (4 if check["flip_rate"] <= 0.005 and faster else 0)
    assert any("changes" in said for said in heard.notes + heard.warnings)
    asked = capture(checkpoint, tmp_path / "asked", heard, accuracy_level=4)
    assert asked.accuracy_level == 4 and asked.flip_rate == result.flip_rate


def test_folder_is_complete_and_can_be_moved(llama, tmp_path):
    checkpoint = write_quantized(tmp_path / "q", llama, Plan())
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [1, 5], "bos_token_id": 0}')
    result = capture(checkpoint, tmp_path / "o", accuracy_level=0)
    shutil.move(tmp_path / "o", tmp_path / "elsewhere")
    shutil.rmtree(checkpoint)
    folder = tmp_path / "elsewhere" / "model"
    names = set(os.listdir(folder))
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "generation_config.json"} <= names
    assert "chat_template.jinja" in names or "chat_template" in (folder / "tokenizer_config.json").read_text()
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == [1, 5]
    manifest = read_manifest(tmp_path / "elsewhere")
    assert manifest.kind == "onnx" and manifest.command == "capture-onnx-graph"
    assert set(manifest.files) == {f"model/{n}" for n in names}
    assert manifest.parent["name"] == "q"
    for file in (folder / "genai_config.json", tmp_path / "elsewhere" / "quantcli.json"):
        assert str(tmp_path) not in file.read_text()
    assert result.size_bytes == sum(p.stat().st_size for p in folder.iterdir())
    assert onnx_logits(folder, [3, 4, 5, 6], 2).shape == (4, VOCAB)


def test_torch_exporter_float(tmp_path):
    source = write_float(tmp_path / "f", LlamaConfig(**SMALL), tie=True)
    capture(source, tmp_path / "o", exporter="torch", target_opset=19)
    import onnx

    proto = onnx.load(tmp_path / "o" / "model" / "model.onnx", load_external_data=False)
    assert {o.domain: o.version for o in proto.opset_import}[""] == 19
    assert_same_function(source, tmp_path / "o" / "model")


def test_torch_exporter_quantized(llama, tmp_path):
    plan = replace(PLANS["overrides"], desc_act=True, head=Scheme(8, 32), embedding=Scheme(4, 40))
    checkpoint = write_quantized(tmp_path / "q", llama, plan)
    capture(checkpoint, tmp_path / "o", exporter="torch", accuracy_level=0)
    assert_same_function(checkpoint, tmp_path / "o" / "model")


def test_an_unknown_model_goes_through_torch_by_itself(tmp_path):
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=0, eos_token_id=1
    )
    source, heard = write_float(tmp_path / "f", config, tie=True), Heard()
    with pytest.raises(InputError, match="'gpt2'") as raised:
        capture(source, tmp_path / "o", exporter="genai")
    assert raised.value.hint == "add --exporter torch"
    capture(source, tmp_path / "o", heard)
    assert [n for n in heard.notes if "torch.onnx exports it" in n and "'gpt2'" in n]
    assert read_manifest(tmp_path / "o").options["exporter"] == "torch"
    assert_same_function(source, tmp_path / "o" / "model")


EXPERTS = {
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "gpt_oss": lambda: GptOssConfig(  # biases, gate and up interleaved, [K, N]
        **SMALL, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", [pytest.param("mixtral", marks=pytest.mark.large), "gpt_oss"])
def test_mixture_of_experts(family, tmp_path):
    source = write_float(tmp_path / "f", EXPERTS[family]())
    with pytest.raises(UsageError, match="holds all experts' matrices in one"):
        capture(source, tmp_path / "o", precision="int4", exporter="torch")
    capture(source, tmp_path / "o")
    assert_same_function(source, tmp_path / "o" / "model")
    quantize.run(QuantizeOptions(str(source), tmp_path / "q", "rtn", group_size=32))
    result = capture(tmp_path / "q", tmp_path / "packed", accuracy_level=0)
    assert result.nodes["4"] >= 2 * (4 + 4 * 2)  # attention and experts of two layers
    assert_same_function(tmp_path / "q", tmp_path / "packed" / "model")


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2_5_vl", marks=pytest.mark.large)])
def test_the_language_part_of_a_model_that_sees(family, tmp_path):
    vision = {k: SMALL[k] for k in ("hidden_size", "intermediate_size")} | {"num_attention_heads": 3, "patch_size": 8}
    config = {
        "llava": lambda: LlavaConfig(
            text_config=LlamaConfig(**SMALL).to_dict(),
            vision_config=CLIPVisionConfig(**vision, num_hidden_layers=2, image_size=16).to_dict(),
            image_token_index=3,
        ),
        "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
            text_config=Qwen2Config(**SMALL).to_dict()
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}},
            vision_config={
                "depth": 2,
                "hidden_size": 96,
                "intermediate_size": 160,
                "num_heads": 3,
                "out_hidden_size": 96,
            },
        ),
    }[family]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "f")
    write_tokenizer(tmp_path / "f")
    heard = Heard()
    capture(tmp_path / "f", tmp_path / "o", heard)
    assert any("without the tower that sees" in said for said in heard.warnings)
    tokens = torch.randint(4, VOCAB - 2, (1, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits[0].numpy()
    np.testing.assert_allclose(onnx_logits(tmp_path / "o" / "model", tokens[0].tolist(), 33), wanted, atol=1e-4)
    assert (tmp_path / "o" / "model" / "model.onnx.data").stat().st_size < 1.05 * sum(
        4 * p.numel() for n, p in model.named_parameters() if "vision" not in n and "visual" not in n
    )


def test_a_linear_that_the_builder_would_take_for_the_head_is_refused(tmp_path):
    source = write_float(tmp_path / "f", LlamaConfig(**SMALL | {"intermediate_size": VOCAB}))
    with pytest.raises(InputError, match="gate_proj has as many outputs as there are tokens"):
        capture(source, tmp_path / "o", exporter="genai")


def test_a_graph_of_another_function_is_refused(tmp_path):
    source = write_float(tmp_path / "f", OlmoConfig(**SMALL))  # the builder's OLMo is not OLMo, and it does not say so
    with pytest.raises(InputError, match="'olmo' computes something else"):
        capture(source, tmp_path / "o", exporter="genai")
    assert sorted(os.listdir(tmp_path)) == ["f"]


def test_a_graph_of_another_function_is_made_again_by_torch(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    source, heard = write_float(tmp_path / "f", LlamaConfig(**SMALL, rope_parameters=yarn)), Heard()
    config = json.loads((source / "config.json").read_text())
    del config["architectures"]
    (source / "config.json").write_text(json.dumps(config))
    checkpoint = write_quantized(tmp_path / "q", source, Plan())
    capture(checkpoint, tmp_path / "o", heard, accuracy_level=0)
    assert [n for n in heard.notes if "computes something else" in n and "torch.onnx exports it" in n]
    assert read_manifest(tmp_path / "o").options["exporter"] == "torch"
    assert_same_function(checkpoint, tmp_path / "o" / "model")


def test_half_precision_says_that_it_was_not_opened(llama, tmp_path):
    heard = Heard()
    result = capture(llama, tmp_path / "o", heard, precision="fp16")
    assert result.sample is None and result.tokens_per_second is None
    assert any("not opened" in said for said in heard.warnings)


REFUSED = [
    ({"exporter": "tourch"}, "did you mean 'torch'"),
    ({"precision": "int5"}, "unknown --precision"),
    ({"accuracy_level": 5}, "0 to 4"),
    ({"block_size": 48}, "--block-size must be one of"),
    ({"lm_head_bits": 3}, "4, 8 or 16"),
    ({"target_opset": 20}, "--target-opset applies to --exporter torch"),
    ({"target_opset": 7, "exporter": "torch"}, "18 to 23"),
    ({"precision": "int4"}, "keeps its codes"),
    ({"precision": "fp16"}, "keeps its codes"),
    ({"block_size": 32}, "--block-size applies where"),
    ({"precision": "fp16", "accuracy_level": 4}, "does not apply to --precision fp16"),
    ({"precision": "fp16", "exporter": "torch"}, "--exporter genai"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_options_that_do_not_apply_are_refused(options, message, llama, tmp_path):
    checkpoint = write_quantized(tmp_path / "q", llama, Plan())
    with pytest.raises(UsageError, match=message):
        capture(checkpoint, tmp_path / "o", **options)
    assert sorted(os.listdir(tmp_path)) == ["q"]


def test_accuracy_level_needs_quantized_products(llama, tmp_path):
    with pytest.raises(UsageError, match="--accuracy-level applies to quantized"):
        capture(llama, tmp_path / "o", accuracy_level=4)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def drop_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def drop_scales(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors")


def make_infinite(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors")


def narrow_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 96}
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:96].clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged"),
        (drop_tokenizer, "has no tokenizer"),
        (drop_scales, "up_proj"),
        (make_infinite, r"tensor model\.norm\.weight of .* holds NaN or infinite values"),
        (narrow_vocabulary, "the model knows 96"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_damaged_checkpoint_leaves_nothing_behind(damage, message, llama, tmp_path):
    checkpoint = write_quantized(tmp_path / "q", llama, Plan())
    damage(checkpoint)
    with pytest.raises(InputError, match=message):
        capture(checkpoint, tmp_path / "o")
    assert sorted(os.listdir(tmp_path)) == ["q"]
