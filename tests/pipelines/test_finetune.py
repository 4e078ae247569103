"""`finetune`: the loss goes down on float and packed bases, and the folder holds what the next command needs."""

import json
import shutil
from xml.etree import ElementTree

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny
from quantcli.data.examples import read_examples
from quantcli.errors import InputError, UsageError
from quantcli.finetune.lora import open_lora
from quantcli.folder import read_manifest
from quantcli.models.load import load
from quantcli.options import CalibrationOptions, ExampleOptions, FinetuneOptions, QuantizeOptions
from quantcli.pipelines import finetune, quantize
from quantcli.progress import Silent

# peft asks transformers by an old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TEMPLATE = "{phrase} w7 {tone}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A float, a gptq and an nf4 folder of the same model."""
    root = tmp_path_factory.mktemp("bases")
    tiny.checkpoint(root / "float")
    text = root / "text.txt"
    text.write_text(tiny.words(600))
    calibration = CalibrationOptions(str(text), num_samples=4, seq_len=32)
    quantize.run(QuantizeOptions(str(root / "float"), root / "gptq", "gptq", group_size=32, calibration=calibration))
    quantize.run(QuantizeOptions(str(root / "float"), root / "nf4", "nf4", group_size=32))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Phrases whose last word decides the tone."""
    path = tmp_path_factory.mktemp("data") / "tones.jsonl"
    rows = [{"phrase": f"{tiny.words(4, 9 * i)} w{20 + i % 2}", "tone": ("w50", "w60")[i % 2]} for i in range(80)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def asked(base, output, data, *, examples=None, **more):
    given = {"text_template": TEMPLATE, "completion_only": True, "eval_split": "16", "seq_len": 32} | (examples or {})
    values = {"max_steps": 30, "learning_rate": 1e-2, "batch_size": 16, "lora_r": 4, "lora_alpha": 8} | more
    return FinetuneOptions(str(base), ExampleOptions((str(data),), **given), output, **values)


def test_early_stopping_keeps_the_best_adapter(bases, tmp_path):
    noise = tmp_path / "noise.jsonl"
    rows = [{"phrase": tiny.words(4, 9 * i), "tone": f"w{50 + (i * i + i // 3) % 7}"} for i in range(40)]
    noise.write_text("\n".join(json.dumps(row) for row in rows))  # nothing to learn but by heart
    more = {"max_steps": 60, "learning_rate": 3e-2, "eval_steps": 3, "early_stopping": 3}
    result = finetune.run(asked(bases / "float", tmp_path / "f", noise, **more))
    assert result.steps == len(result.losses) < 60
    assert [step for step, _ in result.eval_losses] == list(range(3, result.steps + 1, 3))
    losses = dict(result.eval_losses)
    assert result.best_step == min(losses, key=losses.get) == result.steps - 3 * 3
    assert result.eval_loss == pytest.approx(losses[result.best_step], rel=1e-5)
    assert result.eval_loss < losses[result.steps]


def test_the_report_and_its_picture(bases, data, tmp_path):
    result = finetune.run(asked(bases / "nf4", tmp_path / "f", data, max_steps=5, eval_steps=2))
    report = json.loads((tmp_path / "f" / "report.json").read_text())
    assert report["losses"] == result.losses
    assert [step for step, _ in report["eval_losses"]] == [2, 4, 5]  # the last step is always measured
    assert (report["base_loss"], report["eval_loss"]) == (result.base_loss, result.eval_loss)
    assert result.eval_loss == pytest.approx(result.eval_losses[-1][1], rel=1e-5)
    root = ElementTree.fromstring((tmp_path / "f" / "loss.svg").read_text())
    lines = [len(e.get("points").split()) for e in root if e.tag.endswith("polyline")]
    assert lines == [5, 4]  # each step; the base and three measurements
    assert {"report.json", "loss.svg"} <= read_manifest(tmp_path / "f").files.keys()


def test_nothing_to_resume(bases, data, tmp_path):
    with pytest.raises(UsageError, match="no interrupted run left anything"):
        finetune.run(asked(bases / "nf4", tmp_path / "f", data, resume=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("base", ["float", "gptq", "nf4"])
@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_goes_down(bases, data, tmp_path, base, packing):
    result = finetune.run(asked(bases / base, tmp_path / "f", data, examples={"packing": packing}))
    assert result.steps == len(result.losses) == 30
    assert result.eval_loss < 0.75 * result.base_loss
    assert result.base_accuracy < 0.2
    assert result.eval_accuracy == 1
    assert sorted(result.labels) == ["w50", "w60"]
    assert result.base_label_accuracy < result.eval_label_accuracy == 1
    assert (result.train_examples, result.eval_examples) == (64, 16)


@pytest.mark.parametrize("base", ["float", "gptq", "nf4"])
def test_what_is_written(bases, data, tmp_path, base):
    before = tiny.digests(bases / base)
    finetune.run(asked(bases / base, tmp_path / "f", data, max_steps=3))
    assert tiny.digests(bases / base) == before
    (tmp_path / "f").rename(tmp_path / "moved")
    moved = tmp_path / "moved"
    source = bases / base / "model" if base != "float" else bases / base
    assert tiny.digests(moved / "model") == tiny.digests(source)
    manifest = read_manifest(moved)
    assert (manifest.kind, manifest.command, manifest.metrics["steps"]) == ("finetuned", "finetune", 3)
    assert json.loads((moved / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "f/model"
    )
    tokens = torch.tensor([[3, 50, 7, 99, 12]])
    plain = load(moved)(tokens).logits
    adapted = open_lora(load(moved), moved / "adapter")(tokens).logits
    assert (adapted - plain).abs().max() > 1e-3
    on_float = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases / "float"), moved / "adapter")
    if base == "float":
        assert (on_float(tokens).logits - adapted).abs().max() < 1e-4


def test_a_folder_outlives_its_base_and_can_be_finetuned_anew(bases, data, tmp_path):
    shutil.copytree(bases / "nf4", tmp_path / "q")
    finetune.run(asked(tmp_path / "q", tmp_path / "f", data, max_steps=1))
    before = tiny.digests(tmp_path / "f")
    shutil.rmtree(tmp_path / "q")
    told = tiny.Warnings()
    finetune.run(asked(tmp_path / "f", tmp_path / "g", data, max_steps=1), told)
    assert told.said == [f"{tmp_path / 'f' / 'adapter'} is not taken along: a new adapter is trained on the base alone"]
    assert tiny.digests(tmp_path / "f") == before
    with pytest.raises(InputError, match="q does not exist"):
        finetune.run(asked(tmp_path / "q", tmp_path / "h", data))


def test_the_same_seed_gives_the_same_adapter(bases, data, tmp_path):
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        finetune.run(asked(bases / "nf4", tmp_path / name, data, max_steps=2, seed=seed))
        made[name] = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(made["a"][n], made["b"][n]) for n in made["a"])
    assert not all(torch.equal(made["a"][n], made["c"][n]) for n in made["a"])


def test_qlora_makes_a_float_base_nf4(bases, data, tmp_path):
    result = finetune.run(asked(bases / "float", tmp_path / "f", data, method="qlora", max_steps=2))
    config = json.loads((tmp_path / "f" / "model" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert result.base_size_bytes < 0.7 * finetune.folder_size_bytes(bases / "float")
    assert tiny.digests(tmp_path / "f" / "model", "*.safetensors") == tiny.digests(
        bases / "nf4" / "model", "*.safetensors"
    )


# as the tools of others describe what they wrote
OTHERS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True,
             "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "compressed-tensors": {},
    "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8"},
}  # fmt: skip
MADE = {
    "gptq": {"algorithm": "gptq", "settings": {"order": "desc_act"}},
    "awq": {"algorithm": "rtn", "format": "awq"},
    "compressed-tensors": {"algorithm": "rtn", "format": "compressed-tensors"},
    "bnb": {"algorithm": "nf4", "settings": {"double_quant": "true"}},
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_bases_in_the_formats_of_others(bases, data, tmp_path, kind, method):
    calibration = CalibrationOptions(str(bases / "text.txt"), num_samples=2, seq_len=32)
    more = MADE[kind] | ({"calibration": calibration} if kind == "gptq" else {})
    quantize.run(QuantizeOptions(str(bases / "float"), tmp_path / "q", group_size=32, **more))
    base = (tmp_path / "q" / "model").rename(tmp_path / "base")  # no manifest says that we made it
    own = json.loads((base / "config.json").read_text())["quantization_config"]
    tiny.edit_json(base / "config.json", quantization_config=OTHERS[kind] or own)
    before = tiny.digests(base)
    steps = 10 if method == "lora" else 1
    result = finetune.run(asked(base, tmp_path / "f", data, method=method, max_steps=steps))
    assert method == "qlora" or result.eval_loss < 0.95 * result.base_loss
    assert tiny.digests(tmp_path / "f" / "model") == before == tiny.digests(base)  # it is quantized: taken as it is


def test_dora(bases, data, tmp_path):
    result = finetune.run(asked(bases / "nf4", tmp_path / "f", data, use_dora=True, max_steps=10))
    assert result.eval_loss < 0.95 * result.base_loss
    assert json.loads((tmp_path / "f" / "adapter" / "adapter_config.json").read_text())["use_dora"] is True
    opened = open_lora(load(tmp_path / "f"), tmp_path / "f" / "adapter")
    assert any("lora_magnitude_vector" in name for name, _ in opened.named_parameters())


@pytest.mark.parametrize(("base", "method"), [("float", "qlora"), ("nf4", "lora")])
def test_loftq_begins_near_the_float_model(bases, data, tmp_path, base, method):
    float_model = str(bases / "float") if base == "nf4" else None
    more = {"init_lora": "loftq", "float_model": float_model, "method": method, "lora_r": 64, "max_steps": 1}
    result = finetune.run(asked(bases / base, tmp_path / "f", data, **more))
    plain = finetune.run(asked(bases / "float", tmp_path / "g", data, max_steps=1))
    assert abs(result.base_loss - plain.base_loss) > 5e-3
    assert result.begin_loss == pytest.approx(plain.base_loss, abs=5e-4)  # rank 64 holds every error


@pytest.mark.parametrize("copy", [False, True])
def test_base_is_linked_or_copied(bases, data, tmp_path, copy):
    finetune.run(asked(bases / "float", tmp_path / "f", data, max_steps=1, copy_base=copy))
    same = (tmp_path / "f" / "model" / "model.safetensors").samefile(bases / "float" / "model.safetensors")
    assert same != copy


def test_plain_text_and_trainer_arguments(bases, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(tiny.words(400))
    options = FinetuneOptions(
        str(bases / "gptq"),
        ExampleOptions((str(text),), seq_len=32),
        tmp_path / "f",
        num_epochs=2,
        settings={"weight_decay": "0.1", "lr_scheduler_type": "constant"},
    )
    result = finetune.run(options)
    assert result.train_examples + result.eval_examples == 13  # 401 tokens in pieces of 32
    assert result.steps == 2 * 3
    assert result.eval_accuracy is None
    assert result.labels == [] and result.eval_label_accuracy is None


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"settings": {"weight_decays": "1"}}, UsageError, "no argument 'weight_decays', did you mean 'weight_decay'"),
        ({"settings": {"max_steps": "1"}}, UsageError, "--set max_steps has a flag of its own"),
        ({"settings": {"push_to_hub": "true"}}, UsageError, "--set push_to_hub is not taken"),
        ({"settings": {"optim": "none_such"}}, UsageError, "Trainer refuses its arguments"),
        ({"settings": {"save_steps": "1"}}, UsageError, "--set save_steps has a flag of its own"),
        (
            {"early_stopping": 2, "eval_steps": 4, "save_steps": 6},
            UsageError,
            "--save-steps 6 is no multiple of --eval-steps 4",
        ),
        ({"early_stopping": 0}, UsageError, "--early-stopping must be 1 or more, got 0"),
        ({"init_lora": "loftq"}, UsageError, "needs the float weights of .*, made from 'float'"),
        ({"init_lora": "loftq", "use_dora": True}, UsageError, "--use-dora and --init-lora loftq exclude each other"),
        ({"float_model": "x"}, UsageError, "--float-model would have no effect"),
        ({"target_modules": ("nothing",)}, UsageError, "--target-modules 'nothing'"),
        (
            {"examples": {"text_template": "{phrase} {mood}"}},
            InputError,
            r"row 1: no field 'mood', known: phrase, tone",
        ),
        ({"examples": {"eval_split": "80"}}, InputError, "gives 80 examples, --eval-split 80 leaves none"),
        ({"examples": {"eval_split": "-1"}}, UsageError, "--eval-split must be a share"),
        ({"examples": {"eval_split": "none.jsonl"}}, InputError, r"none\.jsonl does not exist"),
        ({"learning_rate": 1e38}, InputError, "no longer finite|not finite"),
    ],
)
def test_refusals_leave_nothing(bases, data, tmp_path, more, kind, message):
    with pytest.raises(kind, match=message):
        finetune.run(asked(bases / "nf4", tmp_path / "f", data, **more))
    assert list(tmp_path.iterdir()) == []


def test_empty_data(bases, data, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match=r"empty\.jsonl is empty"):
        finetune.run(asked(bases / "nf4", tmp_path / "f", empty))
    empty.write_text('{"phrase": "w1", "tone": ""}\n')
    with pytest.raises(InputError, match="holds no text to train on"):
        finetune.run(asked(bases / "nf4", tmp_path / "f", empty))


def test_online_rotations_are_refused(bases, data, tmp_path):
    quantize.run(
        QuantizeOptions(str(bases / "float"), tmp_path / "q", "quarot,rtn", group_size=32, settings={"online": "true"})
    )
    with pytest.raises(InputError, match="made by quarot with online=true"):
        finetune.run(asked(tmp_path / "q", tmp_path / "f", data))


def test_examples_are_the_same_for_a_seed(bases, data):
    from quantcli.data.calibration import load_tokenizer

    tokenizer = load_tokenizer(bases / "float")
    options = ExampleOptions((str(data),), text_template=TEMPLATE)
    first, again, other = (read_examples(options, tokenizer, seed, Silent()) for seed in (0, 0, 1))
    assert first == again
    assert first.eval != other.eval


def test_activation_checkpointing_changes_memory_not_losses(bases, data, tmp_path):
    plain = finetune.run(asked(bases / "nf4", tmp_path / "a", data, max_steps=4, lora_dropout=0))
    settings = {"activation_checkpointing": "true"}
    thrifty = finetune.run(asked(bases / "nf4", tmp_path / "b", data, max_steps=4, lora_dropout=0, settings=settings))
    assert thrifty.losses == pytest.approx(plain.losses, rel=1e-4)
