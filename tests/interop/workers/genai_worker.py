"""onnxruntime-genai alone, on a folder that `capture-onnx-graph` has made of the checkpoint."""

import numpy as np
import onnxruntime_genai as og
from job import answer, log_softmax


def log_probabilities(folder, ids):
    model = og.Model(folder)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 1)
    generator = og.Generator(model, params)
    rows = []
    for token in ids:
        generator.append_tokens(np.array([token], dtype=np.int32))
        rows.append(generator.get_logits().reshape(-1))
    return log_softmax(np.stack(rows))


if __name__ == "__main__":
    answer(log_probabilities)
