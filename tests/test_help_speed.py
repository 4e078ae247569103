"""`--help` answers at once, because nothing heavy is imported before a command runs."""

import json
import resource
import subprocess
import sys
import time

import pytest

HEAVY = [
    "torch",
    "transformers",
    "peft",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "numpy",
    "safetensors",
    "numba",
    "rich",
    "pydantic",
    "msgspec",
]
COMMANDS = [
    "quantize",
    "tune",
    "finetune",
    "capture-onnx-graph",
    "evaluate",
    "generate",
    "generate-adapter",
    "convert-adapter",
    "inspect",
    "algorithms",
    "backends",
    "compare",
]
SCRIPT = """
import sys, json
from quantcli.cli.app import run
code = run(sys.argv[1:])
print(json.dumps([code, sorted(set({heavy!r}) & set(sys.modules))]), file=sys.stderr)
"""


def loaded_after(*argv):
    script = SCRIPT.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, check=True)
    return json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("argv", [[], ["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)])
def test_help_imports_nothing_heavy(argv):
    code, heavy = loaded_after(*argv)
    assert code == (0 if argv else 2)
    assert heavy == []


def test_a_usage_error_imports_nothing_heavy():
    assert loaded_after("quantize", "-m", "M", "-o", "O", "--bitz", "3") == [2, []]


def test_importing_the_package_imports_nothing_heavy():
    script = (
        f"import sys, json, quantcli, quantcli.options; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_listing_algorithms_needs_no_torch():
    code, heavy = loaded_after("algorithms", "--json")
    assert code == 0
    assert set(heavy) <= {"rich", "pydantic"}


def seconds(*argv, enough):
    """Best of up to twenty, wall clock or CPU, whichever is less: other processes must not fail the test."""
    best, tries = float("inf"), 0
    while best >= enough and tries < 20:
        tries += 1
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "quantcli", *argv], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best = min(best, cpu, time.perf_counter() - start)
    return best


@pytest.mark.parametrize("argv", [["--help"], *([c, "--help"] for c in COMMANDS)])
def test_help_takes_less_than_three_tenths_of_a_second(argv):
    assert seconds(*argv, enough=0.3) < 0.3


def test_algorithms_takes_less_than_a_second():
    assert seconds("algorithms", enough=1) < 1
