"""What becomes of a worker that does well, and of one that does not: the frame around every backend."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from quantcli.backends import BACKENDS, Backend, Method, Setting, worker
from quantcli.cli.app import run
from quantcli.errors import (
    InputError,
    InterruptedRunError,
    QualityError,
    QuantcliError,
    ResourceError,
    UsageError,
)
from quantcli.options import CalibrationOptions, QuantizeOptions
from quantcli.pipelines import inspect, quantize
from quantcli.progress import Silent

ACTING = Backend(
    "acting",
    "pytest",
    "does as it is told",
    "checkpoint",
    {
        "play": Method(
            "plays",
            (4, 8),
            calibrates=True,
            group_size=32,
            group_sizes=(32, 64),
            symmetric=True,
            grids=(True,),
            takes=frozenset({"calibration"}),
            settings={"act": Setting("good", "what to do")},
            warning="nothing is meant",
        )
    },
    imports=("json",),
    packages=("numpy", "pytest"),
    own_environment=False,
)
TEXT = CalibrationOptions(num_samples=4, seq_len=16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model, and beside it what workers may hand over: good, noise."""
    root = tmp_path_factory.mktemp("frame")
    model = tiny.checkpoint(root / "model")
    quantize.run(QuantizeOptions(str(model), root / "Q", algorithm="rtn", group_size=32, symmetric=True))
    shutil.copytree(root / "Q" / "model", root / "good")
    shutil.copytree(root / "good", root / "noise")
    file = next((root / "noise").glob("*.safetensors"))
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("scales"):
            tensors[name] *= 300
    save_file(tensors, file, metadata={"format": "pt"})
    shutil.copytree(root / "good", root / "nan")
    file = next((root / "nan").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    return root


@pytest.fixture(autouse=True)
def acting(monkeypatch, tmp_path):
    monkeypatch.setitem(BACKENDS, "acting", ACTING)
    folder = tmp_path / "workers"
    shutil.copytree(worker._WORKERS, folder)
    shutil.copy(Path(__file__).with_name("acting_worker.py"), folder)
    monkeypatch.setattr(worker, "_WORKERS", folder)
    monkeypatch.setenv("QUANTCLI_HOME", str(tmp_path / "home"))


class Heard(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.notes, self.warnings, self.tracked = [], [], []

    def note(self, message):
        self.notes.append(message)

    def warn(self, message):
        self.warnings.append(message)

    def track(self, label, total, start=0):
        self.tracked.append((label, total))
        return super().track(label, total, start)


def play(folders, output, act, progress=None, **options):
    text = tiny.words(400)
    (folders / "text.txt").write_text(text)
    given = {"calibration": CalibrationOptions(data=str(folders / "text.txt"), num_samples=4, seq_len=16), **options}
    asked = QuantizeOptions(str(folders / "model"), output, backend="acting", settings={"act": act}, **given)
    return quantize.run(asked, progress)


def leftovers(folder):
    return sorted(p.name for p in folder.iterdir() if p.name not in ("workers", "home"))


def test_a_good_result_is_kept_as_ours_are(folders, tmp_path):
    heard, before = Heard(), tiny.digests(folders / "model")
    made = play(folders, tmp_path / "O", "good", heard, evaluate=True)
    assert "acting: act is good" in heard.notes
    assert "nothing is meant" in heard.warnings
    assert ("acting: acting", 3.0) in heard.tracked
    assert 0 < made.outputs.kl < made.outputs.uniform_kl
    assert made.evaluation.kl_mean > 0
    assert made.peak_bytes > 1_000_000
    assert made.kept == ()
    assert leftovers(tmp_path) == ["O"]
    assert tiny.digests(folders / "model") == before
    # the original's tokenizer, nothing that the package left beside the model
    assert (tmp_path / "O/model/tokenizer.json").read_bytes() == (folders / "model/tokenizer.json").read_bytes()
    assert not (tmp_path / "O/model/logs").exists()
    manifest = json.loads((tmp_path / "O/quantcli.json").read_text())
    assert manifest["options"]["backend"] == "acting"
    assert manifest["options"]["settings"] == {"act": "good"}
    assert manifest["versions"]["acting: pytest"] == pytest.__version__
    assert manifest["parent"]["name"] == "model"
    assert inspect.run(tmp_path / "O").intact
    assert not list((tmp_path / "home/logs").iterdir())  # logs are kept of failures alone


@pytest.mark.parametrize(
    ("act", "kind", "said"),
    [
        ("crash", QuantcliError, "RuntimeError: the package broke"),
        ("segfault", QuantcliError, "signal SIGSEGV"),
        ("killed", ResourceError, "killed by the system"),
        ("refuse", InputError, "no such architecture"),
        ("silent", QuantcliError, "without a word"),
        ("empty", QuantcliError, "wrote no model that runs"),
        ("garbage", QuantcliError, "wrote no model that runs"),
        ("nan", QuantcliError, "model.norm.weight"),
        ("noise", QualityError, "the result is noise"),
    ],
)
def test_a_bad_one_leaves_one_line_and_nothing_else(folders, tmp_path, act, kind, said):
    with pytest.raises(QuantcliError) as caught:
        play(folders, tmp_path / "O", act)
    assert type(caught.value) is kind
    assert said in caught.value.message
    assert "\n" not in caught.value.message
    assert leftovers(tmp_path) == []
    if act in ("crash", "segfault", "killed", "refuse", "silent"):
        log = Path(caught.value.hint.removeprefix("its log: "))
        assert "a package prints what it likes" in log.read_text()


@pytest.mark.parametrize(
    ("act", "limits", "said"),
    [("hang", {"timeout": 8.0}, "longer than 8 s"), ("memory", {"max_memory": 400_000_000}, "more than 400 MB")],
)
def test_limits_end_it_and_all_that_it_started(folders, tmp_path, act, limits, said):
    begun = time.monotonic()
    with pytest.raises(ResourceError, match=said):
        play(folders, tmp_path / "O", act, **limits)
    assert time.monotonic() - begun < 60
    assert leftovers(tmp_path) == []
    if act == "hang":
        assert gone(int((folders / "child").read_text()))


def test_ctrl_c_ends_it_and_all_that_it_started(folders, tmp_path):
    class Interrupting(Silent):
        def note(self, message):
            if "act is hang" in message:
                deadline = time.monotonic() + 20
                while not (folders / "child").is_file() and time.monotonic() < deadline:
                    time.sleep(0.05)
                raise KeyboardInterrupt

    (folders / "child").unlink(missing_ok=True)
    with pytest.raises(InterruptedRunError):
        play(folders, tmp_path / "O", "hang", Interrupting())
    assert gone(int((folders / "child").read_text()))
    assert leftovers(tmp_path) == []
    assert not psutil.Process().children(recursive=True)


def gone(pid):
    for _ in range(40):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"algorithm": "plya"}, "did you mean 'play'"),
        ({"bits": 3}, "makes 4 or 8 bits, not 3"),
        ({"group_size": 128}, "groups of 32 or 64, not 128"),
        ({"symmetric": False}, "symmetric only"),
        ({"target_bits": 3.5}, "--target-bits has no effect"),
        ({"preset": "best"}, "--preset has no effect"),
        ({"readers": ("vllm",)}, "--for has no effect"),
        ({"exclude": ("q_proj",)}, "--exclude has no effect"),
        ({"device": "cuda"}, "not on cuda"),
        ({"calibration": CalibrationOptions(seq_len=4000)}, "--seq-len 4000 is more than the 128"),
    ],
)
def test_what_has_no_effect_is_refused_before_the_work(folders, tmp_path, options, said):
    asked = {"calibration": TEXT, **options}
    with pytest.raises(UsageError, match=said):
        quantize.run(QuantizeOptions(str(folders / "model"), tmp_path / "O", backend="acting", **asked))
    assert leftovers(tmp_path) == []


def test_settings_are_checked(folders, tmp_path):
    for settings, said in ({"acts": "x"}, "no setting 'acts', did you mean 'act'"), ({"damp": "1"}, "no setting"):
        with pytest.raises(UsageError, match=said):
            asked = QuantizeOptions(str(folders / "model"), tmp_path / "O", backend="acting", settings=settings)
            quantize.run(asked)
    number, choice = Setting(3, "a number", least=1), Setting("a", "a letter", choices=("a", "b"))
    assert (number.read("n", "7"), choice.read("c", "b"), Setting(True, "").read("t", "FALSE")) == (7, "b", False)
    for setting, text in ((number, "0"), (number, "x"), (choice, "c"), (Setting(0.5, "", least=0), "nan")):
        with pytest.raises(UsageError):
            setting.read("name", text)


def test_kinds_of_models_and_unknown_names(folders, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'onnxruntime'"):
        quantize.run(QuantizeOptions(str(folders / "model"), tmp_path / "O", backend="onnxruntim"))
    with pytest.raises(UsageError, match="onnxruntime takes ONNX graphs"):
        quantize.run(QuantizeOptions(str(folders / "model"), tmp_path / "O", backend="onnxruntime"))
    with pytest.raises(UsageError, match="--timeout is for --backend"):
        QuantizeOptions("m", Path("O"), timeout=3.0)


@pytest.mark.skipif(os.path.exists("/proc/driver/nvidia/version"), reason="there is a GPU")
def test_cuda_only_is_refused_with_what_to_use_instead(folders, tmp_path):
    with pytest.raises(UsageError, match="auto-gptq runs on CUDA only") as caught:
        quantize.run(QuantizeOptions(str(folders / "model"), tmp_path / "O", backend="auto-gptq"))
    assert "--backend gptqmodel" in caught.value.hint
    with pytest.raises(UsageError, match="awq of llm-compressor asks for an accelerator"):
        quantize.run(QuantizeOptions(str(folders / "model"), tmp_path / "O", backend="llm-compressor", algorithm="awq"))


@pytest.mark.skipif(not os.path.exists("/proc/driver/nvidia/version"), reason="auto-gptq runs on CUDA only")
def test_auto_gptq_on_a_gpu(folders, tmp_path, monkeypatch):
    monkeypatch.delenv("QUANTCLI_HOME")
    from quantcli.options import BackendsOptions
    from quantcli.pipelines import backends

    backends.run(BackendsOptions("install", "auto-gptq"))
    assert not backends.run(BackendsOptions("check", "auto-gptq")).failures


def test_a_dry_run_needs_nothing_installed(folders, tmp_path):
    asked = QuantizeOptions(str(folders / "model"), tmp_path / "O", backend="gptqmodel", dry_run=True)
    plan = quantize.run(asked)
    assert dict(plan.rows())["scheme"] == "4 bits, group size 128, sym"
    with pytest.raises(UsageError, match="not installed") as caught:
        quantize.run(QuantizeOptions(str(folders / "model"), tmp_path / "O", backend="gptqmodel"))
    assert caught.value.hint == "run `quantcli backends install gptqmodel`"
    assert leftovers(tmp_path) == []


def test_compare_puts_them_in_one_table(folders, tmp_path, capsys):
    text = folders / "text.txt"
    text.write_text(tiny.words(4000))
    words = ["compare", "-m", str(folders / "model"), "--with", "ours:rtn,acting,acting:play", "--group-size", "32"]
    words += ["--data", str(text), "--num-samples", "4", "--seq-len", "64", "--eval-data", str(text), "--sym"]
    words += ["--eval-samples", "4", "-o", str(tmp_path / "C"), "--json"]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    ours, theirs, again = found["entrants"]
    # what the worker hands over is our own rtn at the same scheme: the same figures, whoever made it
    assert (ours["algorithm"], ours["scheme"]) == ("rtn", "4b g32 sym")
    assert theirs["kl"] == again["kl"] == pytest.approx(ours["kl"], rel=1e-3)
    assert theirs["size_bytes"] == ours["size_bytes"]
    assert "transformers" in theirs["opens"]
    assert found["reference_perplexity"] > 1
    assert sorted(p.name for p in (tmp_path / "C").iterdir()) == ["acting", "acting-play", "ours-rtn"]


def test_compare_refuses_before_the_first_run_and_goes_on_after_a_failure(folders, tmp_path, capsys, monkeypatch):
    words = ["compare", "-m", str(folders / "model"), "--group-size", "32", "--eval-samples", "2", "-o"]
    words += [str(tmp_path / "C"), "--data", str(folders / "text.txt"), "--num-samples", "4", "--seq-len", "16"]
    (folders / "text.txt").write_text(tiny.words(400))
    refused = {"ours,actin": "did you mean 'acting'", "ours,gptqmodel": "not installed", "": "nobody"}
    for entrants, said in refused.items():
        assert run([*words, "--with", entrants]) == 2
        assert said in capsys.readouterr().err
    crashing = replace(ACTING.methods["play"], settings={"act": Setting("crash", "fails")})
    monkeypatch.setitem(BACKENDS, "acting", replace(ACTING, methods={"play": crashing}))
    assert run([*words, "--with", "acting,ours:rtn", "--bits", "8"]) == 5
    out, err = capsys.readouterr()
    assert "RuntimeError: the package broke" in out
    assert "no result: acting" in err
    assert leftovers(tmp_path) == ["C"]
    assert [p.name for p in (tmp_path / "C").iterdir()] == ["ours-rtn"]
