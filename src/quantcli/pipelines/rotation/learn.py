"""Trained rotations: gives the plan a checkpoint that is seen through them.

They are kept beside the run's other state, so that a run that was interrupted goes on with the same rotations.
"""

from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import load_file

from quantcli.folder import read_state, write_json
from quantcli.models.rotate import RotatedCheckpoint
from quantcli.models.writer import write_tensors
from quantcli.pipelines.blockwise.journal import Journal
from quantcli.pipelines.blockwise.tokens import saved_tokens
from quantcli.pipelines.planning.plan import Plan
from quantcli.pipelines.rotation.train import RotationReport, see_through, train_rotations
from quantcli.progress import Progress

__all__ = ["learn_rotations"]


def learn_rotations(plan: Plan, state: Path, journal: Journal, progress: Progress) -> tuple[Plan, RotationReport]:
    """The plan with rotations trained, or those that an interrupted run has trained.

    Args:
        plan: With a transform whose rotations are trained.
        state: Where an interrupted run keeps what it needs.
        journal: Of the run; the time of a training that an interrupted run did counts where it did nothing else.
        progress: Told of the training.
    """
    checkpoint, step = plan.checkpoint, plan.trained
    assert isinstance(checkpoint, RotatedCheckpoint) and step is not None
    file, log = state / "rotations.safetensors", state / "rotations.json"
    if file.is_file():
        saved = load_file(file)
        matrices = [saved[str(i)] for i in range(len(saved))]
        report = read_state(log, RotationReport)
        if not journal.done:
            progress.note("continuing with the rotations that the interrupted run has trained")
            journal.seconds_before = report.seconds
    else:
        rows = saved_tokens(plan, state, progress)["rows"]
        matrices, report = train_rotations(checkpoint, plan.skeleton, plan.layout, rows, step, plan.device, progress)
        write_json(log, asdict(report))
        write_tensors({str(i): m.cpu().clone() for i, m in enumerate(matrices)}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return replace(plan, checkpoint=see_through(checkpoint, matrices)), report
