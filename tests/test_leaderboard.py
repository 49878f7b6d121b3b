"""Exactly one result per job, whoever is killed and whenever; and pandas reads it without us."""

import os
import random
import shutil
import subprocess
import sys
import time
import uuid
import warnings
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.crash import CRASH_EXIT_CODE
from jobs.errors import NumericError, SpecError
from jobs.result import JobResult, Score
from jobs.storage import Storage
from orchestrator import leaderboard
from orchestrator.leaderboard import COMPACT, ROWS, SCHEMA, compact, load, publish, published_keys

MANY = int(os.environ.get("PRUNEFLEET_FUZZ_EXAMPLES", "40"))
"""How many examples a fuzz test tries. A thousand take minutes."""
WHEN = datetime(2026, 11, 22, 6, 0, tzinfo=UTC)
FACTS: dict[str, Any] = {
    "sweep": "grid",
    "model": "demo",
    "method": "wanda",
    "sparsity": 0.5,
    "repair": "none",
    "seed": 0,
    "created": WHEN,
}


def key(i: int) -> str:
    return f"{i:016x}"[::-1]  # the first two digits, which name the folder, differ


def score(weights: Any = "pruned", value: float = 0.5, **changes: Any) -> Score:
    return Score(
        **{
            "weights": weights,
            "benchmark": "easy-vqa",
            "metric": "exact_match",
            "score": value,
            "score_low": None,
            "score_high": None,
            "num_items": 100,
            **changes,
        }
    )


def complete(i: int, *, value: float = 0.5, **facts: Any) -> JobResult:
    scores = (score("dense", 0.75), score("pruned", value))
    return JobResult(job_key=key(i), status="complete", scores=scores, facts=facts)


def failed(i: int, error: str = "out of memory", **facts: Any) -> JobResult:
    return JobResult(
        job_key=key(i), status="failed", error=error, error_kind="resource", facts=facts
    )


def plain(storage: Storage) -> pd.DataFrame:
    """As someone reads it who has pandas and not us."""
    return pd.read_parquet(f"{storage.url}/{ROWS}")


def scores_of(frame: pd.DataFrame) -> list[tuple[str, str, float]]:
    return list(zip(frame["job_key"], frame["weights"], frame["score"], strict=True))


def test_a_result_is_a_row_per_score_with_the_facts_repeated(storage: Storage):
    assert publish(storage, FACTS, complete(1, peak_memory_gib=1.5))

    frame = load(storage)

    assert list(frame.columns) == SCHEMA.names
    assert scores_of(frame) == [(key(1), "dense", 0.75), (key(1), "pruned", 0.5)]
    assert frame["peak_memory_gib"].tolist() == [1.5, 1.5]
    assert frame["created"].tolist() == [WHEN, WHEN]
    assert frame["status"].tolist() == ["complete", "complete"]


def test_what_was_not_measured_is_null(storage: Storage):
    publish(storage, FACTS, complete(1))

    assert load(storage)["sparsity_language"].isna().all()
    assert load(storage)["error"].isna().all()


def test_a_failed_job_is_one_row_with_its_reason(storage: Storage):
    assert publish(storage, FACTS, failed(1))

    [row] = load(storage).to_dict("records")

    assert (row["status"], row["error"], row["error_kind"]) == (
        "failed",
        "out of memory",
        "resource",
    )
    assert row["method"] == "wanda"
    assert pd.isna(row["score"])
    assert pd.isna(row["num_items"])


def test_the_first_result_of_a_job_stays(storage: Storage):
    assert publish(storage, FACTS, complete(1, value=0.5))
    assert not publish(storage, FACTS, complete(1, value=0.25))
    assert not publish(storage, FACTS, failed(1))

    assert scores_of(load(storage)) == [(key(1), "dense", 0.75), (key(1), "pruned", 0.5)]


def test_the_latest_failure_shows_until_the_job_completes(storage: Storage):
    """Running the sweep again tries failed jobs again; their rows must not pile up."""
    publish(storage, FACTS, failed(1, "out of memory"))
    publish(storage, FACTS, failed(1, "disk full"))
    assert load(storage)["error"].tolist() == ["disk full"]

    assert publish(storage, FACTS, complete(1))

    assert load(storage)["status"].tolist() == ["complete", "complete"]
    assert len(storage.list(ROWS)) == 1


def test_resume_knows_what_is_done_and_what_failed_from_names_alone(storage: Storage):
    publish(storage, FACTS, complete(1))
    publish(storage, FACTS, failed(2))
    storage.put(f"{ROWS}/notes.txt", b"a stranger's file")

    assert published_keys(storage) == {key(1): "complete", key(2): "failed"}
    assert published_keys(storage, "failed") == {key(2): "failed"}


def test_plain_pandas_reads_every_job_once_compacted_or_not(disk: Storage):
    for i in range(4):
        publish(disk, FACTS, complete(i))
    publish(disk, FACTS, failed(4))
    Path(disk.root, ROWS, "00", "_tmp-left-by-a-kill").write_bytes(b"half a fi")
    compact(disk)

    assert len(plain(disk)) == 9
    assert len(pd.read_parquet(f"{disk.url}/leaderboard")) == 9
    assert plain(disk)["job_key"].nunique() == 5
    assert set(plain(disk).columns) == set(SCHEMA.names)


# ---- compaction ----


def test_compaction_changes_no_row(storage: Storage):
    for i in range(6):
        publish(storage, FACTS, complete(i, value=i / 8) if i % 3 else failed(i))
    before = load(storage)

    assert compact(storage) == 6

    pd.testing.assert_frame_equal(load(storage), before)


def test_results_after_a_compaction_are_seen(storage: Storage):
    publish(storage, FACTS, complete(1))
    publish(storage, FACTS, failed(2))
    compact(storage)
    publish(storage, FACTS, complete(2))
    publish(storage, FACTS, complete(3))

    statuses = load(storage).groupby("job_key")["status"].unique().map(list).to_dict()

    assert statuses == {key(1): ["complete"], key(2): ["complete"], key(3): ["complete"]}
    assert compact(storage) == 3


def test_a_compacted_leaderboard_is_read_from_one_file(disk: Storage):
    """Else 5,000 results take 15 seconds to read."""
    for i in range(3):
        publish(disk, FACTS, complete(i))
    compact(disk)
    for path in disk.list(ROWS):  # the same version by name, size and time, other bytes
        file = Path(disk.root, path)
        stat = file.stat()
        file.write_bytes(b"x" * stat.st_size)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert len(load(disk)) == 6


def test_deleting_a_file_takes_its_result_back_from_a_compacted_leaderboard_too(
    storage: Storage,
):
    publish(storage, FACTS, complete(1, value=0.5))
    publish(storage, FACTS, complete(2))
    compact(storage)

    storage.delete(leaderboard.row_path(key(1), "complete"))

    assert load(storage)["job_key"].unique().tolist() == [key(2)]
    publish(storage, FACTS, complete(1, value=0.25))
    assert (key(1), "pruned", 0.25) in scores_of(load(storage))


def test_compacting_again_with_nothing_new_writes_nothing(storage: Storage):
    publish(storage, FACTS, complete(1))
    compact(storage)
    before = storage.versions(COMPACT)

    assert compact(storage) == 1
    assert storage.versions(COMPACT) == before


def test_old_generations_are_deleted_but_the_last_one(storage: Storage):
    for i in range(5):
        publish(storage, FACTS, complete(i))
        compact(storage)

    names = [path.removeprefix(f"{COMPACT}/")[:10] for path in storage.list(COMPACT)]
    assert names == ["gen-4-" + names[0][6:], "gen-5-" + names[1][6:], "manifest-4", "manifest-5"]


@pytest.mark.parametrize("name", ["gen-1", "manifest-1"])
def test_a_damaged_compaction_costs_time_and_no_row(storage: Storage, name: str):
    publish(storage, FACTS, complete(1))
    compact(storage)
    [path] = [path for path in storage.list(COMPACT) if name in path]
    storage.put(path, b"garbage")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(load(storage)) == 2
        compact(storage)
    assert f"{COMPACT}/manifest-2.json" in storage.list(COMPACT)
    assert len(load(storage)) == 2


class Killed(BaseException):
    """Passes every `except Exception`, as a kill does."""


def kill_at(storage: Storage, step: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the storage stop the process right after its n-th change; 0: before the first."""
    changes: list[str] = []

    def counted(name: str) -> None:
        act = getattr(storage, name)

        def then_die(path: str, *rest: Any) -> Any:
            if len(changes) == step:
                raise Killed
            changes.append(path)
            outcome = act(path, *rest)
            if len(changes) == step:
                raise Killed
            return outcome

        monkeypatch.setattr(storage, name, then_die)

    for name in ("put", "put_if_absent", "delete"):
        counted(name)
    return changes


def test_a_kill_at_any_step_of_a_compaction_loses_and_doubles_nothing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    """The third one: it has generations to delete, and a failure that a result superseded."""
    for i in range(3):
        publish(storage, FACTS, complete(i))
        compact(storage)
    publish(storage, FACTS, failed(9))
    failure = storage.read_bytes(leaderboard.row_path(key(9), "failed"))
    publish(storage, FACTS, complete(9))
    storage.put(leaderboard.row_path(key(9), "failed"), failure)
    before = load(storage)

    for step in range(20):
        with monkeypatch.context() as patch:
            kill_at(storage, step, patch)
            try:
                compact(storage)
                break
            except Killed:
                pass
        pd.testing.assert_frame_equal(load(storage), before)
        publish(storage, FACTS, complete(20 + step))  # so that there is something to compact again
        before = load(storage)

    assert 5 <= step < 19
    pd.testing.assert_frame_equal(load(storage), before)


# ---- what a reader meets ----


def test_a_broken_file_is_skipped_and_named(storage: Storage):
    """A power cut must not take the other thousand results with it."""
    publish(storage, FACTS, complete(1))
    publish(storage, FACTS, complete(2))
    whole = storage.read_bytes(leaderboard.row_path(key(1), "complete"))
    storage.put(leaderboard.row_path(key(1), "complete"), whole[: len(whole) // 2])

    with pytest.warns(UserWarning, match=rf"skipped .*{key(1)}\.parquet"):
        frame = load(storage)

    assert frame["job_key"].unique().tolist() == [key(2)]


def test_a_flipped_bit_is_a_broken_file(storage: Storage):
    """Without checksums it would be another score."""
    publish(storage, FACTS, complete(1, export="here" * 50))
    path = leaderboard.row_path(key(1), "complete")
    data = bytearray(storage.read_bytes(path))
    data[150] ^= 1
    storage.put(path, bytes(data))

    with pytest.warns(UserWarning, match="skipped"):
        assert load(storage).empty


def test_a_file_that_goes_between_listing_and_reading_is_no_error(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    publish(storage, FACTS, complete(1))
    publish(storage, FACTS, complete(2))
    listed = storage.versions(ROWS)
    storage.delete(leaderboard.row_path(key(1), "complete"))
    monkeypatch.setattr(storage, "versions", lambda folder: listed)

    assert load(storage)["job_key"].unique().tolist() == [key(2)]


def write_row(storage: Storage, i: int, columns: dict[str, Any]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"job_key": [key(i)], **columns}), sink)
    storage.put(leaderboard.row_path(key(i), "complete"), sink.getvalue().to_pybytes())


def test_files_of_older_and_newer_versions_are_read_together(storage: Storage):
    """pyarrow takes the first file's columns for all, and drops a later version's silently."""
    write_row(storage, 1, {"score": [1], "status": ["complete"]})
    write_row(storage, 2, {"score": [0.5], "energy_kwh": [0.1]})
    publish(storage, FACTS, complete(3))

    for _ in range(2):
        frame = load(storage).set_index("job_key")
        assert frame.loc[key(1), "score"] == 1.0
        assert pd.isna(frame.loc[key(1), "method"])
        assert frame.loc[key(2), "energy_kwh"] == 0.1
        assert len(frame.loc[key(3)]) == 2
        compact(storage)


FIXTURES = Path(__file__).parent / "fixtures" / "leaderboard"


def load_fixtures(*versions: str, into: Storage) -> pd.DataFrame:
    for version in versions:
        shutil.copytree(FIXTURES / version, into.root, dirs_exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load(into)


def test_rows_of_the_first_released_schema_still_read(disk: Storage):
    """As commit 61b44fa wrote them: a complete job and a failed one."""
    frame = load_fixtures("v1", into=disk)

    assert scores_of(frame)[:2] == [
        ("00000000000000a1", "dense", 0.75),
        ("00000000000000a1", "pruned", 0.5),
    ]
    assert frame["error"].dropna().tolist() == ["disk full"]
    assert frame["created"].tolist() == [WHEN] * 3
    assert frame["sparsity_total"].dropna().tolist() == [0.5, 0.5]
    assert frame["weights_sha256"].isna().all()


def test_rows_with_fewer_columns_of_other_types_are_typed_as_ours(disk: Storage):
    """A first version that had counts as floats, scores as integers and times in milliseconds."""
    frame = load_fixtures("v0", into=disk)

    assert frame["score"].tolist() == [1.0, 0.0]
    assert frame["score"].dtype == "float64"
    assert frame["num_items"].tolist() == frame["seed"].add(100).tolist() == [100, 100]
    assert frame["seed"].dtype == "int64"
    assert frame["created"].tolist() == [WHEN, WHEN]
    assert frame["status"].tolist() == ["complete", "complete"]
    assert frame["stages"].isna().all()


def test_columns_of_a_newer_version_are_kept_and_may_disagree_among_themselves(disk: Storage):
    """One file has a number in it and one a text: then both are text, and no score is lost."""
    frame = load_fixtures("newer", into=disk)

    assert frame["energy_kwh"].tolist() == ["0.25", "a lot"]
    assert frame["score"].tolist() == [0.5, 0.5]


def test_all_versions_read_together_compacted_and_wide(disk: Storage):
    publish(disk, FACTS, complete(1))
    frame = load_fixtures("v0", "v1", "newer", into=disk)

    compact(disk)

    assert frame["job_key"].nunique() == 7
    pd.testing.assert_frame_equal(load(disk), frame)
    wide = leaderboard.wide(frame).set_index("job_key")
    assert wide["easy-vqa/exact_match/pruned"].dropna().to_dict() == {
        "00000000000000a0": 1.0,
        "00000000000000a1": 0.5,
        "00000000000000a9": 0.5,
        "10000000000000a0": 0.0,
        "10000000000000a9": 0.5,
        key(1): 0.5,
    }


def test_a_file_under_another_jobs_name_is_skipped(storage: Storage):
    """Copied by hand; its scores would stand under a key that never had them."""
    publish(storage, FACTS, complete(1))
    data = storage.read_bytes(leaderboard.row_path(key(1), "complete"))
    storage.put(leaderboard.row_path(key(2), "complete"), data)

    with pytest.warns(UserWarning, match=rf"{key(2)}\.parquet.* rows of another job"):
        assert load(storage)["job_key"].unique().tolist() == [key(1)]


def test_a_file_whose_rows_were_edited_is_skipped(disk: Storage):
    """Read with pandas, changed, written back: the page checksums are right, the hash is not."""
    publish(disk, FACTS, complete(1))
    file = f"{disk.root}/{leaderboard.row_path(key(1), 'complete')}"
    table = pq.read_table(file, partitioning=None)
    scores = pa.array([0.99, 0.99])
    pq.write_table(table.set_column(table.column_names.index("score"), "score", scores), file)

    with pytest.warns(UserWarning, match="other rows than it was written with"):
        assert load(disk).empty


def test_a_file_that_unpacks_to_gigabytes_is_not_unpacked(storage: Storage):
    """100,000 times the same 100 kB are a file of 150 kB."""
    write_row(storage, 1, {"score": [0.5]})
    sink = pa.BufferOutputStream()
    names = pa.array(["x" * 100_000] * 100).dictionary_encode()
    bomb = pa.table({"job_key": [key(2)] * 100_000, "model": pa.chunked_array([names] * 1000)})
    pq.write_table(bomb, sink)
    storage.put(leaderboard.row_path(key(2), "complete"), sink.getvalue().to_pybytes())

    with pytest.warns(UserWarning, match="it may unpack to"):
        assert load(storage)["job_key"].tolist() == [key(1)]


def test_a_file_far_too_large_for_a_result_is_not_read(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(leaderboard, "MAX_FILE_BYTES", 100)
    publish(storage, FACTS, complete(1))

    with pytest.warns(UserWarning, match="more than 100 bytes"):
        assert load(storage).empty


MANIFESTS = [
    "[]",
    "{}",
    '{"file": 5, "inputs": 7}',
    '{"file": "../../x", "inputs": {}}',
    "[" * 9999,
]


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_of_another_shape_is_passed_over(storage: Storage, manifest: str):
    publish(storage, FACTS, complete(1))
    storage.put(f"{COMPACT}/manifest-7.json", manifest.encode())

    assert len(load(storage)) == 2
    compact(storage)
    assert len(load(storage)) == 2


ROW_FILE: dict[str, bytes] = {}


def row_file() -> bytes:
    """A result's file. Written once: it is where every mutation starts."""
    if not ROW_FILE:
        storage = Storage(f"memory://{uuid.uuid4().hex}")
        publish(storage, FACTS, complete(1, export="there", peak_memory_gib=1.5))
        ROW_FILE["data"] = storage.read_bytes(leaderboard.row_path(key(1), "complete"))
    return ROW_FILE["data"]


MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=4), st.integers(0, 4)),
    min_size=1,
    max_size=3,
)


def mutated(data: bytes, mutations: list[tuple[float, bytes, int]]) -> bytes:
    """Put bytes in and take bytes out at places given as fractions; half of them in the footer."""
    for where, inserted, num_taken in mutations:
        start = int(abs(2 * where - 1) * len(data))
        data = data[:start] + inserted + data[start + num_taken :]
    return data


@settings(max_examples=MANY, deadline=None)
@given(MUTATIONS | st.binary(max_size=200))
def test_whatever_bytes_a_file_holds_no_row_is_wrong(mutations: Any):
    """A crash would hide every other result; a wrong row would be believed."""
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    is_mutated = isinstance(mutations, list)
    data = mutated(row_file(), mutations) if is_mutated else mutations
    storage.put(leaderboard.row_path(key(1), "complete"), data)
    publish(storage, FACTS, complete(2))
    right = Storage(f"memory://{uuid.uuid4().hex}")
    right.put(leaderboard.row_path(key(1), "complete"), row_file())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = load(storage)

    assert (frame["job_key"] == key(2)).sum() == 2
    ours = frame[frame["job_key"] == key(1)]
    if len(ours):
        pd.testing.assert_frame_equal(ours.reset_index(drop=True), load(right))


def test_a_query_selects_rows(storage: Storage):
    publish(storage, FACTS, complete(1))
    publish(storage, {**FACTS, "method": "sparsegpt"}, complete(2))

    frame = load(storage, "method == 'sparsegpt' and weights == 'pruned'")

    assert scores_of(frame) == [(key(2), "pruned", 0.5)]


@pytest.mark.parametrize("query", ["metod == 'wanda'", "method ==", "seed + 1", "seed"])
def test_a_query_that_makes_no_sense_is_answered_with_the_columns(storage: Storage, query: str):
    publish(storage, FACTS, complete(1))

    with pytest.raises(SpecError, match=r"query .*Columns: job_key, .*method"):
        load(storage, query)


def test_an_empty_leaderboard_has_all_columns_and_no_rows(storage: Storage):
    assert list(load(storage).columns) == SCHEMA.names
    assert load(storage).empty
    assert leaderboard.wide(load(storage)).empty
    assert compact(storage) == 0


def test_wide_has_a_row_per_job_and_a_column_per_score(storage: Storage):
    publish(storage, FACTS, complete(1, value=0.5))
    publish(storage, FACTS, failed(2))

    frame = leaderboard.wide(load(storage)).set_index("job_key")

    assert frame.loc[key(1), "easy-vqa/exact_match/dense"] == 0.75
    assert frame.loc[key(1), "easy-vqa/exact_match/pruned"] == 0.5
    assert pd.isna(frame.loc[key(2), "easy-vqa/exact_match/pruned"])
    assert frame["error"].dropna().tolist() == ["out of memory"]
    assert len(frame) == 2


def test_wide_of_nothing_but_failures_has_their_reasons(storage: Storage):
    publish(storage, FACTS, failed(1))

    assert leaderboard.wide(load(storage))["error"].tolist() == ["out of memory"]


def test_a_row_file_says_its_schema_version_and_hash(disk: Storage):
    publish(disk, FACTS, complete(1))

    [path] = disk.list(ROWS)
    metadata = pq.read_schema(f"{disk.root}/{path}").metadata

    assert metadata[b"schema_version"] == b"2"
    assert len(metadata[b"sha256"]) == 64


# ---- what is refused ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(storage: Storage, value: float):
    with pytest.raises(NumericError, match="score is"):
        publish(storage, FACTS, complete(1, value=value))
    assert storage.list() == []


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"sparsity_langauge": 0.5}, "Did you mean 'sparsity_language'"),
        ({"metod": None}, "Did you mean 'method'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"seconds_prune": "3"}, "seconds_prune is '3'"),
        ({"job": {"model": "demo"}}, "job is {'model': 'demo'}"),
        ({"created": datetime(2026, 1, 1)}, "without a time zone"),
        ({"score": 1.0}, "no column for the fact 'score'"),
        ({"job_key": "f" * 16}, "job_key is both"),
    ],
)
def test_a_fact_that_does_not_fit_is_refused(facts: dict[str, Any], message: str):
    """pyarrow would store 1.5 as 1 and True as 1.0 without a word."""
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    job_facts = {name: value for name, value in FACTS.items() if name not in facts}
    with pytest.raises(ValueError, match=message):
        publish(storage, job_facts | facts, complete(1))
    assert storage.list() == []


def test_a_fact_said_twice_with_two_values_is_refused(storage: Storage):
    with pytest.raises(ValueError, match=r"sparsity is both 0\.5 and 0\.6"):
        publish(storage, FACTS, complete(1, sparsity=0.6))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (JobResult("../etc", "complete"), "job key '../etc'"),
        (JobResult(key(1), "failed"), "needs an error"),
        (JobResult(key(1), "failed", (score(),), error="x"), "no scores"),
        (JobResult(key(1), "complete", (score(),), error="x"), "complete and has an error"),
        (JobResult(key(1), "complete", (score(), score(value=0.1))), "two scores for pruned"),
        (JobResult(key(1), "complete", (score("sparse"),)), "weights 'sparse'"),
        (JobResult(key(1), "complete", (score(score_low=0.6),)), "outside its interval"),
        (JobResult(key(1), "done"), "status is 'done'"),  # type: ignore[arg-type]
    ],
)
def test_a_result_that_contradicts_itself_is_refused(result: JobResult, message: str):
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    with pytest.raises(ValueError, match=message):
        publish(storage, FACTS, result)
    assert storage.list() == []


# ---- exactly once ----


def writers(num: int) -> Any:
    """Processes that share nothing with this one. The server imports pandas once for all."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["orchestrator.leaderboard", "hypothesis", "pytest"])
    return context.Pool(num)


def publish_many(url: str, numbers: list[int], value: float) -> int:
    storage = Storage(url)
    return sum(publish(storage, FACTS, complete(i, value=value)) for i in numbers)


def test_of_processes_that_race_for_the_same_jobs_each_job_has_one_winner(disk: Storage):
    """The speculative retry on another node that finishes after all."""
    numbers = list(range(20))
    with writers(4) as pool:
        wins = pool.starmap(publish_many, [(disk.url, numbers, w / 8) for w in range(4)])

    frame = load(disk, "weights == 'pruned'")
    assert sum(wins) == 20
    assert len(frame) == len(plain(disk)) / 2 == 20
    won_by = frame["score"].mul(8).astype(int).value_counts()
    assert [won_by.get(w, 0) for w in range(4)] == wins


def test_four_writers_lose_nothing_while_another_process_compacts(disk: Storage):
    """The result of the last writer may come while a compactor lists."""
    work = [(disk.url, list(range(w * 50, w * 50 + 50)), 0.5) for w in range(4)]
    with writers(4) as pool:
        running = pool.starmap_async(publish_many, work)
        while not running.ready():
            compact(disk)
            time.sleep(0.2)
        assert running.get() == [50] * 4

    compact(disk)
    assert load(disk)["job_key"].nunique() == 200
    assert len(load(disk)) == len(plain(disk)) == 400


PUBLISH = """
import sys
from tests.test_leaderboard import FACTS, Storage, compact, complete, failed, publish
storage = Storage(sys.argv[1])
publish(storage, FACTS, failed(1) if sys.argv[2] == "fail" else complete(1))
compact(storage)
"""


def killed_at(point: str, storage: Storage, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, storage.url, how],
        env={**os.environ, "PRUNEFLEET_CRASH_AT": point},
        check=False,
    )
    assert done.returncode == CRASH_EXIT_CODE


@pytest.mark.parametrize(
    ("point", "visible"),
    [
        ("between failure and result", []),
        ("after temporary write", []),
        ("after publish", ["complete"]),
        ("before manifest", ["complete"]),
    ],
)
def test_a_kill_while_completing_shows_one_result_or_none_and_then_one(
    disk: Storage, point: str, visible: list[str]
):
    publish(disk, FACTS, failed(1))

    killed_at(point, disk, "complete")

    assert list(published_keys(disk).values()) == visible
    assert load(disk)["status"].unique().tolist() == visible
    publish(disk, FACTS, complete(1))
    assert len(plain(disk)) == len(load(disk)) == 2
    compact(disk)
    assert len(plain(disk)) == len(load(disk)) == 2


def test_a_kill_while_failing_again_keeps_the_failure_before(disk: Storage):
    publish(disk, FACTS, failed(1, "the first time"))

    killed_at("after temporary write", disk, "fail")

    assert plain(disk)["error"].tolist() == load(disk)["error"].tolist() == ["the first time"]


def test_a_failure_left_beside_a_result_is_not_seen_and_is_cleaned_up(storage: Storage):
    """Two attempts at once, one failing, the failing one killed before it looked again."""
    publish(storage, FACTS, failed(1))
    failure = storage.read_bytes(leaderboard.row_path(key(1), "failed"))
    publish(storage, FACTS, complete(1))
    storage.put(leaderboard.row_path(key(1), "failed"), failure)

    assert published_keys(storage) == {key(1): "complete"}
    assert load(storage)["status"].tolist() == ["complete", "complete"]
    compact(storage)
    assert storage.list(ROWS) == [leaderboard.row_path(key(1), "complete")]


events = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=15, deadline=None)
@given(events, st.randoms(use_true_random=False))
def test_order_and_repetition_of_publishes_do_not_show(
    events: list[tuple[int, bool]], order: random.Random
):
    """At-least-once work gives exactly-once rows: complete if the job ever was."""

    def published(sequence: list[tuple[int, bool]]) -> pd.DataFrame:
        storage = Storage(f"memory://{uuid.uuid4().hex}")
        for i, ends_well in sequence:
            publish(storage, FACTS, complete(i, value=i / 8) if ends_well else failed(i))
            if order.random() < 0.2:
                compact(storage)
        return load(storage)

    shuffled = events + order.choices(events, k=len(events))
    order.shuffle(shuffled)

    pd.testing.assert_frame_equal(published(shuffled), published(sorted(set(events))))


def test_writers_and_a_compactor_that_are_killed_lose_and_double_nothing():
    """The full form, 8 writers by 500 results, is `python -m tests.chaos.writers`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.writers", "8", "30", "0.1"],
        capture_output=True,
        text=True,
        timeout=600,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert "8 writers, 240 results" in done.stdout
    assert "nothing lost, nothing doubled" in done.stdout
    assert " 0 kills of a writer" not in done.stdout
