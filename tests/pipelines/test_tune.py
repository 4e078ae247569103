"""`tune`: what is tried, what is refused beforehand, what is kept, and that the kept folder is quantize's own."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest

import forked
import small_graphs
import tiny
from quantcli.cli import app
from quantcli.cli.app import parse
from quantcli.errors import InterruptedRunError, ResourceError, UsageError
from quantcli.folder import read_manifest
from quantcli.options import Goal, Metric
from quantcli.pipelines import quantize, tune
from quantcli.pipelines.tuning import loop, trial
from quantcli.pipelines.tuning.record import Record, append_record, read_records

TEXT = ["--num-samples", "8", "--seq-len", "64", "--eval-samples", "6", "--eval-seq-len", "64"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    tiny.checkpoint(folder / "m", tie_word_embeddings=False)
    (folder / "cal.txt").write_text(tiny.words(3000))
    (folder / "eval.txt").write_text(tiny.words(1500, 50000))
    small_graphs.cnn(folder / "cnn.onnx", uneven=True)
    (folder / "samples").mkdir()
    random = np.random.default_rng(0)
    for number in range(4):
        np.savez(folder / "samples" / f"{number}.npz", x=random.normal(size=(1, 3, 12, 12)).astype(np.float32))
    return folder


def options(root, *words, text=True, name="T"):
    judged = ["--eval-data", root / "eval.txt", *TEXT[4:]]
    data = [*judged, "--data", root / "cal.txt", *TEXT[:4]] if text else judged
    request = parse([str(w) for w in ("tune", "-m", root / "m", "-o", root / name, *data, *words)])
    return request.options


def space(root, said):
    file = root / "space.json"
    file.write_text(json.dumps(said))
    return ["--space", file]


def test_the_best_folder_is_what_quantize_writes(root):
    """Every combination is tried in order; the kept model is quantize's, byte for byte; the next command takes it."""
    said = {"algorithm": ["rtn", "gptq"], "bits": [4], "group_size": 32, "damp_percent": [0.01, 0.1]}
    found = tune.run(options(root, *space(root, said), "--no-prune"))
    assert [r.label for r in found.trials] == ["rtn", "gptq damp_percent=0.01", "gptq damp_percent=0.1"]
    assert all(r.state == "complete" and r.windows == 6 for r in found.trials) and found.sampler == "grid"
    point = found.best.point
    settings = ["--damp-percent", point["damp_percent"]] if "damp_percent" in point else []
    data = ["--data", root / "cal.txt", *TEXT[:4]] if point["algorithm"] == "gptq" else []
    alone = ["-a", point["algorithm"], "--bits", point["bits"], "--group-size", 32, *settings, *data]
    words = ["quantize", "-m", root / "m", "-o", root / "alone", *alone, "-q"]
    assert app.run([str(w) for w in words]) == 0
    assert tiny.digests(root / "T" / "model") == tiny.digests(root / "alone" / "model")
    manifest = read_manifest(root / "T")
    assert manifest.command == "tune" and manifest.options["best"]["bits"] == point["bits"]
    assert read_records(root / "T" / "trials.jsonl") == found.trials
    assert {"pareto.svg", "pareto.png", "tuning.json", "report.json", "study.journal"} <= {
        p.name for p in (root / "T").iterdir()
    }
    assert not [p for p in root.iterdir() if "partial" in p.name]
    evaluated = ["evaluate", "-m", root / "T", "--reference", root / "m", "--data", root / "eval.txt", "--no-speed"]
    assert app.run([str(w) for w in (*evaluated, "--num-samples", 6, "--seq-len", 64, "-q", "--json")]) == 0


def literal_front(records):
    """Those that none is at least as good as in both figures and better in one."""
    pairs = {r.number: (r.figures["size"], r.figures["kl"]) for r in records}
    return [
        n for n, (a, b) in pairs.items() if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in pairs.values())
    ]


def test_a_goal_makes_the_cheapest_that_meets_it_the_best(root):
    said = {"algorithm": "rtn", "bits": [2, 3, 4], "group_size": [32, 64]}
    found = tune.run(options(root, *space(root, said), "--no-prune", text=False, name="goal"))
    assert sorted(r.number for r in found.front) == sorted(literal_front(found.trials))
    kl = sorted(r.figures["kl"] for r in found.trials)
    goal = f"kl<={(kl[2] + kl[3]) / 2}"
    words = [
        *space(root, said),
        "--goal",
        goal,
        "--force",
        "--data",
        root / "cal.txt",
        "--eval-data",
        root / "eval.txt",
    ]
    assert app.run([str(w) for w in ("tune", "-m", root / "m", "-o", root / "goal", *words, *TEXT, "-q")]) == 0
    kept = json.loads((root / "goal" / "tuning.json").read_text())["best"]
    meeting = [r for r in found.trials if r.figures["kl"] <= (kl[2] + kl[3]) / 2]
    assert kept["figures"]["size"] == min(r.figures["size"] for r in meeting) and not kept["missed"]


def test_what_no_trial_meets_ends_with_5_and_keeps_the_closest(root, capsys):
    words = [*space(root, {"algorithm": "rtn", "bits": [2, 4]}), "--goal", "kl<=1e-9", "--eval-data", root / "eval.txt"]
    code = app.run([str(w) for w in ("tune", "-m", root / "m", "-o", root / "none", *words, *TEXT[4:], "-q")])
    said = capsys.readouterr()
    assert code == 5 and "no trial meets kl<=1e-09; the closest, rtn bits=4 (trial 2), is kept in" in said.err
    assert read_manifest(root / "none").options["best"]["bits"] == 4


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bits": [4, 9]}, "bits 9: bits must be 1 to 8, got 9"),
        ({"bits": [3, 5], "algorithm": "awq,gptq", "format": "awq"}, "it holds 4 bits, not 3"),
        ({"bitz": 4}, "has no option 'bitz', did you mean 'bits'?"),
        ({"bits": "four"}, "bits is a whole number, got 'four'"),
        ({"bits": True}, "bits is a whole number, got True"),
        ({"algorithm": ["gptq", "gtpq"]}, "unknown algorithm 'gtpq', did you mean 'gptq'?"),
        ({"algorithm": "rtn", "damp_percent": 0.1}, "damp_percent is an option of gptq"),
        ({"damp_percent": [0.1, -1]}, "damp_percent -1"),
        ({"damp_percent": {"low": 0.1, "high": 0.01}}, "the range of damp_percent is none"),
        ({"damp_percent": {"low": -0.5, "high": 0.1}}, "damp_percent -0.5"),
        ({"damp_percent": {"low": 0.1, "high": 0.2, "lag": 1}}, "has no 'lag', did you mean 'log'?"),
        ({"order": ["static", "sideways"]}, "order sideways: gptq: order is one of"),
        ({"group_size": [32, 8]}, "group_size 8: group size must be 16 or more"),
        ({"device": "cpu"}, "device is no choice of a search"),
        ({"encoding": "qdq"}, "--encoding is for ONNX graphs"),
        ([], "is no object of options"),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_the_first_trial(root, tmp_path, said, message):
    (tmp_path / "space.json").write_text(json.dumps(said))
    with pytest.raises(UsageError) as refused:
        tune.run(options(root, "--space", tmp_path / "space.json", name="refused"))
    assert message in refused.value.message and not list(root.glob("refused*"))


def test_an_interrupted_search_goes_on_where_it_was(root, monkeypatch):
    """The trial that was stopped is tried again, those before are not, and the best is the same."""
    said = {"algorithm": "rtn", "bits": [3, 4], "group_size": [32, 64]}
    given = options(root, *space(root, said), text=False, name="whole")
    whole = tune.run(given)
    given, begun, run = replace(given, output=root / "parts"), [], trial.quantize.run

    def interrupted(chosen, *rest, **more):
        begun.extend([] if chosen.dry_run else [f"{chosen.bits} {chosen.group_size}"])
        if len(begun) == 3 and not chosen.dry_run:
            raise KeyboardInterrupt
        return run(chosen, *rest, **more)

    with monkeypatch.context() as patched, pytest.raises(InterruptedRunError):
        patched.setattr(trial.quantize, "run", interrupted)
        tune.run(given)
    assert len(read_records(root / "parts.partial-work" / "trials.jsonl")) == 2
    file = root / "parts.partial-work" / "trials.jsonl"
    file.write_bytes(file.read_bytes() + b'{"number": 3, "la')  # a kill while a line is written
    monkeypatch.setattr(trial.quantize, "run", interrupted)
    found = tune.run(given)
    assert begun[:5] == ["3 32", "3 64", "4 32", "4 32", "4 64"]
    assert [r.point for r in found.trials] == [r.point for r in whole.trials]
    assert found.best.point == whole.best.point
    assert tiny.digests(root / "parts" / "model") == tiny.digests(root / "whole" / "model")


def test_trials_that_cannot_win_are_given_up_and_the_best_is_the_same(root):
    said = {"algorithm": ["gptq", "rtn"], "bits": [4, 2], "group_size": [32, 64]}
    data = ["--goal", "kl<=0.0006"]
    all_of_them = tune.run(options(root, *space(root, said), *data, "--no-prune", name="all"))
    fewer = tune.run(options(root, *space(root, said), *data, name="fewer"))
    given_up = [r for r in fewer.trials if r.state == "pruned"]
    assert given_up and all(r.reason and r.figures["size"] for r in given_up)
    assert fewer.best.point == all_of_them.best.point


def test_mixed_bits_close_in_on_the_goal(root):
    """The sensitivities are measured once; the kept size is near the least that meets the goal."""
    found = tune.run(options(root, "--set", "mixed", "--goal", "kl<=0.0006", name="mixed"))
    assert found.best.meets and len(found.trials) <= 10
    below = [r for r in found.trials if not r.meets]
    assert below and max(r.figures["size"] for r in below) > 0.97 * found.best.figures["size"]
    assert not [r for r in found.trials if r.meets and r.figures["size"] < found.best.figures["size"]]


def graph_options(root, *words, name="G"):
    given = ("tune", "-m", root / "cnn.onnx", "-o", root / name, "--calibration-inputs", root / "samples", *words)
    return parse([str(w) for w in given]).options


def test_integers_share_ranges_and_are_what_quantize_writes(root, monkeypatch):
    from quantcli.graphs.calibration import tensor_ranges

    measured, measure = [], tensor_ranges.measure_ranges

    def counted(path, names, reader, how):
        measured.append(how.method)
        return measure(path, names, reader, how)

    monkeypatch.setattr(tensor_ranges, "measure_ranges", counted)
    said = {"algorithm": "static", "per_channel": [False, True], "calibrate_method": ["minmax", "entropy"]}
    found = tune.run(graph_options(root, *space(root, said)))
    assert sorted(measured) == ["entropy", "minmax"] and all(r.state == "complete" for r in found.trials)
    point = found.best.point
    words = ["--set", f"calibrate_method={point['calibrate_method']}"] + ["--per-channel"] * point["per_channel"]
    alone = ["quantize", "-m", root / "cnn.onnx", "-o", root / "g", "-a", "static", *words, "-q"]
    assert app.run([str(w) for w in (*alone, "--calibration-inputs", root / "samples")]) == 0
    assert tiny.digests(root / "G" / "model") == tiny.digests(root / "g" / "model")


def test_nodes_go_back_to_float_until_the_goal_holds(root):
    """Static quantization of a network of uneven channels misses 36 dB; with what costs most in float it holds."""
    plain = tune.run(graph_options(root, "-a", "static", name="plain"))
    least = plain.best.figures["sqnr"] + 3
    found = tune.run(graph_options(root, "-a", "static", "--goal", f"sqnr>={least}", name="held"))
    assert found.best.meets and found.best.figures["sqnr"] >= least
    report = json.loads((root / "held" / "report.json").read_text())
    assert report["kept"] and report["quantized"], "some nodes in float, not all"
    assert any("stay float" in note for note in found.best.notes)


def test_a_metric_of_the_users_own(root, tmp_path):
    """It judges the float graph first: one that fails is named, and nothing is tried."""
    script = tmp_path / "net.py"
    script.write_text(
        "import numpy as np\n"
        "def drift(session):\n"
        "    x = np.ones((1, 3, 12, 12), np.float32)\n"
        "    return float(np.square(session.run(None, {'x': x})[0]).sum())\n"
        "def broken(session):\n    return float('nan')\n"
        "def raises(session):\n    raise KeyError('label')\n"
    )
    found = tune.run(graph_options(root, "-a", "dynamic", "--metric", f"{script}:drift", name="own"))
    assert found.metric == Metric("drift", str(script)) and found.best.figures["drift"] > 0
    assert abs(found.best.figures["drift"] / found.reference["drift"] - 1) < 0.1
    for function, said in (("broken", "returned nan"), ("raises", "KeyError: 'label'")):
        words = ["-a", "dynamic", "--metric", f"{script}:{function}"]
        out = root / function
        given = ["tune", "-m", root / "cnn.onnx", "-o", out, *words, "-q"]
        assert app.run([str(w) for w in given]) == 3 and not list(root.glob(function + "*")), said


@pytest.mark.parametrize(
    ("text", "value", "reference", "holds"),
    [
        ("kl<=0.05", 0.05, None, True),
        ("kl < 0.05", 0.05, None, False),
        ("size<=60MB", 60e6, None, True),
        ("accuracy>=reference-0.01", 0.89, 0.9, True),
        ("accuracy>=reference*0.99", 0.89, 0.9, False),
        ("perplexity<=reference", 10.1, 10.0, False),
    ],
)
def test_goals(text, value, reference, holds):
    goal = Goal.parse(text)
    assert (goal.missed_by(value, reference) <= 0) == holds
    assert Goal.parse(str(goal)) == goal


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--goal", "kl"], "says no bound"),
        (["--goal", "kl>=0.1"], "kl is better where it is lower"),
        (["--goal", "kll<=0.1"], "unknown --metric 'kll', did you mean 'kl'?"),
        (["--goal", "sqnr>=20", "--metric", "kl"], "sqnr is not measured"),
        (["--set", "wok"], "unknown --set 'wok', did you mean 'woq'?"),
        (["--set", "mixed"], "finds the smallest size that meets a goal"),
        (["--minimize", "sise"], "unknown --minimize 'sise', did you mean 'size'?"),
        (["--timeout", "1 fortnight"], "is not a time"),
        (["--ray-cpus", "2"], "--ray-cpus needs --ray"),
        (["--stop-at-first"], "--stop-at-first needs a goal"),
    ],
)
def test_options_that_cannot_be(root, words, message):
    with pytest.raises(UsageError, match=message):
        parse(["tune", "-m", str(root / "m"), "-o", str(root / "x"), *words])


def test_a_killed_search_leaves_what_the_next_one_needs(root, tmp_path):
    """SIGKILL in the middle of a trial; the trials before are not run again."""
    said = {"algorithm": "rtn", "bits": [3, 4, 8], "group_size": [32, 64]}
    words = ["tune", "-q", "-m", root / "m", "-o", tmp_path / "K", *space(root, said), "--eval-data", root / "eval.txt"]
    words = [str(w) for w in (*words, *TEXT[4:])]
    file = tmp_path / "K.partial-work" / "trials.jsonl"
    nursery = forked.Nursery(tmp_path)
    try:
        assert nursery.warm([*words[:3], "nothing-there", *words[4:]]) == 3  # imports everything
        child = nursery.start(words)
        forked.until(lambda: file.is_file() and file.read_bytes().count(b"\n") >= 2, 120)
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        before = read_records(file)
        assert 2 <= len(before) < 6
        assert nursery.run(words) == 0
    finally:
        nursery.close()
    trials = read_records(tmp_path / "K" / "trials.jsonl")
    assert [r for r in trials if r.number <= len(before)] == before
    assert len({json.dumps(r.point) for r in trials}) == len(trials) == 6


def test_a_cluster_that_is_not_there(root):
    pytest.importorskip("ray")
    with pytest.raises(ResourceError, match=r"the Ray cluster 127\.0\.0\.1:1 cannot be joined"):
        tune.run(graph_options(root, "-a", "dynamic", "--ray", "127.0.0.1:1", name="nowhere"))


def test_records_are_read_back(tmp_path):
    records = [Record(n, f"t{n}", {"bits": n}, "complete", {"kl": 1 / n}, notes=("a",)) for n in (1, 2)]
    for record in records:
        append_record(tmp_path / "trials.jsonl", record)
    assert read_records(tmp_path / "trials.jsonl") == records


assert loop and quantize  # patched above
