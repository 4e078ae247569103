"""Where an ONNX graph comes from: a file, or a folder with one graph and what belongs to it."""

import glob
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.errors import InputError
from quantcli.folder import describe_parent, fingerprint, resolve_model_folder
from quantcli.graphs.model.files import Model, data_files, open_graph
from quantcli.graphs.model.genai_config import GENAI_CONFIG, GenaiConfig, read_genai_config
from quantcli.json_files import read_json
from quantcli.progress import Progress

__all__ = ["GraphSource", "axis_lengths", "context_length", "is_graph", "locate_graph"]


def is_graph(model: str) -> bool:
    """Whether a model is an ONNX file, or a folder with graphs and no checkpoint."""
    path = Path(model)
    if path.suffix == ".onnx" and not path.is_dir():
        return True
    if not path.is_dir():
        return False
    folder = resolve_model_folder(path)
    return any(folder.glob("*.onnx")) and not any(folder.glob("*.safetensors"))


def locate_graph(model: Path) -> Path:
    """The graph that is meant: an .onnx file, or the only one of a folder.

    Raises:
        InputError: there is none, or several.
    """
    if model.is_file():
        return model
    if model.suffix == ".onnx" and not model.exists():
        raise InputError(f"{model} does not exist", hint="give an .onnx file or a folder with one")
    folder = resolve_model_folder(model)
    found = sorted(folder.glob("*.onnx"))
    if len(found) != 1:
        names = ", ".join(p.name for p in found)
        raise InputError(
            f"{folder} holds {len(found)} ONNX graphs" + (f": {names}" if names else ""),
            hint="give the .onnx file itself",
        )
    return found[0]


@dataclass(frozen=True)
class GraphSource:
    """A graph on disk."""

    path: Path
    """The .onnx file."""
    alone: bool
    """Whether the file was named, not its folder: what lies beside it does not travel along."""
    data: frozenset[str]
    """Names of the files that hold its weights."""
    size_bytes: int
    """Of the file and its weights."""
    digest: str
    """Fingerprint of the folder, or of the graph's own files where it was named alone."""

    @classmethod
    def open(cls, model: str) -> tuple["GraphSource", Model]:
        """The graph and where it lies; its weights stay on disk.

        Raises:
            InputError: there is none, or it cannot be read.
        """
        path = locate_graph(Path(model))
        graph = open_graph(path)
        alone = Path(model).is_file()
        data = frozenset(data_files(graph))
        size = path.stat().st_size + sum((path.parent / name).stat().st_size for name in data)
        own = [glob.escape(name) for name in (path.name, *data)]
        digest = fingerprint(path.parent, own) if alone else fingerprint(path.parent)
        found = cls(path, alone, data, size, digest)
        if not alone:
            _ = found.genai_config  # it travels along: a broken one is refused before the work
        return found, graph

    @property
    def folder(self) -> Path:
        """Where the graph and its data lie."""
        return self.path.parent

    @property
    def genai_config(self) -> GenaiConfig | None:
        """`genai_config.json` of a folder that ONNX Runtime GenAI runs.

        Raises:
            InputError: it is not what that runs.
        """
        return read_genai_config(self.folder) if (self.folder / GENAI_CONFIG).is_file() else None

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""
        if self.alone:
            return {"name": self.path.name, "fingerprint": self.digest}
        return describe_parent(self.folder, self.digest)

    def copy_companions(self, target: Path, progress: Progress) -> None:
        """Copies tokenizer, configurations and whatever else stands beside the graph; says what it leaves."""
        if self.alone:
            return
        for companion in sorted(self.folder.iterdir()):
            if companion.name in {self.path.name, *self.data} or companion.name.startswith("."):
                continue
            if companion.is_file():
                shutil.copyfile(companion, target / companion.name)
            else:
                progress.note(f"{companion.name} beside the graph is no file, it is not copied")


def axis_lengths(source: GraphSource) -> dict[str, int]:
    """Lengths of axes that a language model's graph only names, as far as its folder says them."""
    config = source.genai_config
    if config is None:
        return {}
    heads, size = config.model.decoder.num_key_value_heads, config.model.decoder.head_size
    axes = {"kv_cache_dim": size, "head_size": size, "head_dim": size, "num_key_value_heads": heads}
    return {name: length for name, length in axes.items() if length is not None}


def context_length(source: GraphSource) -> int | None:
    """Tokens that a graph of text takes; None where its folder does not say.

    GenAI's configuration says it; of an encoder the model's own and its tokenizer's, which knows of positions that are
    kept for padding.
    """
    config = source.genai_config
    if config is not None:
        return config.model.context_length
    if source.alone:
        return None
    found = (
        read_json(source.folder / name, dict[str, Any], "a JSON object").get(key)
        for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length"))
        if (source.folder / name).is_file()
    )
    counts = [n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0]
    return min(counts, default=None)
