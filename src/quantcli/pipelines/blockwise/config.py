"""config.json of the result."""

from typing import Any

from quantcli import __version__
from quantcli.formats.codec import Described
from quantcli.formats.compressed_config import INTEGER_LAYOUT
from quantcli.models.layout import is_linear
from quantcli.models.marks import add_mark
from quantcli.pipelines.planning.plan import Plan

__all__ = ["result_config"]


def result_config(plan: Plan) -> dict[str, Any]:
    """What config.json of the result says: the model's own, how its linears are quantized, and what changed."""
    config = {k: v for k, v in plan.checkpoint.config.items() if k != "auto_map" or v}  # an empty one stops readers
    targets = plan.targets
    damp = getattr(plan.settings, "damp_percent", None)
    quantization = plan.codec.config(
        Described(
            plan.default,
            {t.stem: t.scheme for t in targets.values() if t.scheme != plan.default},
            [n for n in plan.layout.linears if n not in targets],
            desc_act=getattr(plan.settings, "order", "") == "desc_act",
            head=targets[plan.layout.head].stem if plan.layout.head in targets else None,
            producer=f"quantcli:{__version__}",
            damp_percent=damp,
            outlier_threshold=getattr(plan.settings, "threshold", None),
            quantized=list(targets),
            blocks=plan.layout.blocks,
            float_linears=[n for n, m in plan.skeleton.named_modules() if is_linear(m) and n not in targets],
            layout=plan.codec.name if plan.codec.layout is not None else INTEGER_LAYOUT,
            activations=plan.activations,
            fp8_cache=plan.options.kv_cache is not None,
            dtype=plan.float_dtype_of(next(iter(targets.values()))) if targets else plan.dtype,
        )
    )
    embedding = plan.embedding if plan.gguf is None else None  # one where others expect floats
    if embedding is not None and quantization is not None:
        scheme = embedding.scheme
        quantization["quantcli"] = {
            "embedding": {
                "name": embedding.name,
                "bits": scheme.bits,
                "group_size": scheme.group_size,
                "sym": scheme.symmetric,
            }
        }
    if quantization is not None:
        config["quantization_config"] = quantization
    if plan.untie_head:
        config["tie_word_embeddings"] = False
        # who counts weights is to know that these are the embedding's
        config["quantcli"] = dict(config.get("quantcli") or {}) | {"untied_head": plan.layout.head}
    if plan.options.dtype != "keep":
        config.pop("torch_dtype", None)
        config["dtype"] = plan.options.dtype
    if embedding is not None:  # others would take it for one that is missing, and make one up
        config = add_mark(config, "quantized_embedding", {})
    return config if plan.online is None else plan.online.mark(config)
