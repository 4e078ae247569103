"""`genai_config.json`, by which ONNX Runtime GenAI runs a traced graph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantcli.export.plain_cache import PlainCache
from quantcli.folder import write_json
from quantcli.graphs.model.genai_config import GENAI_CONFIG
from quantcli.json_files import read_json

__all__ = ["write_genai_config"]

_FEW_POSITIONS = 2048  # where a configuration sets no limit (alibi, recurrent positions)


def write_genai_config(folder: Path, target: Path, model: Any, cache: PlainCache, inputs: Sequence[str]) -> None:
    """Writes it.

    Args:
        folder: The checkpoint, for its generation settings.
        target: The folder with model.onnx.
        model: The loaded checkpoint.
        cache: What its layers keep.
        inputs: Names of the graph's inputs that are no cache.
    """
    config = model.config.get_text_config(decoder=True)
    path = folder / "generation_config.json"
    generation = read_json(path, dict[str, Any], "a generation configuration") if path.is_file() else {}

    def token(name: str) -> Any:
        found = generation.get(name)
        return found if found is not None else getattr(config, name, None)

    end, pad, start = token("eos_token_id"), token("pad_token_id"), token("bos_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    context = int(getattr(config, "max_position_embeddings", None) or _FEW_POSITIONS)
    settings = {
        "model": {
            "bos_token_id": start if start is not None else first_end or 0,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": cache.widths[0],
                "hidden_size": config.hidden_size,
                "inputs": {
                    **{name: name for name in inputs},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": cache.layers,
                "num_key_value_heads": cache.heads[0],
            },
            "eos_token_id": end if end is not None else 0,
            "pad_token_id": pad if pad is not None else first_end or 0,
            "type": "decoder",
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": False,
            "repetition_penalty": generation.get("repetition_penalty", 1.0),
            "temperature": generation.get("temperature", 1.0),
            "top_k": generation.get("top_k", 50),
            "top_p": generation.get("top_p", 1.0),
        },
    }
    write_json(target / GENAI_CONFIG, settings)
