"""`quantcli convert-adapter`: a peft adapter becomes a file for an ONNX base that exists."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantcli.adapters.files import FILE_FORMATS, write_adapter
from quantcli.adapters.peft_folder import read_peft
from quantcli.adapters.slots import find_slots, fit
from quantcli.errors import InputError, ResourceError, UsageError
from quantcli.graphs.model.files import open_graph
from quantcli.models.source import locate_model
from quantcli.options import ConvertAdapterOptions

__all__ = ["ConvertAdapterResult", "run"]

_GRAPH = "model.onnx"


@dataclass(frozen=True)
class ConvertAdapterResult:
    """What `run` wrote."""

    output: Path
    """The file."""
    linears: int
    """Linears that it changes."""
    size_bytes: int
    """Its bytes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self) | {"output": str(self.output)}


def run(options: ConvertAdapterOptions) -> ConvertAdapterResult:
    """Converts the adapter, once its linears and shapes are found in the base.

    Raises:
        UsageError: the file exists, or has the ending of another format.
        InputError: a base or adapter that cannot be read, or that do not belong together.
        ResourceError: the file cannot be written.
    """
    output = _output_file(options)
    base = locate_model(options.model)
    if not (base / _GRAPH).is_file():
        raise InputError(f"{base} holds no {_GRAPH}", hint="give a folder that `quantcli generate-adapter` wrote")
    slots = find_slots(open_graph(base / _GRAPH))
    if not slots:
        raise InputError(
            f"{base / _GRAPH} has no inputs for adapters", hint="make a base with `quantcli generate-adapter`"
        )
    layers = read_peft(options.adapter)
    values = fit(layers, slots)
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_adapter(partial, values, options.adapter_format)
        os.replace(partial, output)
    except OSError as error:
        raise ResourceError(f"cannot write {output}: {error.strerror}", hint="give another -o") from error
    finally:
        partial.unlink(missing_ok=True)
    return ConvertAdapterResult(output, len(layers), output.stat().st_size)


def _output_file(options: ConvertAdapterOptions) -> Path:
    """The file with its ending."""
    ending = FILE_FORMATS[options.adapter_format]
    output = options.output
    if output.suffix in FILE_FORMATS.values() and output.suffix != ending:
        raise UsageError(f"{output} has the ending of another format than {options.adapter_format}")
    if output.suffix != ending:
        output = output.with_name(output.name + ending)
    if output.is_dir() or (output.exists() and not options.force):
        raise UsageError(f"{output} exists", hint="add --force to replace it, or give another -o")
    return output
