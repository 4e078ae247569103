"""`quantize -a …,distill`, and distill on a folder that is quantized already: codes stay, the model comes nearer."""

import json
import shutil
from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import families
import quantcli
import tiny
from quantcli.data.calibration import load_tokenizer
from quantcli.errors import DivergedError, InputError, InterruptedRunError, ResourceError, UsageError
from quantcli.folder import read_manifest
from quantcli.models.checkpoint import Checkpoint
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines import quantize
from quantcli.pipelines.blockwise.stages import StageSolver
from quantcli.pipelines.distilling import train
from quantcli.pipelines.planning.decide import make_plan
from quantcli.progress import Silent

TEXT = "\n".join(topics[name] for name in sorted(topics))
QUICK = {"train_rows": "24", "distill.learning_rate": "0.04"}
CODES = {"gptq": ("qweight", "qzeros", "g_idx"), "awq": ("qweight", "qzeros"), "compressed-tensors": ("weight_packed",)}
SCALES = {"gptq": "scales", "awq": "scales", "compressed-tensors": "weight_scale"}


def taught(family, steps, folder):
    """A tiny model that has read some English: divergence from noise would say nothing."""
    model = families.build(family)
    families.save(model, folder)
    ids = torch.tensor(load_tokenizer(folder)(TEXT[:60000])["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(ids) - 65, (8,), generator=random)
        rows = torch.stack([ids[s : s + 65] for s in starts])
        logits = model(input_ids=rows[:, :-1]).logits
        cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return families.save(model, folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return taught("llama", 120, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text(TEXT[:60000])
    return path


def options(model, output, text, algorithm="gptq,distill", settings=QUICK, rows=8, seed=0, **values):
    values = {"bits": 2, "group_size": 32, "dtype": "keep"} | values
    calibration = CalibrationOptions(str(text), num_samples=rows, seq_len=64, seed=seed)
    return QuantizeOptions(str(model), output, algorithm, calibration=calibration, settings=settings, **values)


def alone(folder, output, text, model, settings=QUICK, **values):
    """distill of a quantized folder."""
    calibration = CalibrationOptions(str(text), seq_len=64)
    return QuantizeOptions(
        str(folder), output, "distill", calibration=calibration, settings=settings, float_model=str(model), **values
    )


class Heard(Silent):
    """Notes what a run says."""

    def __init__(self):
        self.notes, self.warnings = [], []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)


def tensors(folder):
    return load_file(folder / "model" / "model.safetensors")


def divergence_between(model, folder):
    """KL on text that no run has seen."""
    ids = torch.tensor(load_tokenizer(model)(TEXT[80000:82000])["input_ids"])
    rows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    with torch.no_grad():
        p, q = (quantcli.load(f)(rows).logits.double().log_softmax(-1) for f in (model, folder))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_model_comes_nearer_and_codes_stay(model, text, tmp_path):
    plain = quantize.run(options(model, tmp_path / "p", text, "gptq", settings={}))
    heard = Heard()
    result = quantize.run(options(model, tmp_path / "q", text), heard)
    report = result.distilled
    assert report.kept and report.held_out_after < 0.9 * report.held_out_before
    assert divergence_between(model, tmp_path / "q") < 0.9 * divergence_between(model, tmp_path / "p")
    assert any("rows held out" in note for note in heard.notes) and not heard.warnings
    assert (report.rows, report.judges, len(report.losses)) == (23, 1, 12)
    before, after = tensors(tmp_path / "p"), tensors(tmp_path / "q")
    assert before.keys() == after.keys()
    trained = {n for n in before if not torch.equal(before[n], after[n])}
    assert trained == {n for n in before if n.endswith(".scales") or "norm" in n}
    assert all(before[n].dtype == after[n].dtype for n in before)
    assert result.layers and len(result.layers) == len(plain.layers)
    written = json.loads((tmp_path / "q/report.json").read_text())["distilled"]
    assert written["held_out_after"] == report.held_out_after
    assert [p.name for p in (tmp_path / "q/model").glob("*.tmp")] == []


def test_what_is_read_again_is_what_was_trained(model, text, tmp_path, monkeypatch):
    seen = []
    replace_tensors = train.replace_tensors
    students = []
    open_student = train.open_student
    monkeypatch.setattr(train, "open_student", lambda *a, **k: students.append(open_student(*a, **k)) or students[-1])

    def noting(checkpoint, changed):
        with torch.no_grad():
            seen.append(students[-1].logits(torch.arange(3, 60)).clone())
        replace_tensors(checkpoint, changed)

    monkeypatch.setattr(train, "replace_tensors", noting)
    quantize.run(options(model, tmp_path / "q", text))
    with torch.no_grad():
        found = quantcli.load(tmp_path / "q")(torch.arange(3, 60)[None]).logits[0]
    assert (found - seen[-1]).abs().max() < 1e-5 * found.abs().max()


@pytest.mark.parametrize(
    ("family", "format", "settings"),
    [
        ("qwen2", "compressed-tensors", {}),
        ("gpt2", "awq", {"group_size": 64}),
        ("gemma2", "gptq", {"bits": 3}),
        ("mixtral", "compressed-tensors", {"bits": 8}),
        ("falcon-alibi", "gptq", {}),
        ("llama-tied", "gptq", {"quantize_lm_head": True, "quantize_embeddings": True}),
        ("llama-tied", "gptq", {"quantize_embeddings": True}),
    ],
)
def test_a_quantized_folder_is_trained_again(family, format, settings, text, tmp_path):
    source = families.save(families.build(family), tmp_path / "source")
    settings = {"algorithm": "gptq", "bits": 4} | settings
    quantize.run(options(source, tmp_path / "q", text, format=format, **settings, settings={}))
    quiet = {"train_rows": "24", "learning_rate": "0.001"}
    report = quantize.run(alone(tmp_path / "q", tmp_path / "r", text, source, quiet)).distilled
    before, after = tensors(tmp_path / "q"), tensors(tmp_path / "r")
    assert before.keys() == after.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert report.kept == bool(changed)
    scales = [n for n in before if n.endswith(f".{SCALES[format]}") and "embed" not in n]
    assert report.values >= sum(before[n].numel() for n in scales)
    assert not any(n.rpartition(".")[2] in CODES[format] or (before[n].ndim == 2 and n not in scales) for n in changed)
    manifest = read_manifest(tmp_path / "r")
    assert manifest.parent["name"] == "q" and set(manifest.metrics["held_out_kl"]) == {"before", "after"}
    assert "float_model" not in manifest.options
    assert sorted(p.name for p in (tmp_path / "r/model").iterdir()) == sorted(
        p.name for p in (tmp_path / "q/model").iterdir()
    )


def test_interrupted_anywhere_and_continued_it_ends_the_same(model, text, tmp_path, monkeypatch):
    quantize.run(options(model, tmp_path / "whole", text))
    wanted = tiny.digests(tmp_path / "whole/model")
    monkeypatch.setattr(train, "_SAVED_EVERY", 0.0)
    loss, write = train._Training._loss, train.replace_tensors
    calls = []

    def stopping(self, rows, wanted):
        calls.append(rows)
        if len(calls) in (1, 4, 10):
            raise KeyboardInterrupt
        return loss(self, rows, wanted)

    def written_and_stopped(checkpoint, changed):
        write(checkpoint, changed)
        if len(calls) < 100:
            calls.extend([[]] * 100)
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train._Training, "_loss", stopping)
        for _ in range(3):
            with pytest.raises(InterruptedRunError):
                quantize.run(options(model, tmp_path / "q", text))
        first = [p.name for p in (tmp_path / "q.partial-work/state").iterdir()]
        assert "rounded.safetensors" in first
        # the next run puts the rounded tensors in place, trains on, and is stopped as it has written the trained ones
        patched.setattr(train._Training, "_restore", lambda self: None)
        patched.setattr(train, "replace_tensors", written_and_stopped)
        with pytest.raises(InterruptedRunError):
            quantize.run(options(model, tmp_path / "q", text))
    heard = Heard()
    monkeypatch.setattr(StageSolver, "solve", None)  # rounding is finished
    quantize.run(options(model, tmp_path / "q", text), heard)
    assert any("continuing after 12 steps" in note for note in heard.notes)
    assert tiny.digests(tmp_path / "q/model") == wanted


def test_a_loss_that_is_no_number_keeps_what_was_rounded(model, text, tmp_path, monkeypatch):
    loss, calls = train._Training._loss, []

    def breaking(self, rows, wanted):
        calls.append(rows)
        return loss(self, rows, wanted) if len(calls) < 4 else float("nan")

    with monkeypatch.context() as patched:
        patched.setattr(train._Training, "_loss", breaking)
        with pytest.raises(DivergedError, match="step 4 of 12") as error:
            quantize.run(options(model, tmp_path / "q", text))
    assert error.value.exit_code == 3 and "learning_rate" in error.value.hint
    assert not (tmp_path / "q").exists()
    kept = load_file(tmp_path / "q.partial-work/state/training.safetensors")
    assert len(kept["losses"]) == 3 and all(torch.isfinite(t.float()).all() for t in kept.values())
    heard = Heard()
    monkeypatch.setattr(StageSolver, "solve", None)
    slower = QUICK | {"distill.learning_rate": "0.02"}
    result = quantize.run(options(model, tmp_path / "q", text, settings=slower), heard)
    assert len(result.distilled.losses) == 12 and any("begins anew" in note for note in heard.notes)


def test_lack_of_memory_keeps_what_was_rounded(model, text, tmp_path, monkeypatch):
    def lacking(self, rows, wanted):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(train._Training, "_loss", lacking)
    with pytest.raises(ResourceError, match=r"distill ran out of memory: CUDA .* 2.00 GiB") as error:
        quantize.run(options(model, tmp_path / "q", text))
    assert "--seq-len" in error.value.hint
    assert (tmp_path / "q.partial-work/model/model.safetensors").is_file()


def test_training_that_does_harm_is_not_kept(model, text, tmp_path):
    heard = Heard()
    settings = QUICK | {"distill.learning_rate": "0.999"}
    result = quantize.run(options(model, tmp_path / "q", text, settings=settings | {"epochs": "3"}, bits=8), heard)
    assert not result.distilled.kept and any("did not help" in w for w in heard.warnings)
    quantize.run(options(model, tmp_path / "p", text, "gptq", settings={}, bits=8))
    assert tiny.digests(tmp_path / "p/model") == tiny.digests(tmp_path / "q/model")


def test_blocks_that_run_twice_give_the_same(model, text, tmp_path, monkeypatch):
    quantize.run(options(model, tmp_path / "q", text, bits=3))
    quantize.run(options(model, tmp_path / "p", text, "gptq", settings={}, bits=3))
    seen = []
    recompute = train.Student.recompute
    monkeypatch.setattr(train.Student, "recompute", lambda self, blocks: seen.extend(blocks) or recompute(self, blocks))
    plan = quantize.run(alone(tmp_path / "p", tmp_path / "r", text, model, dry_run=True))
    tight = alone(tmp_path / "p", tmp_path / "r", text, model, max_memory=int(plan.cost.peak_bytes * 1.1))
    quantize.run(tight)
    assert seen == ["model.layers.0", "model.layers.1"]
    assert tiny.digests(tmp_path / "r/model") == tiny.digests(tmp_path / "q/model")
    with pytest.raises(ResourceError, match="distill needs about"):
        quantize.run(alone(tmp_path / "p", tmp_path / "s", text, model, max_memory=10_000_000))


def test_the_preset_max_is_best_and_distill(model, text, tmp_path):
    values = {"algorithm": None, "settings": {}, "preset": "max"}
    plan = make_plan(options(model, tmp_path / "q", text, **values))
    best = make_plan(options(model, tmp_path / "q", text, **values | {"preset": "best"}))
    assert plan.trainer.algorithm.name == "distill" and best.trainer is None
    assert (plan.transforms, plan.algorithm, plan.settings) == (best.transforms, best.algorithm, best.settings)
    assert plan.distilling.seconds > 0 and plan.seconds > plan.distilling.seconds
    assert any(row[0] == "then" and row[1].startswith("distill") for row in plan.rows())
    chained = make_plan(options(model, tmp_path / "q", text, "awq,gptq,distill", settings={}, preset="best"))
    assert chained.settings == best.settings and chained.trainer == plan.trainer


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"format": "float"}, UsageError, "which format float has not"),
        ({"algorithm": "nf4,distill"}, UsageError, "nf4 is stored as"),
        ({"float_model": "elsewhere"}, UsageError, "--float-model is for -a distill of a folder"),
        ({"algorithm": "distill"}, InputError, "is float"),
        ({"settings": {"train_rows": "1"}}, UsageError, "train_rows must be 2 or more"),
    ],
)
def test_refused_before_the_work(values, error, message, model, text, tmp_path):
    with pytest.raises(error, match=message):
        quantize.run(options(model, tmp_path / "q", text, **values))
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_trained_again(model, text, tmp_path):
    quantize.run(QuantizeOptions(str(model), tmp_path / "n", "nf4", group_size=32))
    quantize.run(options(model, tmp_path / "p", text, "gptq", settings={}))
    other = families.save(families.build("qwen2"), tmp_path / "other")
    given = sorted(p.name for p in tmp_path.iterdir())
    out = tmp_path / "q"
    for wanted, error, message in (
        (alone(tmp_path / "n", out, text, model), InputError, "bitsandbytes .* trains scales that stand beside codes"),
        (alone(tmp_path / "p", out, text, other), InputError, "is a qwen2, .* a llama"),
        (replace(alone(tmp_path / "p", out, text, model), float_model=None), UsageError, "learns from the float model"),
        (alone(tmp_path / "p", out, text, model, bits=3), UsageError, "bits would have no effect"),
        (alone(tmp_path / "p", out, text, model, exclude=("q_proj",)), UsageError, "exclude would have no effect"),
        (options(tmp_path / "p", out, text), InputError, "is already quantized"),
    ):
        with pytest.raises(error, match=message):
            quantize.run(wanted)
    assert sorted(p.name for p in tmp_path.iterdir()) == given


def test_another_parent_is_told_of(model, text, tmp_path):
    quantize.run(options(model, tmp_path / "p", text, "gptq", settings={}))
    moved = shutil.copytree(model, tmp_path / "moved")
    heard = Heard()
    quantize.run(alone(tmp_path / "p", tmp_path / "q", text, moved, dry_run=True), heard)
    assert not heard.warnings
    tiny.edit_json(moved / "config.json", rope_theta=20000.0)
    quantize.run(alone(tmp_path / "p", tmp_path / "q", text, moved, dry_run=True), heard)
    assert len(heard.warnings) == 1 and "was not made from" in heard.warnings[0]


def test_weights_that_expect_rotations_learn_too(text, tmp_path):
    source = families.save(families.build("llama"), tmp_path / "source")
    report = quantize.run(
        options(source, tmp_path / "q", text, "quarot,gptq,distill", QUICK | {"online": "true"}, bits=3)
    ).distilled
    assert report.kept and report.held_out_after < report.held_out_before
    assert Checkpoint.open(tmp_path / "q/model").config["tie_word_embeddings"] is False
