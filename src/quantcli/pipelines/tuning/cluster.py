"""Trials as tasks of a Ray cluster: https://docs.ray.io. Ray places them, and runs those of a lost node again."""

import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from quantcli.errors import InputError, InterruptedRunError, ResourceError, UsageError, first_line
from quantcli.options import TuneOptions
from quantcli.pipelines.tuning.record import Record
from quantcli.pipelines.tuning.trial import Job, run_trial
from quantcli.progress import Progress

__all__ = ["Cluster"]

_AGAIN = 5
"""How often a trial whose node or process was lost is run again."""
_SECONDS = 10.0
_LOCAL_VARIABLES = ("PYTHONPATH", "QUANTCLI_CACHE", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")


class Cluster:
    """As many trials at once as the cluster has room for.

    Model, data and output are read and written by their paths, which all nodes must see; a trial that does not find
    them there fails with that reason.
    """

    def __init__(self, options: TuneOptions, progress: Progress):
        """Joins the cluster, or starts one on this machine.

        Raises:
            UsageError: Ray is not installed, or a cluster has no node with room for one trial.
            ResourceError: the cluster cannot be reached.
        """
        try:
            import ray
        except ImportError as error:
            raise UsageError("--ray needs Ray, which is not installed", hint="pip install 'quantcli[ray]'") from error
        self._ray, self._progress = ray, progress
        self._jobs: dict[Any, Job] = {}
        self._started = False
        self._join(str(options.ray))
        resources = {"CPU": options.ray_cpus, "GPU": options.ray_gpus, "memory": float(options.ray_memory or 0)}
        self._needs = {name: amount for name, amount in resources.items() if amount}
        if not self._room():
            self.close()
            wanted = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items())
            raise UsageError(
                f"no node of the cluster has {wanted}", hint="lower --ray-cpus, --ray-gpus or --ray-memory"
            )
        task: Callable[..., Any] = ray.remote(_run)
        self._task: Any = task.options(  # type: ignore[attr-defined]
            num_cpus=options.ray_cpus,
            num_gpus=options.ray_gpus,
            memory=options.ray_memory,
            max_retries=_AGAIN,
        )

    def _join(self, address: str) -> None:
        ray = self._ray
        environment = {name: os.environ[name] for name in _LOCAL_VARIABLES if name in os.environ}
        common: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": "ERROR",
            "runtime_env": {"env_vars": environment},
        }
        _refuse_unreachable(address)
        if ray.is_initialized():  # somebody else's, who also ends it
            return
        try:
            if address == "local":
                ray.init(address="local", include_dashboard=False, **common)
            else:
                ray.init(address=address, **common)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
            raise ResourceError(
                f"the Ray cluster {address} cannot be joined: {first_line(error)}",
                hint="give --ray HOST:6379, or --ray local for one on this machine",
            ) from error
        self._started = True

    def _room(self) -> int:
        """Trials that run at once: what each living node can hold, added up."""
        count = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                has = node["Resources"]
                count += min(int(has.get(name, 0) / amount) for name, amount in self._needs.items())
        return count

    @property
    def free(self) -> bool:
        """Whether another trial would begin at once."""
        return len(self._jobs) < max(self._room(), 1)

    def submit(self, job: Job) -> None:
        """Hands a trial to the cluster."""
        self._jobs[self._task.remote(_absolute(job))] = job

    def next(self) -> Record:
        """Waits for a trial to end.

        Raises:
            InterruptedRunError: it was interrupted where it ran.
        """
        (done, *_), _ = self._ray.wait(list(self._jobs), num_returns=1)
        job = self._jobs.pop(done)
        try:
            record: Record = self._ray.get(done)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InterruptedRunError | KeyboardInterrupt):
                raise InterruptedRunError("interrupted", hint="run the same command again to continue") from error
            reason = f"{type(error.cause).__name__}: {first_line(error.cause)}"
            return Record(job.number, job.label, job.point, "failed", reason=reason)
        except self._ray.exceptions.RayError as error:  # lost once too often, or out of memory
            reason = f"lost {_AGAIN + 1} times: {type(error).__name__}"
            return Record(job.number, job.label, job.point, "failed", reason=reason)
        return record

    def close(self) -> None:
        """Cancels what still runs, and leaves the cluster."""
        for task in self._jobs:
            self._ray.cancel(task, force=True)
        self._jobs = {}
        if self._started:
            self._ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Asks at the door: Ray itself knocks for minutes.

    Raises:
        ResourceError: nobody is there.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ResourceError(
            f"the Ray cluster {address} cannot be joined: {first_line(error)}",
            hint="give --ray HOST:6379, or --ray local for one on this machine",
        ) from error


def _absolute(job: Job) -> Job:
    """The same with paths that mean the same wherever it runs."""

    def whole(path: Any) -> Any:
        return path if path is None or not os.path.exists(path) else type(path)(os.path.abspath(path))

    options, judging = job.options, job.judging
    names = ("calibration_inputs", "user_script", "calibration_cache")
    graphs = [replace(g, **{n: whole(getattr(g, n)) for n in names}) for g in (options.graph, judging.graph)]
    text = replace(options.calibration, data=whole(options.calibration.data))
    options = replace(options, model=whole(options.model), calibration=text, graph=graphs[0])
    metric = replace(judging.metric, script=whole(judging.metric.script))
    judging = replace(judging, model=whole(judging.model), data=whole(judging.data), metric=metric, graph=graphs[1])
    return replace(job, options=options, judging=judging)


def _run(job: Job) -> Record:
    """A trial on whichever node Ray has chosen."""
    import ray

    needed = [str(job.judging.kept.parent)] + [m for m in (job.options.model,) if os.path.isabs(m)]
    for path in needed:
        if not os.path.exists(path):
            raise InputError(f"{path} is not there on node {ray.util.get_node_ip_address()}")
    node = ray.get_runtime_context().get_node_id()
    return replace(run_trial(job), node=node)
