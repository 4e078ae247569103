"""`quantcli evaluate`: how good, how large, how fast; and a gate where one is set."""

from typing import TYPE_CHECKING, Any

from quantcli.cli.command import Command, FlagStyle
from quantcli.errors import QualityError
from quantcli.options import EvaluateOptions

if TYPE_CHECKING:
    from quantcli.cli.console import Console

__all__ = ["COMMAND", "SIMULATION_STYLES", "check", "run", "show"]

SIMULATION_STYLES = {
    "a_symmetric": FlagStyle(("--a-sym/--a-asym",)),
    "kv_symmetric": FlagStyle(("--kv-sym/--kv-asym",)),
}


def run(options: EvaluateOptions, console: "Console") -> Any:
    """Evaluates."""
    from quantcli.pipelines import evaluate_graphs

    if evaluate_graphs.is_graph_pair(options):  # torch has no part in it
        return evaluate_graphs.run(options, console)
    from quantcli.pipelines import evaluate

    return evaluate.run(options, console)


def show(result: Any, console: "Console") -> None:
    """The figures of the folder, and those against the reference where there is one."""
    from quantcli.evaluate.result import GraphEvaluation
    from quantcli.report.evaluation import evaluation_rows, graph_rows, output_table

    if isinstance(result, GraphEvaluation):
        console.pairs(f"{result.model} against {result.reference}", graph_rows(result))
        console.text("")
        console.table(*output_table(result))
        return
    against = f" against {result.reference}" if result.reference is not None else ""
    console.pairs(f"{result.model}{against}", evaluation_rows(result))


def check(result: Any) -> None:
    """Exit code 5 where a gate was not met.

    Raises:
        QualityError: naming each gate, the figure and the bound.
    """
    if result.failures:
        raise QualityError("; ".join(str(f) for f in result.failures), hint="loosen the gate, or quantize less hard")


COMMAND = Command(
    name="evaluate",
    summary="Measure a model beside its original: perplexity and divergence, or the outputs of any graph; size, speed.",
    options=EvaluateOptions,
    run=run,
    show=show,
    check=check,
    styles={
        "model": FlagStyle(("-m", "--model")),
        "data": FlagStyle(metavar="FILE"),
        "image_spec": FlagStyle(metavar="SPEC"),
        "user_script": FlagStyle(metavar="FILE.py"),
        **SIMULATION_STYLES,
    },
    panels={"Simulation": ("simulation",), "Graphs that are no language models": ("pair",)},
    examples=(
        "quantcli evaluate -m Q --reference SmolLM2-135M",
        "quantcli evaluate -m Q2 --reference SmolLM2-135M --reference-cache ~/.cache/logits",
        "quantcli evaluate -m onnx --reference SmolLM2-135M --data held_out.txt --json",
        "quantcli evaluate -m Q --reference SmolLM2-135M --max-kl 0.15 --no-speed",
        "quantcli evaluate -m Q --reference net.onnx --data inputs.npz --min-sqnr 20",
        "quantcli evaluate -m Q --reference net.onnx --user-script net.py --metric-function accuracy --max-loss 0.01",
    ),
)
