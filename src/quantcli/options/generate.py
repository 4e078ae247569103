"""What `generate` was asked to do."""

from dataclasses import dataclass

from quantcli.errors import UsageError

__all__ = ["GenerateOptions"]


@dataclass(frozen=True)
class GenerateOptions:
    """What `quantcli generate` was asked to do."""

    model: str
    """Folder to run: float, quantized or ONNX GenAI."""
    prompt: str
    """Text to continue."""
    adapter: str | None = None
    """Adapter to run with. In an ONNX folder: NAME of its NAME.onnx_adapter, or such a file. For a checkpoint: a
    folder that peft saved, or its name beside the model (`adapter` in an output folder of finetune)."""
    use_chat_template: bool = False
    """Render the prompt as a user's message by the model's chat template."""
    max_new_tokens: int = 128
    """Tokens to write at most; fewer where the model ends its answer or its positions are used up."""
    temperature: float = 0.0
    """Sample with this temperature; 0 always takes the likeliest token."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability. Default: from all."""
    seed: int | None = None
    """Seed of the samples (default 0)."""
    device: str | None = None
    """cpu, cuda or cuda:N, for checkpoints. Default: cuda where there is one."""
    trust_remote_code: bool = False
    """Run model code that the folder brings along."""

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UsageError("--prompt is empty", hint="write -p 'Once upon a time'")
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be 1 or more, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise UsageError(f"--temperature must be 0 or more, got {self.temperature:g}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must be above 0 and at most 1, got {self.top_p:g}")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed must be 0 to {2**31 - 1}, got {self.seed}")
        for name in ("top_p", "seed"):
            if getattr(self, name) is not None and self.temperature == 0:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} would have no effect without --temperature", hint="add --temperature 0.8")
