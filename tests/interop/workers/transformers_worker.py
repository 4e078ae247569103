"""transformers, as its users call it; with optimum, gptqmodel, compressed-tensors and bitsandbytes beside it."""

import torch
from job import answer, log_softmax
from transformers import AutoModelForCausalLM


def log_probabilities(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    with torch.no_grad():
        return log_softmax(model(torch.tensor([ids])).logits[0].float().numpy())


if __name__ == "__main__":
    answer(log_probabilities)
