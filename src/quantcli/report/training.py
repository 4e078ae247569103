"""How a training went, as a picture."""

from collections.abc import Sequence

from quantcli.report.curve import Series, draw_curves

__all__ = ["draw_losses"]


def draw_losses(losses: Sequence[float], held_out: Sequence[tuple[int, float]]) -> str:
    """The text of an SVG file.

    Args:
        losses: Training loss at each step, the first step's first.
        held_out: Steps and the loss on held-out examples after them, 0 for the model before training.
    """
    return draw_curves(
        "Loss while finetuning",
        "step",
        [
            Series("training", list(enumerate(losses, 1))),
            Series("held out", sorted(held_out), marked=True),
        ],
    )
