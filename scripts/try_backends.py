"""Installs, checks and removes every backend that runs here, one after the other, and writes what it saw.

    python scripts/try_backends.py [NAME ...] [--keep]

With names, only these; the page keeps what was seen of the others. `--keep` leaves the environments.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantcli.backends import BACKENDS
from quantcli.backends.environments import pinned

ROOT = Path(__file__).resolve().parents[1]
SEEN = ROOT / "benchmarks" / "backends.json"
TARGET = ROOT / "docs" / "backends.md"
INTRODUCTION = """\
# Backends

Other packages can quantize instead of quantcli's own code:

```sh
quantcli backends                       # what there is, and what is installed
quantcli backends install gptqmodel     # an environment of its own, from pinned requirements
quantcli quantize -m SmolLM2-135M -o Q --backend gptqmodel -a gptq --bits 4 --group-size 64 --data notes.txt
quantcli compare -m SmolLM2-135M --with ours,gptqmodel,auto-round --group-size 64 --data notes.txt
quantcli backends remove gptqmodel
```

- **Environments.** Each backend lives in a virtual environment below `QUANTCLI_HOME` (default: `quantcli` in
  `$XDG_DATA_HOME` or `~/.local/share`). Nothing of it enters quantcli's own environment. Every package is pinned
  (`src/quantcli/backends/requirements/`), and installed without a look at what packages say of each other's versions,
  which is often wrong. `onnxruntime` needs none: it is here already.
- **Installing.** By `uv` where it is there, else by `venv` and pip; `--installer pip` decides. For torch's CPU build
  give `--torch-index https://download.pytorch.org/whl/cpu`, else Linux gets the CUDA build. An install that was
  interrupted goes on with the same command; one that fails leaves nothing. `quantcli backends check NAME` sends a tiny
  model through each method.
- **Calibration** is the same as for our own algorithms: the same flags, the same default, the same rows of tokens.
- **Results** are treated as ours are. A checkpoint is opened by quantcli and run beside the original on text that it
  was not made with; a graph is run in onnxruntime beside the float one. What a result lost stands in the result line,
  the manifest and the report. One that tells less than a model that knows nothing is noise, and is not kept (exit
  code 5).
- **Limits.** `--timeout 30m` and `--max-memory 8GB` stop a backend and all that it started; so does Ctrl-C. A crash is
  one line that names its log (exit code 1), a model that it refuses is exit code 3, a limit 4.
- **No silent flag.** Each method takes the flags that reach its package; every other flag is an error.
- **Olive's configurations** run by quantcli's own code. With `--backend` they run by the package that they were written
  for: `--backend inc --config inc.json`, `--backend nvmo --config nvmo.json`, `--backend gptqmodel --config gptq.json`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    parser.add_argument("--page", action="store_true", help="only write the page")
    asked = parser.parse_args()
    seen: dict[str, Any] = json.loads(SEEN.read_text()) if SEEN.is_file() else {}
    for name in [] if asked.page else asked.names or [n for n, b in BACKENDS.items() if "cpu" in b.processors]:
        seen[name] = try_one(name, keep=asked.keep)
        SEEN.write_text(json.dumps(seen, indent=1) + "\n")
        TARGET.write_text(page(seen))
    TARGET.write_text(page(seen))


def try_one(name: str, *, keep: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d")}
    if BACKENDS[name].own_environment:
        made = quantcli("backends", "install", name, "--json")
        if made is None:
            return found | {"failure": "install"}
        found |= {key: made["backends"][0][key] for key in ("size_bytes", "install_seconds")}
    checked = quantcli("backends", "check", name, "--json")
    found["checks"] = [] if checked is None else checked["checks"][name]
    if BACKENDS[name].own_environment and not keep:
        quantcli("backends", "remove", name, "--json")
    return found


def quantcli(*words: str) -> Any:
    print("$ quantcli", *words, flush=True)
    done = subprocess.run([sys.executable, "-m", "quantcli", *words], stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if done.stdout else None


def page(seen: dict[str, Any]) -> str:
    lines = [INTRODUCTION, "## What there is", "", *table(seen), "", "## Methods, each tried on a tiny model", ""]
    return "\n".join([*lines, *methods(seen)]) + "\n"


def table(seen: dict[str, Any]) -> Iterator[str]:
    yield "| backend | package | takes | runs on | environment | what it is |"
    yield "|---|---|---|---|---|---|"
    for name, backend in BACKENDS.items():
        saw = seen.get(name, {})
        size = "none" if not backend.own_environment else "not installed here"
        if "size_bytes" in saw:
            size = f"{saw['size_bytes'] / 1e9:.2f} GB, {len(pinned(backend))} packages"
        version = pinned(backend).get(backend.package, "")
        takes = {"onnx": "graphs", "checkpoint": "checkpoints"}[backend.input]
        on = ", ".join(backend.processors)
        yield f"| `{name}` | {backend.package} {version} | {takes} | {on} | {size} | {backend.summary} |"


def methods(seen: dict[str, Any]) -> Iterator[str]:
    yield "A tiny model has random weights: what a result lost says that it works, not how good a method is."
    yield ""
    yield "| backend | `-a` | what it does | result | seen |"
    yield "|---|---|---|---|---|"
    for name, backend in BACKENDS.items():
        saw = seen.get(name, {})
        checks = {c["method"]: c for c in saw.get("checks", [])}
        for method, what in backend.methods.items():
            check = checks.get(method)
            result = "not tried here" if check is None else check["said"]
            yield f"| `{name}` | `{method}` | {what.summary} | {result} | {saw.get('date', '')} |"
    notes = [(n, m, what.warning) for n, b in BACKENDS.items() for m, what in b.methods.items() if what.warning]
    yield ""
    yield "What there is to know of some:"
    yield ""
    for name, method, warning in notes:
        yield f"- `--backend {name} -a {method}`: {warning}."
    for name, backend in BACKENDS.items():
        if backend.instead:
            yield f"- `{name}` is refused without a GPU, before anything is installed: {backend.instead}."


if __name__ == "__main__":
    main()
