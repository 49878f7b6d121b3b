"""What goes is what no result needs; rows never; and a kill half-way leaves everything readable."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.result import JobResult, Score
from jobs.storage import Storage
from orchestrator import garbage, leaderboard
from orchestrator.garbage import delete, survey
from tests.test_cli import prunefleet

KEPT_KEY, LOST_KEY = "a" * 16, "b" * 16


def stage(storage: Storage, tmp_path: Path, name: str, key: str) -> str:
    folder = tmp_path / "output"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    storage.publish_folder(folder, f"stages/{name}/{key}", {"info": {}, "seconds": {"total": 1.0}})
    return f"stages/{name}/{key}"


def row(storage: Storage, key: str, **facts: Any) -> None:
    scores = (Score("pruned", "easy-vqa", "exact_match", 0.5, None, None, 10),)
    leaderboard.publish(storage, {"model": "demo"}, JobResult(key, "complete", scores, facts=facts))


@pytest.fixture
def littered(storage: Storage, tmp_path: Path) -> Storage:
    """A result, what it needs, and one of each kind that it does not."""
    exported = stage(storage, tmp_path, "repair", KEPT_KEY)
    stage(storage, tmp_path, "evaluate", KEPT_KEY)
    stages = [{"stage": "evaluate", "key": KEPT_KEY}, {"stage": "prune", "key": LOST_KEY}]
    facts = {"export": f"/elsewhere/{exported}", "stages": json.dumps(stages)}
    row(storage, "0123456789abcdef", **facts)
    for name in ("statistics", "prune", "evaluate"):
        stage(storage, tmp_path, name, LOST_KEY)
    storage.put("stages/prune/_tmp-1/model.safetensors", b"half")
    storage.put("leaderboard/rows/01/_tmp-2", b"half")
    storage.put(f"work/{LOST_KEY}/LAST", b"[]")
    storage.put("ray/tune/study-1/state.json", b"{}")
    storage.put("ray/train/run-1/step-1/0.safetensors", b"")
    storage.put("notes/mine.txt", b"not ours to judge")
    for _ in range(3):
        leaderboard.compact(storage)
        row(storage, os.urandom(8).hex())
    storage.put("leaderboard/_compact/gen-1-0000.parquet", b"left by a compactor that was killed")
    return storage


GARBAGE = {
    f"stages/statistics/{LOST_KEY}",
    f"stages/prune/{LOST_KEY}",
    f"stages/evaluate/{LOST_KEY}",
    "stages/prune/_tmp-1",
    "leaderboard/rows/01/_tmp-2",
    f"work/{LOST_KEY}",
    "ray/tune/study-1",
    "ray/train/run-1",
    "leaderboard/_compact/gen-1-0000.parquet",
}


def found(storage: Storage, **options: Any) -> set[str]:
    paths = {one.path for one in survey(storage, **{"min_age_s": 0, **options}).garbage}
    # Of the two real generations before the newest one may be left or not: compact decides.
    return {path for path in paths if path in GARBAGE or "_compact" not in path}


def test_what_no_result_needs_is_found_with_its_size(littered: Storage):
    assert found(littered) == GARBAGE
    [pruned] = [one for one in survey(littered, min_age_s=0).garbage if "prune/b" in one.path]
    assert pruned.num_files == 2
    assert 1000 < pruned.size < 1400


def test_a_stage_can_be_kept_by_name(littered: Storage):
    kept = {f"stages/{name}/{LOST_KEY}" for name in ("statistics", "evaluate")}

    assert found(littered, keep=["statistics", "evaluate"]) == GARBAGE - kept


def test_looking_deletes_nothing_and_deleting_leaves_every_row_and_model(
    littered: Storage, tmp_path: Path
):
    files = set(littered.files(hidden=True))
    before = leaderboard.load(littered)
    survey(littered, min_age_s=0)
    assert set(littered.files(hidden=True)) == files

    for one in survey(littered, min_age_s=0).garbage:
        assert delete(littered, one)

    assert survey(littered, min_age_s=0).garbage == []
    assert leaderboard.load(littered).equals(before)
    assert littered.fetch_folder(f"stages/repair/{KEPT_KEY}", tmp_path / "cache", verify=True)
    assert littered.is_published(f"stages/evaluate/{KEPT_KEY}")
    assert littered.exists("notes/mine.txt")


def test_what_is_young_stays(littered: Storage):
    seen = survey(littered, min_age_s=3600)

    assert seen.garbage == []
    assert seen.too_young >= len(GARBAGE)


@pytest.mark.parametrize(
    "sign", [f"claims/prune-{KEPT_KEY}.json", "progress/0123456789abcdef.json"]
)
def test_while_a_job_lives_nothing_that_it_may_use_goes(littered: Storage, sign: str):
    """It does not say which finished stages it will read next."""
    before = survey(littered, min_age_s=0).garbage
    littered.put(sign, b"{}")

    seen = survey(littered, min_age_s=0)

    assert seen.alive == [sign]
    assert seen.garbage == []
    stages = [one for one in before if one.is_stage]
    assert [delete(littered, one) for one in stages] == [False] * 3
    assert littered.is_published(f"stages/prune/{LOST_KEY}")


def test_the_signs_of_a_job_that_died_do_not_protect(disk: Storage, tmp_path: Path):
    lost = stage(disk, tmp_path, "prune", LOST_KEY)
    sign = f"claims/prune-{LOST_KEY}.json"
    disk.put(sign, b"{}")
    long_ago = time.time() - garbage.LIVES_WITHIN_S - 1
    os.utime(Path(disk.root, sign), (long_ago, long_ago))

    assert found(disk) == {lost, sign}


def test_a_checkpoint_is_kept_with_the_ray_run_that_it_points_to(storage: Storage):
    """The pointer is ours, the file is Ray Train's: one without the other is a lost repair."""
    pointers = json.dumps([{"step": 1, "path": "ray/train/run-1/abc-1"}]).encode()
    storage.put_sealed(f"work/{LOST_KEY}/LAST", pointers)
    storage.put("ray/train/run-1/abc-1/0.safetensors", b"")
    storage.put("ray/train/run-2/abc-1/0.safetensors", b"")

    assert found(storage) == {f"work/{LOST_KEY}", "ray/train/run-2"}


def test_a_row_that_cannot_be_read_protects_all_stages(littered: Storage):
    """What it needs stands in it, and the file may be mended from a backup."""
    broken = leaderboard.row_path("0123456789abcdef", "complete")
    littered.put(broken, b"garbage")

    seen = survey(littered, min_age_s=0)

    assert seen.unreadable == ["0123456789abcdef"]
    assert not [one for one in seen.garbage if one.is_stage]


def test_a_stage_whose_result_came_since_the_survey_stays(littered: Storage):
    """Somebody ran a sweep between looking and deleting."""
    [pruned] = [one for one in survey(littered, min_age_s=0).garbage if "prune/b" in one.path]
    row(littered, "fedcba9876543210", export=f"{littered.url}/stages/prune/{LOST_KEY}")

    assert not delete(littered, pruned)
    assert littered.is_published(f"stages/prune/{LOST_KEY}")


def test_a_kill_half_way_through_a_stage_leaves_it_as_if_never_computed(
    littered: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    [pruned] = [one for one in survey(littered, min_age_s=0).garbage if "prune/b" in one.path]
    with monkeypatch.context() as patch:
        patch.setattr(littered.filesystem, "rm", killed)
        with pytest.raises(KeyboardInterrupt):
            delete(littered, pruned)

    assert not littered.is_published(pruned.path)
    assert pruned.path in found(littered)
    stage(littered, tmp_path, "prune", LOST_KEY)
    assert littered.fetch_folder(pruned.path, tmp_path / "cache", verify=True)


def test_the_command_shows_first_and_deletes_when_told(disk: Storage, tmp_path: Path):
    lost = stage(disk, tmp_path, "statistics", LOST_KEY)

    young = prunefleet("gc", "--storage", disk.url)
    shown = prunefleet("gc", "--storage", disk.url, "--min-age", "0")
    done = prunefleet("gc", "--storage", disk.url, "--min-age", "0", "--delete")

    assert "0 things nothing needs" in young.out
    assert "1 more are younger than 24 hours" in young.out
    assert f"{lost}  no result needs it" in shown.out
    assert "Nothing was deleted: see --delete" in shown.out
    assert "Deleted 1 of 1" in done.out
    assert not disk.exists(lost)
    assert prunefleet("gc", "--storage", disk.url, "--keep", "statistic").code == 2
    assert "0 things" in prunefleet("gc", "--storage", tmp_path / "none").out
    assert not (tmp_path / "none").exists()
