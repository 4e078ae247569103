"""What is uploaded: a wheel and a source archive that are whole, and a command that works from the wheel alone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    place = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "-o", place, ROOT], check=True, capture_output=True
    )
    return place


def test_the_descriptions_are_what_the_index_takes(built):
    files = sorted(map(str, built.iterdir()))
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == 2


def test_every_file_of_the_package_is_in_both(built):
    package = ROOT / "src" / "quantcli"
    expected = {p.relative_to(ROOT / "src") for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        assert expected <= set(map(Path, wheel.namelist()))
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        inside = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert {Path("src") / path for path in expected} | {Path("LICENSE"), Path("CHANGELOG.md")} <= inside


def test_the_command_runs_from_the_wheel_alone(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import quantcli; print(quantcli.__file__); " + (
        "from quantcli.cli.app import run; sys.exit(run(['quantize', '--help']))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    assert "--group-size" in done.stdout
