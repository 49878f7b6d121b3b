"""Where jobs run: on Ray, one Tune trial and one Train run each, or here in this process.

Both executors take planned jobs, call `on_settled` with each result, and leave everything that
matters in the storage. Ray is imported only when it is used.
"""

import os
import re
import secrets
import tempfile
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from jobs.errors import LostError, PrunefleetError, SpecError, StarvedError
from jobs.result import JobResult
from jobs.spec import JobSpec
from jobs.storage import Storage
from orchestrator.settle import fail, settle
from workers.keys import TRAIN_FOLDER

TUNE_FOLDER = "ray/tune"
TRIAL_RESOURCES = {"CPU": 0, "memory": 2**28}
"""A trial only waits for its Train workers, which reserve their own CPUs. A hundredth of a CPU
would be too much: on two it leaves too little for two workers, and the trial waits for itself."""

STARTS = 4
"""How often a Train run that gets no workers is tried again, 60 s each."""

RAY_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how often a Train run looks whether it is over
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "1800",  # without it a lost worker is waited for for ever
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TOKENIZERS_PARALLELISM": "false",
}

OnSettled = Callable[[JobSpec, JobResult], None]


class Executor(Protocol):
    def run(self, jobs: Sequence[JobSpec], storage: Storage, on_settled: OnSettled) -> None:
        """Settle every job: after this each has a row."""


class InlineExecutor:
    """One job after the other in this process, without Ray: for tests and for debugging.

    A job that repairs with several workers runs with one; see `RepairSpec.num_workers`.
    """

    def run(self, jobs: Sequence[JobSpec], storage: Storage, on_settled: OnSettled) -> None:
        for job in jobs:
            on_settled(job, settle(job, storage, partial(_here, job, storage)))


def _here(job: JobSpec, storage: Storage, attempt: int) -> JobResult:
    import torch

    from workers.context import Context, threads
    from workers.run import run_job

    device = torch.device("cuda" if job.resources.gpus_per_worker else "cpu")
    with (
        tempfile.TemporaryDirectory(prefix=f"prunefleet-{job.key}-") as scratch,
        threads(job.resources.cpus_per_worker),
    ):
        return run_job(job, Context(storage, job.key, Path(scratch), device))


class RayExecutor:
    """On a Ray cluster: the one at `address`, or one that is started here and ends with us."""

    def __init__(self, address: str | None = None) -> None:
        self.address = address

    def run(self, jobs: Sequence[JobSpec], storage: Storage, on_settled: OnSettled) -> None:
        if not jobs:
            return
        if storage.url.startswith("memory:"):
            raise SpecError("storage memory:// is seen by one process only; Ray needs a shared one")
        self._connect()
        import ray

        try:
            for _, same_shape in groupby(jobs, key=_shape):
                self._run_alike(list(same_shape), storage, on_settled)
        finally:
            ray.shutdown()

    def _connect(self) -> None:
        for name, value in RAY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        starts_one = self.address is None
        if starts_one:  # before Ray is imported: it reads them then
            os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a process a run, for clouds
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this cluster, on no disk
        import ray

        # A dead run's placement group is freed by a process that asks the dashboard about it.
        dashboard: dict[str, Any] = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        ray.init(
            address=self.address,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": RAY_ENVIRONMENT},
            **(dashboard if starts_one else {}),
        )

    def _run_alike(self, jobs: list[JobSpec], storage: Storage, on_settled: OnSettled) -> None:
        """One Tune run over jobs of equal resources, as many at a time as the cluster holds."""
        from ray import tune

        by_key = {job.key: job for job in jobs}

        class Report(tune.Callback):  # type: ignore[misc]
            def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
                value = trial.last_result["result"]
                on_settled(by_key[value["job_key"]], JobResult.from_mapping(value))

            def __reduce__(self) -> Any:  # Tune pickles callbacks, for a resume that is not ours
                return tune.Callback, ()

        name = f"{jobs[0].sweep}-{uuid.uuid4().hex[:8]}"
        results = tune.Tuner(
            tune.with_resources(_trial, TRIAL_RESOURCES),
            param_space={
                "job": tune.grid_search([job.model_dump(mode="json") for job in jobs]),
                "storage": storage.url,
            },
            tune_config=tune.TuneConfig(
                max_concurrent_trials=_slots(jobs[0]),
                reuse_actors=True,
                trial_dirname_creator=lambda trial: (
                    f"{trial.config['job']['sweep']}-{trial.trial_id}"
                ),
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=f"{storage.url}/{TUNE_FOLDER}",
                failure_config=tune.FailureConfig(max_failures=2),
                callbacks=[Report()],
                verbose=0,
            ),
        ).fit()
        storage.remove_folder(f"{TUNE_FOLDER}/{name}")
        for outcome in results:
            if outcome.error is not None:
                job = by_key[JobSpec.model_validate(outcome.config["job"]).key]
                on_settled(job, fail(job, storage, LostError.kind, str(outcome.error)))


def _trial(config: dict[str, Any]) -> None:
    """What Tune runs: one job, in an actor of its own that waits for the job's Train run."""
    from dataclasses import asdict

    from ray import tune

    job = JobSpec.model_validate(config["job"])
    storage = Storage(config["storage"])
    result = settle(job, storage, partial(_fit, job, storage))
    tune.report({"result": asdict(result)})


def _fit(job: JobSpec, storage: Storage, attempt: int) -> JobResult:
    """One attempt at a job as a Ray Train run.

    Raises:
        PrunefleetError: what a worker raised; LostError if one died; StarvedError if none began.
        Exception: a mistake in our code, as the worker raised it.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from workers.entry import train_worker

    need = job.resources
    name = f"{job.key}-{attempt}-{uuid.uuid4().hex[:8]}"
    resources: dict[str, float] = {"CPU": need.cpus_per_worker}
    if need.gpus_per_worker:
        resources["GPU"] = need.gpus_per_worker
    if need.memory_gib_per_worker:
        resources["memory"] = need.memory_gib_per_worker * 2**30
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job.model_dump(mode="json"), "storage": storage.url},
        torch_config=TorchConfig(backend="nccl" if need.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.num_workers,
            use_gpu=bool(need.gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=f"{storage.url}/{TRAIN_FOLDER}",
            # Retries are ours (settle.py). Ray's default for its controller is to retry for ever.
            failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=STARTS),
        ),
    )
    try:
        result = JobResult.from_mapping(trainer.fit().return_value)
    except ray.train.TrainingFailedError as error:
        raise _cause(error, job) from error
    storage.remove_folder(f"{TRAIN_FOLDER}/{name}")
    return result


def _cause(error: Exception, job: JobSpec) -> Exception:
    """What a worker raised, out of what Ray Train wraps it in; or that one died, or never began."""
    failures = getattr(error, "worker_failures", {})
    raised = [getattr(failure, "_base_exc", None) for failure in failures.values()]
    for inner in raised:
        if isinstance(inner, PrunefleetError):
            return inner
    if "StartupTimeout" in type(getattr(error, "controller_failure", None)).__name__:
        return StarvedError(
            f"the cluster did not give {job.num_workers} workers of {job.resources} in "
            f"{STARTS + 1} tries of 60 s. Is something else using it? Free it or ask for less, "
            "and run the sweep again"
        )
    for inner in raised:
        # A worker whose neighbour died is told so by the collective it waits in.
        if isinstance(inner, Exception) and not re.search("gloo|nccl", str(inner), re.IGNORECASE):
            return inner
    return LostError(f"a worker of the job died: {error}")


def _shape(job: JobSpec) -> tuple[Any, ...]:
    """Jobs of one shape fill a cluster without deadlock or gaps: they are run together."""
    return job.num_workers, job.resources


def _slots(job: JobSpec) -> int:
    """How many jobs of this shape the cluster holds at a time.

    Raises:
        SpecError: not one.
    """
    import ray

    total = ray.cluster_resources()
    need = {
        "CPU": job.num_workers * job.resources.cpus_per_worker,
        "GPU": job.num_workers * job.resources.gpus_per_worker,
    }
    fits = min(int(total.get(name, 0) // amount) for name, amount in need.items() if amount)
    if fits == 0:
        raise SpecError(
            f"resources: a job needs {need['CPU']} CPUs and {need['GPU']:g} GPUs for its "
            f"{job.num_workers} workers; the cluster has {total.get('CPU', 0):g} and "
            f"{total.get('GPU', 0):g}"
        )
    return fits
