"""Text that the model writes itself, for calibration without data.

Each row begins with a random token and goes on by sampling at temperature 1, so its text follows the distribution that
the model was trained on (the idea of LLM-QAT, arXiv 2305.17888); after an end token the row begins anew. All rows are
written at once: a product with 64 columns costs little more than reading the weights.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantcli.data.cache import cache_folder
from quantcli.data.kvcache import preallocated_cache
from quantcli.data.windows import bos_prefix
from quantcli.errors import InputError
from quantcli.models.layout import config_value
from quantcli.progress import Progress

__all__ = ["Sampler", "SamplingKey", "cached_sample", "estimate_sampling", "first_tokens"]

# counts every change of the text that a seed gives: older cache files are then no longer found
VERSION = 1
_BLOCK = 128  # vocabulary entries whose probabilities are summed before one of them is looked for
# a product with one column per row reaches this share of the machine's rate for square matrices
_SKINNY = 0.7
_PROBE = 3  # tokens on which a way to write is tried
_SAME = 0.01  # of the largest logit, between a token at a time and all at once


@dataclass(frozen=True)
class SamplingKey:
    """What decides the text: the cache is keyed by it."""

    model_digest: str
    """Fingerprint of the model folder."""
    rows: int
    """Rows to write."""
    seq_len: int
    """Tokens per row."""
    seed: int
    """Seed of the random choices."""

    @property
    def file(self) -> Path:
        """Where the tokens are kept."""
        words = f"{VERSION} {self.model_digest} {self.rows} {self.seq_len} {self.seed}"
        return cache_folder() / "self-text" / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.safetensors"


def cached_sample(
    key: SamplingKey, open_sampler: Callable[[], "Sampler"], progress: Progress, *, whole: bool = True
) -> Tensor | None:
    """The model's own text [rows, seq_len] int64, out of the cache or written now and kept for the next run.

    Args:
        key: What decides the text.
        open_sampler: Opens the model.
        progress: Told of what is written.
        whole: Whether to write where that means to run each row again for each token; None comes back where not.
    """
    tokens = _read(key, progress)
    if tokens is None:
        sampler = open_sampler()
        if not (whole or sampler.keeps_state):
            return None
        tokens = sampler.sample(key.rows, key.seq_len, key.seed, progress)
        _write(key, tokens, progress)
    return tokens


class Sampler:
    """A model ready to write."""

    def __init__(self, model: Any, starts: Tensor, prefix: list[int]):
        """Args: a transformers causal model; tokens [S] that a text may begin with; what stands before every text."""
        self.model = model.eval()
        self.starts = starts
        self.prefix = prefix
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends = getattr(model.config.get_text_config(), "eos_token_id", None) if ends is None else ends
        self.ends = torch.tensor([] if ends is None else ends, dtype=torch.int64).reshape(-1)

    def sample(
        self, rows: int, seq_len: int, seed: int, progress: Progress, choose: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Writes all rows side by side.

        Args:
            rows: Rows to write.
            seq_len: Tokens per row, the prefix included.
            seed: Seed of the first tokens and of every draw.
            progress: Told of every token column.
            choose: Picks tokens [rows] from logits [rows, V]; default: a random draw at temperature 1.

        Returns:
            tokens [rows, seq_len] int64 on the CPU.

        Raises:
            InputError: the model's output is not finite.
        """
        generator = torch.Generator().manual_seed(seed)
        device = self.model.device
        tokens = torch.empty(rows, seq_len, dtype=torch.int64)
        # columns that are given, not written: the prefix and a random beginning
        given = [torch.full((rows,), token) for token in self.prefix] + [self._beginnings(rows, generator)]
        for column, values in enumerate(given[:seq_len]):
            tokens[:, column] = values
        if not self.keeps_state:
            progress.note(f"{type(self.model).__name__} writes without a cache: each token runs its whole row again")
        step = self._steps(self.model, seq_len)
        begun = time.perf_counter()
        label = f"writing {rows} x {seq_len} tokens of calibration text"
        with torch.inference_mode(), _fast_head(self.model), progress.track(label, rows * seq_len) as task:
            for column in range(seq_len - 1):
                logits = step.logits(tokens[:, : column + 1].to(device))
                if column + 1 >= len(given):
                    written = (choose(logits) if choose else draw(logits, generator)).cpu()
                    ended = torch.isin(tokens[:, column], self.ends)
                    if choose is None and bool(ended.any()):
                        written = torch.where(ended, self._beginnings(rows, generator), written)
                    tokens[:, column + 1] = written
                rate = rows * (column + 1) / (time.perf_counter() - begun)
                task.advance(rows, f"{rate:.0f} tokens/s")
            task.advance(rows)
        return tokens

    @property
    def keeps_state(self) -> bool:
        """Whether a token costs one token, not the whole row so far."""
        return self._steps is not _WholeSteps

    @cached_property
    def _steps(self) -> type["_Steps"]:
        """How this model writes token by token: the first way that gives what all at once give."""
        tokens = self.starts[torch.arange(2 * _PROBE) % self.starts.numel()].reshape(2, _PROBE).to(self.model.device)
        with torch.inference_mode():
            expected = _WholeSteps(self.model, _PROBE).logits(tokens).float()
            for kind in (_BufferSteps, _CacheSteps, _StateSteps):
                try:
                    step = kind(self.model, _PROBE)
                    found = [step.logits(tokens[:, : column + 1]) for column in range(_PROBE)][-1].float()
                except Exception:  # what a class says of a cache that it does not know
                    continue
                if torch.allclose(found, expected, rtol=0, atol=_SAME * float(expected.abs().max())):
                    return kind
        return _WholeSteps

    def _beginnings(self, rows: int, generator: torch.Generator) -> Tensor:
        return self.starts[torch.randint(self.starts.numel(), (rows,), generator=generator)]


class _Steps:
    """Text token by token, with what the model keeps of earlier tokens."""

    def __init__(self, model: Any, seq_len: int):
        """Nothing is written yet; rows will have `seq_len` tokens at most."""
        self._model, self._kept = model, self.begin(model, seq_len)

    @staticmethod
    def begin(model: Any, seq_len: int) -> Any:
        """What is kept at first."""

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, V] behind tokens [B, t]; called with one column more each time."""
        output = self._model(input_ids=tokens[:, -1:], use_cache=True, **{self.argument: self._kept})
        self._kept = getattr(output, self.argument)
        found: Tensor = output.logits[:, -1]
        return found

    argument = "past_key_values"


class _BufferSteps(_Steps):
    """Keys and values are written in place."""

    @staticmethod
    def begin(model: Any, seq_len: int) -> Any:
        """The buffers."""
        return preallocated_cache(model.config, seq_len)


class _CacheSteps(_Steps):
    """The model makes the cache that it wants."""


class _StateSteps(_Steps):
    """State space models call it otherwise."""

    argument = "cache_params"


class _WholeSteps(_Steps):
    """Nothing is kept: every row is run again from its beginning."""

    def logits(self, tokens: Tensor) -> Tensor:
        """As in `_Steps`."""
        found: Tensor = self._model(input_ids=tokens, use_cache=False).logits[:, -1]
        return found


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One random token [B] int64 per row of logits [B, V], with the probabilities that softmax gives.

    The inverse of the cumulative sum, looked up in two steps: which block of the vocabulary, then which entry of it.
    One random number per row instead of one per vocabulary entry, and no sum over the whole vocabulary in sequence.

    Raises:
        InputError: logits that are not finite.
    """
    columns = logits.t().float()  # [V, B]: the layout that `_fast_head` leaves behind
    size, rows = columns.shape
    weights = (columns - columns.amax(0)).exp_()
    whole = size // _BLOCK * _BLOCK
    sums = weights[:whole].reshape(-1, _BLOCK, rows).sum(1)
    if whole < size:
        sums = torch.cat([sums, weights[whole:].sum(0, keepdim=True)])
    bounds = sums.cumsum(0)
    if not bool(bounds[-1].isfinite().all()):
        raise InputError(
            "the model's output is not finite (NaN or infinity), it cannot write text",
            hint="check the weights with: quantcli inspect",
        )
    target = torch.rand(rows, generator=generator).to(logits.device) * bounds[-1]
    block = (bounds <= target).sum(0).clamp_(max=sums.shape[0] - 1)
    rest = target - (bounds.gather(0, block[None]) - sums.gather(0, block[None]))[0]
    entries = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)[:, None]
    inside = weights.gather(0, entries.clamp(max=size - 1)) * (entries < size)
    found = (inside.cumsum(0) <= rest).sum(0)
    # rounding can put the target behind the block's last entry
    found = torch.where(found < _BLOCK, found, inside.argmax(0))
    return block * _BLOCK + found


def first_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """Tokens [S] int64 that a text may begin with: all but the special ones and those the model has no row for."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = [i for i in range(min(len(tokenizer), vocabulary)) if i not in special]
    if not known:
        raise InputError("the tokenizer has no ordinary tokens", hint="give calibration text with --data FILE")
    return torch.tensor(known, dtype=torch.int64)


def open_sampler(model: Any, tokenizer: Any) -> Sampler:
    """A sampler for a model and its tokenizer."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return Sampler(model, first_tokens(tokenizer, vocabulary), bos_prefix(tokenizer))


def estimate_sampling(
    config: Any, parameters: int, rows: int, seq_len: int, flops_per_second: float, bandwidth: float
) -> tuple[float, int]:
    """Seconds and bytes of memory that `Sampler.sample` will take, the model in float32 included.

    Args:
        config: The model's transformers config.
        parameters: Weights of the whole model; those of one expert count once each.
        rows: Rows to write.
        seq_len: Tokens per row.
        flops_per_second: The machine's rate for large float32 products.
        bandwidth: Bytes per second that it reads from memory.
    """
    text = config.get_text_config()
    heads = config_value(text, "num_attention_heads") or 1
    head_dim = config_value(text, "head_dim") or text.hidden_size // heads
    per_token = 2 * 4 * text.num_hidden_layers * (config_value(text, "num_key_value_heads") or heads) * head_dim
    kept = rows * seq_len * per_token
    logits = 3 * 4 * rows * text.vocab_size
    # every step reads the weights once, and the keys and values so far: half of them on average
    compute = 2 * parameters * rows * seq_len / (flops_per_second * _SKINNY)
    reading = seq_len * (4 * parameters + kept / 2) / bandwidth
    return compute + reading, 4 * parameters + kept + logits


@contextlib.contextmanager
def _fast_head(model: Any) -> Iterator[None]:
    """Lets the output head compute `weight @ hidden`: for few rows 1.3 to 2 times the rate of `hidden @ weight`."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None or head.weight.device.type != "cpu":
        yield
        return

    def forward(hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return torch.mm(head.weight, flat.t()).t().reshape(*hidden.shape[:-1], -1)

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward  # the class's own shows again


def _read(key: SamplingKey, progress: Progress) -> Tensor | None:
    """The tokens in the cache; None where there are none, or none that can be trusted."""
    path = key.file
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tokens: Tensor = file.get_tensor("tokens")
            digest = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        progress.note(f"the cached calibration text {path} is damaged and is written anew ({error})")
        return None
    if tokens.shape != (key.rows, key.seq_len) or tokens.dtype != torch.int32 or digest != _digest(tokens):
        progress.note(f"the cached calibration text {path} is damaged and is written anew")
        return None
    return tokens.long()


def _write(key: SamplingKey, tokens: Tensor, progress: Progress) -> None:
    path, tokens = key.file, tokens.int()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            save_file({"tokens": tokens}, Path(scratch) / path.name, metadata={"sha256": _digest(tokens)})
            os.replace(Path(scratch) / path.name, path)
    except (OSError, SafetensorError) as error:
        progress.warn(f"the calibration text could not be kept in {path.parent} for the next run: {error}")


def _digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
