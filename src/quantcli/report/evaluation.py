"""Evaluation figures as words and table cells, for whoever prints them."""

from collections.abc import Sequence

from quantcli.evaluate.result import EvaluationResult, GraphEvaluation

__all__ = ["comparison_table", "evaluation_rows", "graph_rows", "output_table"]


def evaluation_rows(result: EvaluationResult) -> list[tuple[str, str]]:
    """One evaluation as name and value, figures that were not measured left out."""
    bits = _bits(result)
    rows = [
        ("text", f"{result.text}, {result.windows} windows, {result.tokens} tokens scored"),
        ("perplexity", f"{result.perplexity:.3f}"),
    ]
    if result.simulated is not None:
        rotated = "R3 and R4 at run time" if result.simulated["online_rotations"] else "no rotations at run time"
        rows.append(("simulated", f"{result.simulated['description']}; {rotated}"))
    if result.reference_perplexity is not None:
        change = 100 * (result.perplexity_increase or 0)
        rows.append(("reference perplexity", f"{result.reference_perplexity:.3f} ({change:+.1f}%)"))
    if result.kl_mean is not None and result.kl_99th_percentile is not None and result.top1_agreement is not None:
        error = "" if result.kl_standard_error is None else f" ± {result.kl_standard_error:.4f}"
        rows.append(("KL to reference", f"{result.kl_mean:.4f}{error} (99% below {result.kl_99th_percentile:.3f})"))
        rows.append(("top-1 agreement", f"{100 * result.top1_agreement:.1f}%"))
    rows.append(("size", _size(result.size_bytes, result.reference_size_bytes)))
    rows.append(("bits per weight", bits))
    if result.prefill_tokens_per_second is not None and result.decode_tokens_per_second is not None:
        rows.append(("prefill", f"{result.prefill_tokens_per_second:.0f} tokens/s"))
        rows.append(("decode", f"{result.decode_tokens_per_second:.1f} tokens/s"))
    if result.peak_memory_bytes is not None:
        rows.append(("peak memory", f"{result.peak_memory_bytes / 1e6:.0f} MB above start"))
    return rows


def graph_rows(result: GraphEvaluation) -> list[tuple[str, str]]:
    """Two graphs as name and value, figures that were not measured left out."""
    compared = result.compared
    rows = [("inputs", f"{result.inputs}, {compared.samples} samples")]
    if result.score is not None and result.reference_score is not None:
        change = result.score - result.reference_score
        rows.append((str(result.metric), f"{result.score:.6g}, reference {result.reference_score:.6g} ({change:+.3g})"))
    rows.append(("size", _size(result.size_bytes, result.reference_size_bytes)))
    if result.timed and compared.float_ms and compared.quantized_ms:
        ratio = compared.quantized_ms / compared.float_ms
        rows.append(("latency", f"{compared.quantized_ms:.3g} ms, reference {compared.float_ms:.3g} ms ({ratio:.2f}x)"))
    return rows


def output_table(result: GraphEvaluation) -> tuple[list[str], list[list[str]]]:
    """The outputs of two graphs: column names, and one row of cells for each."""
    rows = []
    for output in result.compared.outputs:
        decibels = "–" if output.sqnr_db is None else f"{output.sqnr_db:.1f} dB"
        top1 = "–" if output.top1 is None else f"{output.top1:.1%}"
        largest = f"{output.largest:.3g}" if output.finite else "not finite"
        compared = result.compared.samples - output.reshaped
        rows.append([output.name, decibels if output.finite else "–", largest, top1, str(compared)])
    return ["output", "SQNR", "largest difference", "top-1", "samples"], rows


def comparison_table(results: Sequence[tuple[str, EvaluationResult]]) -> tuple[list[str], list[list[str]]]:
    """Several evaluations side by side.

    Args:
        results: A label and an evaluation for each row.

    Returns:
        Column names, and one row of cells per evaluation.
    """
    columns = ["model", "size MB", "bits/weight", "perplexity", "KL", "top-1", "decode tok/s"]
    rows = []
    for label, r in results:
        rows.append(
            [
                label,
                f"{r.size_bytes / 1e6:.0f}",
                "–" if r.bits_per_weight is None else f"{r.bits_per_weight:.2f}",
                f"{r.perplexity:.2f}",
                "–" if r.kl_mean is None else f"{r.kl_mean:.4f}",
                "–" if r.top1_agreement is None else f"{100 * r.top1_agreement:.1f}%",
                "–" if r.decode_tokens_per_second is None else f"{r.decode_tokens_per_second:.0f}",
            ]
        )
    return columns, rows


def _bits(result: EvaluationResult) -> str:
    whole = "–" if result.bits_per_weight is None else f"{result.bits_per_weight:.2f}"
    if result.quantized_bits_per_weight is None:
        return whole
    return f"{whole} ({result.quantized_bits_per_weight:.2f} where quantized)"


def _size(size_bytes: int, reference_bytes: int | None) -> str:
    own = _megabytes(size_bytes)
    return f"{own} of {_megabytes(reference_bytes)} ({size_bytes / reference_bytes:.0%})" if reference_bytes else own


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB" if size_bytes >= 1e5 else f"{size_bytes / 1e3:.1f} kB"
