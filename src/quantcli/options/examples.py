"""Rows of text and how they become examples."""

from dataclasses import dataclass

from quantcli.errors import UsageError

__all__ = ["ExampleOptions"]


@dataclass(frozen=True)
class ExampleOptions:
    """Which text a model is trained on, and which part of it the loss counts."""

    data_files: tuple[str, ...] = ()
    """Files to train on: jsonl, csv, tsv, parquet or txt, joined by commas."""
    data_name: str | None = None
    """Data set on the Hugging Face hub or in its cache; the path of a file is taken as --data-files."""
    data_split: str = "train"
    """Split of the hub data set."""
    text_field: str | None = None
    """Field of a row that holds the text (default: text)."""
    text_template: str | None = None
    """Text made of several fields, as in "Q: {question}\\nA: {answer}"."""
    use_chat_template: bool = False
    """Render rows with a `messages` field by the model's chat template."""
    completion_only: bool = False
    """Count the loss on the completion alone: the template's last field and what follows it, or the last message."""
    seq_len: int = 512
    """Most tokens of an example; longer ones are cut."""
    max_samples: int | None = None
    """Most rows that are read, those for evaluation included. Default: all."""
    packing: bool = False
    """Put several examples into one row of --seq-len tokens, none of which sees another."""
    eval_split: str | None = None
    """What the eval loss is measured on: a share of the rows (0.1), a number of rows (200), a file, or the name of a
    split of the hub data set. Default: a tenth of the rows, at most 256."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise UsageError(f"--{name.replace('_', '-')} must be 2 or more, got {value}")
        if bool(self.data_files) == (self.data_name is not None):
            what = "exclude each other" if self.data_files else "are both missing"
            raise UsageError(
                f"--data-files and --data-name {what}",
                hint="leave one out" if self.data_files else "add --data-files FILE",
            )
        if self.data_files and self.data_split != ExampleOptions.data_split:
            raise UsageError("--data-split would have no effect on files", hint="leave it out")
        chosen = [n for n in ("text_field", "text_template", "use_chat_template") if getattr(self, n)]
        if len(chosen) > 1:
            flags = " and ".join("--" + n.replace("_", "-") for n in chosen)
            raise UsageError(f"{flags} exclude each other", hint="leave one out")
        if self.completion_only and not (self.text_template or self.use_chat_template):
            raise UsageError(
                "--completion-only needs to know what the completion is",
                hint="add --text-template 'Q: {question}\\nA: {answer}', or --use-chat-template",
            )
