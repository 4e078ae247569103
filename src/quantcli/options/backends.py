"""What `backends` and `compare` were asked to do."""

from dataclasses import dataclass, field
from pathlib import Path

from quantcli.errors import UsageError, nearest
from quantcli.options.calibration import CalibrationOptions

__all__ = ["BACKEND_ACTIONS", "BACKEND_INSTALLERS", "BackendsOptions", "CompareOptions"]

BACKEND_ACTIONS = ("list", "install", "remove", "check")
BACKEND_INSTALLERS = ("auto", "uv", "pip")


@dataclass(frozen=True)
class BackendsOptions:
    """What `quantcli backends` was asked to do."""

    action: str = "list"
    """list: what there is, with a name its methods and options; install: make its environment; remove: drop it; check:
    a tiny model through each of its methods."""
    name: str | None = None
    """Backend; check without one takes all that are installed."""
    installer: str = "auto"
    """uv, pip, or auto: uv where it is there. pip also looks where its configuration says."""
    torch_index: str | None = None
    """Package index for torch, as https://download.pytorch.org/whl/cpu; default: the installer's own, which on Linux
    gives the CUDA build."""

    def __post_init__(self) -> None:
        if self.action not in BACKEND_ACTIONS:
            raise UsageError(f"unknown action {self.action!r}, {nearest(self.action, BACKEND_ACTIONS)}")
        if self.installer not in BACKEND_INSTALLERS:
            raise UsageError(f"unknown installer {self.installer!r}, {nearest(self.installer, BACKEND_INSTALLERS)}")
        if self.action in ("install", "remove") and self.name is None:
            raise UsageError(f"{self.action} what?", hint=f"quantcli backends {self.action} NAME")
        for name, default in (("installer", "auto"), ("torch_index", None)):
            if self.action != "install" and getattr(self, name) != default:
                raise UsageError(f"--{name.replace('_', '-')} is for install", hint="leave it out")


@dataclass(frozen=True)
class CompareOptions:
    """What `quantcli compare` was asked to do."""

    model: str
    """Checkpoint that each quantizes."""
    entrants: tuple[str, ...]
    """Who takes part, joined by commas: `ours` and backends, as ours,gptqmodel,auto-round; NAME:METHOD for another
    method than -a or the backend's first, as ours:awq."""
    output: Path | None = None
    """Folder that keeps every result, by its entrant; default: none is kept."""
    algorithm: str | None = None
    """Algorithm of all; default: gptq of ours, each backend's first."""
    bits: int = 4
    """Bits per weight."""
    group_size: int | None = 64
    """Input columns that share a scale, the same for all."""
    symmetric: bool | None = None
    """Grid, the same for all that have a choice. Default: each one's own."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """The same text for all."""
    eval_data: str | None = None
    """Text to score on; default: Python's own documentation."""
    eval_samples: int = 16
    """Windows of it."""
    timeout: float | None = None
    """Time that each backend may take, as 90s, 30m or 2h."""
    max_memory: int | None = None
    """Bytes of memory that each run may take."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""
    force: bool = False
    """Replace results that stand in the output folder."""

    def __post_init__(self) -> None:
        if len(self.entrants) < 1:
            raise UsageError("nobody takes part", hint="write --with ours,gptqmodel")
        twice = next((name for name in self.entrants if self.entrants.count(name) > 1), None)
        if twice is not None:
            raise UsageError(f"{twice} takes part twice", hint="name it once, or with two methods: NAME:METHOD")
        if self.eval_samples < 1:
            raise UsageError(f"--eval-samples must be 1 or more, got {self.eval_samples}")
