"""Which text statistics are gathered on."""

from dataclasses import dataclass

from quantcli.errors import UsageError

__all__ = ["BUILTIN", "MOE_CALIBRATIONS", "SELF", "CalibrationOptions"]

SELF, BUILTIN = "self", "builtin"
MOE_CALIBRATIONS = "routed", "all"


@dataclass(frozen=True)
class CalibrationOptions:
    """Which text statistics are gathered on."""

    data: str | None = None
    """Text to calibrate on: a txt, jsonl, csv or parquet file, `self` (text that the model writes itself) or
    `builtin` (Python's own documentation). Default: self, or builtin where sampling would cost more than quantizing."""
    data_name: str | None = None
    """Data set on the Hugging Face hub or in its cache."""
    data_split: str = "train"
    """Split of the hub data set."""
    text_field: str | None = None
    """Field of a jsonl, csv, parquet or hub row that holds the text (default: text)."""
    text_template: str | None = None
    """Text made of several fields, as in "Q: {question}\\nA: {answer}"."""
    use_chat_template: bool = False
    """Render rows with a `messages` field by the model's chat template."""
    num_samples: int = 64
    """Calibration rows."""
    seq_len: int = 512
    """Tokens per calibration row."""
    batch_size: int = 1
    """Rows that go through a block together; more takes more memory and, on a CPU, more time."""
    moe_calibration: str = "routed"
    """Which tokens an expert's statistics are gathered on: routed (those that its router sends it) or all."""
    seed: int = 0
    """Seed of every random choice."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        if self.moe_calibration not in MOE_CALIBRATIONS:
            known = ", ".join(MOE_CALIBRATIONS)
            raise UsageError(f"--moe-calibration must be one of {known}, got {self.moe_calibration!r}")
        if self.data is not None and self.data_name is not None:
            raise UsageError("--data and --data-name exclude each other", hint="leave one out")
        chosen = [n for n in ("text_field", "text_template") if getattr(self, n) is not None]
        chosen += ["use_chat_template"] if self.use_chat_template else []
        if len(chosen) > 1:
            flags = " and ".join("--" + n.replace("_", "-") for n in chosen)
            raise UsageError(f"{flags} exclude each other", hint="leave one out")
        if chosen and self.data in (SELF, BUILTIN):
            raise UsageError(
                f"--{chosen[0].replace('_', '-')} needs --data FILE or --data-name, not --data {self.data}"
            )
