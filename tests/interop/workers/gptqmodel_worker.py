"""GPTQModel's own loader, on a kernel that every processor runs."""

import torch
from gptqmodel import BACKEND, GPTQModel
from job import answer, log_softmax


def log_probabilities(folder, ids):
    model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    with torch.inference_mode():
        return log_softmax(model.model(torch.tensor([ids])).logits[0].float().numpy())


if __name__ == "__main__":
    answer(log_probabilities)
