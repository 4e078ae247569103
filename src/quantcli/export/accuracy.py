"""What int8 arithmetic (accuracy level 4 of MatMulNBits) does to a captured model: measured on the model itself.

Level 0 multiplies float32 activations with dequantized weights. Level 4 rounds the activations of each block to int8:
faster on most processors, and not the same function. Which top tokens change is counted over running text.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from quantcli.errors import InputError, first_line

__all__ = [
    "COMPARED_TOKENS",
    "LARGEST_FLIP_RATE",
    "LevelCheck",
    "Probe",
    "compare_levels",
    "probe",
    "refuse_other_function",
]

LARGEST_FLIP_RATE = 0.005
"""Level 4 is taken by default only where at most this share of top tokens changes: 2 of 400."""
SMALLEST_GAIN = 1.05
"""… and only where it decodes at least this much faster, since otherwise it costs accuracy for nothing."""
COMPARED_TOKENS = 12
"""First tokens of the text whose logits are compared with the checkpoint's own."""
LARGEST_ERROR = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.05}
"""Norm of the difference to the checkpoint's logits over their norm, by the dtype that the checkpoint ran in: the
exporters' approximations (a rounded constant, another gelu) stay below 0.001, a wrong graph is off by more than 0.3."""
_SAMPLE_TOKENS = 16
_TIMED_TOKENS = 24


@dataclass(frozen=True)
class Probe:
    """What a folder did when it was opened."""

    top: np.ndarray
    """[T] most likely next token after each position of the text."""
    first: np.ndarray
    """[COMPARED_TOKENS, V] float32 logits of the first positions."""
    sample: tuple[int, ...]
    """Tokens that it wrote after the prompt."""
    tokens_per_second: float
    """Decoding, batch of one."""


@dataclass(frozen=True)
class LevelCheck:
    """Level 4 against level 0."""

    flip_rate: float
    """Share of positions whose most likely next token changes."""
    positions: int
    """Positions compared."""
    exact_tokens_per_second: float
    """Decoding at level 0."""
    int8_tokens_per_second: float
    """Decoding at level 4."""

    @property
    def worth_it(self) -> bool:
        """Whether level 4 keeps the top tokens and is faster."""
        gain = self.int8_tokens_per_second / self.exact_tokens_per_second
        return self.flip_rate <= LARGEST_FLIP_RATE and gain >= SMALLEST_GAIN


def probe(folder: Path, text: Sequence[int], prompt: Sequence[int], longest: int) -> Probe:
    """Opens a GenAI folder, scores a text and continues a prompt.

    Args:
        folder: The folder.
        text: Tokens to score, at most `longest` of them are used.
        prompt: Tokens to continue greedily.
        longest: Positions that the model has.

    Raises:
        InputError: the folder cannot be opened, does not run or gives values that are not finite.
    """
    try:
        model = og.Model(str(folder))
        logits = _logits(model, text[: longest - 1])
        room = min(_TIMED_TOKENS, longest - len(prompt))
        params = og.GeneratorParams(model)
        params.set_search_options(
            max_length=len(prompt) + room, min_length=len(prompt) + room, do_sample=False, num_beams=1
        )
        generator = og.Generator(model, params)
        generator.append_tokens(np.asarray([prompt], np.int32))
        written: list[int] = []
        seconds: list[float] = []
        while not generator.is_done() and len(written) < room:
            begin = time.perf_counter()
            generator.generate_next_token()
            seconds.append(time.perf_counter() - begin)
            written.append(int(generator.get_next_tokens()[0]))
    except Exception as error:  # the package raises RuntimeError and types of its own
        raise InputError(f"the captured graph does not run: {first_line(error)}") from error
    if not np.isfinite(logits).all():
        raise InputError("the captured graph gives logits that are not finite")
    if not written:
        raise InputError("the captured graph writes no token")
    pace = 1 / float(np.median(seconds[1:] or seconds))
    return Probe(logits.argmax(-1), logits[:COMPARED_TOKENS].copy(), tuple(written[:_SAMPLE_TOKENS]), pace)


def refuse_other_function(found: np.ndarray, wanted: np.ndarray, dtype: str, model_type: str, exporter: str) -> None:
    """Compares a captured graph with the checkpoint itself: exporters can be wrong about an architecture in silence.

    Args:
        found: Logits of the graph at accuracy level 0, [T, V].
        wanted: Logits of the checkpoint, [T, V].
        dtype: The dtype that the checkpoint ran in.
        model_type: Named in the message.
        exporter: Named in the message.

    Raises:
        InputError: they differ by more than arithmetic explains.
    """
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    if not error <= LARGEST_ERROR[dtype]:
        raise InputError(
            f"the {exporter} exporter's graph of model type {model_type!r} computes something else than the "
            f"checkpoint: its logits differ by {error:.1%}",
            hint="add --exporter torch" if exporter == "genai" else None,
        )


def compare_levels(exact: Probe, int8: Probe) -> LevelCheck:
    """Counts the top tokens that level 4 changes."""
    flips = float((exact.top != int8.top).mean())
    return LevelCheck(flips, len(exact.top), exact.tokens_per_second, int8.tokens_per_second)


def _logits(model: og.Model, tokens: Sequence[int]) -> np.ndarray:
    """[T, V] float32."""
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens) + 1, do_sample=False, num_beams=1)
    generator = og.Generator(model, params)
    generator.append_tokens(np.asarray([tokens], np.int32))
    logits: np.ndarray = np.asarray(generator.get_output("logits"))[0].astype(np.float32)
    return logits
