"""`quantize -a spinquant`: rotations that are trained in the run, kept where they help, and not trained twice."""

import json

import pytest
import torch

import families
import quantcli
from quantcli.errors import InputError, InterruptedRunError, ResourceError, UsageError
from quantcli.models.checkpoint import Checkpoint
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines import quantize, quantize_checkpoint
from quantcli.pipelines.blockwise.journal import Journal
from quantcli.pipelines.blockwise.shards import ShardWriter
from quantcli.pipelines.planning.decide import make_plan
from quantcli.pipelines.rotation import learn as trained
from quantcli.pipelines.rotation import train as train_rotation

QUICK = {"steps": "4", "batch_rows": "4", "row_len": "16"}


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """A model with three loud channels in its residual stream."""
    model = families.build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[[3, 17, 40]] *= 20
    return families.save(model, tmp_path_factory.mktemp("loud") / "model")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return families.save(families.build("llama-tied"), tmp_path_factory.mktemp("model") / "model")


def options(model, output, text, settings=QUICK, rows=16, seq_len=32, **values):
    values.setdefault("algorithm", "spinquant")
    calibration = CalibrationOptions(str(text), num_samples=rows, seq_len=seq_len)
    return QuantizeOptions(str(model), output, calibration=calibration, settings=settings, **values)


class Heard:
    """Notes what a run says."""

    def __init__(self):
        self.notes, self.warnings, self.plans, self.tasks = [], [], [], []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)

    def plan(self, title, rows):
        self.plans.append(dict(rows))

    def track(self, label, total, start=0):
        self.tasks.append((label, total))
        return quantize_checkpoint.Silent().track(label, total, start)


def logits(folder, dtype=torch.float32):
    with torch.no_grad():
        return quantcli.load(folder, dtype=dtype)(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize("objective", ["local", "divergence"])
def test_training_beats_its_start_and_a_random_rotation(objective, loud, text, tmp_path):
    heard = Heard()
    settings = {"a_bits": "4", "objective": objective, "batch_rows": "8"}
    result = quantize.run(options(loud, tmp_path / "q", text, settings, rows=64), heard)
    report = json.loads((tmp_path / "q/report.json").read_text())["training"]
    held_out = report["held_out_divergences"]
    assert held_out["trained"] < 0.9 * min(held_out["start"], held_out["random"])
    assert report["kept"] == "trained" and not heard.warnings
    assert any("held-out text with 4-bit activations" in note for note in heard.notes)
    assert ("training rotations", 100) in heard.tasks
    losses = report["losses"]
    assert len(losses) == 100 and sum(losses[-10:]) < sum(losses[:10])
    assert abs(losses[0] - 1) < 1e-3
    assert set(report["held_out_losses"]) == {"float", "start", "random", "trained"}
    assert report["tokens"] > 1000 and result.training.kept == "trained"


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "phi3", "gemma", "mixtral"])
def test_the_function_stays(family, text, tmp_path):
    source = families.save(families.build(family), tmp_path / "source")
    quantize.run(options(source, tmp_path / "q", text, QUICK | {"learning_rate": "0.1"}))
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "q/model")
    assert before.config.get("quantization_config") is after.config.get("quantization_config") is None
    wanted, found = logits(source), logits(tmp_path / "q")
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_every_block_has_value_heads_of_its_own(model, text, tmp_path, monkeypatch):
    kept = []
    see_through = trained.see_through
    monkeypatch.setattr(trained, "see_through", lambda c, m: kept.extend(m) or see_through(c, m))
    quantize.run(options(model, tmp_path / "q", text, QUICK | {"a_bits": "3"}))
    assert [len(m) for m in kept] == [64, 16, 16]
    assert all((m.T @ m - torch.eye(len(m))).abs().max() < 1e-13 for m in kept)
    assert not torch.equal(kept[1], kept[2])


def test_exact_in_float64(text, tmp_path):
    source = families.save(families.build("llama").double(), tmp_path / "source")
    quantize.run(options(source, tmp_path / "q", text))
    found = []
    for folder in (source, tmp_path / "q"):
        loaded = quantcli.load(folder, dtype=torch.float64)
        families.norms_in_float64(loaded)
        with torch.no_grad():
            found.append(loaded(torch.arange(3, 40)[None]).logits)
    assert (found[1] - found[0]).abs().max() < 1e-10 * found[0].abs().max()


@pytest.mark.parametrize("chain", ["spinquant,rtn", "spinquant,gptq", "spinquant,awq,gptq"])
def test_trained_models_are_quantized(chain, model, text, tmp_path):
    result = quantize.run(options(model, tmp_path / "q", text, algorithm=chain, bits=8, group_size=32))
    assert {layer.algorithm for layer in result.layers} == {chain.rpartition(",")[2]}
    assert (result.layers[0].tokens > 0) == (chain != "spinquant,rtn")
    wanted, found = logits(model), logits(tmp_path / "q")
    assert (found - wanted).square().mean() < 0.01 * wanted.square().mean()
    assert Checkpoint.open(tmp_path / "q/model").config["tie_word_embeddings"] is False


def test_weights_are_rounded_in_training_too(model, text, tmp_path):
    settings = QUICK | {"a_bits": "16", "w_bits": "3", "objective": "divergence"}
    result = quantize.run(options(model, tmp_path / "q", text, settings))
    plain = quantize.run(options(model, tmp_path / "p", text, QUICK | {"a_bits": "8"}))
    divergences = [r.training.held_out_divergences["start"] for r in (result, plain)]
    assert divergences[0] > 2 * divergences[1] > 0


def test_training_that_does_harm_is_not_kept(loud, text, tmp_path):
    heard = Heard()
    settings = {"steps": "30", "row_len": "16", "learning_rate": "1e9"}
    result = quantize.run(options(loud, tmp_path / "q", text, settings), heard)
    held_out, kept = result.training.held_out_divergences, result.training.kept
    assert kept == min(held_out, key=held_out.get) != "trained"
    assert f"training did not help, the {kept} rotation is kept" in heard.warnings[0]
    mode = {"start": "hadamard", "random": "random"}[kept]
    quantize.run(QuantizeOptions(str(loud), tmp_path / "quarot", "quarot", settings={"rotate_mode": mode}))
    ours, quarot = (Checkpoint.open(tmp_path / name / "model") for name in ("q", "quarot"))
    for name in ours.entries:
        assert (ours.read(name) - quarot.read(name)).abs().max() < 1e-6


def test_stopped_and_continued(model, text, tmp_path, monkeypatch):
    values = {"algorithm": "spinquant,gptq", "group_size": 32}
    quantize.run(options(model, tmp_path / "whole", text, **values))
    trainings = []
    train = train_rotation.train_rotations
    monkeypatch.setattr(trained, "train_rotations", lambda *a: trainings.append(1) or train(*a))
    # after training, then the first block
    for home, name in ((quantize_checkpoint, "learn_rotations"), (Journal, "remember")):
        original = getattr(home, name)

        def stop(*args, original=original):
            original(*args)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(InterruptedRunError):
            patched.setattr(home, name, stop)
            quantize.run(options(model, tmp_path / "q", text, **values))
    result = quantize.run(options(model, tmp_path / "q", text, **values))
    assert len(trainings) == 1 and result.training.seconds < result.seconds
    whole, again = Checkpoint.open(tmp_path / "whole/model"), Checkpoint.open(tmp_path / "q/model")
    assert all(torch.equal(whole.read(n), again.read(n)) for n in whole.entries)
    reports = [json.loads((tmp_path / n / "report.json").read_text())["training"] for n in ("whole", "q")]
    assert reports[0] | {"seconds": 0} == reports[1] | {"seconds": 0}
    assert not [p for p in tmp_path.iterdir() if "partial" in p.name]


def test_other_options_do_not_continue(model, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(InterruptedRunError):
        patched.setattr(ShardWriter, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        quantize.run(options(model, tmp_path / "q", text))
    with pytest.raises(UsageError, match="settings"):
        quantize.run(options(model, tmp_path / "q", text, QUICK | {"a_bits": "4"}))


def test_the_callers_random_numbers_are_left_alone(model, text, tmp_path):
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    quantize.run(options(model, tmp_path / "q", text))
    assert torch.equal(torch.rand(3), wanted)


def test_the_plan_says_what_training_takes(model, text, tmp_path):
    plan = make_plan(options(model, tmp_path / "q", text, {}, rows=64, seq_len=64))
    longer = make_plan(options(model, tmp_path / "q", text, {"steps": "6400"}, rows=64, seq_len=64))
    rows = dict(plan.rows())
    assert rows["training"].startswith("about ") and "the whole float model" in rows["training"]
    assert rows["calibration"].startswith(str(text))
    assert longer.seconds > plan.seconds and plan.to_dict()["training"]["peak_bytes"] > 0
    assert plan.peak_bytes >= plan.training.peak_bytes
    assert not tmp_path.joinpath("q").exists()
    plain = make_plan(options(model, tmp_path / "q", text, {}, algorithm="gptq", group_size=32))
    assert plain.training is None and "training" not in dict(plain.rows())


def test_models_that_do_not_fit(model, text, tmp_path):
    with pytest.raises(ResourceError, match="training rotations needs about") as caught:
        make_plan(options(model, tmp_path / "q", text, max_memory=100_000_000))
    assert "quarot" in caught.value.hint


def test_refusals(model, text, tmp_path):
    with pytest.raises(InputError, match="its norms subtract the mean"):
        make_plan(options(families.save(families.build("gpt2"), tmp_path / "gpt2"), tmp_path / "q", text))
    with pytest.raises(UsageError, match="takes two calibration rows or more"):
        make_plan(options(model, tmp_path / "q", text, rows=1))
    with pytest.raises(UsageError, match="cannot be combined"):
        make_plan(options(model, tmp_path / "q", text, algorithm="quarot,spinquant"))
    with pytest.raises(UsageError, match="bits would have no effect"):
        make_plan(options(model, tmp_path / "q", text, bits=3))
    (tmp_path / "short.txt").write_text("abc def " * 10)
    with pytest.raises(InputError, match="takes two calibration rows or more"):
        quantize.run(options(model, tmp_path / "q", tmp_path / "short.txt", rows=2, seq_len=60))
