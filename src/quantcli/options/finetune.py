"""What `finetune` was asked to do."""

from dataclasses import dataclass, field
from pathlib import Path

from quantcli.errors import UsageError, nearest
from quantcli.options.examples import ExampleOptions

__all__ = ["DTYPES", "INITS", "METHODS", "FinetuneOptions"]

METHODS = ("lora", "qlora")
INITS = ("zero", "loftq")
DTYPES = ("keep", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class FinetuneOptions:
    """What `quantcli finetune` was asked to do."""

    model: str
    """Model to adapt: a checkpoint folder, float or quantized, an output folder of an earlier command, or a hub id."""
    examples: ExampleOptions
    """What it is trained on."""
    output: Path = Path("finetuned-model")
    """Folder to write: the base in model/, the adapter in adapter/."""
    method: str = "lora"
    """lora: adapters beside the model as it is; qlora: beside quantized weights, a float model becomes nf4 first."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32
    """Their output is scaled by this over the rank."""
    lora_dropout: float = 0.05
    """Share of their inputs that training leaves out."""
    target_modules: tuple[str, ...] = ()
    """Linears that get an adapter, by the ends of their names, joined by commas, as q_proj,v_proj. Default: every
    linear in the blocks but routers and experts."""
    use_dora: bool = False
    """DoRA: learn the length of each row of a weight beside its direction. ONNX Runtime adapters cannot hold it."""
    init_lora: str = "zero"
    """How adapters begin. zero: as the base; loftq: with the part of the rounding error that their rank can hold."""
    float_model: str | None = None
    """The float model that a quantized base was rounded from, for --init-lora loftq."""
    torch_dtype: str | None = None
    """Type that the model computes in: float32, float16 or bfloat16; adapters are float32. Default: float32 on CPU,
    else the checkpoint's."""
    max_steps: int | None = None
    """Steps of the optimizer. Default: what --num-epochs takes."""
    num_epochs: float | None = None
    """Times that the examples are gone through (default: 3)."""
    learning_rate: float = 2e-4
    """Largest learning rate, after warmup; it falls linearly to 0."""
    batch_size: int = 4
    """Rows that go through the model together."""
    gradient_accumulation: int = 1
    """Batches whose gradients make one step."""
    warmup: float = 0.03
    """Steps in which the learning rate rises from 0: a share of all steps below 1, else their number."""
    eval_steps: int | None = None
    """Steps between measurements of the eval loss while training. Default: none, or a tenth of all steps with
    --early-stopping."""
    early_stopping: int | None = None
    """Stop when so many measurements in a row have not improved the eval loss, and keep the best adapter."""
    save_steps: int | None = None
    """Steps between checkpoints, from which an interrupted run continues. Default: --eval-steps, or a tenth of all."""
    resume: bool = False
    """Only continue an interrupted run, refuse to begin one. The same command continues without it, too."""
    settings: dict[str, str] = field(default_factory=dict)
    """Any other argument of transformers' Trainer, as weight_decay=0.01."""
    seed: int = 0
    """Seed of every random choice."""
    copy_base: bool = False
    """Copy the base into the output; the default makes hard links where the file system can."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: cuda where there is one."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""
    force: bool = False
    """Replace an output folder of ours."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}, {nearest(self.method, METHODS)}")
        if self.init_lora not in INITS:
            raise UsageError(f"unknown --init-lora {self.init_lora!r}, {nearest(self.init_lora, INITS)}")
        if self.init_lora == "loftq" and self.use_dora:
            raise UsageError(
                "--use-dora and --init-lora loftq exclude each other: the lengths of DoRA are those of the base",
                hint="leave one out",
            )
        if self.init_lora != "loftq" and self.float_model is not None:
            raise UsageError("--float-model would have no effect", hint="add --init-lora loftq, or leave it out")
        if self.torch_dtype is not None and self.torch_dtype not in DTYPES[1:]:
            raise UsageError(f"unknown dtype {self.torch_dtype!r}, {nearest(self.torch_dtype, DTYPES[1:])}")
        counts = ("lora_r", "max_steps", "batch_size", "gradient_accumulation")
        for name in (*counts, "eval_steps", "early_stopping", "save_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        for name in ("lora_alpha", "num_epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora-dropout must be at least 0 and below 1, got {self.lora_dropout:g}")
        if self.warmup < 0 or (self.warmup > 1 and self.warmup != int(self.warmup)):
            raise UsageError(f"--warmup must be a share below 1 or a whole number of steps, got {self.warmup:g}")
        if self.max_steps is not None and self.num_epochs is not None:
            raise UsageError("--max-steps and --num-epochs exclude each other", hint="leave one out")
