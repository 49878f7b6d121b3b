"""What a storage holds that nothing needs: found and shown first, deleted only when asked to.

Kept, always: rows; of every result its model (`export`), evaluations and allocation;
whatever a living job may use. A job says that it lives by its claims and its progress, but not
which finished stages it is going to read: so while any job lives, no stage goes, and of the rest
only what is older than a day. Whatever is younger than `min_age_s` stays, too.

A kill in the middle leaves everything readable: a stage loses its marker first, and without it
counts as never computed.
"""

import json
import re
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from jobs.errors import StorageError
from jobs.storage import Storage, StoredFile
from orchestrator import leaderboard
from orchestrator.executors import TUNE_FOLDER
from workers.keys import STAGES, TRAIN_FOLDER

DAY_S = 86_400.0
LIVES_WITHIN_S = 600.0
"""A claim is rewritten every few seconds, progress at least every block."""

SMALL_STAGES = ("allocate", "evaluate")
"""Kept with a result that came of them: the answers behind its scores, how a search went."""

Files = dict[str, StoredFile]


@dataclass(frozen=True)
class Garbage:
    """One thing to delete, with all its files."""

    path: str
    """A file, or a folder with all that is in it."""
    reason: str
    num_files: int
    size: int
    """In bytes."""
    age_s: float
    """Since its newest file was written."""
    is_folder: bool
    is_stage: bool


@dataclass(frozen=True)
class Survey:
    garbage: list[Garbage]
    too_young: int
    """How many things nothing needs either, but are younger than the minimum age."""
    alive: list[str]
    """Signs of jobs that run: then no stage is garbage."""
    unreadable: list[str]
    """Keys of jobs whose row cannot be read, nor what it needs: then no stage is garbage."""


def survey(storage: Storage, *, min_age_s: float, keep: Collection[str] = ()) -> Survey:
    """Find what could be deleted. Deletes nothing.

    Args:
        min_age_s: what was written since stays, by the storage's own clock.
        keep: stages of which nothing is garbage, such as `statistics`.
    """
    files = storage.files(hidden=True)
    if not files:
        return Survey([], 0, [], [])
    now = storage.clock()
    alive = _alive(files, now)
    needed, unreadable = _needed_stages(storage)
    candidates = [
        *_leftovers(files, now),
        *_signs_of_the_dead(files, now),
        *_superseded_compactions(storage, files, now),
        *_abandoned_work(storage, files, now),
    ]
    if not alive and not unreadable:
        candidates += _unneeded_stages(files, now, needed, keep)
    old_enough_s = max(min_age_s, DAY_S) if alive else min_age_s
    # the newest file may be ahead of a clock that ticks coarsely
    old = [garbage for garbage in candidates if max(garbage.age_s, 0) >= old_enough_s]
    return Survey(old, len(candidates) - len(old), alive, unreadable)


def delete(storage: Storage, garbage: Garbage) -> bool:
    """Delete one thing, unless it is a stage and a job has come to life since the survey."""
    if garbage.is_stage:
        if _alive(storage.files("claims") | storage.files("progress"), storage.clock()):
            return False
        if garbage.path in _needed_stages(storage)[0]:
            return False
        storage.remove_folder(garbage.path)
    elif garbage.is_folder:
        storage.remove_folder(garbage.path)
    else:
        storage.delete(garbage.path)
    return True


def _grouped(files: Files, pattern: str) -> dict[str, Files]:
    """Files by the part of their path that matches."""
    groups: dict[str, Files] = {}
    for path, file in files.items():
        if match := re.match(pattern, path):
            groups.setdefault(match[0].rstrip("/"), {})[path] = file
    return groups


def _thing(path: str, reason: str, files: Files, now: float, *, is_stage: bool = False) -> Garbage:
    return Garbage(
        path,
        reason,
        len(files),
        sum(file.size for file in files.values()),
        now - max(file.modified for file in files.values()),
        path not in files,
        is_stage,
    )


def _alive(files: Files, now: float) -> list[str]:
    return [
        path
        for path, file in files.items()
        if re.match(r"(claims|progress)/[^/]+\.json$", path)
        and now - file.modified < LIVES_WITHIN_S
    ]


def _needed_stages(storage: Storage) -> tuple[set[str], list[str]]:
    """Paths of the stages that results need, and the jobs whose results cannot be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are told by their keys
        frame = leaderboard.load(storage)
    unreadable = leaderboard.published_keys(storage).keys() - set(frame["job_key"])
    needed = {"/".join(uri.split("/")[-3:]) for uri in frame["export"].dropna()}
    for stages in frame["stages"].dropna():
        needed |= set(_small_stages(stages))
    return needed, sorted(unreadable)


def _small_stages(stages: str) -> Iterator[str]:
    try:
        listed: Any = json.loads(stages)
        for stage in listed:
            if stage["stage"] in SMALL_STAGES:
                yield f"stages/{stage['stage']}/{stage['key']}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return  # the row itself is fine, and it is what counts


def _unneeded_stages(
    files: Files, now: float, needed: set[str], keep: Collection[str]
) -> Iterator[Garbage]:
    for path, its in _grouped(files, r"stages/[^/]+/(?!_tmp)[^/]+/").items():
        stage = path.split("/")[1]
        if stage in STAGES and stage not in keep and path not in needed:
            yield _thing(path, "no result needs it", its, now, is_stage=True)


def _leftovers(files: Files, now: float) -> Iterator[Garbage]:
    for path, its in _grouped(files, r"(?:[^/]+/)*?_tmp[^/]*(?:/|$)").items():
        yield _thing(path, "left in the making by a kill", its, now)


def _signs_of_the_dead(files: Files, now: float) -> Iterator[Garbage]:
    for path, file in files.items():
        is_sign = re.match(r"(claims|progress)/(?!_tmp)[^/]+\.json$", path)
        if is_sign and now - file.modified >= LIVES_WITHIN_S:
            yield _thing(path, "of a process that is gone", {path: file}, now)


def _superseded_compactions(storage: Storage, files: Files, now: float) -> Iterator[Garbage]:
    newest = leaderboard.newest_generation(storage)
    for path, file in files.items():
        match = re.match(rf"{leaderboard.COMPACT}/(?:manifest|gen)-(\d+)\b", path)
        if match and int(match[1]) < newest.number and path != newest.file:
            yield _thing(path, "a later compaction holds its rows", {path: file}, now)


def _abandoned_work(storage: Storage, files: Files, now: float) -> Iterator[Garbage]:
    """Checkpoints: of a finished stage at any age, else of one that nobody took up again."""
    matches = (re.match(r"stages/[^/]+/([^/]+)/DONE.json$", path) for path in files)
    done = {match[1] for match in matches if match}
    claimed = {
        path.removesuffix(".json").rpartition("-")[2]
        for path, file in files.items()
        if path.startswith("claims/") and now - file.modified < LIVES_WITHIN_S
    }
    in_use = set()
    for path, its in _grouped(files, r"work/(?!_tmp)[^/]+/").items():
        key = path.split("/")[1]
        if key in claimed:
            in_use |= set(_pointed_to(storage, path))
        elif key in done:
            yield _thing(path, "checkpoints of a stage that is finished", its, now)
        else:
            in_use |= set(_pointed_to(storage, path))
            yield _thing(path, "checkpoints of a stage that nobody finished", its, now)
    for folder in (TRAIN_FOLDER, TUNE_FOLDER):
        for path, its in _grouped(files, rf"{folder}/(?!_tmp)[^/]+(?:/|$)").items():
            if path not in in_use:
                yield _thing(path, "Ray's own files of a run that is over", its, now)


def _pointed_to(storage: Storage, work: str) -> Iterator[str]:
    """Folders of Ray Train runs in which checkpoints of a stage lie."""
    try:
        for pointer in json.loads(storage.read_sealed(f"{work}/LAST")):
            yield "/".join(str(pointer["path"]).split("/")[:3])
    except (FileNotFoundError, StorageError, ValueError, TypeError, KeyError):
        return
