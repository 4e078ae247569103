"""`genai_config.json`, by which ONNX Runtime GenAI runs a graph: as much of it as we read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from quantcli.json_files import read_json

__all__ = ["GENAI_CONFIG", "Decoder", "GenaiConfig", "ModelSection", "read_genai_config"]

GENAI_CONFIG = "genai_config.json"
Count = Annotated[int, Meta(ge=1, lt=1 << 31)]
Token = Annotated[int, Meta(ge=0, lt=1 << 31)]


@dataclass(frozen=True)
class Decoder:
    """`model.decoder`."""

    filename: str = "model.onnx"
    """The graph, beside the file."""
    head_size: Count | None = None
    """Width of a head."""
    num_key_value_heads: Count | None = None
    """Heads of the cache."""


@dataclass(frozen=True)
class ModelSection:
    """`model`."""

    type: str | None = None
    """The architecture."""
    context_length: Count | None = None
    """Positions."""
    eos_token_id: Token | list[Token] | None = None
    """Tokens that end an answer."""
    decoder: Decoder = field(default_factory=Decoder)
    """Its graph."""


@dataclass(frozen=True)
class GenaiConfig:
    """The file."""

    model: ModelSection = field(default_factory=ModelSection)
    """What it says of the model."""


def read_genai_config(folder: Path) -> GenaiConfig:
    """What a folder's file says.

    Raises:
        InputError: there is none, or it cannot be.
    """
    return read_json(folder / GENAI_CONFIG, GenaiConfig, "a GenAI configuration")
