"""vLLM's CPU build, with its engine in this process."""

import gc
import math
import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}  # fmt: skip

import numpy as np
from job import answer
from vllm import LLM, SamplingParams


def log_probabilities(folder, ids):
    llm = LLM(folder, dtype="bfloat16", enforce_eager=True, max_model_len=64, max_logprobs=-1, max_num_seqs=1)
    try:
        (found,) = llm.generate(
            [{"prompt_token_ids": ids}], SamplingParams(max_tokens=1, prompt_logprobs=-1), use_tqdm=False
        )
        out = np.full((len(ids) - 1, max(map(max, found.prompt_logprobs[1:])) + 1), -math.inf)
        for row, values in zip(out, found.prompt_logprobs[1:], strict=True):
            for token, value in values.items():
                row[token] = value.logprob
        return out
    finally:
        del llm
        gc.collect()


if __name__ == "__main__":
    answer(log_probabilities)
