"""Runs that are stopped, killed, doubled and changed: what is finished is kept, and the result is the same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

import forked
import tiny
from quantcli.folder import MANIFEST

INTERRUPTED, USAGE = 130, 2
KILLS = 20
# every improvement that has a state of its own: statistics of two streams, held-out rows, a quantized head
OPTIONS = ["-q", "-a", "gptq", "--num-samples", "12", "--seq-len", "32", "--batch-size", "2", "--group-size", "32"]
OPTIONS += ["--set", "refit=true", "--set", "sweeps=1", "--correct-earlier", "--quantize-lm-head"]


class Scene:
    """A model, a text and the result of an undisturbed run."""

    def __init__(self, folder):
        self.folder = folder
        self.model = tiny.checkpoint(folder / "model", num_hidden_layers=4)
        (folder / "text.txt").write_text(tiny.words(2000))
        self.nursery = forked.Nursery(folder)
        self.input = tiny.digests(self.model)
        assert self.nursery.warm(self.line(folder / "whole", "--dry-run")) == 0
        assert self.nursery.run(self.line(folder / "whole")) == 0  # fills the cache of compiled kernels
        shutil.rmtree(folder / "whole")
        begun = time.monotonic()
        assert self.nursery.run(self.line(folder / "whole")) == 0
        self.seconds = time.monotonic() - begun
        self.result = tiny.digests(folder / "whole" / "model")
        assert len([name for name in self.result if name.endswith(".safetensors")]) == 1

    def line(self, output, *more):
        return ["quantize", "-m", str(self.model), "-o", str(output), "--data", str(self.folder / "text.txt"),
                *OPTIONS, *more]  # fmt: skip

    def finished(self, output):
        """Whether a killed run had put its output in place: between that and its end it may be killed too."""
        if not output.exists():
            return False
        output.with_name(output.name + ".partial-lock").unlink(missing_ok=True)  # the next run's file otherwise
        self.check(output)
        return True

    def check(self, output):
        """The output stands alone and equals that of the undisturbed run; the model is as it was."""
        assert tiny.digests(output / "model") == self.result
        assert sorted(p.name for p in output.iterdir()) == ["model", MANIFEST, "report.json"]
        assert [p.name for p in output.parent.glob(output.name + "*")] == [output.name]
        manifest = json.loads((output / MANIFEST).read_text())["files"]
        assert {n.removeprefix("model/"): f["sha256"] for n, f in manifest.items() if n.startswith("model/")} == (
            self.result
        )
        assert len(json.loads((output / "report.json").read_text())["layers"]) == 4 * 7 + 1
        assert tiny.digests(self.model) == self.input


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    made = Scene(tmp_path_factory.mktemp("interruptions"))
    yield made
    made.nursery.close()


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_instant(scene, tmp_path, number):
    # one instant in each twentieth of the run, so that every part of it is hit
    delay = (number + random.Random(number).random()) / KILLS * scene.seconds
    child = scene.nursery.start(scene.line(tmp_path / "Q"))
    time.sleep(delay)
    child.send(signal.SIGKILL)
    child.wait()
    if scene.finished(tmp_path / "Q"):  # it was faster this time
        shutil.rmtree(tmp_path / "Q")
    assert scene.nursery.run(scene.line(tmp_path / "Q")) == 0
    scene.check(tmp_path / "Q")


def test_killed_again_and_again(scene, tmp_path):
    runs = 0
    while runs < 40 and not scene.finished(tmp_path / "Q"):
        child = scene.nursery.start(scene.line(tmp_path / "Q"))
        time.sleep(scene.seconds * (0.5 + 0.1 * runs))
        child.send(signal.SIGKILL)
        assert child.wait() in (0, -signal.SIGKILL)
        runs += 1
    assert 1 < runs < 40  # it gets there, because finished blocks are not begun again
    scene.check(tmp_path / "Q")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("blocks", [0, 1, 3, 4])
def test_stopped_by_hand_and_continued(scene, tmp_path, blocks, sent):
    state = tmp_path / "Q.partial-work" / "state"

    def reached():
        log = state / "progress.json"
        return state.is_dir() if blocks == 0 else log.is_file() and json.loads(log.read_text())["done"] >= blocks

    for _ in range(10):
        child = scene.nursery.start(scene.line(tmp_path / "Q"))
        forked.until(lambda: reached() or (tmp_path / "Q").exists())
        child.send(sent)
        end = child.wait()
        if not scene.finished(tmp_path / "Q"):
            break
        shutil.rmtree(tmp_path / "Q")  # it was faster this time
    assert end == INTERRUPTED
    assert child.err.splitlines() == ["error: interrupted", "hint: run the same command again to continue"]
    assert [p.name for p in tmp_path.iterdir()] == ["Q.partial-work"]
    done = json.loads((state / "progress.json").read_text())["done"] if blocks else 0
    assert done >= blocks
    before = {p.name: p.stat().st_mtime_ns for p in (state.parent / "model").iterdir()}
    again = scene.nursery.start([a for a in scene.line(tmp_path / "Q") if a != "-q"])
    assert again.wait() == 0
    if blocks:
        assert f"continuing after {done} finished blocks" in again.err
        assert len(before) >= blocks
    scene.check(tmp_path / "Q")


def test_interrupted_before_anything_was_written(scene, tmp_path):
    end = forked.NOT_BEGUN
    for attempt in range(20):
        child = scene.nursery.start(scene.line(tmp_path / "Q"))
        time.sleep(0.02 + 0.005 * attempt)
        child.send(signal.SIGINT)
        end = child.wait()
        if end != forked.NOT_BEGUN:
            break
    assert end == INTERRUPTED
    assert child.err.startswith("error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_process_of_its_own_ends_like_any_other(scene, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "quantcli", *scene.line(tmp_path / "Q")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    forked.until((tmp_path / "Q.partial-work" / "state" / "tokens.safetensors").is_file, 60)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert out == "" and err == "error: interrupted\nhint: run the same command again to continue\n"
    assert scene.nursery.run(scene.line(tmp_path / "Q")) == 0
    scene.check(tmp_path / "Q")


def test_two_runs_at_once(scene, tmp_path):
    first = scene.nursery.start(scene.line(tmp_path / "Q"))
    forked.until((tmp_path / "Q.partial-work" / "state").is_dir)
    first.send(signal.SIGSTOP)
    for more in ([], ["--force"], ["--bits", "3"]):
        second = scene.nursery.start(scene.line(tmp_path / "Q", *more))
        assert second.wait() == USAGE
        assert second.err.splitlines()[0] == f"error: another run is writing {tmp_path / 'Q'} right now"
    first.send(signal.SIGCONT)
    assert first.wait() == 0
    scene.check(tmp_path / "Q")


def test_a_killed_run_does_not_lock_the_output(scene, tmp_path):
    child = scene.nursery.start(scene.line(tmp_path / "Q"))
    forked.until((tmp_path / "Q.partial-work" / "state" / "tokens.safetensors").is_file)
    child.send(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert (tmp_path / "Q.partial-lock").exists()
    assert scene.nursery.run(scene.line(tmp_path / "Q")) == 0
    scene.check(tmp_path / "Q")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--bits", "3"], "bits was 4, is 3"),
        (["--asym", "--format", "compressed-tensors"], "symmetric was True, is False"),
        (["--seed", "1"], "calibration"),
        (["--set", "grid_steps=30"], "settings"),
        (["--exclude", "o_proj"], "exclude was [], is ['o_proj']"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_other_options_do_not_continue_a_run(scene, tmp_path, more, named):
    child = scene.nursery.start(scene.line(tmp_path / "Q"))
    forked.until((tmp_path / "Q.partial-work" / "state" / "progress.json").is_file)
    child.send(signal.SIGINT)
    assert child.wait() == INTERRUPTED
    before = tiny.digests(tmp_path)
    other = scene.nursery.start(scene.line(tmp_path / "Q", *more))
    assert other.wait() == USAGE
    error, hint = other.err.splitlines()
    assert "an interrupted run with other options left" in error and named in error
    assert "--force" in hint
    assert tiny.digests(tmp_path) == before
    assert scene.nursery.run(scene.line(tmp_path / "Q", *more, "--force")) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["Q"]
    assert tiny.digests(tmp_path / "Q" / "model") != scene.result


def test_another_model_does_not_continue_a_run(scene, tmp_path):
    child = scene.nursery.start(scene.line(tmp_path / "Q"))
    forked.until((tmp_path / "Q.partial-work" / "state" / "progress.json").is_file)
    child.send(signal.SIGINT)
    assert child.wait() == INTERRUPTED
    other = tiny.checkpoint(tmp_path / "other", num_hidden_layers=4)
    tiny.edit_weights(other, lambda t: t["model.layers.3.mlp.up_proj.weight"].mul_(2))
    line = [str(other) if a == str(scene.model) else a for a in scene.line(tmp_path / "Q")]
    refused = scene.nursery.start(line)
    assert refused.wait() == USAGE and "model_digest was" in refused.err
