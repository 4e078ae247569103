"""Where trials run: here, one after the other, or wherever else somebody takes jobs."""

from typing import Protocol

from quantcli.pipelines.tuning.record import Record
from quantcli.pipelines.tuning.trial import Job, run_trial
from quantcli.progress import Progress

__all__ = ["Here", "Runner"]


class Runner(Protocol):
    """Takes jobs and gives records, in whatever order they end."""

    @property
    def free(self) -> bool:
        """Whether another job would begin at once."""
        ...

    def submit(self, job: Job) -> None:
        """Begins a job, or notes it."""
        ...

    def next(self) -> Record:
        """Waits for a job to end."""
        ...

    def close(self) -> None:
        """Gives up what still runs."""
        ...


class Here:
    """One trial at a time, in this process."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._job: Job | None = None

    @property
    def free(self) -> bool:
        """Whether nothing is to run."""
        return self._job is None

    def submit(self, job: Job) -> None:
        """Notes the job; `next` runs it."""
        self._job = job

    def next(self) -> Record:
        """Runs the job."""
        assert self._job is not None
        job, self._job = self._job, None
        return run_trial(job, self._progress)

    def close(self) -> None:
        """Nothing runs between two calls."""
