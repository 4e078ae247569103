"""A base and its adapters in ONNX Runtime against the same adapters in peft."""

import io
import json
import os
import shutil
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict, replace

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import tiny
from quantcli.adapters.files import write_adapter
from quantcli.cli import app
from quantcli.errors import InputError, UsageError
from quantcli.evaluate.genai_model import GenaiModel
from quantcli.folder import fingerprint, read_manifest, write_json
from quantcli.graphs.model.files import open_graph
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, CaptureOptions, GenerateAdapterOptions, QuantizeOptions
from quantcli.pipelines import capture, generate_adapter, quantize
from quantcli.progress import Silent

# peft asks transformers for a name that it is about to give up
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
TOKENS = torch.tensor([3, 14, 15, 92, 65, 35, 89, 79])
ADAPTERS = {  # different ranks, different linears, one with a part of the joined q, k and v
    "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "qv": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 6}},
    "mlp": {"r": 2, "lora_alpha": 2, "target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1]},
}


def randomize(model):
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A float base, its quantized copies, the captured graphs and the adapters."""
    root = tmp_path_factory.mktemp("adapters")
    # no layer has as many outputs as there are tokens; lively enough that adapters change the answer
    tiny.checkpoint(root / "float", vocab_size=200, attention_bias=True)
    tiny.edit_weights(root / "float", lambda tensors: [t.mul_(6) for t in tensors.values() if t.ndim == 2])
    (root / "text.txt").write_text(tiny.words(2000))
    text = CalibrationOptions(data=str(root / "text.txt"), num_samples=4, seq_len=32)
    # groups along the order of the columns: the nodes read their input in another order than A does
    order, settings = {"order": "desc_act"}, {"algorithm": "gptq", "group_size": 32, "device": "cpu", "dtype": "keep"}
    quantize.run(QuantizeOptions(str(root / "float"), root / "Q", settings=order, calibration=text, **settings))
    for name, values in ADAPTERS.items():
        model = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(root / "float"), peft.LoraConfig(**values)
        )
        randomize(model)
        model.save_pretrained(root / name)
    for base in ("float", "Q"):
        capture.run(CaptureOptions(str(root / base), root / f"{base}-onnx", accuracy_level=0 if base == "Q" else None))
        words = tuple(f"{name}={root / name}" for name in ADAPTERS)
        generate_adapter.run(GenerateAdapterOptions(str(root / f"{base}-onnx"), root / f"{base}-A", words))
    return root


def wanted_logits(root, base, adapter):
    """What the checkpoint computes with an adapter: peft on float weights, dequantized ones for codes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(root / "float")
    if base != "float":
        packed = load(root / base, device="cpu")
        for name, module in packed.named_modules():
            if hasattr(module, "dequantize") and isinstance(model.get_submodule(name), torch.nn.Linear):
                model.get_submodule(name).weight.data = module.dequantize().float()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, root / adapter)
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS[None]).logits[0].numpy()


def genai_logits(folder, adapter=None):
    model = GenaiModel(folder / "model", adapter)
    try:
        return model.logits(TOKENS).numpy()
    finally:
        model.close()


@pytest.mark.parametrize("base", ["float", "Q"])
def test_without_an_adapter_it_is_the_base(root, base):
    assert np.array_equal(genai_logits(root / f"{base}-A"), genai_logits(root / f"{base}-onnx"))


@pytest.mark.parametrize("base", ["float", "Q"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_with_an_adapter_it_is_peft(root, base, adapter):
    wanted, plain = wanted_logits(root, base, adapter), wanted_logits(root, base, None)
    found = genai_logits(root / f"{base}-A", adapter)
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(plain - wanted).max() > 0.1


def test_adapters_switch_in_one_session_of_onnxruntime(root):
    folder = root / "Q-A" / "model"
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feed = {"input_ids": TOKENS[None].numpy(), "attention_mask": np.ones((1, len(TOKENS)), np.int64)}
    feed |= {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs() if "past" in i.name}
    for adapter in (None, "qv", "all", None, "mlp"):
        run = ort.RunOptions()
        if adapter is not None:
            loaded = ort.LoraAdapter()
            loaded.Load(str(folder / f"{adapter}.onnx_adapter"))
            run.add_active_adapter(loaded)
        found = session.run(["logits"], feed, run)[0][0]
        assert np.abs(found - wanted_logits(root, "Q", adapter)).max() < 1e-4


@pytest.mark.parametrize("base", ["float", "Q"])
def test_the_weights_are_untouched_and_no_name_is_there_twice(root, base):
    before, after = (open_graph(root / f"{base}-{kind}" / "model" / "model.onnx").graph for kind in ("onnx", "A"))
    for name, value in before.initializers.items():
        assert after.initializers[name].const_value.tobytes() == value.const_value.tobytes()
    names = [value.name for value in after.inputs]
    assert len(names) == len(set(names))
    added = set(after.initializers) - set(before.initializers)
    assert added == {n for n in names if n.endswith(("lora_A", "lora_B"))}
    assert len(added) == 2 * sum(n.op_type == "Add" and n.name.endswith("lora_Add") for n in after)


def test_a_finetuned_folder_and_its_adapter(root, tmp_path, capsys):
    finetuned = tmp_path / "F"
    shutil.copytree(root / "Q", finetuned)
    shutil.copytree(root / "qv", finetuned / "adapter")
    assert app.run(["generate-adapter", "-m", str(finetuned), "-o", str(tmp_path / "A"), "-q"]) == 0
    assert "adapter.onnx_adapter: 4 linears, rank 3 to 6" in capsys.readouterr().out
    wanted, plain = wanted_logits(root, "Q", "qv"), wanted_logits(root, "Q", None)
    # capture may have taken int8 arithmetic, which of the two is faster here
    assert np.abs(genai_logits(tmp_path / "A", "adapter") - wanted).max() < np.abs(plain - wanted).max() / 2
    manifest = read_manifest(tmp_path / "A")
    assert (manifest.kind, manifest.command) == ("onnx", "generate-adapter")
    assert manifest.metrics["adapters"][0]["name"] == "adapter"
    words = ["generate", "-m", str(tmp_path / "A"), "-p", tiny.words(4), "--max-new-tokens", "4", "--json"]
    answers = []
    for more in ([], ["--adapter", "adapter"]):
        assert app.run([*words, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out)["tokens"])
    assert answers[0] != answers[1]
    assert app.run([*words, "--adapter", "adapted"]) == 2
    assert "has no adapter 'adapted', did you mean 'adapter'?" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_other_files_hold_the_same(root, tmp_path, kind):
    words = (f"qv={root / 'qv'}",)
    generate_adapter.run(GenerateAdapterOptions(str(root / "float-A"), tmp_path / "A", words, adapter_format=kind))
    path = tmp_path / "A" / "model" / f"qv.{kind}"
    found = load_file(path) if kind == "safetensors" else dict(np.load(path))
    held = ort.AdapterFormat.read_adapter(str(root / "float-A" / "model" / "qv.onnx_adapter")).get_parameters()
    assert found.keys() == held.keys()
    assert all((held[n].numpy() == v).all() for n, v in found.items())


def test_adapters_that_do_not_fit(root, tmp_path):
    def refused(*words, model="float-onnx"):
        with pytest.raises((InputError, UsageError)) as caught:
            generate_adapter.run(GenerateAdapterOptions(str(root / model), tmp_path / "A", words))
        assert not (tmp_path / "A").exists()
        return caught.value.message

    assert refused().endswith("brings no adapter along")
    assert refused(str(root / "qv"), f"qv={root / 'all'}") == "two adapters are named 'qv'"
    assert "not of the form" in refused(f"a b={root / 'qv'}")
    assert "not of the form" in refused("a=")
    assert "not of the form" in refused("runs/rate=1")
    assert "runs=1/tone is not an adapter folder" in refused("./runs=1/tone")
    other = tiny.checkpoint(tmp_path / "other", hidden_size=32, num_hidden_layers=3)
    for name, values in {"wide": {"layers_to_transform": [0]}, "deep": {"layers_to_transform": [2]}}.items():
        model = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(other),
            peft.LoraConfig(target_modules=["q_proj"], **values),
        )
        model.save_pretrained(tmp_path / name)
    assert "is for a model.layers.0.self_attn.q_proj of" in refused(str(tmp_path / "wide"))
    assert "changes model.layers.2.self_attn.q_proj, where the base takes none" in refused(str(tmp_path / "deep"))


@pytest.mark.parametrize("name", ["tone.onnx_adapter", "tone"])
def test_one_more_adapter_for_a_base(root, tmp_path, name):
    words = [
        "convert-adapter",
        "-m",
        str(root / "Q-A"),
        "--adapter-path",
        str(root / "all"),
        "-o",
        str(tmp_path / name),
    ]
    assert app.run(words) == 0
    assert (tmp_path / "tone.onnx_adapter").read_bytes() == (root / "Q-A" / "model" / "all.onnx_adapter").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["tone.onnx_adapter"]
    assert app.run(words) == 2
    assert app.run([*words, "--force"]) == 0
    assert np.array_equal(
        genai_logits(root / "Q-A", str(tmp_path / "tone.onnx_adapter")), genai_logits(root / "Q-A", "all")
    )


def test_conversions_that_cannot_be(root, tmp_path, capsys):
    def refused(model, adapter, output="x", *more):
        words = ["convert-adapter", "-m", str(root / model), "--adapter-path", str(root / adapter)]
        code = app.run([*words, "-o", str(tmp_path / output), *more])
        assert not list(tmp_path.iterdir())
        return code, capsys.readouterr().err

    assert "holds no model.onnx" in refused("float", "qv")[1]
    assert "has no inputs for adapters" in refused("float-onnx", "qv")[1]
    assert "is not an adapter folder" in refused("float-A", "float")[1]
    code, said = refused("float-A", "qv", "x.npz")
    assert (code, "the ending of another format" in said) == (2, True)
    assert (
        "unknown --adapter-format 'nzp', did you mean 'npz'?"
        in refused("float-A", "qv", "x", "--adapter-format", "nzp")[1]
    )


def test_int8_arithmetic_without_an_adapter_is_the_base(root, tmp_path):
    capture.run(CaptureOptions(str(root / "Q"), tmp_path / "onnx", accuracy_level=4))
    generate_adapter.run(GenerateAdapterOptions(str(tmp_path / "onnx"), tmp_path / "A", (str(root / "qv"),)))
    assert np.array_equal(genai_logits(tmp_path / "A"), genai_logits(tmp_path / "onnx"))
    assert np.abs(genai_logits(tmp_path / "A", "qv") - wanted_logits(root, "Q", "qv")).max() < 0.5


def test_adapters_switch_in_one_model_of_genai(root):
    import onnxruntime_genai as og

    folder = root / "Q-A" / "model"
    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    for name in ADAPTERS:
        adapters.load(str(folder / f"{name}.onnx_adapter"), name)
    for name in ("qv", None, "all", "mlp", "qv"):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(TOKENS) + 1)
        generator = og.Generator(model, params)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(TOKENS.numpy().astype(np.int32)[None])
        found = np.asarray(generator.get_output("logits"))[0]
        assert np.abs(found - wanted_logits(root, "Q", name)).max() < 1e-4


BLOCK = """generate-adapter
    --model_name_or_path finetuned-model/model
    --adapter_path finetuned-model/adapter
    --use_ort_genai
    --output_path adapter-onnx
    --log_level 1"""


def test_the_documented_command_as_written(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "Q", "finetuned-model")
    shutil.copytree(root / "qv", "finetuned-model/adapter")
    assert app.run(BLOCK.split()) == 0
    assert {p.name for p in (tmp_path / "adapter-onnx" / "model").iterdir()} >= {
        "adapter.onnx_adapter",
        "genai_config.json",
        "model.onnx",
        "tokenizer.json",
    }
    # the folders are self-contained: what they were made from may go, and they may move
    (tmp_path / "adapter-onnx").rename(tmp_path / "moved")
    shutil.rmtree("finetuned-model")
    assert not np.array_equal(genai_logits(tmp_path / "moved", "adapter"), genai_logits(tmp_path / "moved"))


def built_with_adapter(source, adapter, target, precision="fp32", **more):
    """A graph of the model builder that has an adapter built in."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime_genai.models import builder

        words = [f"adapter_path={adapter}", "hf_token=false", *(f"{k}={v}" for k, v in more.items())]
        given = (str(source), str(target), precision, "cpu", str(target / ".cache"))
        options = builder.parse_extra_options(None, *given, words)
        builder.create_model(None, *given, **options)
    return target


@pytest.fixture(scope="module")
def built_in(root):
    (root / "built-in").mkdir()
    return built_with_adapter(root / "float", root / "all", root / "built-in" / "model").parent


def test_a_graph_with_lora_built_in(root, built_in, tmp_path, capsys):
    words = ["generate-adapter", "-m", str(built_in / "model"), "-o", str(tmp_path / "A")]
    assert app.run([*words, "--adapter-path", f"qv={root / 'qv'}"]) == 0
    assert "adapter.onnx_adapter: 14 linears, rank 4" in capsys.readouterr().out
    assert app.run(["convert-adapter", "-m", str(tmp_path / "A"), "--adapter-path", str(root / "mlp"), "-o",
                    str(tmp_path / "A" / "model" / "mlp")]) == 0  # fmt: skip
    for name, twin in (("adapter", "all"), ("qv", "qv"), ("mlp", "mlp"), (None, None)):
        assert np.abs(genai_logits(tmp_path / "A", name) - wanted_logits(root, "float", twin)).max() < 1e-4
    assert app.run([*words, "--force", "--adapter-path", f"adapter={root / 'qv'}"]) == 2
    assert "is named 'adapter' already" in capsys.readouterr().err


def test_lora_that_was_quantized(root, tmp_path):
    folder = built_with_adapter(root / "float", root / "all", tmp_path / "int4", "int4", int4_block_size=16)
    with pytest.raises(InputError, match=r"LoRA matrix .*lora_A.* is used by MatMulNBits") as caught:
        generate_adapter.run(GenerateAdapterOptions(str(folder), tmp_path / "A"))
    assert "nodes_to_exclude" in caught.value.hint


def test_adapter_files_that_do_not_fit(root, tmp_path):
    def refused(values):
        path = tmp_path / "x.onnx_adapter"
        write_adapter(path, values, "onnx_adapter")
        with pytest.raises(InputError) as caught:
            genai_logits(root / "Q-A", str(path))
        assert "convert-adapter" in caught.value.hint
        return caught.value.message

    held = ort.AdapterFormat.read_adapter(str(root / "Q-A" / "model" / "qv.onnx_adapter")).get_parameters()
    values = {name: value.numpy() for name, value in held.items()}
    a, b = next(n for n in values if n.endswith("lora_A")), next(n for n in values if n.endswith("lora_B"))
    assert "has no such input" in refused({"other.lora_A": values[a]})
    assert f"{a} is [32, " in refused(values | {a: values[a][:32].copy()})
    assert f"{b} is [2, " in refused(values | {b: values[b][:2].copy()})
    whole = (root / "Q-A" / "model" / "qv.onnx_adapter").read_bytes()
    for size in (0, 100, len(whole) - 8):
        (tmp_path / "cut.onnx_adapter").write_bytes(whole[:size])
        with pytest.raises(InputError, match="is damaged, or no adapter file"):
            genai_logits(root / "Q-A", str(tmp_path / "cut.onnx_adapter"))


def test_models_that_are_none(root, tmp_path):
    def refused(model):
        with pytest.raises((InputError, UsageError)) as caught:
            generate_adapter.run(GenerateAdapterOptions(str(model), tmp_path / "A"))
        return f"{caught.value.message} / {caught.value.hint}"

    shutil.copytree(root / "qv", tmp_path / "F" / "adapter")
    config = tmp_path / "F" / "adapter" / "adapter_config.json"
    tiny.edit_json(config, base_model_name_or_path="../model")
    said = refused(config.parent)
    assert (
        "is an adapter, not a model; its base was ../model, which is not there / write -m BASE --adapter-path" in said
    )
    shutil.copytree(root / "float", tmp_path / "F" / "model")
    assert "is an adapter, not a model / write -m " in refused(config.parent)
    assert f"add --adapter-path {os.path.relpath(config.parent)}" in refused(tmp_path / "F" / "model")
    shutil.copytree(root / "float-onnx" / "model", tmp_path / "graph")
    (tmp_path / "graph" / "genai_config.json").unlink()
    assert "holds an ONNX graph without genai_config.json" in refused(tmp_path / "graph")


def test_slots_only_where_adapters_are(root, tmp_path, capsys):
    words = ["generate-adapter", "-m", str(root / "float-onnx"), "--only-adapted", "-o", str(tmp_path / "A")]
    given = [w for name in ("qv", "mlp") for w in ("--adapter-path", str(root / name))]
    assert app.run([*words, *given]) == 0
    graph = open_graph(tmp_path / "A" / "model" / "model.onnx").graph
    # q, k and v are one product in each of two layers; up and down in one
    assert sum(value.name.endswith("lora_A") for value in graph.inputs) == 4
    for name in ("qv", "mlp", None):
        assert np.abs(genai_logits(tmp_path / "A", name) - wanted_logits(root, "float", name)).max() < 1e-4
    more = ["--adapter-path", str(root / "all"), "-o", str(tmp_path / "x")]
    assert app.run(["convert-adapter", "-m", str(tmp_path / "A"), *more]) == 3
    assert "where the base takes none" in capsys.readouterr().err
    again = ["generate-adapter", "-m", str(root / "float-A"), "--only-adapted", *more]
    assert app.run(again) == 2
    assert "the base takes adapters already" in capsys.readouterr().err


def test_an_adapter_that_was_trained_beside_another_model(root, tmp_path, capsys):
    shutil.copytree(root / "Q", tmp_path / "F")
    shutil.copytree(root / "qv", tmp_path / "F" / "adapter")
    manifest = read_manifest(root / "Q")
    parent = {"name": "Q", "fingerprint": fingerprint(root / "Q" / "model")}
    finetuned = replace(manifest, kind="finetuned", command="finetune", parent=parent)
    write_json(tmp_path / "F" / "quantcli.json", asdict(finetuned))
    shutil.rmtree(tmp_path / "F" / "model")  # what it was trained beside is known without it

    def said(model):
        words = ["generate-adapter", "-m", str(root / model), "--adapter-path", str(tmp_path / "F" / "adapter")]
        assert app.run([*words, "-o", str(tmp_path / "A"), "--force"]) == 0
        return capsys.readouterr().err

    assert "was trained beside" not in said("Q-onnx")
    assert "adapter 'adapter' was trained beside Q, " in said("float-onnx")


class Snapshot(Silent):
    """Keeps what it is warned of, and the work folder as a kill behind the capture would leave it."""

    def __init__(self, work, aside):
        self.work, self.aside, self.warnings = work, aside, []

    def warn(self, message):
        self.warnings.append(message)

    def note(self, message):
        if message == "comparing the base with what it was" and not self.aside.exists():
            shutil.copytree(self.work, self.aside)


def test_a_base_on_a_codebook_is_written_as_float_also_after_a_kill(root, tmp_path):
    quantize.run(QuantizeOptions(str(root / "float"), root / "nf4", algorithm="nf4", group_size=32, dtype="keep"))
    work, killed = tmp_path / "A.partial-work", tmp_path / "killed"
    progress = Snapshot(work, killed)
    options = GenerateAdapterOptions(str(root / "nf4"), tmp_path / "A", (str(root / "qv"),))
    generate_adapter.run(options, progress)
    assert any("its codes have no exact form in ONNX (nf4 and fp4" in said for said in progress.warnings)
    for name in ("qv", None):
        assert np.abs(genai_logits(tmp_path / "A", name) - wanted_logits(root, "nf4", name)).max() < 1e-4
    shutil.rmtree(tmp_path / "A")
    killed.rename(work)
    generate_adapter.run(options)
    assert [p.name for p in tmp_path.iterdir()] == ["A"]
    assert not np.array_equal(genai_logits(tmp_path / "A", "qv"), genai_logits(tmp_path / "A"))
