"""In which format a result is stored, and on which grid: what can hold it, and what its readers open."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantcli.algorithms import Step
from quantcli.errors import UsageError
from quantcli.formats.codecs import CODECS
from quantcli.formats.opening import Contents, Obstacle, StoredLinear, opens_in
from quantcli.formats.readers import DEFAULT_READERS, READERS
from quantcli.models.gguf.mixes import MIXES
from quantcli.models.gguf.planned import GgufPlan
from quantcli.options import MIXED_BITS, QuantizeOptions
from quantcli.pipelines.mixed_bits.widths import holds_mixed
from quantcli.pipelines.planning.gguf_types import plan_gguf
from quantcli.pipelines.planning.layout import weight_scheme
from quantcli.pipelines.planning.opening import FloatModel
from quantcli.pipelines.planning.steps import allowed_formats
from quantcli.pipelines.planning.target import Target
from quantcli.pipelines.planning.targets import choose_zero_points, find_targets, refuse_format
from quantcli.scheme import Scheme
from quantcli.tensors.block_types import scheme_of

__all__ = ["Storage", "choose_storage"]

_FULL_BITS = 4
"""From so many bits on a symmetric grid costs little."""


@dataclass(frozen=True)
class Storage:
    """A way to store the result."""

    options: QuantizeOptions
    """With format, grid and dtype resolved."""
    default: Scheme
    settings: Any
    """The rounder's."""
    targets: dict[str, Target]
    opens: Mapping[str, Obstacle | None]
    """By reader, what keeps it from opening the result; None where nothing does."""
    gguf: GgufPlan | None = None
    """What a GGUF file will hold, where that is the format."""

    @property
    def silent(self) -> str | None:
        """A reader that would go on and compute nonsense."""
        return next((name for name, why in self.opens.items() if why is not None and why.silent), None)

    def refused_by(self, readers: Sequence[str]) -> str | None:
        """The first of the readers that does not open it."""
        return next((name for name in readers if self.opens[name] is not None), None)


def choose_storage(options: QuantizeOptions, model: FloatModel, rounder: Step) -> Storage:
    """Stores the result as was asked, or as most readers open it.

    Args:
        options: With the group size that was chosen.
        model: What is quantized.
        rounder: With its settings.

    Raises:
        UsageError: nothing holds it, or a reader that was named does not open it, or one would open it wrong.
        InputError: see `find_targets`.
    """
    found: list[Storage] = []
    refused: UsageError | None = None
    for name, symmetric in _ways(options, rounder):
        try:
            found.append(_store(options, model, rounder, name, symmetric))
        except UsageError as error:
            refused = refused or error
    if not found:
        assert refused is not None
        raise refused
    if options.readers:
        fitting = [way for way in found if way.refused_by(options.readers) is None]
        if not fitting:
            raise _unopened(found[0], options, model, rounder)
        return fitting[0]
    preferred = [way for way in found if way.options.symmetric == _grid(options, rounder, way.options.format or "")]
    loud = [way for way in preferred if way.silent is None]
    if not loud:
        raise _opened_wrong(preferred[0], options, model, rounder)
    return max(loud, key=lambda way: sum(way.opens[name] is None for name in DEFAULT_READERS))


def _ways(options: QuantizeOptions, rounder: Step) -> Iterator[tuple[str, bool | None]]:
    """Formats and grids in the order in which they are tried: as usual first, then, for named readers, otherwise."""
    formats = allowed_formats(options.format, rounder.algorithm)
    if options.mixes:
        formats = tuple(name for name in formats if holds_mixed(CODECS[name])) or formats
    usual = [(name, _grid(options, rounder, name)) for name in formats]
    yield from usual
    if options.readers and options.symmetric is None and rounder.algorithm.codebook is None:
        yield from ((name, not symmetric) for name, symmetric in usual)


def _grid(options: QuantizeOptions, rounder: Step, name: str) -> bool | None:
    """Whether the grid is symmetric; None on a codebook."""
    if rounder.algorithm.codebook is not None:
        return None
    if name == "gguf":
        return options.symmetric
    if options.symmetric is not None or CODECS[name].layout is not None:
        return options.symmetric is not False  # layouts refuse it
    widths = tuple(options.mixed_bits or MIXED_BITS) if options.mixes else (options.weight_bits,)
    takes = [READERS[reader].formats[name].bits for reader in options.readers if name in READERS[reader].formats]
    widths = tuple(bits for bits in widths if all(bits in known for known in takes)) or widths
    served = name in ("gptq", "compressed-tensors") and getattr(rounder.settings, "zero", "") != "float"
    return served and min(widths) >= _FULL_BITS


def _store(options: QuantizeOptions, model: FloatModel, rounder: Step, name: str, symmetric: bool | None) -> Storage:
    codec, algorithm = CODECS[name], rounder.algorithm
    wide = codec.unpack is not None and model.stored_dtype.itemsize > 2
    dtype = options.dtype or ("bfloat16" if wide else "keep")
    options = replace(options, format=name, symmetric=symmetric, dtype=dtype)
    default = weight_scheme(options) or Scheme(
        options.weight_bits,
        options.weight_group_size,
        options.weight_symmetric,
        codec.lowest_zero,
        algorithm.codebook,
        getattr(rounder.settings, "double_quant", False),
    )
    if default.block_rows > 1 and getattr(rounder.settings, "refit", False):
        raise UsageError(
            f"refit fits the scales of single rows, {name} has one for {default.block_rows} of them",
            hint="add --set refit=false",
        )
    gguf = None
    if options.gguf_type is not None:
        default = scheme_of(MIXES[options.gguf_type])
        if getattr(rounder.settings, "order", "") in ("dynamic", "desc_act"):
            raise UsageError(
                f"order={rounder.settings.order} chooses groups one by one, GGUF's types have scales over several",
                hint="use order=static or order=none",
            )
        gguf = plan_gguf(options, model)
    targets = find_targets(options, model, default, algorithm, gguf)
    settings = choose_zero_points(rounder.settings, codec, targets)
    refuse_format(codec, options, targets, default, Step(algorithm, settings), model)
    contents = _contents(options, model, default, targets, getattr(settings, "order", "") == "desc_act")
    return Storage(options, default, settings, targets, opens_in(contents), gguf)


def _contents(
    options: QuantizeOptions, model: FloatModel, default: Scheme, targets: Mapping[str, Target], desc_act: bool
) -> Contents:
    """What the folder will hold."""
    layout, packs = model.layout, CODECS[options.format or ""].unpack is not None
    stored = {t.name: StoredLinear(t.scheme, t.rows, t.columns) for t in targets.values()} if packs else {}
    head = stored.pop(layout.head or "", None)
    return Contents(
        format=options.format or "",
        model_type=str(model.checkpoint.config.get("model_type")),
        default=default if packs else None,
        linears=stored,
        kept=[name for name in layout.linears if name not in stored] if packs else (),
        blocks=layout.blocks,
        head=head,
        embedding=options.quantize_embeddings,
        desc_act=desc_act,
        online=model.online is not None,
        rounds_cache=options.kv_cache is not None,
        mixes=options.mixes and packs,
    )


def _unopened(way: Storage, options: QuantizeOptions, model: FloatModel, rounder: Step) -> UsageError:
    """Why no way that was allowed opens in all readers that were named."""
    name = way.refused_by(options.readers)
    assert name is not None
    obstacle = way.opens[name]
    assert obstacle is not None
    other = _elsewhere(options, model, rounder)
    hint = f"use --format {other}" if other else obstacle.change
    return UsageError(f"{name} does not open this as {way.options.format}: {obstacle.why}", hint=hint)


def _opened_wrong(way: Storage, options: QuantizeOptions, model: FloatModel, rounder: Step) -> UsageError:
    """What a reader would make of a folder, and for whom it may be written all the same."""
    name = way.silent
    assert name is not None
    obstacle = way.opens[name]
    assert obstacle is not None
    other = _elsewhere(options, model, rounder)
    able = [reader for reader, why in way.opens.items() if why is None]
    first = f"use --format {other}" if other else obstacle.change
    return UsageError(
        f"{name} would open this as {way.options.format} and compute nonsense: {obstacle.why}",
        hint=f"{first}; or say whom it is for: --for {' or '.join(able)}",
    )


def _elsewhere(options: QuantizeOptions, model: FloatModel, rounder: Step) -> str | None:
    """The format that would do in place of the one that was asked for."""
    if options.format is None or CODECS[options.format].layout is not None:
        return None
    try:
        return choose_storage(replace(options, format=None), model, rounder).options.format
    except UsageError:
        return None
