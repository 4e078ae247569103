"""What a backend is asked to do: every default resolved, and refused what would have no effect on it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from quantcli.backends import Backend, Method, find_backend
from quantcli.backends.environments import python_of
from quantcli.backends.processes import Limits
from quantcli.errors import UsageError, nearest
from quantcli.options import CalibrationOptions, GraphOptions, QuantizeOptions, SimulationOptions
from quantcli.pipelines.graph.source import is_graph

__all__ = ["ExternalPlan", "has_cuda", "plan_external", "refuse_processor"]

_ALWAYS = {
    *("model", "output", "algorithm", "settings", "config", "backend", "timeout", "bits", "group_size", "symmetric"),
    *("format", "device", "max_memory", "trust_remote_code", "evaluate", "force", "dry_run"),
}
_ALWAYS_ON_GRAPHS = {"min_sqnr", "smaller_only"}


@dataclass(frozen=True)
class ExternalPlan:
    """A job."""

    backend: Backend
    name: str
    """Of the method."""
    method: Method
    settings: Mapping[str, Any]
    """The method's own options."""
    options: QuantizeOptions
    """As resolved: method, bits, group size and grid."""

    @property
    def limits(self) -> Limits:
        """Of time and memory."""
        return Limits(self.options.timeout, self.options.max_memory)

    def job(self) -> dict[str, Any]:
        """What a worker is told, whatever the model is."""
        options = self.options
        return {
            "method": self.name,
            "settings": dict(self.settings),
            "bits": options.bits,
            "group_size": options.group_size,
            "symmetric": options.symmetric,
            "seed": options.calibration.seed,
            "batch_size": options.calibration.batch_size,
            "device": options.device or "cpu",
        }

    def rows(self) -> list[tuple[str, str]]:
        """For people."""
        options = self.options
        grid = {True: ", sym", False: ", asym", None: ""}[options.symmetric]
        group = "" if options.group_size is None else f", group size {options.group_size}"
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return [
            ("model", options.model),
            ("backend", f"{self.backend.name}: {self.backend.summary}"),
            ("method", self.name + (f" ({settings})" if settings else "")),
            ("scheme", f"{options.bits} bits{group}{grid}"),
            *([("note", self.method.warning)] if self.method.warning else []),
            ("output", str(options.output)),
        ]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {"model": self.options.model, "backend": self.backend.name} | self.job()


def plan_external(options: QuantizeOptions) -> ExternalPlan:
    """Settles method, scheme and settings.

    Raises:
        UsageError: an unknown backend, one that is not installed or has no processor here, another kind of model, or a
            flag that it has no use for.
    """
    backend = find_backend(str(options.backend))
    refuse_processor(backend)
    kind = "onnx" if is_graph(options.model) else "checkpoint"
    if kind != backend.input:
        takes = {"onnx": "ONNX graphs", "checkpoint": "checkpoints"}[backend.input]
        raise UsageError(f"{backend.name} takes {takes}, {options.model} is none", hint="see `quantcli backends`")
    name, method = backend.find_method(options.algorithm)
    if method.cuda_only and not has_cuda():
        hint = f"-a {next(iter(backend.methods))} of it runs on the CPU; -a {name} without --backend is our own"
        raise UsageError(f"{name} of {backend.name} asks for an accelerator, there is no GPU here", hint=hint)
    _refuse_idle(options, backend, name, method)
    if options.device is not None and options.device.split(":")[0] not in backend.processors:
        raise UsageError(f"{backend.name} runs on {' and '.join(backend.processors)} here, not on {options.device}")
    _refuse_format(options, backend, name, method)
    options = replace(options, algorithm=name, **_scheme(options, backend, name, method))
    plan = ExternalPlan(backend, name, method, _settings(options, backend, name, method), options)
    if not options.dry_run:
        python_of(backend)
    return plan


def has_cuda() -> bool:
    """Whether there is a GPU of NVIDIA's with its driver; no torch is asked, ours may know the CPU alone."""
    return Path("/proc/driver/nvidia/version").exists()


def refuse_processor(backend: Backend) -> None:
    """Refuses a backend that cannot run here, before anything is installed.

    Raises:
        UsageError: naming what to use instead.
    """
    if "cpu" not in backend.processors and not has_cuda():
        raise UsageError(f"{backend.name} runs on CUDA only, there is no GPU here", hint=backend.instead)


def _refuse_idle(options: QuantizeOptions, backend: Backend, name: str, method: Method) -> None:
    """No flag without effect."""
    takes = _ALWAYS | _ALWAYS_ON_GRAPHS | method.takes
    what = f"-a {name} of --backend {backend.name}"
    unset: dict[str, Any] = {
        "graph": GraphOptions(),
        "calibration": CalibrationOptions(),
        "simulation": SimulationOptions(),
    }
    for spec in fields(QuantizeOptions):
        given = getattr(options, spec.name)
        if spec.name == "graph":
            for inner in fields(GraphOptions):
                if inner.name not in takes and getattr(given, inner.name) != inner.default:
                    raise UsageError(f"{_flag(inner.name)} has no effect with {what}", hint="leave it out")
            if backend.input == "checkpoint" and given != unset["graph"]:
                raise UsageError(f"a flag for ONNX graphs has no effect with {what}", hint="leave it out")
        elif spec.name == "calibration" and not method.calibrates and given != unset["calibration"]:
            raise UsageError(f"{what} looks at no data", hint="leave flags of data and calibration out")
        elif spec.name not in takes and given not in (unset.get(spec.name), spec.default, (), {}):
            raise UsageError(f"{_flag(spec.name)} has no effect with {what}", hint="leave it out")


def _refuse_format(options: QuantizeOptions, backend: Backend, name: str, method: Method) -> None:
    if options.format is None or options.format in method.formats:
        return
    stores = f"stores {' or '.join(method.formats)}" if method.formats else "has no --format"
    raise UsageError(f"{backend.name}'s {name} {stores}, not {options.format}", hint="leave --format out")


def _flag(name: str) -> str:
    return "--" + {"readers": "for", "overrides": "override"}.get(name, name).replace("_", "-")


def _scheme(options: QuantizeOptions, backend: Backend, name: str, method: Method) -> dict[str, Any]:
    """Bits, group size and grid."""
    what = f"{backend.name}'s {name}"
    bits = method.bits[0] if options.bits is None else options.bits
    if bits not in method.bits:
        raise UsageError(f"{what} makes {_either(sorted(method.bits))} bits, not {bits}")
    group, symmetric = options.group_size, options.symmetric
    if options.format is not None and len(method.formats) > 1:
        wanted = options.format == method.formats[0]
        if symmetric is not None and symmetric != wanted:
            grid = "--sym" if wanted else "--asym"
            raise UsageError(f"--format {options.format} of {what} goes with {grid}", hint="leave one of them out")
        symmetric = wanted
    if method.group_size is None and group is not None:
        raise UsageError(f"--group-size has no effect with {what}", hint="leave it out")
    if method.group_sizes and group is not None and group not in method.group_sizes:
        raise UsageError(f"{what} has groups of {_either(method.group_sizes)}, not {group}")
    if method.symmetric is None and symmetric is not None:
        raise UsageError(f"--sym and --asym have no effect with {what}", hint="leave them out")
    if symmetric is not None and symmetric not in method.grids:
        raise UsageError(
            f"{what} is {'asymmetric' if symmetric else 'symmetric'} only", hint="leave --sym and --asym out"
        )
    return {
        "bits": bits,
        "group_size": method.group_size if group is None else group,
        "symmetric": method.symmetric if symmetric is None else symmetric,
    }


def _settings(options: QuantizeOptions, backend: Backend, name: str, method: Method) -> dict[str, Any]:
    """The method's own options, defaults filled in; `weight_type` follows --bits."""
    found = {key: setting.default for key, setting in method.settings.items()}
    for key, text in options.settings.items():
        if key not in found:
            raise UsageError(
                f"{backend.name}'s {name} has no setting {key!r}"
                + (f", {nearest(key, found)}" if found else ": it has none"),
                hint=f"quantcli backends list {backend.name}",
            )
        found[key] = method.settings[key].read(key, text)
    if "weight_type" in found and "weight_type" not in options.settings:
        found["weight_type"] = f"int{options.bits}"
    return found


def _either(values: Any) -> str:
    words = [str(value) for value in values]
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
