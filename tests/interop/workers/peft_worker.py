"""peft: an adapter of zeros beside what transformers opens, so that logits stay what they are."""

import torch
from job import answer, log_softmax
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def log_probabilities(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    # "all-linear" finds none in a gptq model
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])).eval()
    with torch.no_grad():
        return log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float().numpy())


if __name__ == "__main__":
    answer(log_probabilities)
