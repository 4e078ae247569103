"""Trials on a Ray cluster of two nodes, of which one is killed in the middle: the same best, and nothing lost."""

import json
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

import tiny
from quantcli.errors import InterruptedRunError, UsageError
from quantcli.options import CalibrationOptions, TuneOptions
from quantcli.pipelines import tune
from quantcli.progress import Silent

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.large, pytest.mark.filterwarnings("ignore")]


class Told(Silent):
    """Calls a function with each trial that ends."""

    def __init__(self, function):
        self.add = function

    @contextmanager
    def board(self, title, columns):
        yield self


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    # a node is lost after 3 s of silence, not after half a minute
    quick = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "object_store_memory": 10**8,
            "_system_config": quick,
            "include_dashboard": False,
        },
    )
    made.other = made.add_node(num_cpus=1, object_store_memory=10**8)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def given(tmp_path):
    tiny.checkpoint(tmp_path / "m", tie_word_embeddings=False)
    (tmp_path / "eval.txt").write_text(tiny.words(1500, 50000))
    (tmp_path / "space.json").write_text(json.dumps({"algorithm": "rtn", "bits": [3, 4, 8], "group_size": [32, 64]}))
    return TuneOptions(
        str(tmp_path / "m"),
        tmp_path / "here",
        space=tmp_path / "space.json",
        prune=False,
        eval_data=str(tmp_path / "eval.txt"),
        eval_samples=4,
        eval_seq_len=64,
        calibration=CalibrationOptions(),
    )


def test_one_of_two_nodes_is_killed(cluster, given, tmp_path):
    alone = tune.run(given)
    ended, killed = [], []

    def told(cells):
        ended.append(cells)
        if len(ended) == 2:  # both nodes are in the middle of another
            time.sleep(0.5)
            cluster.remove_node(cluster.other, allow_graceful=False)
            killed.append(cluster.other)

    found = tune.run(replace(given, output=tmp_path / "there", ray=cluster.address), Told(told))
    assert killed and len({r.node for r in found.trials}) == 2
    assert all(r.state == "complete" for r in found.trials) and len(found.trials) == 6
    figures = {json.dumps(r.point): (r.figures["kl"], r.figures["size"]) for r in found.trials}
    assert figures == {json.dumps(r.point): (r.figures["kl"], r.figures["size"]) for r in alone.trials}
    assert found.best.point == alone.best.point
    assert tiny.digests(tmp_path / "there" / "model") == tiny.digests(tmp_path / "here" / "model")


def test_an_interruption_cancels_what_runs(cluster, given, tmp_path):
    def told(cells):
        raise KeyboardInterrupt

    given = replace(given, output=tmp_path / "stopped", ray=cluster.address)
    with pytest.raises(InterruptedRunError):
        tune.run(given, Told(told))
    lines = (tmp_path / "stopped.partial-work" / "trials.jsonl").read_text().splitlines()
    assert len(lines) == 1 and not ray.is_initialized()
    found = tune.run(replace(given, ray=None))
    assert len(found.trials) == 6 and json.loads(lines[0])["point"] == found.trials[0].point


def test_what_a_cluster_cannot_give(cluster, given, tmp_path):
    with pytest.raises(UsageError, match="no node of the cluster has 64 CPU"):
        tune.run(replace(given, output=tmp_path / "x", ray=cluster.address, ray_cpus=64.0))
    assert not list(tmp_path.glob("x*"))
