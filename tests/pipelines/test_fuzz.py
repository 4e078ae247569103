"""500 damaged checkpoints, and other files by kind: each is refused by an error of ours or taken; nothing is left."""

import contextlib
import io
import json
import random
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest
import torch

import small_graphs
import tiny
from quantcli.cli import app
from quantcli.errors import InputError, QuantcliError, UsageError
from quantcli.models.checkpoint import INDEX
from quantcli.options import QuantizeOptions
from quantcli.pipelines import quantize

CASES, PARTS, SECONDS_EACH = 500, 10, 5
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "vocab_size": 200}
VALUES = [None, True, -1, 0, 1, 2**40, 1e308, "", "x", [], [0], {}, {"a": 1}, "../x", "\x00", [[]], -0.5]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint with an index; most cases damage a copy of it."""
    folder = tiny.checkpoint(tmp_path_factory.mktemp("fuzz") / "sound", **SMALL)
    header = (folder / "model.safetensors").read_bytes()[8:]
    names = [n for n in json.JSONDecoder().raw_decode(header.decode("latin-1"))[0] if n != "__metadata__"]
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}))
    return folder


def damage_bytes(data: bytes, low: int, high: int, generator: random.Random) -> bytes:
    """Flips, removes, inserts or repeats bytes in [low, high)."""
    out = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 8])):
        at = generator.randrange(low, max(low + 1, min(high, len(out))))
        kind = generator.choice(["flip", "flip", "set", "cut", "insert", "truncate", "repeat"])
        length = generator.choice([1, 2, 8, 64])
        if kind == "flip" and at < len(out):
            out[at] ^= 1 << generator.randrange(8)
        elif kind == "set":
            out[at : at + length] = generator.randbytes(length)
        elif kind == "cut":
            del out[at : at + length]
        elif kind == "insert":
            out[at:at] = generator.randbytes(length)
        elif kind == "truncate" and generator.random() < 0.3:
            del out[at:]
        elif kind == "repeat":
            out[at:at] = out[at : at + length]
    return bytes(out)


def damage_json(data: bytes, generator: random.Random) -> bytes:
    """Sets, removes or renames an entry somewhere in the tree."""
    value = json.loads(data)
    for _ in range(generator.choice([1, 1, 3])):
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = generator.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and generator.random() < 0.7:
                node = node[key]
                continue
            kind = generator.choice(["set", "set", "remove", "rename", "scale"])
            if kind == "remove":
                del node[key]
            elif kind == "rename" and isinstance(node, dict):
                node[str(key) + generator.choice(["x", "", ".weight", "/"])] = node.pop(key)
            elif kind == "scale" and isinstance(node[key], int | float):
                node[key] = node[key] * generator.choice([-1, 0, 2, 3])
            else:
                node[key] = generator.choice(VALUES)
            break
    return json.dumps(value).encode()


def damage(folder, generator: random.Random) -> str:
    """Damages one file of a checkpoint; says what was done."""
    name = generator.choice(["model.safetensors"] * 3 + ["config.json"] * 2 + [INDEX, "tokenizer.json"])
    path = folder / name
    data = path.read_bytes()
    how = generator.choice(["bytes", "tree"])
    if name == "model.safetensors":
        length = int.from_bytes(data[:8], "little")
        how = generator.choice(["length", "header", "header", "data", "tree", "tree"])
        if how == "tree":
            header = damage_json(data[8 : 8 + length], generator)
            path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        else:
            low, high = {"length": (0, 8), "header": (8, 8 + length), "data": (8 + length, len(data))}[how]
            path.write_bytes(damage_bytes(data, low, high, generator))
    elif how == "tree":
        path.write_bytes(damage_json(data, generator))
    else:
        path.write_bytes(damage_bytes(data, 0, len(data), generator))
    return f"{name}: {how}"


def too_long(_number, _frame):
    raise TimeoutError


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.filterwarnings("ignore")  # what transformers thinks of a damaged config is not ours to judge
def test_damaged_checkpoints(sound, tmp_path, part):
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_long)
    refused = 0
    for case in range(part, CASES, PARTS):
        folder, output = tmp_path / "model", tmp_path / "Q"
        shutil.copytree(sound, folder)
        what = f"case {case}, {damage(folder, random.Random(case))}"
        before, begun = tiny.digests(folder), time.monotonic()
        signal.alarm(4 * SECONDS_EACH)  # a hang ends as a failure that names its case
        try:
            quantize.run(QuantizeOptions(str(folder), output, algorithm="rtn", group_size=32))
        except QuantcliError as error:
            refused += 1
            assert isinstance(error, InputError | UsageError), f"{what}: {error!r}"
            assert error.message and "\n" not in error.message and len(error.message) < 1000, what
            assert not output.exists(), what
        except BaseException as error:
            raise AssertionError(what) from error
        finally:
            signal.alarm(0)
        assert time.monotonic() - begun < SECONDS_EACH, what
        assert tiny.digests(folder) == before, what
        assert {p.name for p in tmp_path.iterdir()} <= {"model", "Q"}, what
        shutil.rmtree(folder)
        shutil.rmtree(output, ignore_errors=True)
    assert refused > CASES / PARTS / 4  # the damage is real


# -- other files, and numbers that are none: by kind, each with a command that reads them ------------------------------

KINDS = {  # the file that is damaged, and how; the command that reads it
    "npz": ("inputs.npz", "quantize -m net.onnx -o out -a static --calibration-inputs inputs.npz"),
    "ranges": (
        "ranges.json",
        "quantize -m net.onnx -o out -a static --calibration-inputs inputs.npz --calibration-cache ranges.json",
    ),
    "manifest": ("Q/quantcli.json", "inspect Q"),
    "manifest of the base": ("onnx/quantcli.json", "generate-adapter -m onnx -o out --adapter-path a=tuned/adapter"),
    "report": ("Q/report.json", "evaluate -m Q --num-samples 1 --seq-len 8 --no-speed --data text.txt"),
    "genai_config": ("onnx/model/genai_config.json", "quantize -m onnx -o out -a rtn --group-size 32"),
    "genai_config that runs": (
        "onnx/model/genai_config.json",
        "evaluate -m onnx --num-samples 1 --seq-len 8 --no-speed --data text.txt",
    ),
    "adapter": (
        "tuned/adapter/adapter_config.json",
        "generate-adapter -m onnx -o out --adapter-path a=tuned/adapter",
    ),
    "tensor, quantize": ("model/model.safetensors", "quantize -m model -o out -a rtn --group-size 32"),
    "tensor, gptq": (
        "model/model.safetensors",
        "quantize -m model -o out -a gptq --group-size 32 --data text.txt --num-samples 4 --seq-len 16",
    ),
    "tensor, capture": ("model/model.safetensors", "capture-onnx-graph -m model -o out"),
    "tensor, finetune": (
        "model/model.safetensors",
        "finetune -m model -o out --data-files text.jsonl --seq-len 16 --max-steps 1",
    ),
    "tensor, evaluate": (
        "model/model.safetensors",
        "evaluate -m model --num-samples 1 --seq-len 8 --no-speed --data text.txt",
    ),
    "tensor, packed": (
        "Q/model/model.safetensors",
        "evaluate -m Q --num-samples 1 --seq-len 8 --no-speed --data text.txt",
    ),
    "tensor, generate-adapter": (
        "model/model.safetensors",
        "generate-adapter -m model -o out --adapter-path a=tuned/adapter",
    ),
    "tensor of an adapter": (
        "tuned/adapter/adapter_model.safetensors",
        "generate-adapter -m onnx -o out --adapter-path a=tuned/adapter",
    ),
}
TOLD_ONLY = ("manifest of the base", "report")
"""Files that only inform: whatever they hold, the command goes on."""
IN_SUITE, IN_LARGE = 6, 1000 // len(KINDS) + 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a graph, and what commands made of them."""
    root = tmp_path_factory.mktemp("kinds") / "sound"
    root.mkdir()
    tiny.checkpoint(root / "model", **SMALL, num_attention_heads=2)
    (root / "text.txt").write_text(tiny.words(400))
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": tiny.words(12, 5 * i)}) for i in range(16)))
    small_graphs.mlp(root / "net.onnx")
    np.savez(root / "inputs.npz", x=np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32))
    for line in (
        "quantize -m model -o Q -a rtn --group-size 32",
        "finetune -m model -o tuned --data-files text.jsonl --seq-len 16 --max-steps 1",
        "capture-onnx-graph -m model -o onnx",
        KINDS["ranges"][1],
    ):
        code, said = answer(root, line)
        assert code == 0, f"{line}: {said}"
    shutil.rmtree(root / "out")
    return root


def answer(folder, line):
    """Exit code and what was said on stderr."""
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        return app.run([*line.split(), "-q"]), said.getvalue()


def damage_archive(data: bytes, generator: random.Random) -> bytes:
    """Damages an .npz file as a whole, one of its members, or what the member's header says."""
    how = generator.choice(["bytes", "member", "header", "objects", "names", "odd"])
    if how == "bytes":
        return damage_bytes(data, 0, len(data), generator)
    out = io.BytesIO()
    if how == "objects":
        np.savez(out, x=np.array([{"a": 1}, None], object))
        return out.getvalue()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", generator.choice([0, 8, 12, 14])) as new:
        for name in old.namelist():
            member = old.read(name)
            if how == "member":
                member = damage_bytes(member, 0, len(member), generator)
            elif how == "header":
                said = generator.choice([b"(4, 1<<60)", b"(-4, 32)", b"(10**12,)", b"(4,)", b"((4", b"'a'", b"()"])
                member = member.replace(b"(4, 32)", said.ljust(7))
            elif how == "odd":
                odd = [np.nan, np.inf, b"text", "text", 1j, np.datetime64("now"), 2**70, np.float16(1)]
                buffer = io.BytesIO()
                np.save(buffer, np.full((4, 32), generator.choice(odd)), allow_pickle=True)
                member = buffer.getvalue()
            new.writestr(generator.choice(["x", "y.npy", "../x.npy", "/"]) if how == "names" else name, member)
    return out.getvalue()


def put_what_is_no_number(data: bytes, generator: random.Random) -> tuple[bytes, str]:
    """Writes NaN or an infinity into one number of a float tensor; gives the tensor's name."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    floats = {"F32": np.float32, "F16": np.float16}
    name = generator.choice(sorted(n for n, e in header.items() if e.get("dtype") in floats))
    start, stop = (8 + length + offset for offset in header[name]["data_offsets"])
    values = np.frombuffer(data[start:stop], floats[header[name]["dtype"]]).copy()
    values[generator.randrange(len(values))] = generator.choice([np.nan, np.inf, -np.inf])
    return data[:start] + values.tobytes() + data[stop:], name


def try_kind(place, tmp_path, kind, cases):
    """Runs the command of a kind on so many damaged files: never exit 1, one line where it is refused, nothing left."""
    file, line = KINDS[kind]
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, too_long)
    refused = 0
    for case in range(cases):
        generator, name = random.Random(f"{kind} {case}"), ""
        folder = tmp_path / "case"
        shutil.copytree(place, folder)
        data = (folder / file).read_bytes()
        if kind.startswith("tensor"):
            changed, name = put_what_is_no_number(data, generator)
        elif file.endswith(".npz"):
            changed = damage_archive(data, generator)
        elif generator.random() < 0.3:
            changed = damage_bytes(data, 0, len(data), generator)
        else:
            changed = damage_json(data, generator)
        (folder / file).write_bytes(changed)
        what = f"{kind}, case {case} {name}"
        signal.alarm(6 * SECONDS_EACH)
        try:
            code, said = answer(folder, line)
        except BaseException as error:
            raise AssertionError(what) from error
        finally:
            signal.alarm(0)
        assert code in (0, 2, 3, 4), f"{what}: {said}"
        errors = [text for text in said.splitlines() if text.startswith("error: ")]
        assert len(errors) == (code != 0) and "Traceback" not in said, f"{what}: {said}"
        assert (folder / "out").is_dir() <= (code == 0), f"{what}: {said}"
        if name:
            assert code == 3 and name in errors[0], f"{what}: {said}"
        refused += code != 0
        shutil.rmtree(folder)
    assert refused or kind in TOLD_ONLY or cases < IN_LARGE  # the damage is real


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files(place, tmp_path, kind):
    try_kind(place, tmp_path, kind, IN_SUITE)


@pytest.mark.large
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_thousand_damaged_files(place, tmp_path, kind):
    try_kind(place, tmp_path, kind, IN_LARGE)
