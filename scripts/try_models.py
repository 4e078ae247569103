"""Quantizes a tiny random model of every causal language model class of the installed transformers; a table of it.

    python scripts/try_models.py                          # all classes, rtn and gptq; then docs/models.md is written
    python scripts/try_models.py --methods best llama gpt2

Results are kept in .models.json; what is there already is taken from there, --again measures anew.
"""

import argparse
import json
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import quantcli
from quantcli.errors import QuantcliError
from quantcli.models.linear import PackedEmbedding, QuantizedLinear
from quantcli.options import CalibrationOptions, CaptureOptions, QuantizeOptions
from quantcli.pipelines import capture, quantize
from tiny_models import CAUSAL, build, save
from written_page import write_or_check

ROOT = Path(__file__).resolve().parent.parent
PAGE, KEPT = ROOT / "docs" / "models.md", ROOT / ".models.json"
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"algorithm": "rtn"},
    "gptq": {"algorithm": "gptq"},
    "best": {"preset": "best"},
    "quarot,gptq": {"algorithm": "quarot,gptq"},
}
_SECONDS = 240
_CLOSE = 1e-4
_NOISE = 0.7  # of 4 bits in random weights, beside the float model
_TOKENS = 24


def literal_model(model: Any, loaded: Any) -> Any:
    """The float model with the dequantized matrices of `loaded` written into its parameters."""
    stacks = {stack.owner: [] for stack in loaded.stacked.values()}
    for stack in loaded.stacked.values():
        stacks[stack.owner].append(stack)
    with torch.no_grad():
        for name, module in loaded.named_modules():
            if not isinstance(module, QuantizedLinear):
                continue
            owner, _, rest = name.rpartition(".")
            path, _, expert = owner.rpartition(".")
            weight = module.dequantize()
            if path in stacks and expert.isdecimal():
                stack = next(s for s in stacks[path] if rest in s.leaves)
                target = model.get_parameter(stack.name)[int(expert)]
                (target.T if stack.transposed else target)[stack.rows(rest)] = weight
                continue
            target = model.get_submodule(name).weight
            target.copy_(weight if isinstance(model.get_submodule(name), torch.nn.Linear) else weight.T)
    return model


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[2, T, V] in one go."""
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits.float()


def try_method(method: str, folder: Path, output: Path) -> dict[str, Any]:
    """What became of one model by one method."""
    settings = METHODS[method]
    text = {} if method == "rtn" else {"data": "builtin", "num_samples": 4, "seq_len": 32}
    options = QuantizeOptions(
        model=str(folder), output=output, group_size=16, dtype="keep", allow_partial=True,
        calibration=CalibrationOptions(**text), **settings,
    )  # fmt: skip
    result = quantize.run(options)
    loaded = quantcli.load(output, device="cpu")
    tokens = torch.randint(3, 200, (2, _TOKENS), generator=torch.Generator().manual_seed(1))
    moved = bool(result.plan["transforms"])  # whose float weights are no longer the model's
    reference = quantcli.load(folder, device="cpu") if moved else literal_model(build(folder.name), loaded)
    found, expected = logits(loaded, tokens), logits(reference, tokens)
    apart = float((found - expected).norm() / expected.norm())
    if any(isinstance(module, PackedEmbedding) for module in loaded.modules()):
        raise AssertionError("nobody asked for a quantized embedding")
    return {
        "state": "right" if apart <= (_NOISE if moved else _CLOSE) else "wrong",
        "share": round(result.share.fraction, 4),
        "apart": apart,
        "left": [[one.kind, one.reason] for one in result.share.left if one.counts],
    }


def try_capture(folder: Path, output: Path) -> dict[str, Any]:
    """Whether the float model becomes a graph; the pipeline itself compares the logits."""
    capture.run(CaptureOptions(model=str(folder), output=output))
    return {"state": "right"}


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A refusal is a result; so is a failure, under its own name."""
    signal.alarm(_SECONDS)
    try:
        return work()
    except QuantcliError as error:
        return {"state": "refused", "why": error.message}
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"state": "failed", "why": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        signal.alarm(0)


def measure(family: str, methods: list[str], found: dict[str, Any]) -> None:
    """Fills in what `found` lacks of one family."""
    missing = [method for method in methods if method not in found]
    if not missing:
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / family
        try:
            model = build(family)
            logits(model, torch.full((1, 4), 5))
            save(model, folder)
        except Exception as error:  # what a configuration says of small numbers
            found["none"] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            return
        found.pop("none", None)
        found["class"] = type(model).__name__
        for method in missing:
            output = Path(scratch) / "out"
            if method == "capture":
                found[method] = attempt(lambda output=output: try_capture(folder, output))
            else:
                found[method] = attempt(lambda method=method, output=output: try_method(method, folder, output))
            if "why" in found[method]:
                found[method]["why"] = found[method]["why"].replace(str(folder), "the model").replace(scratch, "")
            shutil.rmtree(output, ignore_errors=True)


def page(results: dict[str, dict[str, Any]]) -> str:
    """docs/models.md."""
    methods = [m for m in (*METHODS, "capture") if any(m in found for found in results.values())]
    lines = [
        "# Models",
        "",
        "A tiny random model of every causal language model class of transformers "
        f"{transformers.__version__}, written by `save_pretrained`, quantized to 4 bits and loaded again: "
        "`make models` makes this page.",
        "",
        "*right*: the logits of `quantcli.load` are those of the float model with the dequantized matrices written "
        f"into its parameters (relative difference at most {_CLOSE:g}); after a rotation, those of the float model "
        f"up to the noise of 4 bits ({_NOISE:g}). The percentage is the share of matrix parameters that is quantized; "
        "tiny sizes make what stays float look larger than it is in real models. No number: all of it. "
        "*refused*: the command "
        "ends with exit code 3 and the reason below.",
        "",
    ]
    for method in methods:
        states = [found[method]["state"] for found in results.values() if method in found]
        counts = ", ".join(f"{states.count(s)} {s}" for s in ("right", "refused", "wrong", "failed") if s in states)
        lines.append(f"- {method}: {counts} of {len(states)}")
    lines += ["", f"| model type | class | {' | '.join(methods)} |", "|---|---|" + "---|" * len(methods)]
    reasons: list[str] = []
    for family, found in sorted(results.items()):
        if "none" in found:
            continue
        cells = []
        for method in methods:
            one = found.get(method)
            cell = "-" if one is None else one["state"]
            if one is not None and "share" in one and one["share"] < 0.9995:
                cell += f", {one['share']:.1%}"
            if one is not None and "why" in one:
                if one["why"] not in reasons:
                    reasons.append(one["why"])
                cell += f" [{reasons.index(one['why']) + 1}]"
            cells.append(cell)
        lines.append(f"| {family} | {found['class']} | {' | '.join(cells)} |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {why}" for number, why in enumerate(reasons, 1)]
    kinds = sorted(
        {tuple(x) for f in results.values() for m in f.values() if isinstance(m, dict) for x in m.get("left", ())}
    )
    lines += ["", "## What stays float inside blocks", "", "| kind | reason |", "|---|---|"]
    lines += [f"| {kind} | {reason} |" for kind, reason in kinds]
    lines += ["", "## Classes without a tiny configuration", ""]
    lines += [f"- {family}: {found['none']}" for family, found in sorted(results.items()) if "none" in found]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures what is missing, then writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="model types; default: all")
    parser.add_argument("--methods", default="rtn,gptq", help="of rtn, gptq, best, quarot+gptq and capture")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where results are kept")
    parser.add_argument("--again", action="store_true", help="measure anew what is known")
    given = parser.parse_args()
    methods = [m.replace("+", ",") for m in given.methods.split(",")]
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def out_of_time(*_: object) -> None:
        raise TimeoutError(f"longer than {_SECONDS} s")

    signal.signal(signal.SIGALRM, out_of_time)
    results: dict[str, dict[str, Any]] = json.loads(given.kept.read_text()) if given.kept.is_file() else {}
    for family in given.families or CAUSAL:
        found = {} if given.again else results.get(family, {})
        results[family] = found
        measure(family, methods, found)
        states = ", ".join(f"{m} {found[m]['state']}" for m in methods if m in found)
        print(f"{family}: {states or found.get('none')}", flush=True)
        given.kept.write_text(json.dumps(results, indent=1))
    write_or_check(PAGE, page(results))


if __name__ == "__main__":
    main()
