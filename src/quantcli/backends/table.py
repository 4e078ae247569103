"""The backends: one table. A fact about a package, tried with the versions of `requirements/`, is changed here only."""

from collections.abc import Mapping
from dataclasses import replace

from quantcli.backends.backend import Backend, Method, Setting
from quantcli.backends.graph_methods import AIMET, INC, NVMO, ONNXRUNTIME

__all__ = ["BACKENDS"]

_GROUPS = (32, 64, 128, -1)
_DAMP = Setting(0.05, "share of the Hessian's mean diagonal that is added to it", least=0)
_ORDER = Setting(
    "none",
    "desc_act: columns with large inputs first; dynamic: none, in the words of our own",
    choices=("none", "dynamic", "desc_act"),
)
_HF = ("torch", "transformers")

_GPTQ = Method(
    "GPTQ, stored as gptq v1",
    (4, 2, 3, 8),
    calibrates=True,
    group_size=128,
    group_sizes=(16, *_GROUPS),
    symmetric=True,
    takes=frozenset({"calibration"}),
    settings={"damp_percent": _DAMP, "order": _ORDER},
    formats=("gptq",),
)
_AWQ = Method(
    "AWQ, stored as awq gemm",
    (4,),
    calibrates=True,
    group_size=128,
    group_sizes=_GROUPS,
    symmetric=False,
    grids=(False,),
    takes=frozenset({"calibration"}),
    formats=("awq",),
)

BACKENDS: Mapping[str, Backend] = {
    backend.name: backend
    for backend in (
        ONNXRUNTIME,
        Backend(
            "autoawq",
            "autoawq",
            "AWQ by the package of its authors' followers; no longer maintained",
            "checkpoint",
            {
                "awq": replace(
                    _AWQ,
                    settings={"duo_scaling": Setting(True, "look at the size of weights too, not of inputs alone")},
                )
            },
            imports=("awq", *_HF),
            packages=("autoawq", *_HF),
            size_mb=1430,
        ),
        Backend(
            "gptqmodel",
            "gptqmodel",
            "GPTQ and AWQ; the successor of auto-gptq and autoawq",
            "checkpoint",
            {
                "gptq": _GPTQ,
                "awq": _AWQ,
            },
            imports=("gptqmodel", *_HF),
            packages=("gptqmodel", *_HF),
            processors=("cpu", "cuda"),
            variables={"GPTQMODEL_CPU_WORKERS": "2"},  # it insists on two, and counts the cores that it sees
            size_mb=1490,
        ),
        Backend(
            "auto-round",
            "auto-round",
            "rounding learned by signed gradients, block by block",
            "checkpoint",
            {
                "signround": Method(
                    "learned rounding, stored as gptq v1 (sym) or awq gemm (asym)",
                    (4, 2, 3, 8),
                    calibrates=True,
                    group_size=128,
                    group_sizes=(16, *_GROUPS),
                    symmetric=True,
                    takes=frozenset({"calibration"}),
                    settings={
                        "iters": Setting(200, "steps of training per block", least=1),
                        "batch_size": Setting(8, "rows per step", least=1),
                    },
                    formats=("gptq", "awq"),
                )
            },
            imports=("auto_round", *_HF),
            packages=("auto-round", *_HF),
            processors=("cpu", "cuda"),
            size_mb=1430,
        ),
        Backend(
            "llm-compressor",
            "llmcompressor",
            "vLLM's own quantizer: weights and activations, stored as compressed-tensors",
            "checkpoint",
            {
                "gptq": Method(
                    "GPTQ of weights",
                    (4, 8),
                    formats=("compressed-tensors",),
                    calibrates=True,
                    group_size=128,
                    group_sizes=_GROUPS,
                    symmetric=True,
                    takes=frozenset({"calibration"}),
                    settings={"damp_percent": Setting(0.01, _DAMP.help, least=0)},
                ),
                "rtn": Method(
                    "round to nearest of weights",
                    (4, 8),
                    formats=("compressed-tensors",),
                    group_size=128,
                    group_sizes=_GROUPS,
                    symmetric=True,
                ),
                "awq": Method(
                    "AWQ of weights",
                    (4, 8),
                    formats=("compressed-tensors",),
                    calibrates=True,
                    cuda_only=True,
                    group_size=128,
                    group_sizes=_GROUPS,
                    symmetric=False,
                    takes=frozenset({"calibration"}),
                ),
                "w8a8": Method(
                    "8-bit integers, weights per row and activations per token",
                    (8,),
                    formats=("int-quantized",),
                ),
                "smoothquant": Method(
                    "w8a8 behind SmoothQuant",
                    (8,),
                    formats=("int-quantized",),
                    calibrates=True,
                    takes=frozenset({"calibration"}),
                    settings={"alpha": Setting(0.5, "share of difficulty that weights take, 0 to 1", least=0)},
                ),
                "fp8": Method(
                    "8-bit floats (e4m3), weights per row and activations per token",
                    (8,),
                    formats=("float-quantized",),
                ),
            },
            imports=("llmcompressor", "compressed_tensors", *_HF),
            packages=("llmcompressor", "compressed-tensors", *_HF),
            processors=("cpu", "cuda"),
            size_mb=1430,
        ),
        Backend(
            "auto-gptq",
            "auto-gptq",
            "GPTQ by its first package; last released in March 2024",
            "checkpoint",
            {"gptq": _GPTQ},
            imports=("auto_gptq", *_HF),
            packages=("auto-gptq", *_HF),
            processors=("cuda",),
            size_mb=1600,
            instead="use --backend gptqmodel, its successor, or leave --backend out: our own gptq runs here",
        ),
        INC,
        NVMO,
        AIMET,
    )
}
"""By name, in the order in which they are listed."""
