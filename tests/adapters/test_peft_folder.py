"""Reading what peft saves, and refusing what it does not hold or we cannot add."""

import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from quantcli.adapters.peft_folder import read_peft
from quantcli.errors import InputError

# peft asks transformers for a name that it is about to give up
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("peft") / "base")


def save_adapter(base, folder, **values):
    """An adapter of random matrices, as peft saves it."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = peft.get_peft_model(model, peft.LoraConfig(**(settings | values)))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    ],
)
def test_the_update_is_that_of_peft(base, tmp_path, values):
    model = save_adapter(base, tmp_path / "adapter", **values)
    for folder in (tmp_path / "adapter", tmp_path):  # also the folder above
        layers = read_peft(folder)
        assert len(layers) == 6
        for layer in layers:
            wanted = model.base_model.model.get_submodule(layer.module).get_delta_weight("default")
            assert torch.allclose(layer.scaling * layer.b @ layer.a, wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "adapters of type 'IA3' are not supported"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"r": 8}, r"lora_A .* and lora_B \[64, 4\], adapter_config.json says rank 8"),
        ({"r": "four"}, "r: expected int, got str"),
    ],
)
def test_configurations_that_do_not_fit(base, tmp_path, values, message):
    save_adapter(base, tmp_path)
    tiny.edit_json(tmp_path / "adapter_config.json", **values)
    with pytest.raises(InputError, match=message):
        read_peft(tmp_path)


def test_weights_that_are_damaged(base, tmp_path):
    save_adapter(base, tmp_path / "good")
    path = tmp_path / "good" / "adapter_model.safetensors"
    tensors, whole = load_file(path), path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="is damaged"):
        read_peft(tmp_path / "good")
    name = next(n for n in tensors if "lora_A" in n)
    for change, message in (
        ({name: None}, "lora_A.weight is missing"),
        ({name: tensors[name] * float("nan")}, "NaN or infinite"),
        ({name: tensors[name][0].clone()}, "expected a float matrix"),
        ({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "is no LoRA matrix"),
    ):
        save_file({n: t for n, t in (tensors | change).items() if t is not None}, path)
        with pytest.raises(InputError, match=message):
            read_peft(tmp_path / "good")
    path.unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        read_peft(tmp_path / "good")
    shutil.rmtree(tmp_path / "good")
    with pytest.raises(InputError, match="is not an adapter folder"):
        read_peft(tmp_path)
