"""`quantcli generate`: continues a prompt with any model folder."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from quantcli.errors import InputError, UsageError
from quantcli.evaluate.language_model import LanguageModel, Sampling, open_language_model
from quantcli.evaluate.text import open_tokenizer
from quantcli.evaluate.text_stream import TextStream
from quantcli.models.source import locate_model
from quantcli.options import GenerateOptions

__all__ = ["GenerateResult", "run"]


@dataclass(frozen=True)
class GenerateResult:
    """What `run` wrote."""

    text: str
    """The answer, without special tokens."""
    tokens: tuple[int, ...]
    """Its tokens, the one that ended it included."""
    prompt_tokens: int
    """Tokens of the prompt as the model read it."""
    finish: str
    """Why it ended: `end` (the model ended its answer), `max_new_tokens` or `positions` (none were left)."""
    prefill_tokens_per_second: float
    """Reading the prompt."""
    decode_tokens_per_second: float | None
    """Writing, from the second token on; None where there was only one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self)


def run(options: GenerateOptions, show: Callable[[str], None] = lambda piece: None) -> GenerateResult:
    """Continues the prompt; `show` gets the text piece by piece as it is written.

    Raises:
        InputError: the folder cannot be read or run, or has no chat template where one is asked for.
        UsageError: the prompt is longer than the model's positions, or the adapter does not fit the folder.
    """
    folder = locate_model(options.model)
    tokenizer = open_tokenizer(folder, options.trust_remote_code)
    prompt = _read_prompt(options, tokenizer)
    model = open_language_model(folder, options.device, options.trust_remote_code, adapter=options.adapter)
    try:
        return _continue(options, model, tokenizer, prompt, show)
    finally:
        model.close()


def _read_prompt(options: GenerateOptions, tokenizer: Any) -> list[int]:
    """The tokens that the model reads."""
    if not options.use_chat_template:
        tokens: list[int] = tokenizer(options.prompt)["input_ids"]
    elif getattr(tokenizer, "chat_template", None) is None:
        raise InputError(f"{options.model} has no chat template", hint="leave --use-chat-template out")
    else:
        said = [{"role": "user", "content": options.prompt}]
        try:
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja raises its own types
            raise InputError(f"the chat template of {options.model} cannot be rendered: {error}") from error
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has them
    if not tokens:
        raise UsageError(f"the tokenizer of {options.model} makes no tokens of --prompt {options.prompt!r}")
    return tokens


def _continue(
    options: GenerateOptions, model: LanguageModel, tokenizer: Any, prompt: list[int], show: Callable[[str], None]
) -> GenerateResult:
    room = options.max_new_tokens
    if model.max_positions is not None:
        room = min(room, model.max_positions - len(prompt))
    if room < 1:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens, {options.model} has {model.max_positions} positions",
            hint="give a shorter prompt",
        )
    sampling = None
    if options.temperature > 0:
        sampling = Sampling(options.temperature, options.top_p or 1.0, options.seed or 0)
    stream, written = TextStream(tokenizer, prompt), list[int]()
    pieces: list[str] = []
    finish = "max_new_tokens" if room == options.max_new_tokens else "positions"
    begin = first = time.perf_counter()
    model.start(torch.tensor(prompt), room, sampling)
    for _ in range(room):
        token = model.step()
        if not written:
            first = time.perf_counter()
        written.append(token)
        if token in model.end_tokens:
            finish = "end"
            break
        pieces.append(stream.add(token))
        show(pieces[-1])
    last = time.perf_counter()
    pieces.append(stream.end())
    show(pieces[-1])
    return GenerateResult(
        text="".join(pieces),
        tokens=tuple(written),
        prompt_tokens=len(prompt),
        finish=finish,
        prefill_tokens_per_second=len(prompt) / (first - begin),
        decode_tokens_per_second=(len(written) - 1) / (last - first) if len(written) > 1 else None,
    )
