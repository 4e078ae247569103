"""Output folders: made aside, verified, then renamed; and the manifest that says how a folder came to be.

`quantize -o Q` writes `Q/model/` and `Q/quantcli.json`. Work happens in `Q.partial-work` beside it, so that killing the
process leaves nothing, a folder that the same command resumes, or the whole result.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from filelock import FileLock, Timeout

from quantcli.errors import DivergedError, InputError, InterruptedRunError, ResourceError, UsageError
from quantcli.json_files import read_json

__all__ = [
    "MANIFEST",
    "FileFacts",
    "Manifest",
    "PartialFolder",
    "create_output",
    "describe_parent",
    "file_digest",
    "fingerprint",
    "folder_size_bytes",
    "package_versions",
    "public_options",
    "read_manifest",
    "read_state",
    "require_free_bytes",
    "resolve_model_folder",
    "write_json",
]

MANIFEST = "quantcli.json"
SCHEMA_VERSION = 1
T = TypeVar("T")

_SAMPLE_BYTES = 1 << 16
_SAMPLES = 64


class FileFacts(TypedDict):
    """What a manifest says of a file."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`quantcli.json`: how a folder came to be; what it is, config.json and the weights say."""

    kind: str
    """What the folder holds: checkpoint or onnx."""
    command: str
    """The subcommand that wrote it."""
    options: dict[str, Any]
    """Its options with every default resolved."""
    parent: dict[str, str]
    """Name and fingerprint of the folder it was made from."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures measured while it was made."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that took part."""
    files: dict[str, FileFacts] = field(default_factory=dict)
    """Every file by its path inside the folder."""
    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""


def describe_parent(folder: Path, digest: str) -> dict[str, str]:
    """What a manifest says of the model folder that something was made from: a name to look for, never a place."""
    inside = folder.name == "model" and (folder.resolve().parent / MANIFEST).is_file()
    return {"name": folder.resolve().parent.name if inside else folder.name, "fingerprint": digest}


def public_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a manifest keeps: where a folder stood says nothing about it, and trust is never handed on."""
    private = ("model", "output", "force", "dry_run", "trust_remote_code")
    return {name: value for name, value in options.items() if name not in private}


def resolve_model_folder(path: Path) -> Path:
    """The folder that holds the model itself: `X/model` for an output folder X of ours, else X; a GGUF file is one."""
    if not path.exists():
        raise InputError(f"model folder {path} does not exist", hint="give a checkpoint folder or a hub id")
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path} is a file, expected a model folder", hint="give the folder that holds config.json")
    if (path / MANIFEST).is_file() and (path / "model").is_dir():
        return path / "model"
    return path


def read_manifest(path: Path) -> Manifest | None:
    """The manifest of an output folder X, given X or X/model; None where we did not make the folder.

    Raises:
        InputError: it is damaged.
    """
    for candidate in (path / MANIFEST, path.resolve().parent / MANIFEST if path.name == "model" else None):
        if candidate is not None and candidate.is_file():
            return read_json(candidate, Manifest, "a manifest of ours", hint="it has been changed: remove it")
    return None


def file_digest(path: Path) -> str:
    """The sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(
    folder: Path, patterns: Sequence[str] = ("*.json", "*.safetensors", "*.gguf", "*.onnx", "*.data")
) -> str:
    """Tells one model from another without reading all of it: names, sizes and 64 samples of each file.

    It finds changed inputs and keys caches; it is not proof against somebody who means to deceive.
    """
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            step = max(_SAMPLE_BYTES, size // _SAMPLES)
            for offset in range(0, size, step):
                stream.seek(offset)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def folder_size_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def require_free_bytes(folder: Path, needed: int) -> None:
    """Refuses early where the file system of `folder` cannot take `needed` more bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ResourceError(
            f"the output needs about {needed / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free",
            hint="free disk space or give another -o",
        )


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=False, default=str) + "\n")
    os.replace(temporary, path)


def read_state(path: Path, expected: type[T]) -> T:
    """What an interrupted run has left in a file of its `state`.

    Raises:
        InputError: it is damaged.
    """
    return read_json(path, expected, "what a run leaves", hint="add --force to start anew")


@dataclass
class PartialFolder:
    """An output while it is made."""

    target: Path
    """Where it will stand."""
    root: Path
    """Where it is made."""
    plan: Mapping[str, Any]
    """What decides its content; a run resumes only what the same plan began."""
    resumed: bool
    """Whether an interrupted run of the same plan left something here."""
    replaces: bool = False
    """Whether the target exists and is to be replaced."""

    @property
    def committed(self) -> bool:
        """Whether it stands at its target."""
        return not self.root.exists()

    @property
    def model(self) -> Path:
        """The model folder inside."""
        return self.root / "model"

    @property
    def state(self) -> Path:
        """Scratch files that a resumed run needs and the result does not."""
        return self.root / "state"

    def commit(self, manifest: Manifest) -> Path:
        """Writes the manifest with the digest of every file, then puts the folder in its place."""
        scratch = (MANIFEST, "plan.json", "state")
        paths = [p for p in sorted(self.root.rglob("*")) if p.relative_to(self.root).parts[0] not in scratch]
        files = {
            str(p.relative_to(self.root)): {"size_bytes": p.stat().st_size, "sha256": file_digest(p)}
            for p in paths
            if p.is_file()
        }
        values = asdict(manifest) | {"files": files, "versions": manifest.versions or package_versions()}
        write_json(self.root / MANIFEST, values)
        for path in (*paths, self.root / MANIFEST, self.root):
            _flush_to_disk(path)
        # digests of a large model take a while: what a killed run needs to continue goes last, its plan first of that
        (self.root / "plan.json").unlink(missing_ok=True)
        shutil.rmtree(self.state, ignore_errors=True)
        if self.replaces:
            old = _old(self.target)
            shutil.rmtree(old, ignore_errors=True)
            self.target.rename(old)
            self.root.rename(self.target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            if self.target.is_dir():  # only ever empty: checked when the output was opened
                self.target.rmdir()
            self.root.rename(self.target)
        _flush_to_disk(self.target.parent)
        return self.target


@contextmanager
def create_output(
    target: Path,
    *,
    plan: Mapping[str, Any],
    inputs: Sequence[Path] = (),
    force: bool = False,
    resumable: bool = False,
) -> Iterator[PartialFolder]:
    """Opens an output folder; the body fills `.model` and calls `.commit`.

    Args:
        target: The folder to make. Refused where it exists and is not empty, unless `force` and made by us.
        plan: JSON values that decide the content; compared with those of an interrupted run.
        inputs: Folders that are read; the output may not lie inside one, nor contain one.
        force: Replace a folder that an earlier command of ours wrote, and drop an interrupted run of another plan.
        resumable: Keep the work on Ctrl-C, lack of space or memory, training that diverged or a kill; otherwise only a
            finished folder stays.

    Raises:
        UsageError: the target cannot be written as asked.
        ResourceError: no space is left.
        InterruptedRunError: Ctrl-C.
    """
    target = Path(os.path.abspath(target))
    replaces = _check_target(target, inputs, force)
    root = target.with_name(target.name + ".partial-work")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.with_name(target.name + ".partial-lock"), timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UsageError(
            f"another run is writing {target} right now", hint="wait for it, or give another -o"
        ) from error
    except OSError as error:
        raise _resource_error(error, target) from error
    partial = None
    keep = False
    try:
        if _old(target).is_dir():  # a run was killed while it replaced the target
            if target.exists():
                shutil.rmtree(_old(target))
            else:
                _old(target).rename(target)
            replaces = _check_target(target, inputs, force)
        resumed = _open_partial(root, plan, force)
        partial = PartialFolder(target, root, plan, resumed, replaces)
        yield partial
    except KeyboardInterrupt as error:
        keep = resumable
        hint = "run the same command again to continue" if resumable else None
        if partial is not None and partial.committed:
            hint = f"{target} is complete"
        raise InterruptedRunError("interrupted", hint=hint) from error
    except (ResourceError, InterruptedRunError, DivergedError):  # an interruption of a command that this one ran
        keep = resumable
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        keep = resumable
        raise _resource_error(error, target) from error
    finally:
        if partial is not None and not partial.committed and not (keep and partial.state.is_dir()):
            shutil.rmtree(root, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)  # while it is held: afterwards it may be another run's
        lock.release()


def _old(target: Path) -> Path:
    """Where a target stands aside for the moment in which it is replaced."""
    return target.with_name(target.name + ".partial-old")


def _check_target(target: Path, inputs: Sequence[Path], force: bool) -> bool:
    """Refuses targets that would lose something; True where an existing folder of ours is to be replaced."""
    for folder in (p.resolve() for p in inputs):
        if target.resolve() == folder or folder in target.resolve().parents:
            raise UsageError(f"output {target} lies inside the input {folder}", hint="give another -o")
        if target.resolve() in folder.parents:
            raise UsageError(f"output {target} contains the input {folder}", hint="give another -o")
    if target.is_file():
        raise UsageError(f"output {target} is a file", hint="give a folder that does not exist yet")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise UsageError(
                f"output folder {target} exists and is not empty",
                hint="add --force to replace it, or give another -o",
            )
        if not (target / MANIFEST).is_file():
            raise UsageError(
                f"output folder {target} was not made by quantcli, --force does not replace it",
                hint="remove it yourself, or give another -o",
            )
        return True
    return False


def _open_partial(root: Path, plan: Mapping[str, Any], force: bool) -> bool:
    """Makes the work folder; True where it continues an interrupted run of the same plan."""
    wanted = json.loads(json.dumps(plan, default=str))
    if (root / "state").is_dir():
        try:
            found = read_json(root / "plan.json", dict[str, Any], "a plan")
        except InputError:  # a run that was killed as it began or ended: there is nothing to continue
            found = None
        if found == wanted:
            return True
        if found is not None and not force:
            changed = [k for k in sorted({*found, *wanted}) if found.get(k) != wanted.get(k)]
            what = ", ".join(f"{k} was {found.get(k)!r}, is {wanted.get(k)!r}" for k in changed[:3])
            raise UsageError(
                f"an interrupted run with other options left {root}: {what}",
                hint="repeat the old options to continue it, or add --force to start anew",
            )
    shutil.rmtree(root, ignore_errors=True)
    (root / "model").mkdir(parents=True)
    write_json(root / "plan.json", wanted)
    (root / "state").mkdir()
    return False


def _resource_error(error: OSError, target: Path) -> ResourceError:
    reason = {
        errno.ENOSPC: "no space left on the disk",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
    }.get(error.errno or 0, str(error))
    return ResourceError(f"cannot write {target}: {reason}", hint="free disk space or give another -o")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def package_versions() -> dict[str, str]:
    """Versions of the packages whose behaviour shows in the result."""
    names = (
        "quantcli",
        "torch",
        "transformers",
        "safetensors",
        "numpy",
        "onnx",
        "onnxruntime",
        "onnxruntime-genai",
    )
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
