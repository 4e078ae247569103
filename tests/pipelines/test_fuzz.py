"""500 damaged checkpoints: each is refused by one of our errors or quantized, fast, and leaves nothing behind."""

import json
import random
import shutil
import signal
import time

import pytest
import torch

import tiny
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
