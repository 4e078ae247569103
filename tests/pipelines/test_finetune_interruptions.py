"""`finetune` stopped, killed and changed half way: it continues, and the adapter is that of an unbroken run."""

import json
import random
import re
import signal
import time

import pytest

import forked
import tiny

INTERRUPTED, USAGE, INPUT = 130, 2, 3
KILLS = 6
PATIENCE = 300  # seconds, on a machine that does much else
TEMPLATE = "{phrase} w7 {tone}"


def contents(folder):
    """Every file by its digest; times are left out, and where the base stands, which the adapter names by its path."""
    found = tiny.digests(folder) | {"quantcli.json": None}
    for name, placed in (
        ("adapter/adapter_config.json", "base_model_name_or_path"),
        ("report.json", "adapter_size_bytes"),
    ):
        values = json.loads((folder / name).read_text())
        assert values.pop(placed)
        found[name] = values
    return found


class Scene:
    """A model, data, and the result of an undisturbed run of the command line."""

    def __init__(self, folder):
        self.model, self.data = tiny.checkpoint(folder / "float"), folder / "tones.jsonl"
        rows = [{"phrase": f"{tiny.words(4, 9 * i)} w{20 + i % 2}", "tone": ("w50", "w60")[i % 2]} for i in range(80)]
        self.data.write_text("\n".join(json.dumps(row) for row in rows))
        self.nursery = forked.Nursery(folder)
        assert self.nursery.warm(self.line(folder / "none", model="nothing-there")) == INPUT  # imports everything
        begun = time.monotonic()
        assert self.nursery.run(self.line(folder / "whole")) == 0
        self.seconds = time.monotonic() - begun
        self.result = contents(folder / "whole")

    def line(self, output, *more, model=None):
        return ["finetune", "-q", "-m", str(model or self.model), "-o", str(output), "--data-files", str(self.data),
                "--text-template", TEMPLATE, "--completion-only", "--seq-len", "32", "--max-steps", "40",
                "--batch-size", "8", "--lora-r", "4", "--learning-rate", "0.01", "--save-steps", "7", "--method",
                "qlora", "--eval-steps", "14", *more]  # fmt: skip

    def check(self, output):
        """It is whole, alone, and equal to what the undisturbed run wrote but for times."""
        assert contents(output) == self.result
        assert [p.name for p in output.parent.glob(output.name + "*")] == [output.name]


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    made = Scene(tmp_path_factory.mktemp("killed"))
    yield made
    made.nursery.close()


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_a_random_instant(scene, tmp_path, number):
    child = scene.nursery.start(scene.line(tmp_path / "f"))
    time.sleep((number + random.Random(number).random()) / KILLS * scene.seconds)
    child.send(signal.SIGKILL)
    if child.wait() == 0 or (tmp_path / "f").exists():  # it was faster this time
        (tmp_path / "f.partial-lock").unlink(missing_ok=True)
        return scene.check(tmp_path / "f")
    assert scene.nursery.run(scene.line(tmp_path / "f")) == 0
    scene.check(tmp_path / "f")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_hand_and_continued(scene, tmp_path, sent):
    trainer = tmp_path / "f.partial-work" / "state" / "trainer"
    child = scene.nursery.start(scene.line(tmp_path / "f"))
    forked.until(lambda: [*trainer.glob("checkpoint-*/whole.json")], PATIENCE)
    child.send(sent)
    assert child.wait() == INTERRUPTED
    assert child.err.splitlines() == ["error: interrupted", "hint: run the same command again to continue"]
    assert [p.name for p in tmp_path.iterdir()] == ["f.partial-work"]
    other = scene.nursery.start(scene.line(tmp_path / "f", "--lora-alpha", "8"))
    assert other.wait() == USAGE
    assert "lora_alpha was 32.0, is 8.0" in other.err
    again = scene.nursery.start([a for a in scene.line(tmp_path / "f", "--resume") if a != "-q"])
    assert again.wait() == 0
    assert re.search("continuing after [0-9]+ finished steps", again.err)
    scene.check(tmp_path / "f")


def test_other_data_do_not_continue_a_run(scene, tmp_path):
    data = tmp_path / "tones.jsonl"
    data.write_bytes(scene.data.read_bytes())
    line = [str(data) if a == str(scene.data) else a for a in scene.line(tmp_path / "f")]
    child = scene.nursery.start(line)
    forked.until(lambda: [*(tmp_path / "f.partial-work" / "state" / "trainer").glob("checkpoint-*")], PATIENCE)
    child.send(signal.SIGKILL)
    child.wait()
    with data.open("a") as file:
        file.write('\n{"phrase": "w1", "tone": "w2"}')
    other = scene.nursery.start(line)
    assert other.wait() == USAGE
    assert "an interrupted run with other options left" in other.err
    assert "data was" in other.err
