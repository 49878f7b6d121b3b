"""The leaderboard: every job's result, exactly once, in parquet that pandas reads without us.

    leaderboard/rows/<2 hex>/<job_key>.parquet         a complete job's result, for good
    leaderboard/rows/<2 hex>/<job_key>.failed.parquet  what a job failed of, until it completes
    leaderboard/rows/<2 hex>/<job_key>.stopped.parquet why it was stopped early, likewise
    leaderboard/_compact/gen-<n>-<hash>.parquet        many of them in one file, to read fast
    leaderboard/_compact/manifest-<n>.json             which, in which version

One file per job holds one row per (weights, benchmark, metric) with the job's facts repeated; a
failed job is one row without a score. `pandas.read_parquet("<storage>/leaderboard/rows")` is the
whole table: pyarrow skips names that start with `_`, so nothing in the making is ever in it.

A complete result is created under its one name by put-if-absent and never written again: of
several attempts at one job the first counts. A failure is replaced by the next failure. The
attempt that completes deletes the failure before it creates the result, so that whatever is
killed in between, a job never shows two results. (Two attempts at one job at the same time, one
failing, can show both for a moment; each looks again afterwards and the failure goes. If it is
killed before it can, `load` and `published_keys` still see the complete one only, and `compact`
cleans up.)

Compaction is only a faster way to read the same rows. It deletes no row, and a row whose file was
deleted or replaced since is not taken from it: deleting a file takes its result back.
"""

import difflib
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, get_args

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.crash import crash_point
from jobs.errors import CorruptError, NumericError, SpecError, StorageError
from jobs.result import JobResult, Score, Weights
from jobs.spec import JobSpec
from jobs.storage import Storage

Status = Literal["complete", "failed", "stopped"]
_SUFFIX: dict[Status, str] = {
    "complete": ".parquet",
    "failed": ".failed.parquet",
    "stopped": ".stopped.parquet",
}
_RANK: dict[Status, int] = {"complete": 2, "stopped": 1, "failed": 0}
"""Of several files of one job the highest counts."""

ROWS = "leaderboard/rows"
COMPACT = "leaderboard/_compact"
SCHEMA_VERSION = 2
"""2: `sha256` is of the rows as JSON and is checked. In version 1 it was of pyarrow's own bytes."""

MAX_FILE_BYTES = 16 * 2**20
"""Of one job's result. A complete one has about 25 kB."""

MAX_UNPACKED_BYTES = 2**30
"""Of one job's result, at worst: a packed file may repeat a long value in every row."""

_OUTCOME = {
    "job_key": pa.string(),  # hash of the job's settings: the same job, the same key
    "status": pa.string(),  # complete, failed or stopped (early)
    "error": pa.string(),
    "error_kind": pa.string(),  # whose fault: spec, data, model, numeric, storage, ...
}
_SCORE = {
    "weights": pa.string(),  # dense, pruned or repaired: which weights were scored
    "benchmark": pa.string(),
    "metric": pa.string(),
    "score": pa.float64(),
    "score_low": pa.float64(),  # 95% confidence interval
    "score_high": pa.float64(),
    "num_items": pa.int64(),
}
_FACTS = {
    "sweep": pa.string(),  # the one that ran the job first
    "model": pa.string(),
    "method": pa.string(),
    "pattern": pa.string(),
    "sparsity": pa.float64(),  # asked; of a pattern N:M, what the pattern gives
    "sparsity_vision_asked": pa.float64(),
    "sparsity_language_asked": pa.float64(),
    "sparsity_vision": pa.float64(),  # counted from the saved file, of the prunable weights
    "sparsity_language": pa.float64(),
    "sparsity_total": pa.float64(),
    "sparsity_all_params": pa.float64(),  # of every parameter, embeddings and norms included
    "towers": pa.string(),
    "allocation": pa.string(),
    "refine": pa.string(),  # what was reconstructed after pruning: none, block or submodule
    "propagate": pa.string(),
    "samples": pa.int64(),  # of the calibration
    "tokens": pa.string(),  # which of them count in the language tower
    "repair": pa.string(),
    "seed": pa.int64(),
    "seconds_load": pa.float64(),
    "seconds_calibrate": pa.float64(),
    "seconds_allocate": pa.float64(),
    "seconds_prune": pa.float64(),
    "seconds_repair": pa.float64(),
    "seconds_evaluate": pa.float64(),
    "seconds_export": pa.float64(),
    "seconds_total": pa.float64(),
    "seconds_orchestration": pa.float64(),
    "peak_memory_gib": pa.float64(),
    "device": pa.string(),  # what computed: cpu, or the GPU's name
    "cpu": pa.string(),
    "num_workers": pa.int64(),
    "tokens_per_input_min": pa.float64(),  # of all pruned layers; below 1 a Gram lacks rank
    "damping_max": pa.float64(),  # the largest that a Hessian needed
    "layer_error_mean": pa.float64(),
    "export": pa.string(),  # URI of the pruned (or repaired) model
    "weights_sha256": pa.string(),  # of its weights: equal where the model is, bit for bit
    "created": pa.timestamp("us", tz="UTC"),
    "git_commit": pa.string(),
    "version_prunefleet": pa.string(),
    "version_torch": pa.string(),
    "version_transformers": pa.string(),
    "version_ray": pa.string(),
    "version_deepspeed": pa.string(),
    "version_peft": pa.string(),
    "image_digest": pa.string(),
    "hostname": pa.string(),
    "attempt": pa.int64(),
    "stopped_by": pa.string(),  # the rule of early stopping, if one ended the job
    "memory_rung": pa.int64(),  # how often the samples at a time were halved for lack of memory
    "job": pa.string(),  # the resolved job as JSON
    "warnings": pa.string(),  # what was adjusted on the way
    "stages": pa.string(),  # JSON: key, seconds and whether cached, per stage
}
SCHEMA = pa.schema(list((_OUTCOME | _FACTS | _SCORE).items()))
"""Every column. Null where it was not measured."""


def publish(storage: Storage, job_facts: Mapping[str, Any], result: JobResult) -> bool:
    """Put a job's result on the leaderboard.

    Args:
        job_facts: columns that follow from the job's settings. `created` is now unless given.
        result: its scores, and in `facts` the columns that were measured.

    Returns:
        True: ours is visible. False: the job was complete already; that result stays.

    Raises:
        ValueError: an unknown fact, one of the wrong type, or a result that contradicts itself.
        NumericError: a score or fact that is NaN or infinite.
        StorageError: the storage failed. Try again: publishing twice is publishing once.
    """
    rows = _rows_of(job_facts, result)
    data = _to_parquet(rows, _sha256_of_rows(rows))
    own, complete = (row_path(result.job_key, kind) for kind in (result.status, "complete"))
    provisional: tuple[Status, ...] = ("failed", "stopped")
    others = [row_path(result.job_key, kind) for kind in provisional if kind != result.status]
    if result.status == "complete":
        _delete(storage, others)
        crash_point("between failure and result")
        is_ours = storage.put_if_absent(complete, data)
        _delete(storage, others)  # of an attempt that failed just now
        return is_ours
    if storage.exists(complete):
        return False
    storage.put(own, data)
    _delete(storage, others)
    if storage.exists(complete):
        storage.delete(own)
        return False
    return True


def _delete(storage: Storage, paths: Iterable[str]) -> None:
    for path in paths:
        storage.delete(path)


def published_keys(storage: Storage, status: Status | None = None) -> dict[str, Status]:
    """Every job with a row, and how it ended. Lists names and reads no file."""
    visible = _visible(storage.list(ROWS))
    keys = {key: _parse_path(path)[1] for key, path in visible.items()}
    return {key: its for key, its in keys.items() if status in (None, its)}


def still_to_run(jobs: Sequence[JobSpec], storage: Storage) -> list[JobSpec]:
    """The jobs without a result. One that was stopped early has none under another rule."""
    settled = published_keys(storage)
    stopped = {job.key for job in jobs if settled.get(job.key) == "stopped"}
    by_rule = {key: _stopped_by(storage, key) for key in stopped}
    return [
        job
        for job in jobs
        if settled.get(job.key) != "complete"
        and not (job.policy.early_stop and by_rule.get(job.key) == job.policy.early_stop.key)
    ]


def _stopped_by(storage: Storage, job_key: str) -> str | None:
    table = _read_rows(storage, row_path(job_key, "stopped"))
    rule = table["stopped_by"][0].as_py() if table is not None and len(table) else None
    return None if rule is None else str(rule)


def load(storage: Storage | str, query: str | None = None) -> pd.DataFrame:
    """The leaderboard, one row per (job, weights, benchmark, metric), in order of job key.

    A file that cannot be read is skipped with a warning that names it. Columns that an older
    version did not write are null; those of a newer version are kept.

    Args:
        query: as pandas understands it, such as "method == 'wanda' and sparsity > 0.5".
    """
    table = _read(_opened(storage)).table
    frame: pd.DataFrame = table.to_pandas().sort_values("job_key", kind="stable", ignore_index=True)
    if query is None:
        return frame
    columns = f"Columns: {', '.join(frame.columns)}"
    try:
        chosen = frame.eval(query)
    except Exception as error:  # pandas raises whatever its parser met
        raise SpecError(f"query {query!r}: {error}. {columns}") from error
    if not (isinstance(chosen, pd.Series) and chosen.dtype == bool):
        raise SpecError(f"query {query!r} is no condition on a row. {columns}")
    return frame[chosen].reset_index(drop=True)


def wide(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per job, and a column `benchmark/metric/weights` per score."""
    jobs = frame.drop(columns=list(_SCORE)).drop_duplicates("job_key").set_index("job_key")
    scored = frame.dropna(subset=["benchmark", "metric", "weights"])
    names = scored["benchmark"] + "/" + scored["metric"] + "/" + scored["weights"]
    scores = scored.assign(name=names).pivot(index="job_key", columns="name", values="score")
    return jobs.join(scores).rename_axis(columns=None).reset_index()


def select(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Some columns. Raises SpecError for one that there is not, with what was meant."""
    for name in names:
        if name not in frame:
            near = difflib.get_close_matches(name, frame.columns, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise SpecError(f"no column {name!r}.{hint} Columns: {', '.join(frame.columns)}")
    return frame[names]


def compact(storage: Storage) -> int:
    """Gather all rows in one file, so that thousands of results load in under a second.

    Any process may do it, at any time: the next manifest's number goes to one of them.

    Returns:
        How many jobs the newest generation holds.
    """
    _delete_superseded_failures(storage)
    read = _read(storage)
    newest = read.generation
    if read.is_compact:
        return len(newest.inputs)
    number = newest.number + 1
    data = _to_parquet(read.table.sort_by("job_key"))
    name = f"{COMPACT}/gen-{number}-{hashlib.sha256(data).hexdigest()[:16]}.parquet"
    storage.put_if_absent(name, data)
    crash_point("before manifest")
    manifest = json.dumps({"file": name, "inputs": read.inputs}).encode()
    storage.put_if_absent(f"{COMPACT}/manifest-{number}.json", manifest)
    _delete_generations(storage, before=newest.number)
    return len(read.inputs)


def discard_damaged(storage: Storage, keys: Collection[str]) -> list[str]:
    """Delete the row files of these jobs that cannot be read: those jobs have no result.

    Returns:
        The paths of the files.
    """
    versions, generation = storage.versions(ROWS), newest_generation(storage)
    suspects = [
        path
        for key, path in _visible(versions).items()
        if key in keys and generation.inputs.get(path) != versions[path]
    ]
    with ThreadPoolExecutor(8) as pool:
        damaged = pool.map(lambda path: _is_damaged(storage, path), suspects)
        found = [path for path, is_damaged in zip(suspects, damaged, strict=True) if is_damaged]
    for path in found:
        storage.delete(path)
    return found


def _is_damaged(storage: Storage, path: str) -> bool:
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        return False
    try:
        _rows_in(data, path)
    except Exception:  # a broken file makes pyarrow raise almost anything
        return True
    return False


def row_path(job_key: str, status: Status) -> str:
    """Where a job's rows lie in the storage."""
    if not re.fullmatch(r"[0-9a-f]{8,64}", job_key):
        raise ValueError(f"job key {job_key!r}: 8 to 64 digits of a hexadecimal hash, lower case")
    return f"{ROWS}/{job_key[:2]}/{job_key}{_SUFFIX[status]}"


def _parse_path(path: str) -> tuple[str, Status]:
    """Job key and status of a row's file; the key is empty if it is none of ours."""
    key, _, suffix = path.rpartition("/")[2].partition(".")
    for status, its in _SUFFIX.items():
        if f".{suffix}" == its:
            return key, status
    return "", "failed"


def _visible(paths: Iterable[str]) -> dict[str, str]:
    """The one file that counts for each job, in order of job key."""
    by_key: dict[str, str] = {}
    for path in paths:
        key, status = _parse_path(path)
        if key and (key not in by_key or _RANK[status] > _RANK[_parse_path(by_key[key])[1]]):
            by_key[key] = path
    return dict(sorted(by_key.items()))


# ---- writing ----


def _rows_of(job_facts: Mapping[str, Any], result: JobResult) -> pa.Table:
    _check_outcome(result)
    facts = _merged(job_facts, result)
    scores = [asdict(score) for score in result.scores] or [dict.fromkeys(_SCORE)]
    return pa.table(
        {
            name: _column(name, kind, [(facts | score).get(name) for score in scores])
            for name, kind in (_OUTCOME | _FACTS | _SCORE).items()
        },
        schema=SCHEMA,
    )


def _check_outcome(result: JobResult) -> None:
    what = f"job {result.job_key}"
    if result.status not in get_args(Status):
        raise ValueError(f"{what}: status is {result.status!r}, not one of {get_args(Status)}")
    if result.status == "complete" and result.error:
        raise ValueError(f"{what} is complete and has an error: {result.error}")
    if result.status != "complete" and (not result.error or result.scores):
        raise ValueError(f"{what} {result.status}: it needs an error, and can have no scores")
    seen = set()
    for score in result.scores:
        name = (score.weights, score.benchmark, score.metric)
        if score.weights not in get_args(Weights):
            raise ValueError(f"{what}: weights {score.weights!r} are none of {get_args(Weights)}")
        if name in seen:
            raise ValueError(f"{what}: two scores for {'/'.join(name)}")
        seen.add(name)
        _check_interval(what, score)


def _check_interval(what: str, score: Score) -> None:
    low = score.score if score.score_low is None else score.score_low
    high = score.score if score.score_high is None else score.score_high
    if low > score.score or high < score.score:
        raise ValueError(
            f"{what}: {score.benchmark}/{score.metric} is {score.score}, outside its interval "
            f"{score.score_low} to {score.score_high}"
        )


def _merged(job_facts: Mapping[str, Any], result: JobResult) -> dict[str, Any]:
    outcome = {name: getattr(result, name) for name in _OUTCOME}
    facts: dict[str, Any] = {}
    for name, value in [*job_facts.items(), *result.facts.items(), *outcome.items()]:
        if name not in _FACTS and name not in _OUTCOME:
            near = difflib.get_close_matches(name, _FACTS, n=1)
            raise ValueError(
                f"job {result.job_key}: the leaderboard has no column for the fact {name!r}. "
                + (f"Did you mean {near[0]!r}? " if near else "")
                + f"Known: {', '.join(_FACTS)}"
            )
        if value is None:
            continue
        if facts.get(name, value) != value:
            raise ValueError(f"job {result.job_key}: {name} is both {facts[name]!r} and {value!r}")
        facts[name] = value
    return {"created": datetime.now(UTC)} | facts


def _column(name: str, kind: pa.DataType, values: list[Any]) -> pa.Array:
    """Refuses what pyarrow would bend to fit, such as 1.5 in a column of integers."""
    accepted: Any = {
        pa.string(): str,
        pa.int64(): int,
        pa.float64(): (int, float),
    }.get(kind, datetime)
    for value in values:
        if value is None:
            continue
        if not isinstance(value, accepted) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r} ({type(value).__name__}), the column: {kind}")
        if isinstance(value, float) and not math.isfinite(value):
            raise NumericError(f"{name} is {value}: no result. Null is what was not measured")
        if isinstance(value, datetime) and value.tzinfo is None:
            raise ValueError(f"{name} is {value}, without a time zone: use datetime.now(UTC)")
    return pa.array(values, type=kind)


def _to_parquet(table: pa.Table, sha256: str | None = None) -> bytes:
    table = table.replace_schema_metadata(
        {"schema_version": str(SCHEMA_VERSION), **({"sha256": sha256} if sha256 else {})}
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True, write_statistics=False)
    return buffer.getvalue()


def _sha256_of_rows(table: pa.Table) -> str:
    """The same for the same columns, values and types, whatever file they stood in."""
    kinds = [f"{column.name} {column.type}" for column in table.schema]
    rows = json.dumps([kinds, table.to_pylist()], default=str, separators=(",", ":"))
    return hashlib.sha256(rows.encode()).hexdigest()


# ---- reading ----


@dataclass(frozen=True)
class Generation:
    """The newest manifest: which files, in which version, one compact file stands for."""

    number: int = 0
    file: str = ""
    inputs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Read:
    table: pa.Table
    inputs: dict[str, str]
    """The version of each file that the table's rows come from."""
    generation: Generation
    is_compact: bool
    """The newest generation holds exactly these rows."""


def _opened(storage: Storage | str) -> Storage:
    return Storage(storage) if isinstance(storage, str) else storage


def _read(storage: Storage) -> _Read:
    """All rows: from the compact file where it is up to date, from their own files otherwise."""
    versions = storage.versions(ROWS)
    visible = _visible(versions)
    generation = newest_generation(storage)
    fresh = [key for key, path in visible.items() if generation.inputs.get(path) == versions[path]]
    compacted = _read_compact(storage, generation.file) if fresh else None
    if compacted is None:
        compacted, fresh = SCHEMA.empty_table(), []
    compacted = compacted.filter(pc.is_in(compacted["job_key"], pa.array(fresh, pa.string())))
    tables = _read_loose(storage, [visible[key] for key in visible.keys() - set(fresh)])
    used = {*tables, *(visible[key] for key in fresh)}
    return _Read(
        table=_together([compacted, *tables.values()]),
        inputs={path: versions[path] for path in sorted(used)},
        generation=generation,
        is_compact=not tables and used == generation.inputs.keys(),
    )


def _read_loose(storage: Storage, paths: list[str]) -> dict[str, pa.Table]:
    with ThreadPoolExecutor(8) as pool:
        tables = zip(paths, pool.map(lambda path: _read_rows(storage, path), paths), strict=True)
        return {path: table for path, table in tables if table is not None}


def _read_rows(storage: Storage, path: str) -> pa.Table | None:
    """One job's rows. None if the file is gone by now, or broken: then with a warning."""
    try:
        return _rows_in(storage.read_bytes(path, at_most=MAX_FILE_BYTES), path)
    except FileNotFoundError:
        return None
    except Exception as error:
        _warn_skipped(storage, path, error, "If it is damaged, delete it and run its sweep again")
        return None


def _rows_in(data: bytes, path: str) -> pa.Table:
    """A row file's rows. Raises what pyarrow does on a file that is broken, and CorruptError."""
    table = _unpacked(data, at_most=MAX_UNPACKED_BYTES)
    _check_rows(table, path)
    if "status" not in table.column_names:  # the name says it, too
        status = pa.array([_parse_path(path)[1]] * len(table), pa.string())
        table = table.append_column("status", status)
    return _conformed(table)


def _read_compact(storage: Storage, path: str) -> pa.Table | None:
    """Many jobs' rows. Its name holds the hash of its bytes. None as for `_read_rows`."""
    try:
        data = storage.read_bytes(path)
        if hashlib.sha256(data).hexdigest()[:16] not in path:
            raise CorruptError("it has other bytes than it was written with")
        return _conformed(_unpacked(data))
    except FileNotFoundError:
        return None
    except Exception as error:
        _warn_skipped(storage, path, error, "The rows are read from their own files instead")
        return None


def _warn_skipped(storage: Storage, path: str, error: Exception, remedy: str) -> None:
    reason = str(error) or type(error).__name__
    warnings.warn(
        f"skipped {storage.url}/{path}, which cannot be read: {reason}. {remedy}", stacklevel=3
    )


def _unpacked(data: bytes, *, at_most: int | None = None) -> pa.Table:
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    at_worst = file.metadata.num_rows * sum(group.total_byte_size for group in groups)
    if at_most is not None and not 0 <= at_worst <= at_most:
        raise CorruptError(f"it may unpack to {at_worst} bytes, more than {at_most}")
    table = file.read(use_threads=False)  # small, and many are read at once
    table.validate(full=True)
    return table


def _check_rows(table: pa.Table, path: str) -> None:
    """What a checksum of pages does not see: rows of another job, columns of another name."""
    key, _ = _parse_path(path)
    metadata = table.schema.metadata or {}
    if table["job_key"].unique().to_pylist() != [key]:
        raise CorruptError("it holds rows of another job than its name says")
    is_hashed_as_ours = metadata.get(b"schema_version") == str(SCHEMA_VERSION).encode()
    if is_hashed_as_ours and metadata.get(b"sha256", b"").decode() != _sha256_of_rows(table):
        raise CorruptError("it holds other rows than it was written with")


def _together(tables: list[pa.Table]) -> pa.Table:
    """One table. A newer version's column on whose type the files disagree is read as text."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowTypeError:
        tables = [_newer_as_text(table) for table in tables]
        return pa.concat_tables(tables, promote_options="permissive")


def _newer_as_text(table: pa.Table) -> pa.Table:
    for index, column in enumerate(table.schema):
        if column.name not in SCHEMA.names:
            values = [None if value is None else str(value) for value in table[index].to_pylist()]
            table = table.set_column(index, column.name, pa.array(values, pa.string()))
    return table


def _conformed(table: pa.Table) -> pa.Table:
    """The columns of SCHEMA, null where there were none yet, and then what a newer version has."""
    table = table.replace_schema_metadata(None)
    if table.schema.equals(SCHEMA):
        return table
    columns = {
        column.name: table[column.name].cast(column.type)
        if column.name in table.column_names
        else pa.nulls(len(table), column.type)
        for column in SCHEMA
    }
    newer = {name: table[name] for name in table.column_names if name not in columns}
    return pa.table(columns | newer)


def newest_generation(storage: Storage) -> Generation:
    """The newest manifest that can be read, under the highest number there is."""
    manifests = sorted(_generations(storage, "manifest"), reverse=True)
    highest = manifests[0][0] if manifests else 0
    for _, path in manifests:
        try:
            manifest = storage.read_json(path)
            return Generation(highest, str(manifest["file"]), dict(manifest["inputs"]))
        except (FileNotFoundError, StorageError, KeyError, TypeError, ValueError):
            continue
    return Generation(highest)


def _generations(storage: Storage, kind: Literal["manifest", "gen"]) -> list[tuple[int, str]]:
    """Numbers and paths. Compactors that race may leave two data files under one number."""
    matches = ((re.search(rf"/{kind}-(\d+)\b", path), path) for path in storage.list(COMPACT))
    return [(int(match[1]), path) for match, path in matches if match]


def _delete_generations(storage: Storage, *, before: int) -> None:
    """The one before the newest stays, for those who are reading it."""
    for number, path in _generations(storage, "manifest") + _generations(storage, "gen"):
        if number < before:
            storage.delete(path)


def _delete_superseded_failures(storage: Storage) -> None:
    paths = set(storage.list(ROWS))
    for path in paths:
        key, status = _parse_path(path)
        if key and status != "complete" and row_path(key, "complete") in paths:
            storage.delete(path)
