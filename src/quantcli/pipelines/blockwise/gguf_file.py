"""The last step of a run that ends in a GGUF file: its shards become that file."""

import re
from pathlib import Path

from quantcli import __version__
from quantcli.models.checkpoint import Checkpoint, TensorEntry, read_header
from quantcli.models.gguf.families import family_of
from quantcli.models.gguf.names import tensors_of
from quantcli.models.gguf.vocabulary import read_vocabulary
from quantcli.models.gguf.writer import GgufContent, write_gguf
from quantcli.models.skeleton import disk_name
from quantcli.pipelines.planning.plan import Plan

__all__ = ["file_name", "join_to_gguf"]


def file_name(plan: Plan) -> str:
    """As llama.cpp's users name files: the model, then the mix."""
    return f"{_model_name(plan)}-{(plan.options.gguf_type or '').upper()}.gguf"


def join_to_gguf(plan: Plan, folder: Path) -> None:
    """Makes the file of a folder's shards, which are deleted once it is whole; may be repeated where interrupted."""
    path, shards = folder / file_name(plan), sorted(folder.glob("shard-*.safetensors"))
    if not path.is_file():
        entries: dict[str, TensorEntry] = {}
        for shard in shards:
            entries |= read_header(shard)
        config = plan.skeleton.config.get_text_config()
        head = plan.layout.head if plan.layout.head in plan.targets or not plan.layout.tied else None
        family = family_of(config)
        targets = [*plan.targets.values(), *([plan.embedding] if plan.embedding is not None else [])]
        tensors = tensors_of(plan.skeleton, family, head=head)
        stored = {*entries, *(target.disk for target in targets)}
        names = {
            source: disk
            for tensor in tensors
            for source in tensor.sources
            if (disk := disk_name(source, plan.skeleton, stored)) is not None
        }
        if head is not None:  # tied before: named as it is written
            names.setdefault(f"{head}.weight", f"{head}.weight")
        content = GgufContent(
            config,
            family,
            tensors,
            read_vocabulary(plan.folder, config.vocab_size),
            _model_name(plan),
            plan.options.gguf_type,
            f"quantcli {__version__}",
        )
        types = {target.disk: target.scheme.block_type or "" for target in targets}
        write_gguf(path, Checkpoint(folder, plan.checkpoint.config, entries), names, types, content)
    for shard in shards:
        shard.unlink()


def _model_name(plan: Plan) -> str:
    """The folder that the model came from, without what no file may be called."""
    path = plan.folder.resolve()
    name = path.parent.name if path.name == "model" else path.name
    return re.sub(r"[^\w.+-]+", "-", name) or "model"
