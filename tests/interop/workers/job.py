"""What the scripts in this folder share: each runs in its reader's environment, with numpy and the reader alone.

    python NAME.py JOB.json

JOB.json holds `ids`, `folders` by name and `results`, a folder. Of each folder that opens, NAME.npy becomes the
logarithms of what follows each token but the last; of one that does not, NAME.error the reason. NAME.begun is for the
runner: who ended the process.
"""

import json
import sys
import traceback
from pathlib import Path

import numpy as np


def answer(log_probabilities):
    """Asks a reader about every folder that has no answer yet: (folder, ids) -> [T - 1, vocabulary]."""
    job = json.loads(Path(sys.argv[1]).read_text())
    results = Path(job["results"])
    for name, folder in job["folders"].items():
        if any((results / f"{name}{ending}").is_file() for ending in (".npy", ".error")):
            continue
        (results / f"{name}.begun").touch()
        try:
            found = np.asarray(log_probabilities(folder, job["ids"]), dtype=np.float32)
        except Exception as error:
            (results / f"{name}.error").write_text(f"{type(error).__name__}: {error}\n\n{traceback.format_exc()}")
        else:
            np.save(results / f"{name}.npy", found)


def log_softmax(logits):
    """Of [T, vocabulary], without the last row."""
    logits = np.asarray(logits, dtype=np.float64)[:-1]
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
