"""Generation over tiny folders: checkpoints and ONNX, greedy and sampled, streamed and whole."""

import json
import shutil
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tiny
from quantcli.cli import app
from quantcli.errors import InputError, UsageError
from quantcli.evaluate.text_stream import TextStream
from quantcli.models.linear import QuantizedLinear
from quantcli.options import CaptureOptions, GenerateOptions, QuantizeOptions
from quantcli.pipelines import capture, generate, quantize

# peft asks transformers for a name that it is about to give up
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PROMPT = tiny.words(6)


def byte_tokenizer():
    """Every byte is a token: characters beyond ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({t: i for i, t in enumerate(["<s>", "</s>", *alphabet])}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float checkpoint, its 4-bit copy, and both as ONNX."""
    root = tmp_path_factory.mktemp("models")
    tiny.checkpoint(root / "float", vocab_size=260, eos_token_id=259)
    byte_tokenizer().save_pretrained(root / "float")
    quantize.run(QuantizeOptions(str(root / "float"), root / "Q", algorithm="rtn", group_size=32, dtype="keep"))
    for name in ("float", "Q"):
        capture.run(CaptureOptions(str(root / name), root / f"{name}-onnx"))
    return root


def run(folder, show=lambda piece: None, **values):
    settings = {"prompt": PROMPT, "max_new_tokens": 12, "device": "cpu"}
    return generate.run(GenerateOptions(str(folder), **(settings | values)), show)


@pytest.mark.parametrize("name", ["float", "Q"])
def test_checkpoint_and_graph_write_what_transformers_writes(folders, name):
    from quantcli.models.load import load

    model, tokenizer = load(folders / name, device="cpu"), byte_tokenizer()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
    for folder in (folders / name, folders / f"{name}-onnx"):
        result = run(folder)
        assert list(result.tokens) == wanted
        assert result.prompt_tokens == ids.shape[1]
        assert result.finish == "max_new_tokens"
        assert result.decode_tokens_per_second > 0


@pytest.mark.parametrize("name", ["Q", "Q-onnx"])
def test_samples_depend_on_the_seed_alone(folders, name):
    one, same, other = (run(folders / name, temperature=1.5, seed=seed).tokens for seed in (1, 1, 2))
    assert one == same != other
    assert one != run(folders / name).tokens


@pytest.mark.parametrize("name", ["Q", "Q-onnx"])
def test_a_small_nucleus_is_the_likeliest_token(folders, name):
    assert run(folders / name, temperature=1.5, top_p=1e-6, seed=3).tokens == run(folders / name).tokens


def test_samples_follow_the_distribution(folders):
    from quantcli.evaluate.sampling import Sampling
    from quantcli.evaluate.torch_model import TorchModel

    model, prompt = TorchModel(folders / "float", "cpu", False), torch.tensor([5, 9, 7])
    logits = model.logits(prompt)[-1]
    temperature, draws = float(logits.std()) / 3, 2000  # a few tokens take most of the probability
    p = (logits.double() / temperature).softmax(-1)
    top = torch.tensor(
        [[model.start(prompt, 1, Sampling(temperature, 1.0, seed)), model.step()][1] for seed in range(draws)]
    )
    counts = torch.bincount(top, minlength=260)
    deviation = (p * (1 - p) / draws).sqrt()
    assert ((counts / draws - p).abs() <= 4.5 * deviation + 2 / draws).all()
    assert p.max() > 0.1


@pytest.mark.parametrize("name", ["float", "float-onnx"])
def test_it_ends_where_the_model_does(folders, tmp_path, name):
    whole = run(folders / name)
    last = whole.tokens[4]
    folder = tmp_path / "ends"
    shutil.copytree(folders / name, folder)
    if name == "float":
        tiny.edit_json(folder / "generation_config.json", eos_token_id=[258, last])
    else:
        path = folder / "model" / "genai_config.json"
        config = json.loads(path.read_text())
        config["model"]["eos_token_id"] = [258, last]
        path.write_text(json.dumps(config))
    result = run(folder)
    assert result.tokens == whole.tokens[: whole.tokens.index(last) + 1]
    assert result.finish == "end"
    assert whole.text.startswith(result.text)


@pytest.mark.parametrize("name", ["float", "float-onnx"])
def test_positions_bound_the_answer(folders, name):
    result = run(folders / name, prompt="x" * 120, max_new_tokens=50)
    assert (len(result.tokens), result.finish) == (8, "positions")
    with pytest.raises(UsageError, match=r"the prompt has 128 tokens, .* has 128 positions"):
        run(folders / name, prompt="x" * 128)


def test_pieces_make_the_text(folders):
    pieces = []
    result = run(folders / "Q", pieces.append)
    assert "".join(pieces) == result.text
    assert result.text == byte_tokenizer().decode(result.tokens)


def test_characters_of_several_tokens_come_whole():
    tokenizer, text = byte_tokenizer(), "naïve 🙂 汉字\nend"
    stream = TextStream(tokenizer, tokenizer("voilà ").input_ids)
    pieces = [stream.add(t) for t in tokenizer(text).input_ids]
    assert "".join(pieces) == text
    assert [p for p in pieces if p] == list(text)
    assert [stream.add(t) for t in tokenizer("🙂").input_ids[:2]] == ["", ""]
    assert stream.end() == "\ufffd"


def test_the_chat_template_is_used_where_asked_for(folders, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(folders / "float", folder)
    with pytest.raises(InputError, match="has no chat template"):
        run(folder, use_chat_template=True)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    assert run(folder, use_chat_template=True).tokens == run(folder, prompt=f"[user]{PROMPT}[a]").tokens


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": ""}, "--prompt is empty"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be 1 or more, got 0"),
        ({"temperature": -1.0}, "--temperature must be 0 or more, got -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p must be above 0 and at most 1, got 0"),
        ({"seed": 3}, "--seed would have no effect without --temperature"),
        ({"top_p": 0.5}, "--top-p would have no effect without --temperature"),
        ({"temperature": 1.0, "seed": -1}, "--seed must be 0 to 2147483647, got -1"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(UsageError) as caught:
        GenerateOptions(**({"model": "M", "prompt": "p"} | values))
    assert caught.value.message == message


def test_adapters_that_are_not_there(folders):
    with pytest.raises(UsageError, match="has no adapters"):
        run(folders / "Q-onnx", adapter="tone")
    with pytest.raises(UsageError, match="--adapter tone: there is no such folder"):
        run(folders / "Q", adapter="tone")
    with pytest.raises(UsageError, match=r"config\.json is a file; .* is a checkpoint"):
        run(folders / "Q", adapter=str(folders / "float" / "config.json"))
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        run(folders / "Q", adapter=str(folders / "float"))


def save_adapter(base, folder, **values):
    """A lively adapter, as peft saves it; the model with it."""
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(**(settings | values)))
    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        parameter.data *= 3
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["float", "Q"])
@pytest.mark.parametrize(
    "values",
    [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}, {"use_dora": True}],
    ids=["plain", "pattern", "dora"],
)
def test_a_checkpoint_with_an_adapter_writes_what_peft_writes(folders, tmp_path, name, values):
    from quantcli.models.load import load

    folder = tmp_path / "F"  # as finetune leaves it
    shutil.copytree(folders / name, folder / "model" if name == "float" else folder)
    model, tokenizer = save_adapter(folders / "float", folder / "adapter", **values), byte_tokenizer()
    if name == "Q":
        for path, layer in load(folders / name, device="cpu").named_modules():
            if isinstance(layer, QuantizedLinear):
                model.base_model.model.get_submodule(path).base_layer.weight.data = layer.dequantize()
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    given = str(folder / "adapter")
    assert list(run(folder / "model", adapter=given).tokens) == wanted.tolist()
    assert run(folder / "model", adapter="adapter").tokens == run(folder / "model", adapter=given).tokens
    assert run(folders / name).tokens != run(folder / "model", adapter=given).tokens
    with pytest.raises(UsageError, match=r"is a folder of peft; .* is an ONNX base"):
        run(folders / f"{name}-onnx", adapter=given)


def test_adapters_of_other_models(folders, tmp_path):
    deep = tiny.checkpoint(tmp_path / "deep", vocab_size=260, eos_token_id=259, num_hidden_layers=3)
    byte_tokenizer().save_pretrained(deep)
    save_adapter(deep, tmp_path / "three", target_modules=["q_proj"])
    save_adapter(folders / "float", tmp_path / "two", target_modules=["q_proj"])
    save_adapter(folders / "float", tmp_path / "head", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(InputError, match=r"is for .*layers\.2\..*, which the model does not have"):
        run(folders / "Q", adapter=str(tmp_path / "three"))
    with pytest.raises(InputError, match=r"lacks .*layers\.2\."), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns before we refuse
        run(deep, adapter=str(tmp_path / "two"))
    assert run(folders / "float", adapter=str(tmp_path / "head")).tokens  # a head of its own is taken along
    weights = tmp_path / "two" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(InputError, match="does not fit the model or is damaged"):
        run(folders / "float", adapter=str(tmp_path / "two"))


def test_the_answer_is_on_stdout_and_the_speed_on_stderr(folders, capsys):
    words = ["generate", "-m", str(folders / "Q"), "-p", PROMPT, "--max-new-tokens", "12", "--device", "cpu"]
    assert app.run(words) == 0
    out, err = capsys.readouterr()
    assert out == run(folders / "Q").text + "\n"
    assert "12 tokens, " in err and "tokens/s" in err
    assert app.run([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == run(folders / "Q").text


def test_a_process_streams_and_ends_quietly_where_nobody_reads(folders):
    words = ["generate", "-m", str(folders / "Q"), "-p", PROMPT, "--max-new-tokens", "12", "--device", "cpu"]
    start = [sys.executable, "-m", "quantcli", *words]
    done = subprocess.run(start, capture_output=True, text=True, check=True)
    assert done.stdout == run(folders / "Q").text + "\n"
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
