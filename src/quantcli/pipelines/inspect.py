"""`quantcli inspect`: what a folder or graph is, how it came to be, and whether its files are as they were written."""

import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.errors import UsageError
from quantcli.folder import MANIFEST, Manifest, file_digest, fingerprint, read_manifest, resolve_model_folder
from quantcli.json_files import read_json
from quantcli.options import GRAPH_READERS, READER_NAMES
from quantcli.tensors.inventory import (
    BitsRow,
    WeightRecord,
    bits_histogram,
    parameter_count,
    quantized_bits_per_weight,
    total_bits_per_weight,
)

if TYPE_CHECKING:
    from quantcli.graphs.model.inspect import GraphContents, NodeRecord

__all__ = ["ONLY_CHECKPOINTS", "FileCheck", "Inspection", "Step", "run", "weight_records", "weight_size_bytes"]

_WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "*.onnx_data", "*.data", "*.bin.data")
_MAX_STEPS = 32
ONLY_CHECKPOINTS = "it opens checkpoints"
"""Why a reader does not open a graph."""


@dataclass(frozen=True)
class Step:
    """One command of a folder's history."""

    command: str
    """The subcommand."""
    parent: str
    """Name of the folder it started from."""
    options: dict[str, Any]
    """Its resolved options."""
    metrics: dict[str, Any]
    """Figures measured then."""
    versions: dict[str, str]
    """Packages that took part."""


@dataclass(frozen=True)
class FileCheck:
    """One file that the manifest lists, or that lies beside the listed ones."""

    name: str
    """Path inside the output folder."""
    state: str
    """ok, changed, missing, or extra where the manifest does not know it."""


@dataclass(frozen=True)
class Inspection:
    """What was found."""

    folder: str
    """The model folder, or the graph file that was named."""
    what: str
    """In words: float checkpoint, GPTQ checkpoint, ONNX Runtime GenAI folder, ..."""
    format: str
    """Storage: safetensors float16, gptq v1, ONNX opset, ..."""
    model_type: str | None
    """Architecture, where the folder says so."""
    parameters: int
    """Numbers that the weights stand for; tied weights count once."""
    size_bytes: int
    """Weight files."""
    quantized_bits_per_weight: float | None
    """Of what is quantized, with scales and zero points."""
    bits_per_weight: float | None
    """Of the whole model."""
    share: dict[str, Any] | None
    """How much of the matrices was quantized, and what was not, as the manifest says."""
    histogram: list[BitsRow]
    """Weights by bits."""
    operators: dict[str, int]
    """Nodes of a graph by operator, most first; empty for checkpoints."""
    opens: dict[str, str | None]
    """By reader, why it does not open the folder as it is; None where it does. Empty for formats of others."""
    nodes: list["NodeRecord"]
    """A graph's nodes with weights, where they were asked for."""
    history: list[Step]
    """How it came to be, latest command first; empty where we did not make it."""
    files: list[FileCheck]
    """Digests, file by file; empty where there is no manifest."""

    @property
    def intact(self) -> bool:
        """Whether every listed file is as it was written."""
        return all(f.state in ("ok", "extra") for f in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"intact": self.intact}


def run(folder: Path, *, nodes: bool = False) -> Inspection:
    """Looks at a folder or a graph file without loading its weights; digests read every byte.

    Args:
        folder: Model folder, output folder of ours, or .onnx or .gguf file.
        nodes: Whether to list the nodes of a graph that have weights.

    Raises:
        InputError: it holds no model, or is damaged.
        UsageError: nodes of a checkpoint.
    """
    is_file = folder.suffix in (".onnx", ".gguf") and folder.is_file()
    model = folder if is_file else resolve_model_folder(folder)
    folder = folder.parent if is_file else folder
    manifest = read_manifest(folder)
    graphs = _read_graphs(model)
    if nodes and not graphs:
        raise UsageError(f"{model} is no ONNX graph, --nodes has nothing to list", hint="leave --nodes out")
    records = _records(model, graphs)
    what, stored = _describe(model, graphs)
    return Inspection(
        folder=str(model),
        what=what,
        format=stored,
        model_type=_model_type(model),
        parameters=parameter_count(records),
        size_bytes=_file_size_bytes(model, graphs[0].data if graphs else set())
        if is_file
        else weight_size_bytes(model),
        quantized_bits_per_weight=quantized_bits_per_weight(records),
        bits_per_weight=total_bits_per_weight(records),
        share=None if manifest is None else manifest.metrics.get("share"),
        histogram=bits_histogram(records),
        operators=dict(sum((g.operators for g in graphs), Counter[str]()).most_common()),
        opens=_opens(model, graphs),
        nodes=[node for g in graphs for node in g.nodes] if nodes else [],
        history=_history(folder, manifest),
        files=[] if manifest is None else _check_files(_root(folder), manifest),
    )


def weight_records(model: Path) -> list[WeightRecord]:
    """The weights of a model folder, checkpoint or ONNX.

    Raises:
        InputError: it holds neither.
    """
    return _records(model, _read_graphs(model))


def _records(model: Path, graphs: list["GraphContents"]) -> list[WeightRecord]:
    if graphs:
        return [record for graph in graphs for record in graph.records]
    from quantcli.models.inspect import checkpoint_records
    from quantcli.models.opened import open_checkpoint

    return checkpoint_records(open_checkpoint(model))


def weight_size_bytes(model: Path) -> int:
    """Bytes of the files that hold weights and graphs."""
    return sum(p.stat().st_size for p in {p for pattern in _WEIGHT_FILES for p in model.glob(pattern)})


def _file_size_bytes(graph: Path, data: set[str]) -> int:
    """Bytes of a graph file and of those beside it that hold its weights."""
    return sum(p.stat().st_size for p in (graph, *(graph.parent / name for name in data)))


def _read_graphs(model: Path) -> list["GraphContents"]:
    """A graph file, or those of a folder; a checkpoint that also holds an exported graph stays a checkpoint."""
    if model.suffix == ".gguf":
        return []
    paths = [model] if model.is_file() else sorted(model.glob("*.onnx"))
    if not paths or (model.is_dir() and any(model.glob("*.safetensors"))):
        return []
    from quantcli.graphs.model.inspect import read_contents

    return [read_contents(path) for path in paths]


def _describe(model: Path, graphs: list["GraphContents"]) -> tuple[str, str]:
    if graphs:
        opsets = graphs[0].opsets
        stored = "ONNX, " + ", ".join(f"{name or 'ai.onnx'} {version}" for name, version in opsets.items())
        genai = (model / "genai_config.json").is_file()  # not beside a file: that is one graph of it
        return ("ONNX Runtime GenAI folder" if genai else "ONNX model"), stored
    from quantcli.models.gguf.checkpoint import GgufCheckpoint
    from quantcli.models.opened import open_checkpoint

    checkpoint = open_checkpoint(model)
    config = checkpoint.config.get("quantization_config")
    if isinstance(checkpoint, GgufCheckpoint):
        return "GGUF file", f"gguf, {checkpoint.path.name}: {checkpoint.types_in_words()}"
    if not isinstance(config, dict):
        dtypes = sorted({str(e.dtype).removeprefix("torch.") for e in checkpoint.entries.values()})
        return "float checkpoint", f"safetensors, {', '.join(dtypes)}"
    method = str(config.get("quant_method"))
    names = ("checkpoint_format", "format", "packing_format", "version")
    layout = next((config[name] for name in names if config.get(name)), None)
    if method == "bitsandbytes":
        layout = "int8" if config.get("load_in_8bit") else config.get("bnb_4bit_quant_type")
    keys = ("bits", "group_size", "sym", "zero_point", "desc_act", "bnb_4bit_use_double_quant")
    details = [f"{k.removeprefix('bnb_4bit_')} {config[k]}" for k in keys if k in config]
    name = method if layout in (None, method) else f"{method} ({layout})"
    return f"{method.upper()} checkpoint", ", ".join(["safetensors", name, *details])


def _opens(model: Path, graphs: list["GraphContents"]) -> dict[str, str | None]:
    """Who opens it, by the table of readers; a checkpoint reaches those of graphs through a command of ours."""
    if graphs:
        folder = (model / "genai_config.json").is_file()
        missing = {"genai": None if folder else "no genai_config.json stands beside it"}
        return {name: missing.get(name) if name in GRAPH_READERS else ONLY_CHECKPOINTS for name in READER_NAMES}
    from quantcli.formats.opening import opens_in
    from quantcli.models.inspect import checkpoint_contents
    from quantcli.models.opened import open_checkpoint

    contents = checkpoint_contents(open_checkpoint(model))
    if contents is None:
        return {}
    return {name: None if why is None else why.words for name, why in opens_in(contents).items()}


def _model_type(model: Path) -> str | None:
    if model.suffix == ".gguf":
        from quantcli.models.opened import open_checkpoint

        return str(open_checkpoint(model).config["model_type"])
    model = model.parent if model.is_file() else model
    if (model / "config.json").is_file():
        found = read_json(model / "config.json", dict[str, Any], "a model configuration").get("model_type")
        if isinstance(found, str):
            return found
    if (model / "genai_config.json").is_file():
        from quantcli.graphs.model.genai_config import read_genai_config

        return read_genai_config(model).model.type
    return None


def _root(folder: Path) -> Path:
    """The folder that holds the manifest."""
    return folder if (folder / MANIFEST).is_file() else folder.resolve().parent


def _history(folder: Path, manifest: Manifest | None) -> list[Step]:
    steps: list[Step] = []
    while manifest is not None and len(steps) < _MAX_STEPS:
        parent = str(manifest.parent.get("name", "?"))
        steps.append(Step(manifest.command, parent, manifest.options, manifest.metrics, manifest.versions))
        found = _find_parent(_root(folder), manifest)
        if found is None:
            break
        folder, manifest = found, read_manifest(found)
    return steps


def _find_parent(root: Path, manifest: Manifest) -> Path | None:
    """The folder that a folder was made from, if it lies beside it or here and is still the same."""
    wanted = manifest.parent.get("fingerprint")
    name = Path(str(manifest.parent.get("name", ""))).name
    for candidate in (root.resolve().parent / name, Path(name)) if name else ():
        if os.path.isdir(candidate) and fingerprint(resolve_model_folder(candidate)) == wanted:
            return candidate
    return None


def _check_files(root: Path, manifest: Manifest) -> list[FileCheck]:
    checks = []
    for name, facts in manifest.files.items():
        path = root / name
        if not os.path.isfile(path):  # a name may be one that no system takes
            state = "missing"
        elif path.stat().st_size != facts["size_bytes"] or file_digest(path) != facts["sha256"]:
            state = "changed"
        else:
            state = "ok"
        checks.append(FileCheck(name, state))
    present = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} - {MANIFEST}
    checks += [FileCheck(name, "extra") for name in sorted(present - set(manifest.files))]
    return checks
