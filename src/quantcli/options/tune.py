"""What `tune` was asked to do."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from quantcli.errors import UsageError, nearest
from quantcli.options.calibration import CalibrationOptions
from quantcli.options.goals import COSTS, Goal, Metric
from quantcli.options.graph import GraphOptions

__all__ = ["SAMPLERS", "SETS", "TuneOptions"]

SETS = ("woq", "weights", "mixed", "integers")
SAMPLERS = ("auto", "grid", "tpe", "nsga2")


@dataclass(frozen=True)
class TuneOptions:
    """What `quantcli tune` was asked to do."""

    model: str
    """Model to quantize: a checkpoint folder, an output folder of an earlier command, a hub id; or an .onnx file or a
    folder with one."""
    output: Path
    """Folder to write: the best model as `quantize` writes it, with every trial in trials.jsonl."""
    space: Path | None = None
    """JSON file that says what is tried: options of quantize, each with one value, a list of values or a range
    {"low": 0.001, "high": 0.1, "log": true}; or a list of such objects. A pass or a workflow as Olive has them, with
    lists, SEARCHABLE_VALUES or nothing chosen, is searched too: docs/tuning.md."""
    predefined: str | None = None
    """What is tried, by name. woq: RTN_G32ASYM, GPTQ_G32ASYM, GPTQ_G32ASYM_DISABLE_LAST_MATMUL, GPTQ_G128ASYM,
    AWQ_G32ASYM, in that order; weights: kquant, gptq and awq at several bits and group sizes; mixed: the bits of each
    linear, for a goal; integers: static and dynamic. Default: weights, integers for graphs that read no tokens."""
    algorithm: str | None = None
    """Algorithm of all trials, as for quantize. Without --space and --set, it is tried as it is."""
    metric: str | None = None
    """What tells how good a model is: kl, perplexity (of language models), sqnr (of graphs, in dB), accuracy (share of
    first choices that are the float model's), or FILE.py:FUNCTION, called with an onnxruntime session, or with the
    folder of a checkpoint. Default: kl for language models, else sqnr."""
    goals: tuple[Goal, ...] = ()
    """What must hold, as 'kl<=0.05', 'accuracy>=reference-0.01' or 'size<=60MB' (repeatable). With dynamic and static,
    nodes go back to float until it does. The best trial is then the one of least --minimize."""
    minimize: str = "size"
    """What costs: size of the written weights, latency of a run (of a token, for language models), or time that
    quantizing takes."""
    lower_is_better: bool = False
    """The number of FILE.py:FUNCTION is better where it is lower."""
    trials: int | None = None
    """Most trials. Default: 20, or all of a set or a space that has no more than 40."""
    timeout: float | None = None
    """Time after which no further trial begins, as 90s, 30min or 1h."""
    sampler: str = "auto"
    """How the next trial is chosen: grid (all, in order), tpe, or nsga2. Default: grid where --trials suffice for all;
    else tpe with a goal, nsga2 without one."""
    stop_at_first: bool | None = None
    """End with the first trial that meets the goals. Default: with --set woq."""
    prune: bool = True
    """Give up trials early that cannot become the best: by their mean relative error, then by a few windows of text."""
    eval_data: str | None = None
    """What trials are judged on, as --data of evaluate. Default: Python's own documentation; for other graphs the
    calibration inputs, or what is made from the graph."""
    eval_samples: int = 16
    """Windows of text, or samples of other graphs, on which trials are judged."""
    eval_seq_len: int = 512
    """Tokens per window."""
    ray: str | None = None
    """Run trials as tasks of a Ray cluster: its address, as HOST:6379 or auto, or local for one on this machine. Model
    and output lie on a path that all of its nodes see."""
    ray_cpus: float = 1.0
    """CPUs of a task."""
    ray_gpus: float = 0.0
    """GPUs of a task."""
    ray_memory: int | None = None
    """Memory that a task is given room for, as 4GB."""
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    """Calibration text."""
    graph: GraphOptions = field(default_factory=GraphOptions)
    """Where the model is an ONNX graph."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""
    force: bool = False
    """Replace an output folder of ours, or an interrupted run with other options."""
    dry_run: bool = False
    """Check the space, print what would be tried, and do nothing."""

    def __post_init__(self) -> None:
        if self.predefined is not None and self.predefined not in SETS:
            raise UsageError(f"unknown --set {self.predefined!r}, {nearest(self.predefined, SETS)}")
        if self.predefined is not None and self.space is not None:
            raise UsageError("--space and --set exclude each other", hint="leave one out")
        if self.algorithm is not None and self.predefined is not None:
            raise UsageError(f"--set {self.predefined} names algorithms itself", hint="leave -a out, or use --space")
        if self.minimize not in COSTS:
            raise UsageError(f"unknown --minimize {self.minimize!r}, {nearest(self.minimize, COSTS)}")
        if self.sampler not in SAMPLERS:
            raise UsageError(f"unknown --sampler {self.sampler!r}, {nearest(self.sampler, SAMPLERS)}")
        if self.predefined == "mixed" and not self.goals:
            raise UsageError("--set mixed finds the smallest size that meets a goal", hint="add --goal 'kl<=0.05'")
        if self.predefined == "mixed" and self.sampler != "auto":
            raise UsageError(f"--set mixed halves the range of bits, --sampler {self.sampler} would have no effect")
        if self.stop_at_first and not self.goals:
            raise UsageError("--stop-at-first needs a goal", hint="add --goal 'kl<=0.05'")
        for name in ("trials", "timeout", "eval_samples", "ray_memory"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
        if self.eval_seq_len < 2:
            raise UsageError(f"--eval-seq-len must be 2 or more to score anything, got {self.eval_seq_len}")
        self._check_ray()
        self._check_metric()

    def _check_ray(self) -> None:
        given = {"ray_cpus": 1.0, "ray_gpus": 0.0, "ray_memory": None}
        changed = [name for name, default in given.items() if getattr(self, name) != default]
        if self.ray is None and changed:
            raise UsageError(f"--{changed[0].replace('_', '-')} needs --ray", hint="add --ray local")
        if self.ray_cpus <= 0 or self.ray_gpus < 0:
            raise UsageError("--ray-cpus must be above 0, --ray-gpus 0 or more")

    def _check_metric(self) -> None:
        if self.lower_is_better and (self.metric is None or ":" not in self.metric):
            raise UsageError("--lower-is-better needs --metric FILE.py:FUNCTION", hint="leave it out")
        metric = self.wanted_metric
        if metric is not None:
            for goal in self.goals:
                goal.check(metric)

    @property
    def wanted_metric(self) -> Metric | None:
        """The metric that is named, itself or by a goal; None where nothing names one."""
        named = self.metric or next((g.name for g in self.goals if g.name not in COSTS), None)
        if named is None:
            return None
        metric = Metric.parse(named, self.lower_is_better)
        if metric.script is not None and any(g.name == metric.name and g.lower for g in self.goals):
            return replace(metric, lower=True)
        return metric
