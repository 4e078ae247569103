"""What a checkpoint is for, found in its configuration, and the transformers class that runs it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto as auto

from quantcli.errors import InputError, first_line
from quantcli.models.checkpoint import Checkpoint
from quantcli.models.load import no_progress_bar, refuse_missing

__all__ = ["GENERATION", "SEEING", "TASKS", "TRANSLATION", "find_task", "load_for_task"]

GENERATION = "text-generation"
"""Decoder-only language models, which have a pipeline of their own."""
TRANSLATION = ("text2text-generation", "automatic-speech-recognition")
"""Encoder and decoder."""
SEEING = "image-text-to-text"
"""A language model with a tower for images, of which the language model is captured."""
_CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    GENERATION: ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    TRANSLATION[0]: ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    TRANSLATION[1]: ("AutoModelForSpeechSeq2Seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    SEEING: ("AutoModelForImageTextToText", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    "text-classification": (
        "AutoModelForSequenceClassification",
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token-classification": ("AutoModelForTokenClassification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    "question-answering": ("AutoModelForQuestionAnswering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    "fill-mask": ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "image-classification": ("AutoModelForImageClassification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "audio-classification": ("AutoModelForAudioClassification", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
    "ctc": ("AutoModelForCTC", auto.MODEL_FOR_CTC_MAPPING_NAMES),
    "feature-extraction": ("AutoModel", auto.MODEL_MAPPING_NAMES),
}
TASKS = tuple(_CLASSES)
"""All that a checkpoint can be captured for."""


def find_task(config: Mapping[str, Any]) -> str:
    """The task of a checkpoint.

    Args:
        config: Its config.json. The architecture decides; without one, what its model type is mostly used for.
    """
    names, kind = config.get("architectures") or (), config.get("model_type")
    for name in names if isinstance(names, list) else ():
        for task, (_, classes) in _CLASSES.items():
            if name in classes.values():
                return task
        if hasattr(transformers, str(name)) and not str(name).endswith("ForConditionalGeneration"):
            return "feature-extraction"  # a tower, or a head of its own: its class says what it gives
    if not names:
        for task in TRANSLATION:
            if kind in _CLASSES[task][1]:
                return task
        reads_both_ways = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
        if kind in auto.MODEL_MAPPING_NAMES and (reads_both_ways or kind not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            return "feature-extraction"
    return GENERATION  # which says what it expects where it cannot be


def load_for_task(folder: Path, task: str | None, trust_remote_code: bool) -> Any:
    """Opens a float checkpoint for a task.

    Args:
        folder: The checkpoint.
        task: One of `TASKS`, or None for what its configuration says.
        trust_remote_code: Run model code that the folder brings along.

    Returns:
        A transformers model in evaluation mode, float32.

    Raises:
        InputError: it cannot be read, lacks weights for the task, or is quantized.
    """
    checkpoint = Checkpoint.open(folder)
    checkpoint.require_finite()
    if checkpoint.config.get("quantization_config") is not None:
        raise InputError(
            f"{folder} is quantized, and no decoder-only language model: only those are captured from codes",
            hint="capture the float model, then quantize the graph",
        )
    names = checkpoint.config.get("architectures") or [""]
    own = getattr(transformers, str(names[0]), None) if task is None else None
    opener = own or getattr(transformers, _CLASSES[task or find_task(checkpoint.config)][0])
    try:
        with no_progress_bar():
            model, info = opener.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                output_loading_info=True,
                **({"trust_remote_code": trust_remote_code} if own is None else {}),
            )
    except Exception as error:  # whatever model code raises
        raise InputError(f"{folder} cannot be opened by transformers: {first_line(error)}") from error
    refuse_missing(folder, info["missing_keys"])
    return model.eval().requires_grad_(False)
