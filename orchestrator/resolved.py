"""A sweep as planned jobs in the storage, where a cluster and other terminals find it.

    sweeps/<sweep id>.resolved.json     {"prunefleet": version, "jobs": {job key: JobSpec}}

A sweep id is the sweep's name and a hash of its jobs and their storage, so that whoever plans the
same study for the same place arrives at the same id. Whoever reads such a file checks that the
models and data here are those that were planned with.
"""

import importlib.metadata
import json
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from jobs.errors import PrunefleetError, SpecError
from jobs.spec import DatasetSpec, JobSpec, ModelSpec, content_key
from jobs.storage import Storage
from jobs.sweep import SweepError, read_sweep
from orchestrator.plan import make_plan
from workers.data import fingerprint_dataset
from workers.locate import fingerprint_model, locate

FOLDER = "sweeps"
SUFFIX = ".resolved.json"
MAX_BYTES = 100_000_000
"""Some ten thousand jobs have 20 MB."""


def jobs_of(sweep: str) -> list[JobSpec]:
    """The jobs of a sweep: a YAML file, the name of one that ships, or a resolved sweep.

    Raises:
        SpecError, ModelError, DataError: a job that cannot run, and why.
    """
    if sweep.endswith(SUFFIX):
        folder, _, name = sweep.rpartition("/")
        jobs = read_resolved(Storage(folder or "."), name)
        check_fingerprints(jobs)
        return jobs
    path = Path(sweep)
    if not path.exists():
        shipped = Path(str(files("jobs"))) / "sweeps" / f"{path.stem}.yaml"
        if not shipped.exists():
            names = sorted(file.stem for file in shipped.parent.glob("*.yaml"))
            raise SpecError(f"{sweep}: no such file. Sweeps that ship: {', '.join(names)}")
        path = shipped
    spec = read_sweep(path)
    try:
        return make_plan(spec)
    except SweepError:
        raise
    except PrunefleetError as error:
        raise type(error)(f"{path}: {error.message}") from error


def sweep_id(jobs: list[JobSpec], storage: Storage) -> str:
    """`name-<16 hex digits>`: the same for the same jobs and storage, whatever their resources."""
    key = content_key({"storage": storage.url, "jobs": sorted(job.key for job in jobs)})
    return f"{jobs[0].sweep}-{key}"


def resolved_path(sweep: str) -> str:
    """Where the sweep of this id lies in its storage."""
    return f"{FOLDER}/{sweep}{SUFFIX}"


def write_resolved(jobs: list[JobSpec], storage: Storage) -> str:
    """Put a planned sweep in the storage, in place of one of equal jobs, and return its id."""
    sweep = sweep_id(jobs, storage)
    content = {
        "prunefleet": _version(),
        "jobs": {job.key: job.model_dump(mode="json") for job in jobs},
    }
    storage.put(resolved_path(sweep), json.dumps(content, indent=1).encode())
    return sweep


def read_resolved(storage: Storage, path: str) -> list[JobSpec]:
    """The jobs of a resolved sweep, in the order to run them.

    Raises:
        SpecError: no such file, one that is damaged, or one of another version of prunefleet.
    """
    where = f"{storage.url}/{path}"
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise SpecError(
            f"{where}: no such file. Does this machine see the storage under the same name as the "
            "one that wrote it? `prunefleet doctor` tells"
        ) from None
    if len(data) > MAX_BYTES:
        raise SpecError(f"{where} is larger than {MAX_BYTES} bytes: not a sweep")
    try:
        content = json.loads(data)
        jobs = {key: JobSpec.model_validate(job) for key, job in content["jobs"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise SpecError(
            f"{where} is no resolved sweep of prunefleet {_version()}: {reason}. Plan and submit "
            "it again, with the same version here and there"
        ) from None
    for key, job in jobs.items():
        if job.key != key:
            raise SpecError(
                f"{where}: job {key} has the key {job.key} here. It was planned by prunefleet "
                f"{content.get('prunefleet')}, this is {_version()}: use one version"
            )
    if not jobs:
        raise SpecError(f"{where} has no jobs")
    return list(jobs.values())


def check_fingerprints(jobs: list[JobSpec]) -> None:
    """Make sure that models and data on this machine are what the jobs were planned with.

    Raises:
        SpecError: other content under the same name.
        ModelError, DataError: not there at all.
    """
    for job in jobs:
        for spec in _fingerprinted(job):
            bare = spec.model_copy(update={"fingerprint": None})
            found = _fingerprint(bare)
            if found != spec.fingerprint:
                where = bare.name if isinstance(bare, ModelSpec) else bare.path or bare.format
                raise SpecError(
                    f"{where} on this machine is not what the sweep was planned with (fingerprint "
                    f"{found}, planned {spec.fingerprint}). Put the same files under the same "
                    "name on every machine"
                )


def known_sweeps(storage: Storage) -> list[str]:
    """The ids of the sweeps that were run or submitted with this storage."""
    names = (path.removeprefix(f"{FOLDER}/") for path in storage.list(FOLDER))
    return [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]


def find_sweep(sweep: str, storage: Storage) -> tuple[str, list[JobSpec]]:
    """A sweep by its file, or by its name or id (or its beginning) in the storage.

    Returns:
        Its id and its jobs.
    """
    if not Path(sweep).exists() and not sweep.endswith(SUFFIX):
        known = known_sweeps(storage)
        named = [its_id for its_id in known if its_id.rpartition("-")[0] == sweep]
        matching = named or [its_id for its_id in known if its_id.startswith(sweep)]
        if len(matching) > 1:
            raise SpecError(f"{sweep}: {storage.url} has several so called: {', '.join(matching)}")
        if matching:
            return matching[0], read_resolved(storage, resolved_path(matching[0]))
    jobs = jobs_of(sweep)
    return sweep_id(jobs, storage), jobs


def _fingerprinted(value: Any) -> Iterator[ModelSpec | DatasetSpec]:
    """Every model and dataset of a job that the plan has given a fingerprint."""
    if isinstance(value, ModelSpec | DatasetSpec):
        if value.fingerprint is not None:
            yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _fingerprinted(getattr(value, name))
    elif isinstance(value, tuple | list):
        for child in value:
            yield from _fingerprinted(child)


@cache
def _fingerprint(spec: ModelSpec | DatasetSpec) -> str:
    return (
        fingerprint_model(locate(spec))
        if isinstance(spec, ModelSpec)
        else fingerprint_dataset(spec)
    )


def _version() -> str:
    return importlib.metadata.version("prunefleet")
