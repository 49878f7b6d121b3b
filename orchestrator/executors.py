"""Where jobs run: on Ray, one Tune trial and one Train run each, or here in this process.

Both executors take planned jobs, call `on_settled` with each result, and leave everything that
matters in the storage. Ray is imported only when it is used.
"""

import gc
import os
import re
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from jobs.errors import (
    CorruptError,
    LostError,
    OutOfMemoryError,
    PreemptedError,
    PrunefleetError,
    SpecError,
    StalledError,
    StarvedError,
    StorageError,
)
from jobs.result import JobResult
from jobs.spec import JobSpec
from jobs.storage import Storage
from orchestrator.admission import TRIAL_MEMORY, Node, Queue, check_feasible, need_of, tell
from orchestrator.doctor import require_shared_storage
from orchestrator.fleet import Fleet
from orchestrator.retry import Attempt
from orchestrator.settle import fail, settle
from orchestrator.upkeep import Upkeep
from workers.keys import TRAIN_FOLDER, stalled_path

TUNE_FOLDER = "ray/tune"
TRIAL_RESOURCES = {"CPU": 0, "memory": TRIAL_MEMORY}
"""A trial only waits for its Train workers, which reserve their own CPUs. A hundredth of a CPU
would be too much: on two it leaves too little for two workers, and the trial waits for itself."""

STARTS = 4
"""How often a Train run that gets no workers is tried again, 60 s each."""

DRIVER_LOSSES = 5
"""How often the process that waits for a job's workers is started anew."""

ROOM_PATIENCE_S = 600.0
"""How long to wait while others hold the whole cluster. Then Ray has to say who is starved."""

MAX_NODES_OF_A_GROUP = 1000

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
        """Settle the jobs: after this each has a row, or `on_failure` ended the run.

        Raises:
            SpecError: a job that no node of the cluster can hold, or a node that does not share the
                storage. Nothing was started.
        """


class InlineExecutor:
    """One job after the other in this process, without Ray: for tests and for debugging.

    A job that repairs with several workers runs with one; see `RepairSpec.num_workers`.
    """

    def run(self, jobs: Sequence[JobSpec], storage: Storage, on_settled: OnSettled) -> None:
        num_failed = 0
        for job in jobs:
            result = settle(job, storage, partial(_here, job, storage))
            on_settled(job, result)
            num_failed += result.status == "failed"
            if num_failed == job.policy.on_failure.stop_after:
                return


def _here(job: JobSpec, storage: Storage, attempt: Attempt) -> JobResult:
    import torch

    from workers.context import Context, threads
    from workers.run import run_job
    from workers.scratch import scratch_folder
    from workers.watchdog import raised_here

    device = torch.device("cuda" if job.resources.gpus_per_worker else "cpu")
    limit_s = 60 * job.resources.stalled_after_minutes
    if attempt.memory_rung:
        gc.collect()
        torch.cuda.empty_cache()
    with (
        scratch_folder(job.key) as scratch,
        threads(job.resources.cpus_per_worker),
        raised_here() as raise_stalled,
    ):
        context = Context(storage, job.key, scratch, device)
        context.memory_rung = attempt.memory_rung
        with context.watchdog.watching(limit_s, raise_stalled):
            return run_job(job, context)


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
            check_feasible(jobs, _nodes())
            if self.address is not None:
                require_shared_storage(storage)
            _run_trials(jobs, storage, on_settled)
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


def _run_trials(jobs: Sequence[JobSpec], storage: Storage, on_settled: OnSettled) -> None:
    """One Tune run over all jobs; which of them runs when is our queue's decision."""
    import ray
    from ray import tune
    from ray.tune.search import Searcher

    policy = jobs[0].policy
    queue = Queue(jobs, max_share=policy.max_share, stop_after=policy.on_failure.stop_after)
    fleet = Fleet(storage, ray.get_runtime_context().gcs_address, policy.priority)

    class Admission(Searcher):  # type: ignore[misc]
        """Tune asks it for the next trial several times a second."""

        def __init__(self) -> None:
            super().__init__()
            self.room_due = time.monotonic() + ROOM_PATIENCE_S

        def suggest(self, trial_id: str) -> Any:
            if queue.is_over:
                return Searcher.FINISHED
            if not queue.is_idle:
                self.room_due = time.monotonic() + ROOM_PATIENCE_S
            if fleet.gives_way(len(queue.waiting)):
                return None
            others_matter = time.monotonic() < self.room_due
            job = queue.next(_nodes(), _unused() if others_matter else None)
            return job and {"job": job.model_dump(mode="json"), "storage": storage.url}

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            pass  # Report sees to it

        def save(self, checkpoint_path: str) -> None:
            pass  # Tune would resume from it; we plan again

        def __reduce__(self) -> Any:
            return Searcher, ()

    upkeep = Upkeep()

    class Report(tune.Callback):  # type: ignore[misc]
        def on_step_begin(self, iteration: int, trials: Any, **_: Any) -> None:
            upkeep.see_to_it()

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            self.ended(trial, JobResult.from_mapping(trial.last_result["result"]))

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            job = JobSpec.model_validate(trial.config["job"])
            self.ended(trial, fail(job, storage, LostError.kind, _last_words(trial)))

        def ended(self, trial: Any, result: JobResult) -> None:
            job = JobSpec.model_validate(trial.config["job"])
            queue.ended(job, failed=result.status == "failed")
            on_settled(job, result)

        def __reduce__(self) -> Any:
            return tune.Callback, ()

    name = f"{jobs[0].sweep}-{uuid.uuid4().hex[:8]}"
    tuner = tune.Tuner(
        tune.with_resources(_trial, TRIAL_RESOURCES),
        tune_config=tune.TuneConfig(
            num_samples=len(jobs),
            search_alg=Admission(),
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.config['job']['sweep']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=f"{storage.url}/{TUNE_FOLDER}",
            failure_config=tune.FailureConfig(max_failures=DRIVER_LOSSES),
            callbacks=[Report()],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        fleet.leave()
    storage.remove_folder(f"{TUNE_FOLDER}/{name}")


def _last_words(trial: Any) -> str:
    """Of a trial whose own process died once too often; what a worker raises is settled there."""
    error = str(trial.get_error() or "no reason is known").strip()
    return f"the job's driver died {DRIVER_LOSSES + 1} times: {error.splitlines()[-1]}"


def _nodes() -> list[Node]:
    """What the cluster has, or on one that grows by itself, what it may grow to."""
    import ray
    from ray._private.state import state

    config = state.get_cluster_config()
    groups = config.node_group_configs if config else []
    if groups:
        return [
            Node(f"{group.name}-{number}", dict(group.resources))
            for group in groups
            for number in range(min(group.max_count, MAX_NODES_OF_A_GROUP))
        ]
    return [Node(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _unused() -> list[Node] | None:
    """What nobody holds now, ourselves included; None where nodes come when they are asked for."""
    from ray._private.state import state

    if state.get_cluster_config() is not None:
        return None
    return [Node(name, has) for name, has in state.available_resources_per_node().items()]


def _trial(config: dict[str, Any]) -> None:
    """What Tune runs: one job, in an actor of its own that waits for the job's Train run."""
    from dataclasses import asdict

    from ray import tune

    job = JobSpec.model_validate(config["job"])
    storage = Storage(config["storage"])
    result = settle(job, storage, partial(_fit, job, storage))
    tune.report({"result": asdict(result)})


def _fit(job: JobSpec, storage: Storage, attempt: Attempt) -> JobResult:
    """One attempt at a job as a Ray Train run.

    Raises:
        PrunefleetError: what a worker raised; LostError if one died; StarvedError if none began.
        Exception: a mistake in our code, as the worker raised it.
    """
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    from workers.entry import train_worker

    storage.delete(stalled_path(job.key))
    name = f"{job.key}-{attempt.number}-{uuid.uuid4().hex[:8]}"
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "job": job.model_dump(mode="json"),
            "storage": storage.url,
            "memory_rung": attempt.memory_rung,
        },
        torch_config=TorchConfig(backend="nccl" if job.resources.gpus_per_worker else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=job.num_workers,
            use_gpu=bool(job.resources.gpus_per_worker),
            resources_per_worker=need_of(job),
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
    except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
        raise _stalled(job, storage) or _cause(error, job) from error
    storage.remove_folder(f"{TRAIN_FOLDER}/{name}")
    return result


def _stalled(job: JobSpec, storage: Storage) -> StalledError | None:
    """The last word of a worker that ended itself for standing still."""
    try:
        return StalledError(storage.read_bytes(stalled_path(job.key)).decode())
    except (FileNotFoundError, StorageError):
        return None


DEATHS: list[tuple[str, type[PrunefleetError]]] = [
    (r"OutOfMemoryError|running low on memory|memory monitor", OutOfMemoryError),
    (r"PreemptionError|preempted|node has died|node was terminated", PreemptedError),
    (r"NCCLHangError|CollectiveTimeoutError", StalledError),
    (r"CheckpointManagerInitializationError", CorruptError),
]
"""What Ray says of a worker that is gone, and what it means."""


def _cause(error: Exception, job: JobSpec) -> Exception:
    """What a worker raised, out of what Ray Train wraps it in; or that one died, or never began.

    Where the run's controller died, which only our actor waited for, nobody is left to wrap.
    """
    failures = list(getattr(error, "worker_failures", {}).values())
    raised = [getattr(failure, "_base_exc", None) for failure in failures]
    for inner in raised:
        if isinstance(inner, PrunefleetError):
            return inner
    controller = getattr(error, "controller_failure", None)
    if "StartupTimeout" in type(controller).__name__:
        return StarvedError(
            f"the cluster did not give {job.num_workers} workers of {tell(need_of(job))} each in "
            f"{STARTS + 1} tries of 60 s. Is something else using it? Free it or ask for less, "
            "and run the sweep again"
        )
    for inner in raised:
        # A worker whose neighbour died is told so by the collective it waits in.
        if isinstance(inner, Exception) and not re.search("gloo|nccl", str(inner), re.IGNORECASE):
            return inner
    deaths = [getattr(failure, "health_check_failure", failure) for failure in failures]
    told = " ".join(f"{type(one).__name__}: {one}" for one in [error, controller, *deaths])
    for pattern, kind in DEATHS:
        if re.search(pattern, told):
            return kind(f"a worker of the job is gone: {error}")
    return LostError(f"a worker of the job, or who watched over it, died: {error}")
