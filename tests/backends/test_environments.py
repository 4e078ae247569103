"""Environments of backends: made from pins, gone on with, removed; one that failed leaves nothing."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from quantcli.backends import BACKENDS, Backend, environments, processes
from quantcli.errors import InterruptedRunError, ResourceError, UsageError
from quantcli.options import BackendsOptions
from quantcli.pipelines import backends
from quantcli.progress import Silent

LEAF = Backend("leaf", "leaf-package", "nothing", "checkpoint", {}, imports=("leaf",), packages=("leaf-package",))


@pytest.fixture
def leaf(monkeypatch, tmp_path):
    """A backend of one package, which lies on disk; no index is asked."""
    wheel = tmp_path / "leaf_package-1.5-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("leaf.py", "colour = 'green'\n")
        archive.writestr(
            "leaf_package-1.5.dist-info/METADATA", "Metadata-Version: 2.1\nName: leaf-package\nVersion: 1.5\n"
        )
        archive.writestr(
            "leaf_package-1.5.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("leaf_package-1.5.dist-info/RECORD", "")
    locks = tmp_path / "locks"
    locks.mkdir()
    (locks / "leaf.txt").write_text("Leaf_Package==1.5\n")
    monkeypatch.setattr(environments, "_LOCKS", locks)
    monkeypatch.setitem(BACKENDS, "leaf", LEAF)
    monkeypatch.setenv("QUANTCLI_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path


def test_it_is_installed_found_and_removed(leaf, monkeypatch):
    assert environments.state_of(LEAF) == "not installed"
    with pytest.raises(UsageError, match="not installed"):
        environments.python_of(LEAF)
    made = backends.run(BackendsOptions("install", "leaf", installer="pip")).backends[0]
    assert (made["state"], made["version"], made["pins"]) == ("installed", "1.5", 1)
    assert made["size_bytes"] > 10_000
    run = [str(environments.python_of(LEAF)), "-c", "import leaf; print(leaf.colour)"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "green\n"
    assert not list((leaf / "home/logs").iterdir())
    # nothing of ours is in it
    assert subprocess.run([run[0], "-c", "import torch"], capture_output=True, cwd=leaf).returncode == 1
    # again: nothing is run; with other pins it is out of date
    monkeypatch.setattr(environments, "run_group", None)
    backends.run(BackendsOptions("install", "leaf"))
    (leaf / "locks/leaf.txt").write_text("leaf-package==1.5\n# newer\n")
    assert environments.state_of(LEAF) == "outdated"
    # killed as its mark was to be written: half installed, and never used
    (leaf / "home/backends/leaf/installed.json").unlink()
    assert environments.state_of(LEAF) == "interrupted"
    with pytest.raises(UsageError, match="half installed"):
        environments.python_of(LEAF)
    assert backends.run(BackendsOptions("remove", "leaf")).freed_bytes > 10_000
    assert environments.state_of(LEAF) == "not installed"
    with pytest.raises(UsageError, match="not installed"):
        backends.run(BackendsOptions("remove", "leaf"))


def test_an_install_that_fails_is_one_line_and_leaves_nothing(leaf, monkeypatch):
    (leaf / "locks/leaf.txt").write_text("leaf-package==2.0\n")
    said = r"leaf cannot be installed \(1 packages\): ERROR: .*leaf-package==2.0"
    with pytest.raises(ResourceError, match=said) as caught:
        backends.run(BackendsOptions("install", "leaf", installer="pip"))
    assert "\n" not in caught.value.message
    assert Path(caught.value.hint.removeprefix("the whole log: ")).is_file()
    assert not (leaf / "home/backends/leaf").exists()
    # an index that nobody answers for
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ResourceError, match="the package index cannot be reached"):
        backends.run(BackendsOptions("install", "leaf", installer="pip"))
    assert not (leaf / "home/backends/leaf").exists()


def test_ctrl_c_keeps_what_is_there_and_the_same_command_goes_on(leaf, monkeypatch):
    whole = environments.run_group

    def stops_at_packages(argv, log, on_line, **others):
        if "--requirement" in argv:
            raise KeyboardInterrupt
        return whole(argv, log, on_line, **others)

    monkeypatch.setattr(environments, "run_group", stops_at_packages)
    with pytest.raises(InterruptedRunError) as caught:
        backends.run(BackendsOptions("install", "leaf", installer="pip"))
    assert "goes on" in caught.value.hint
    assert environments.state_of(LEAF) == "interrupted"
    monkeypatch.setattr(environments, "run_group", whole)
    said = []
    progress = Silent()
    progress.note = said.append
    backends.run(BackendsOptions("install", "leaf", installer="pip"), progress)
    assert said == ["going on with an interrupted install of leaf"]
    assert environments.state_of(LEAF) == "installed"


def test_what_cannot_be_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTCLI_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="quantcli's own environment"):
        backends.run(BackendsOptions("install", "onnxruntime"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="uv is not on the path"):
        backends.run(BackendsOptions("install", "autoawq", installer="uv"))
    if not os.path.exists("/proc/driver/nvidia/version"):
        with pytest.raises(UsageError, match="auto-gptq runs on CUDA only"):
            backends.run(BackendsOptions("install", "auto-gptq"))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    for bad in ({"action": "instal"}, {"action": "install"}, {"installer": "pip"}, {"torch_index": "x"}):
        with pytest.raises(UsageError):
            BackendsOptions(**bad)


def test_every_backend_has_pins_of_its_package_and_of_what_it_imports():
    for backend in BACKENDS.values():
        if backend.own_environment:
            pins = environments.pinned(backend)
            assert backend.package in pins, backend.name
            assert not {"torchvision", "quantcli"} & set(pins), backend.name  # the former breaks transformers
            assert set(backend.packages) <= set(pins), backend.name
            assert all(line.count("==") == 1 for line in environments.requirements_file(backend).read_text().split())
    listed = backends.run(BackendsOptions()).to_dict()
    assert [b["name"] for b in listed["backends"]] == list(BACKENDS)
    json.dumps(listed)


def test_a_worker_ends_with_a_parent_that_is_killed_outright(tmp_path):
    """What a parent cannot do any more, the system does."""
    workers = Path(environments.__file__).with_name("workers")
    (tmp_path / "sleeper.py").write_text(
        f"import sys, time; sys.path.insert(0, {str(workers)!r}); import worker_job\n"
        "def sleep(job):\n    job.note('up'); time.sleep(100)\n"
        "worker_job.run(sleep)\n"
    )
    (tmp_path / "job.json").write_text(json.dumps({"imports": [], "packages": []}))
    parent = (
        "import os, sys; from pathlib import Path; from quantcli.backends.processes import run_group\n"
        f"argv = [sys.executable, {str(tmp_path / 'sleeper.py')!r}, {str(tmp_path / 'job.json')!r}]\n"
        f"run_group(argv, Path({str(tmp_path / 'log')!r}), lambda line: (print(line, flush=True)))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert "up" in process.stdout.readline()
    (worker,) = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    psutil.wait_procs([worker], timeout=5)
    assert not worker.is_running()


def test_a_group_that_does_not_mind_sigterm_is_killed(tmp_path):
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    begun = time.monotonic()
    ended = processes.run_group(
        [sys.executable, "-c", stubborn], tmp_path / "log", lambda line: None, processes.Limits(seconds=1.0)
    )
    assert ended.stopped == "time"
    assert ended.code == -signal.SIGKILL
    assert time.monotonic() - begun < 30
    quick = processes.run_group([sys.executable, "-c", "print('a'); print('b')"], tmp_path / "log", lambda line: None)
    assert (quick.code, quick.stopped) == (0, "")
