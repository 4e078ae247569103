"""Reading and writing checkpoints one tensor at a time."""

import contextlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from quantcli.errors import InputError
from quantcli.models.checkpoint import INDEX, Checkpoint, copy_companions, read_header
from quantcli.models.writer import CheckpointWriter


def write(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8, torch.bool]
)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    torch.manual_seed(0)
    tensors = {
        "a": (100 * torch.randn(3, 5)).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "empty": torch.empty((0, 4), dtype=dtype),
    }
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors))
    assert set(checkpoint.entries) == set(tensors)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == dtype and read.shape == tensor.shape and torch.equal(read, tensor)
    assert checkpoint.size_bytes == sum(t.numel() * t.itemsize for t in tensors.values())


def test_a_read_tensor_is_memory_of_its_own(tmp_path):
    folder = write(tmp_path / "m", {"a": torch.ones(4)})
    checkpoint = Checkpoint.open(folder)
    checkpoint.read("a").zero_()
    assert torch.equal(checkpoint.read("a"), torch.ones(4))


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path):
    folder = write(tmp_path / "m", {"a": torch.ones(1000)})
    checkpoint = Checkpoint.open(folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-400])
    with pytest.raises(InputError, match="ends in the middle of tensor a"):
        checkpoint.read("a")


def test_header_equals_what_safetensors_itself_reads(tmp_path):
    folder = tiny.checkpoint(tmp_path / "m", "gpt2", dtype=torch.bfloat16)
    expected = load_file(folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.entries) == set(expected)
    assert all(torch.equal(checkpoint.read(n), t) for n, t in expected.items())


def test_shards_are_read_as_the_index_says(tmp_path):
    folder = tiny.checkpoint(tmp_path / "m")
    expected = load_file(folder / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    # a stale shard that the index does not name is none of ours
    save_file({"stale": torch.ones(2)}, folder / "model-00099-of-00099.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert len({e.file for e in checkpoint.entries.values()}) > 2
    assert set(checkpoint.entries) == set(expected)
    assert all(torch.equal(checkpoint.read(n), t) for n, t in expected.items())


def test_adapters_beside_the_weights_are_not_weights(tmp_path):
    folder = write(tmp_path / "m", {"a": torch.ones(2)})
    save_file({"lora": torch.ones(2)}, folder / "adapter_model.safetensors")
    assert set(Checkpoint.open(folder).entries) == {"a"}


def test_files_without_tensors(tmp_path):
    with pytest.raises(InputError, match="holds no tensors"):
        Checkpoint.open(write(tmp_path / "m", {}))


def test_a_header_longer_than_any_real_one_is_not_read(tmp_path):
    path = tmp_path / "big.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000))
        stream.truncate(300_000_000)  # sparse: takes no disk
    with pytest.raises(InputError, match="header length 200000000"):
        read_header(path)


def write_shards(folder: Path, file_bytes: int) -> tuple[CheckpointWriter, dict[str, torch.Tensor]]:
    """Seven shards of mixed dtypes, one of them empty."""
    writer = CheckpointWriter(folder, file_bytes)
    everything = {}
    for number in range(7):
        tensors = {
            f"{number}.bytes": torch.arange(3 + number, dtype=torch.uint8),
            f"{number}.half": torch.full((2, 3), float(number), dtype=torch.float16).T,  # not contiguous
            f"{number}.wide": torch.tensor(float(number), dtype=torch.float64),
        }
        writer.write(number, tensors if number != 3 else {})
        everything |= tensors if number != 3 else {}
    return writer, everything


@pytest.mark.parametrize(("file_bytes", "files"), [(10**9, 1), (700, 3), (1, 7)])
def test_shards_are_joined_to_files_with_the_names_that_others_expect(tmp_path, file_bytes, files):
    writer, tensors = write_shards(tmp_path, file_bytes)
    writer.finish(7)
    writer.finish(7)  # a run that was killed between finishing and the rename comes by again
    names = sorted(p.name for p in tmp_path.iterdir())
    if files == 1:
        assert names == ["model.safetensors"]
        assert load_file(tmp_path / "model.safetensors").keys() == tensors.keys()
    else:
        assert names == [*(f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)), INDEX]
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert set(index["weight_map"]) == set(tensors)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())
    starts = [(e.start, e.dtype.itemsize) for e in checkpoint.entries.values()]
    assert all(start % size == 0 for start, size in starts)


@pytest.mark.parametrize("file_bytes", [10**9, 700, 1])
def test_joining_goes_on_wherever_it_was_killed(tmp_path, monkeypatch, file_bytes):
    """At every change of a name, and at every deletion."""
    steps = 0
    for stop in range(60):
        folder = tmp_path / str(stop)
        folder.mkdir()
        writer, tensors = write_shards(folder, file_bytes)
        steps = 0

        def counted(call, stop=stop):
            def step(*args, **kwargs):
                nonlocal steps
                steps += 1
                if steps > stop:
                    raise KeyboardInterrupt
                return call(*args, **kwargs)

            return step

        with monkeypatch.context() as patched:
            patched.setattr("os.replace", counted(os.replace))
            patched.setattr(Path, "unlink", counted(Path.unlink))
            with contextlib.suppress(KeyboardInterrupt):
                writer.finish(7)
        CheckpointWriter(folder, file_bytes).finish(7)
        (folder / "config.json").write_text("{}")
        checkpoint = Checkpoint.open(folder)
        assert set(checkpoint.entries) == set(tensors)
        assert all(torch.equal(checkpoint.read(n), t) for n, t in tensors.items())
        assert not [p for p in folder.iterdir() if p.name.startswith(("shard-", "joined-"))]
        if steps <= stop:
            return
    raise AssertionError(f"{steps} steps, more than were tried")


def test_a_shard_that_is_rewritten_replaces_the_old_one(tmp_path):
    writer = CheckpointWriter(tmp_path)
    writer.write(0, {"a": torch.zeros(2)})
    writer.write(0, {"a": torch.ones(2)})
    writer.finish(1)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(2))
    assert not list(tmp_path.glob("*.tmp"))


def test_everything_but_weights_travels_along(tmp_path):
    source = tmp_path / "source"
    wanted = ["tokenizer.json", "chat_template.jinja", "code/modeling.py", "generation_config.json", "merges.txt"]
    unwanted = ["config.json", "model.safetensors", "pytorch_model.bin", INDEX, ".git/HEAD", ".cache/x.json", "m.onnx"]
    for name in wanted + unwanted:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    (tmp_path / "target").mkdir()
    assert sorted(copy_companions(source, tmp_path / "target")) == sorted(wanted)
    assert tiny.digests(tmp_path / "target") == {n: d for n, d in tiny.digests(source).items() if n in wanted}
