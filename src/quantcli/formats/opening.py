"""Whether a reader opens a folder, by the table in `formats.readers`: before it is written, and of any folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from quantcli.formats.fused import fused_shards
from quantcli.formats.readers import READERS, Reader, Takes
from quantcli.scheme import PER_CHANNEL, Scheme

__all__ = ["Contents", "Obstacle", "StoredLinear", "opens_in", "why_not"]

_SHORT = 128
"""Rows of so many columns are one group of the usual sizes too."""


@dataclass(frozen=True)
class StoredLinear:
    """A quantized linear as it lies in a folder."""

    scheme: Scheme
    rows: int
    columns: int


@dataclass(frozen=True)
class Contents:
    """What a folder holds, as far as readers differ about it."""

    format: str
    """As in `--format`."""
    model_type: str
    default: Scheme | None
    """The scheme of the whole model; None in a float folder."""
    linears: Mapping[str, StoredLinear]
    """Those quantized, in blocks, by module name."""
    kept: Sequence[str]
    """Linears in blocks that stay float, by module name."""
    blocks: Sequence[str]
    """Module names of the blocks."""
    head: StoredLinear | None = None
    """The output head, where it is quantized."""
    embedding: bool = False
    """Whether the embedding is."""
    desc_act: bool = False
    """Whether groups are out of order."""
    online: bool = False
    """Whether rotations are computed at run time."""
    rounds_cache: bool = False
    """Whether keys and values are rounded as they enter the cache."""
    mixes: bool = False
    """Whether the bits of each linear are still to be chosen."""

    @property
    def packed(self) -> list[StoredLinear]:
        """All linears that are quantized."""
        return [*self.linears.values(), *([self.head] if self.head is not None else [])]


@dataclass(frozen=True)
class Obstacle:
    """Why a reader does not open a folder."""

    why: str
    """In words."""
    change: str
    """What to change about the run."""
    silent: bool = False
    """Whether it goes on all the same, and computes nonsense."""

    @property
    def words(self) -> str:
        """As people read it."""
        return f"it computes nonsense: {self.why}" if self.silent else self.why


def opens_in(contents: Contents) -> dict[str, Obstacle | None]:
    """By reader, the first obstacle; None where it opens the folder."""
    return {name: why_not(reader, contents) for name, reader in READERS.items()}


def why_not(reader: Reader, contents: Contents) -> Obstacle | None:
    """The worst of what keeps a reader from a folder; None where it opens it."""
    if contents.online and reader.name != "quantcli":
        return Obstacle("weights expect rotations that quantcli alone computes", "leave --set online=true out")
    if contents.rounds_cache and reader.graphs and reader.name != "quantcli":
        return Obstacle("its keys and values are rounded, which no graph of ours does", "leave --kv-cache out")
    takes = reader.formats.get(contents.format)
    if takes is None and contents.format in reader.untried:
        return Obstacle(f"it was not tried with {contents.format}", f"leave --for {reader.name} out, and try it there")
    if takes is None:
        return Obstacle(f"it does not read {contents.format}", f"use --format {' or '.join(reader.formats)}")
    found = [_obstacle(takes, name, *words) for name, *words in _broken(takes, contents)]
    if contents.embedding and contents.format == "gptq":  # which no one else takes for the model that it is
        found = [Obstacle(o.why, o.change) for o in found]
    return next((o for o in found if o.silent), found[0] if found else None)


def _obstacle(takes: Takes, name: str, why: str, change: str) -> Obstacle:
    return Obstacle(why, change, silent=name in takes.silent)


def _broken(takes: Takes, contents: Contents) -> Iterator[tuple[str, str, str]]:
    """The fields that a folder does not keep to: field, why, what to change."""
    packed = contents.packed
    if (reason := takes.families.get(contents.model_type)) is not None:
        yield "families", f"{contents.model_type}: {reason}", "use another --format"
    if contents.embedding and not takes.embedding:
        yield "embedding", "its embedding is quantized", "leave --quantize-embeddings out"
    if contents.head is not None and not takes.head:
        yield "head", "its output head is quantized", "leave --quantize-lm-head out"
    if contents.head is not None and contents.head.rows % takes.head_rows:
        change = "use --format compressed-tensors, or leave --quantize-lm-head out"
        yield (
            "head_rows",
            f"its quantized head's {contents.head.rows} rows are no multiple of {takes.head_rows}",
            change,
        )
    if not takes.experts and any(".experts." in name for name in contents.linears):
        change = f"use --format compressed-tensors --group-size {_fitting(takes, packed)}"
        yield "experts", "its experts are quantized one by one", change
    if packed:
        yield from _broken_schemes(takes, packed, desc_act=contents.desc_act)
        yield from _broken_evenness(takes, contents)


def _broken_schemes(takes: Takes, packed: Sequence[StoredLinear], *, desc_act: bool) -> Iterator[tuple[str, str, str]]:
    widths = sorted({linear.scheme.bits for linear in packed} - set(takes.bits))
    if widths:
        known = ", ".join(map(str, takes.bits))
        yield "bits", f"it takes {known} bits, not {widths[0]}", f"use --bits {min(takes.bits, key=_from(widths[0]))}"
    if takes.symmetric_only and any(not linear.scheme.symmetric for linear in packed):
        yield "symmetric", "its zero points are not fixed in the middle", "use --sym"
    sizes = {linear.scheme.group_size for linear in packed}
    wrong = sorted(sizes - set(takes.group_sizes)) if takes.group_sizes else []
    if wrong:
        yield "group_sizes", f"it does not take groups of {wrong[0]}", f"use --group-size {_fitting(takes, packed)}"
    if not takes.per_row and any(x.scheme.group_size == PER_CHANNEL and x.columns > _SHORT for x in packed):
        yield "per_row", "it does not take one scale per row", f"use --group-size {_fitting(takes, packed)}"
    if takes.whole_groups:
        for linear in packed:
            if linear.columns % linear.scheme.columns_per_group(linear.columns):
                why = f"groups of {linear.scheme.group_size} do not divide {linear.columns} inputs"
                yield "whole_groups", why, f"use --group-size {_fitting(takes, packed)}"
                break
    if any(linear.scheme.bits * n % takes.word for linear in packed for n in (linear.rows, linear.columns)):
        yield "word", f"codes do not fill words of {takes.word} bits", "use another --format"
    if desc_act and not takes.desc_act:
        yield "desc_act", "its groups are out of order", "leave --desc-act out"


def _broken_evenness(takes: Takes, contents: Contents) -> Iterator[tuple[str, str, str]]:
    default, packed = contents.default, contents.linears
    differ = contents.mixes or (default is not None and any(_differs(x, default) for x in contents.packed))
    if differ and not takes.mixed:
        yield "mixed", "its linears differ in bits or group size", "leave --override and targets out"
    if takes.blocks_alike and contents.kept:
        inside = [{n.removeprefix(f"{b}.") for n in packed if n.startswith(f"{b}.")} for b in contents.blocks]
        if any(names != inside[0] for names in inside):
            yield "blocks_alike", "what stays float differs by block", "give --exclude patterns that hold in each block"
    if takes.fused:
        for fused, shards in fused_shards([*packed, *contents.kept]).items():
            stored = {packed[name].scheme if name in packed else None for name in shards}
            if len(stored) > 1:
                together = ", ".join(name.rpartition(".")[2] for name in shards)
                why = f"it runs {together} of {fused.rpartition('.')[0]} as one, and they are stored differently"
                yield "fused", why, f"treat {together} alike in --exclude and --override"
                break


def _differs(linear: StoredLinear, default: Scheme) -> bool:
    same = linear.scheme.bits == default.bits
    return not same or linear.scheme.group_count(linear.columns) != default.group_count(linear.columns)


def _fitting(takes: Takes, packed: Sequence[StoredLinear]) -> int:
    """The group size nearest to 64 that a reader takes and that divides all columns."""
    sizes = [size for size in takes.group_sizes or (64, 32, 16) if size != PER_CHANNEL]
    whole = [size for size in sizes if all(linear.columns % size == 0 for linear in packed)]
    return min(whole, key=_from(64)) if whole else PER_CHANNEL


def _from(wanted: int) -> Callable[[int], int]:
    return lambda value: abs(value - wanted)
