"""Passes of Olive in the words of the package that they were written for, where `--backend` names it.

Only those that say other things of it than of our own code; the rest is read alike.
"""

from collections.abc import Mapping

from quantcli.cli.aliases import Refused, Rename, Setting
from quantcli.cli.configuration.keys import Key, Names, Nested, Pass, Together
from quantcli.cli.configuration.passes import AIMET, NVMO

__all__ = ["BACKEND_PASSES"]

_METHODS: Mapping[tuple[str | None, str | None], tuple[str, ...]] = {
    ("awq", None): ("-a", "awq_lite"),
    ("rtn", None): ("-a", "rtn_dq"),
    **{(of, how): ("-a", how) for how in ("awq_lite", "awq_clip") for of in ("awq", None)},
    **{(of, how): ("-a", "rtn_dq") for how in ("rtn", "rtn_dq") for of in ("rtn", None)},
}
_TECHNIQUES = {name: ("-a", name) for name in ("lpbq", "seqmse", "adaround")}
_DATA = Key("any", Refused("one set of samples serves all techniques", "give it beside the techniques"))
_ANY_GRID = Key("whole number", Rename("", {"8": ()}, only=True))

BACKEND_PASSES: Mapping[str, Mapping[str, Pass]] = {
    "nvmo": {
        "NVModelOptQuantization": Pass(
            ("-a", "awq_lite"),
            {
                **NVMO,
                "precision": Key(
                    "text", Rename("-a", {"int4": (), "int8": ("-a", "int8"), "fp8": ("-a", "fp8")}, only=True)
                ),
                "algorithm": Key("text", Together(("calibration", "calibration_method"), _METHODS)),
            },
            data_hint="add --calibration-inputs FOLDER of samples, or --data FILE, text for a language model",
        )
    },
    "aimet": {
        "AimetQuantization": Pass(
            ("-a", "static"),
            {
                **AIMET,
                "techniques": Key(
                    "list of objects",
                    Nested(
                        {
                            "name": Key("text", Rename("-a", _TECHNIQUES, only=True)),
                            "block_size": Key("whole number", Rename("--group-size")),
                            "bitwidth": Key("whole number", Rename("--bits")),
                            "decompressed_bw": _ANY_GRID,
                            "op_types": Key(
                                "list of texts", Refused("Gemm, MatMul and Conv are taken", "leave it out")
                            ),
                            "nodes_to_exclude": Key("list of texts", Names("--nodes-exclude", whole=True)),
                            "num_candidates": Key("whole number", Setting("num_candidates")),
                            "num_iterations": Key("whole number", Setting("num_iterations")),
                            "data_config": _DATA,
                        }
                    ),
                ),
                "precision": Key(
                    "text", Rename("--bits", {f"int{n}": ("--bits", str(n)) for n in (4, 8, 16)}, only=True)
                ),
                "quant_scheme": Key(
                    "text",
                    Rename(
                        "", {name: ("--set", f"quant_scheme={name}") for name in ("min_max", "tf_enhanced")}, only=True
                    ),
                ),
            },
            data_hint="add --calibration-inputs FOLDER of samples, or --data FILE, text for a language model",
        )
    },
}
"""By backend and type."""
