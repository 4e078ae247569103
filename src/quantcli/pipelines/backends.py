"""`quantcli backends`: what there is, making and removing environments, and a tiny model through each method."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from quantcli.backends import BACKENDS, Backend, find_backend
from quantcli.backends.environments import install, installed, pinned, python_of, remove, state_of
from quantcli.errors import InterruptedRunError, QuantcliError, UsageError
from quantcli.options import BackendsOptions, CalibrationOptions, GraphOptions, QuantizeOptions
from quantcli.pipelines.external.plan import has_cuda, refuse_processor
from quantcli.progress import Progress, Silent

__all__ = ["BackendsResult", "Checked", "run"]

_ROWS = CalibrationOptions(data="builtin", num_samples=16, seq_len=128)
_CHECK_SETTINGS = {"iters": "20", "num_iterations": "20", "num_candidates": "5"}
"""Of methods that train: enough to see that they do."""


@dataclass(frozen=True)
class Checked:
    """A method, tried."""

    method: str
    works: bool | None
    """Whether its result was verified; None where it was not tried."""
    said: str
    """What its result lost, or why there is none."""
    seconds: float = 0.0
    peak_bytes: int = 0
    """Most memory of the backend's processes."""


@dataclass(frozen=True)
class BackendsResult:
    """What is there, or what was done."""

    action: str
    backends: list[dict[str, Any]]
    """Of list and install: what is known of each."""
    freed_bytes: int = 0
    """By remove."""
    checks: dict[str, list[Checked]] = field(default_factory=dict)
    """By backend, of check."""

    @property
    def failures(self) -> list[str]:
        """Methods that did not work, and were tried."""
        return [f"{name} {c.method}" for name, checks in self.checks.items() for c in checks if c.works is False]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def run(options: BackendsOptions, progress: Progress | None = None) -> BackendsResult:
    """Lists, installs, removes or checks.

    Raises:
        UsageError: an unknown backend, or one without an environment of its own.
        ResourceError: packages cannot be had.
    """
    progress = progress or Silent()
    backend = find_backend(options.name) if options.name is not None else None
    if options.action == "list":
        chosen = BACKENDS.values() if backend is None else [backend]
        return BackendsResult("list", [describe(b) for b in chosen])
    if options.action == "check":
        return _check(backend, progress)
    assert backend is not None
    if not backend.own_environment:
        raise UsageError(f"{backend.name} runs in quantcli's own environment, there is nothing to {options.action}")
    if options.action == "remove":
        return BackendsResult("remove", [describe(backend)], freed_bytes=remove(backend))
    refuse_processor(backend)
    install(backend, options.installer, options.torch_index, progress)
    return BackendsResult("install", [describe(backend)])


def describe(backend: Backend) -> dict[str, Any]:
    """What is known of a backend, its environment included."""
    from importlib import metadata

    found = installed(backend) if backend.own_environment else None
    version = (
        pinned(backend).get(backend.package.lower()) if backend.own_environment else metadata.version(backend.package)
    )
    return backend.plain() | {
        "version": version,
        "state": state_of(backend),
        "size_bytes": found.size_bytes if found is not None else None,
        "needed_bytes": backend.size_mb * 10**6,
        "install_seconds": found.seconds if found is not None else None,
        "pins": len(pinned(backend)),
        "options": {
            name: {
                key: {"default": s.default, "choices": list(s.choices), "help": s.help} for key, s in m.settings.items()
            }
            for name, m in backend.methods.items()
        },
        "warnings": {name: m.warning for name, m in backend.methods.items() if m.warning},
    }


def _check(backend: Backend | None, progress: Progress) -> BackendsResult:
    if backend is not None:
        python_of(backend)  # installed, or an error that says how
    chosen = (
        [backend] if backend is not None else [b for b in BACKENDS.values() if state_of(b) in ("installed", "here")]
    )
    checks = {b.name: _check_methods(b, progress) for b in chosen}
    return BackendsResult("check", [describe(b) for b in chosen], checks=checks)


def _check_methods(backend: Backend, progress: Progress) -> list[Checked]:
    from quantcli.backends.tiny_models import write_tiny_checkpoint, write_tiny_graph

    with TemporaryDirectory(prefix="quantcli-check-") as name:
        folder = Path(name)
        if backend.input == "onnx":
            model, samples = write_tiny_graph(folder)
        else:
            model = folder / "tiny"
            write_tiny_checkpoint(model)
            samples = None
        checks = []
        with progress.track(f"checking {backend.name}", len(backend.methods)) as task:
            for method in backend.methods:
                checks.append(_check_method(backend, method, model, samples, folder / method))
                task.advance(1, method)
        return checks


def _check_method(backend: Backend, name: str, model: Path, samples: Path | None, output: Path) -> Checked:
    from quantcli.pipelines.external.run import run_external

    method = backend.methods[name]
    if method.cuda_only and not has_cuda():
        return Checked(name, None, "not tried: it asks for an accelerator")
    options = QuantizeOptions(
        str(model),
        output,
        algorithm=name,
        backend=backend.name,
        settings={key: text for key, text in _CHECK_SETTINGS.items() if key in method.settings},
        group_size=_smallest(method.group_sizes) if method.group_size is not None else None,
    )
    if method.calibrates and samples is not None:
        options = replace(options, graph=GraphOptions(calibration_inputs=samples))
    elif method.calibrates:
        options = replace(options, calibration=_ROWS)
    try:
        made: Any = run_external(options, Silent())
    except InterruptedRunError:
        raise
    except QuantcliError as error:
        return Checked(name, False, error.message + (f" ({error.hint})" if error.hint else ""))
    return Checked(name, True, _brief(made.outputs), round(made.seconds, 1), made.peak_bytes)


def _smallest(sizes: Sequence[int]) -> int | None:
    """Of the group sizes from 32 on, which every tiny matrix holds several of."""
    return min((size for size in sizes if size >= 32), default=None)


def _brief(outputs: Any) -> str:
    if outputs is None:
        return "opens"
    if hasattr(outputs, "kl"):
        return f"KL {outputs.kl:.5f} (a model that knows nothing: {outputs.uniform_kl:.5f}), top-1 {outputs.top1:.1%}"
    worst = min(outputs.outputs, key=lambda o: o.sqnr_db if o.sqnr_db is not None else 1e9)
    return str(worst)
