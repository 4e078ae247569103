"""Adapters on every family that the model builder captures, against peft."""

import numpy as np
import peft
import pytest
import torch
import transformers

import tiny
from quantcli.errors import InputError
from quantcli.evaluate.genai_model import GenaiModel
from quantcli.options import GenerateAdapterOptions
from quantcli.pipelines import generate_adapter

# peft asks transformers for a name that it is about to give up
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
TOKENS = torch.tensor([3, 14, 15, 92, 65, 35, 89, 79])


def logits(folder, adapter=None):
    model = GenaiModel(folder, adapter)
    try:
        return model.logits(TOKENS).numpy()
    finally:
        model.close()


def save_adapter(base, folder):
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3"])
def test_a_family_with_an_adapter_is_peft(models, tmp_path, family):
    if family == "phi3":  # else the builder takes it for one with long and short rotary embeddings
        tiny.edit_json(models(family) / "config.json", original_max_position_embeddings=128)
    model = save_adapter(models(family), tmp_path / "tone")
    generate_adapter.run(GenerateAdapterOptions(str(models(family)), tmp_path / "A", (str(tmp_path / "tone"),)))
    with torch.no_grad():
        wanted = model(input_ids=TOKENS[None]).logits[0].numpy()
        with model.disable_adapter():
            plain = model(input_ids=TOKENS[None]).logits[0].numpy()
    scale = max(1, np.abs(wanted).max())
    assert np.abs(logits(tmp_path / "A" / "model", "tone") - wanted).max() < 1e-4 * scale
    assert np.abs(logits(tmp_path / "A" / "model") - plain).max() < 1e-4 * scale
    assert np.abs(plain - wanted).max() > 0.1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_are_refused(models, tmp_path, family):
    model = transformers.AutoModelForCausalLM.from_pretrained(models(family))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "tone")
    with pytest.raises(InputError, match="expert") as caught:
        generate_adapter.run(GenerateAdapterOptions(str(models(family)), tmp_path / "A", (str(tmp_path / "tone"),)))
    assert caught.value.hint.startswith("merge the adapter")


def test_a_family_that_the_builder_does_not_know(models, tmp_path):
    save_adapter(models("olmo2"), tmp_path / "tone")
    with pytest.raises(InputError, match="does not support model type 'olmo2'") as caught:
        generate_adapter.run(GenerateAdapterOptions(str(models("olmo2")), tmp_path / "A", (str(tmp_path / "tone"),)))
    assert caught.value.hint.startswith("merge the adapter")
