"""What Ray Train calls in each worker process. The one file in `workers` that knows Ray.

Light on purpose: Ray imports it in helper processes that never need torch.
"""

import os
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray.train

from jobs.spec import JobSpec
from jobs.storage import Storage
from workers.keys import TRAIN_FOLDER, stalled_path
from workers.scratch import scratch_folder

LAST_WORD_S = 10.0


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Run a job as one of its Train workers.

    Args:
        config: `job`, a JobSpec as a mapping, `storage`, a URL, and `memory_rung`.

    Returns:
        The JobResult as a mapping, see `JobResult.from_mapping`; Ray hands on rank 0's.
    """
    import torch

    from workers.run import run_job

    job = JobSpec.model_validate(config["job"])
    torch.set_num_threads(job.resources.cpus_per_worker)
    with scratch_folder(job.key) as scratch:
        context = _train_context(Storage(config["storage"]), job.key, scratch)
        context.memory_rung = config["memory_rung"]
        limit_s = 60 * job.resources.stalled_after_minutes
        with context.watchdog.watching(limit_s, partial(_leave, context.storage, job.key)):
            return asdict(run_job(job, context))


def _leave(storage: Storage, job_key: str, diagnosis: str) -> None:
    """End this process, which may hang in a collective, and leave word why."""
    word = threading.Thread(
        target=storage.put, args=(stalled_path(job_key), diagnosis.encode()), daemon=True
    )
    word.start()
    word.join(timeout=LAST_WORD_S)  # it may be the storage that hangs
    os._exit(1)


def _train_context(storage: Storage, job_key: str, scratch: Path) -> Any:
    from ray.train.torch import get_device

    from workers.context import Context

    class TrainContext(Context):
        """Checkpoints go to the storage through Ray Train; the pointer to them is ours.

        Ray's own record of checkpoints is not written atomically, and one damaged stops every
        later attempt of that name. So each attempt has a new name, and finds the checkpoint by
        our pointer.
        """

        def _store_checkpoint(self, stage: str, step: int, folder: Path) -> str:
            name = f"{stage}-{step:08d}"
            ray.train.report(
                {"stage": stage, "step": step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
            )
            return f"{TRAIN_FOLDER}/{ray.train.get_context().get_experiment_name()}/{name}"

    context = TrainContext(storage, job_key, scratch, get_device())
    context.rank = ray.train.get_context().get_world_rank()
    context.world = ray.train.get_context().get_world_size()
    return context
