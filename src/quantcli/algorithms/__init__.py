"""The algorithms; the folder listing is the registry.

An algorithm is one file: idea and paper, a frozen options dataclass, a pure function on tensors, and `ALGORITHM`. Files
import torch inside their functions only: `quantcli algorithms` lists them without waiting for it.
"""

import dataclasses
import importlib
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantcli.errors import UsageError, nearest

__all__ = [
    "ALGORITHMS",
    "KEEP_FLOAT",
    "UNIFORM_FORMATS",
    "Algorithm",
    "Step",
    "find",
    "find_chain",
    "make_options",
    "make_steps",
]

Calibration = Literal["none", "optional", "required"]
UNIFORM_FORMATS = (
    "gptq", "awq", "compressed-tensors", "float", "int-quantized", "float-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)  # fmt: skip
"""Formats that hold the grids which most rounders round to."""


@dataclass(frozen=True)
class Algorithm:
    """One algorithm and what it can do."""

    name: str
    """As on the command line; the file's name."""
    kind: Literal["rounder", "transform", "graph", "trainer"]
    """rounder: weight to codes; transform: float model to float model of the same function; graph: ONNX graph to ONNX
    graph, activations too; trainer: changes what a rounder has left of a whole model, by gradient."""
    summary: str
    """One line."""
    bits: tuple[int, ...]
    """Widths it makes."""
    calibration: Calibration
    """Whether it needs the statistics of calibration text."""
    options: type
    """Frozen dataclass of its own options; the fields' docstrings are their help."""
    run: Callable[..., Any]
    """rounder: (weight [N, K], scheme, options, statistics or None) -> QuantizedTensor; transform: see its file;
    graph: (source file, target file, options, reader of samples or None) -> what became of it; trainer: see
    its file."""
    inputs: tuple[str, ...] = ("checkpoint",)
    """Kinds of model it takes: checkpoint, onnx."""
    formats: tuple[str, ...] = UNIFORM_FORMATS
    """Formats that hold its result exactly; the first is taken where none is asked for."""
    scope: Literal["stage", "model", "graph"] = "stage"
    """Of a transform: whether it works on each input of linears as text reaches it, on the model beforehand, or on an
    ONNX graph beforehand (source file, target file, options, reader of samples) -> what became of it."""
    on_arrays: Callable[..., Any] | None = None
    """Of a rounder without statistics: (weight [N, K], scheme, options) -> QuantizedArray, the same in numpy: graphs
    then need no torch."""
    codebook: str | None = None
    """Of a rounder: the codebook that its codes name; None for uniform grids."""
    beats_rtn: bool = True
    """Of a rounder: whether it promises less error than round-to-nearest at the same bits and group size."""
    group_size: int | None = None
    """Of a transform: columns that share a scale where nothing else is said and they divide all columns. Of a rounder:
    the only ones that it makes."""
    then: str | None = None
    """Of a transform: the rounder that follows where none is named; without one, the result is a float model."""
    sees: Literal["moments", "channels", "outliers"] = "moments"
    """Of a transform of scope stage: what it is shown of each input, Statistics or Channels of `tensors`. Of a rounder:
    outliers where it needs no statistics, and the report tells of OutlierCounts."""
    idle: tuple[str, ...] = ()
    """Options that another kind of model has a use for, and this one has not."""
    on_graphs: "Algorithm | None" = None
    """The same of ONNX graphs, where that is another function."""


@dataclass(frozen=True)
class Step:
    """An algorithm with its options."""

    algorithm: Algorithm
    settings: Any


def _load() -> Iterator[Algorithm]:
    for kind in pkgutil.iter_modules(__path__):
        package = importlib.import_module(f"{__name__}.{kind.name}")
        for module in pkgutil.iter_modules(package.__path__):
            found = importlib.import_module(f"{package.__name__}.{module.name}")
            yield found.ALGORITHM


ALGORITHMS: Mapping[str, Algorithm] = {a.name: a for a in _load()}


def find(name: str) -> Algorithm:
    """The algorithm of that name, or a UsageError that names the nearest."""
    if name not in ALGORITHMS:
        raise UsageError(f"unknown algorithm {name!r}, {nearest(name, ALGORITHMS)}", hint="see `quantcli algorithms`")
    return ALGORITHMS[name]


@dataclass(frozen=True)
class _Nothing:
    """Nothing to choose."""


KEEP_FLOAT = Algorithm(
    name="float",
    kind="rounder",
    summary="leaves weights as they are",
    bits=tuple(range(2, 9)),
    calibration="none",
    options=_Nothing,
    run=lambda *_: None,
    formats=("float",),
)
"""Stands for the rounder after a transform that ends in a float model."""


def find_chain(text: str, model: str = "checkpoint") -> list[Algorithm]:
    """The algorithms of `awq,gptq,distill`: transforms, one rounder, a trainer.

    The rounder may be left to the last transform, and a trainer alone takes what is rounded already.

    Args:
        text: Their names, joined by commas.
        model: What they are for: checkpoint or onnx.

    Raises:
        UsageError: unknown names, or algorithms that do not go together.
    """
    chain = [find(name.strip()) for name in text.split(",")]
    if model == "onnx":
        chain = [a.on_graphs or a for a in chain]
    trainers = chain[-1:] if chain[-1].kind == "trainer" else []
    chain = chain[: len(chain) - len(trainers)]
    if not chain:
        return trainers
    if chain[-1].kind == "transform":
        chain.append(KEEP_FLOAT if chain[-1].then is None else find(chain[-1].then))
    _refuse_trainers(chain, trainers)
    for algorithm in chain[:-1]:
        if algorithm.kind != "transform":
            raise UsageError(
                f"{algorithm.name} rounds, nothing can follow it", hint="write transforms first, as in -a awq,gptq"
            )
        if algorithm.scope == "graph" and chain[-1].kind != "graph":
            raise UsageError(
                f"{algorithm.name} is for integer activations, {chain[-1].name} leaves them float",
                hint=f"use -a {algorithm.name},static or {algorithm.name},dynamic",
            )
        if model == "onnx" and algorithm.scope != "graph" and chain[-1].kind == "graph":
            able = [a.name for a in ALGORITHMS.values() if (a.on_graphs or a).scope == "graph"]
            raise UsageError(
                f"{algorithm.name} is for weights that are rounded one by one, {chain[-1].name} takes a whole graph",
                hint=f"use -a {chain[-1].name}" + (f" or {able[0]},{chain[-1].name}" if able else ""),
            )
    names = [a.name for a in chain]
    if len(set(names)) != len(names):
        raise UsageError(f"an algorithm is named twice in {text!r}")
    if [a.scope for a in chain[:-1]] not in ([], ["model"], ["stage"], ["model", "stage"], ["graph"]):
        raise UsageError(f"{text!r} cannot be combined", hint="rotate, then scale, then round: -a quarot,awq,gptq")
    return [*chain, *trainers]


def _refuse_trainers(chain: Sequence[Algorithm], trainers: Sequence[Algorithm]) -> None:
    """Trainers stand last, behind a rounder that leaves them something to train."""
    early = next((a.name for a in chain if a.kind == "trainer"), None)
    if early is not None:
        others = [a.name for a in chain if a.kind != "trainer"]
        raise UsageError(
            f"{early} trains what a rounder has left, nothing can follow it",
            hint=f"write it once, and last, as in -a {','.join([*others, early])}",
        )
    for trainer in trainers:
        if chain[-1] is KEEP_FLOAT:
            transforms = ",".join(a.name for a in chain[:-1])
            raise UsageError(
                f"{trainer.name} trains what a rounder has left, {transforms} leaves a float model",
                hint=f"name a rounder, as in -a {transforms},gptq,{trainer.name}",
            )
        if not set(trainer.formats) & set(chain[-1].formats):
            raise UsageError(
                f"{trainer.name} trains scales that stand beside codes, as in {', '.join(trainer.formats)}: "
                f"{chain[-1].name} is stored as {', '.join(chain[-1].formats)}",
                hint=f"use -a gptq,{trainer.name}",
            )


def make_steps(chain: Sequence[Algorithm], settings: Mapping[str, str]) -> list[Step]:
    """Options for each algorithm of a chain; a key that two of them have is given as `gptq.KEY`."""
    parts: dict[str, dict[str, str]] = {a.name: {} for a in chain}
    for key, text in settings.items():
        owner, dot, name = key.rpartition(".")
        if dot and owner not in parts:
            raise UsageError(f"option {key!r} is for {owner!r}, which does not run", hint="see `quantcli algorithms`")
        plain = name.replace("-", "_")
        having = [a.name for a in chain if plain in {f.name for f in dataclasses.fields(a.options)}]
        if not dot and len(having) > 1:
            raise UsageError(f"{' and '.join(having)} both have an option {key!r}", hint=f"write {having[-1]}.{key}")
        parts[owner or (having[0] if having else chain[-1].name)][name] = text
    return [Step(a, make_options(a, parts[a.name])) for a in chain]


def make_options(algorithm: Algorithm, settings: Mapping[str, str]) -> Any:
    """The algorithm's options from text values; unknown keys and values of the wrong type are usage errors."""
    types = typing.get_type_hints(algorithm.options)
    values: dict[str, Any] = {}
    for key, text in settings.items():
        name = key.replace("-", "_")
        if name not in types:
            known = [f.name for f in dataclasses.fields(algorithm.options)]
            what = nearest(name, known) if known else "it has none"
            raise UsageError(
                f"{algorithm.name} has no option {key!r}, {what}", hint=f"see `quantcli algorithms {algorithm.name}`"
            )
        if name in algorithm.idle:
            kind = "ONNX graphs" if "checkpoint" in algorithm.inputs else "checkpoints"
            raise UsageError(f"{algorithm.name}: {name} is for {kind}, it would have no effect", hint="leave it out")
        values[name] = _parse(algorithm.name, name, text, types[name])
    return algorithm.options(**values)


def _parse(algorithm: str, name: str, text: str, wanted: Any) -> Any:
    choices = typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()
    if choices:
        if text not in choices:
            raise UsageError(f"{algorithm}: {name} is one of {', '.join(choices)}, got {text!r}")
        return text
    if typing.get_origin(wanted) is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if wanted is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{algorithm}: {name} is true or false, got {text!r}")
        return text.lower() == "true"
    try:
        return wanted(text)
    except ValueError as error:
        raise UsageError(f"{algorithm}: {name} is a {wanted.__name__}, got {text!r}") from error
