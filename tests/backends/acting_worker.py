"""A worker of the tests' own: does what its job's settings say, well or badly."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import worker_job


def act(job):
    act = job.settings["act"]
    job.note(f"act is {act}")
    for step in range(3):
        job.step("acting", step + 1, 3, f"step {step}")
    print("a package prints what it likes")
    if act == "crash":
        raise RuntimeError("the package broke\nsecond line")
    if act == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if act == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "refuse":
        raise worker_job.RefusedError("no such architecture")
    if act == "silent":
        os._exit(0)
    if act == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
        (Path(job.input).parent / "child").write_text(str(child.pid))
        time.sleep(100)
    if act == "memory":
        held = []
        while True:
            held.append(np.ones(4_000_000))  # 32 MB that are written to
            time.sleep(0.02)
    if act == "empty":
        return
    if act == "garbage":
        Path(job.output).mkdir(exist_ok=True)
        (Path(job.output) / "config.json").write_text('{"model_type": "llama", "quantization_config": {}}')
        (Path(job.output) / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
        return
    assert job.tokens is None or np.load(job.tokens).ndim == 2
    shutil.copytree(Path(job.input).parent / act, job.output, dirs_exist_ok=True)
    (Path(job.output) / "tokenizer.json").write_text("the package's own")
    (Path(job.output) / "logs").mkdir()


if __name__ == "__main__":
    worker_job.run(act)
