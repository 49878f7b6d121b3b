"""What the leaderboard looks like in a terminal, wide and narrow, and in a pipe."""

import io
import json
from typing import Any

import pandas as pd
from rich.console import Console

from jobs.result import JobResult, Score
from jobs.spec import RepairSpec
from jobs.storage import Storage
from orchestrator import leaderboard
from orchestrator.tables import print_leaderboard

DENSE = Score("dense", "easy-vqa", "exact_match", 0.8125, 0.79, 0.83, 1000)


def frame(storage: str) -> pd.DataFrame:
    """Two jobs that differ in method and repair, and one that failed."""
    place = Storage(f"memory://{storage}")
    shared = {"model": "demo", "pattern": "unstructured", "seed": 0, "sparsity": 0.5}
    asked = {"sparsity_language_asked": 0.5, "sparsity_language": 0.5001, "sparsity_vision": 0.0}
    pruned = Score("pruned", "easy-vqa", "exact_match", 0.5, 0.48, 0.53, 1000)
    repaired = Score("repaired", "easy-vqa", "exact_match", 0.75, None, None, 1000)

    def publish(key: str, scores: tuple[Score, ...], **facts: Any) -> None:
        result = JobResult(key * 16, "complete", scores)
        leaderboard.publish(place, shared | asked | facts, result)

    publish("b", (DENSE, pruned), method="wanda", repair="none", seconds_total=61.0)
    publish(
        "a",
        (DENSE, pruned, repaired),
        method="sparsegpt",
        repair="sparse_lora",
        seconds_total=7200.0,
    )
    failure = JobResult("c" * 16, "failed", error="[7 x 7] is singular", error_kind="numeric")
    leaderboard.publish(place, {**shared, "method": "wanda"}, failure)
    return leaderboard.load(place)


def printed(rows: pd.DataFrame, *, width: int, terminal: bool) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_leaderboard(rows, console)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_table_says_once_what_all_jobs_share_and_aligns_the_rest():
    assert printed(frame("wide"), width=100, terminal=True) == [
        "easy-vqa, exact_match",
        "model demo  pattern unstructured  language 0.5→0.500  seed 0  dense 0.812 ±0.020",
        "method     repair       pruned        repaired  recovered  time   job",
        "sparsegpt  sparse_lora  0.500 ±0.025  0.750     80%        2.0 h  aaaaaaaa",
        "wanda      none         0.500 ±0.025                       61 s   bbbbbbbb",
        "",
        "1 failed",
        "cccccccc  demo wanda 0.5 unstructured  numeric: [7 x 7] is singular",
    ]


def test_a_narrow_terminal_gets_two_lines_a_job_and_loses_nothing():
    lines = printed(frame("narrow"), width=50, terminal=True)

    assert lines[3:7] == [
        "sparsegpt  sparse_lora",
        "  pruned 0.500 ±0.025  repaired 0.750",
        "  recovered 80%  time 2.0 h  job aaaaaaaa",
        "wanda  none",
    ]
    assert all(len(line) <= 50 for line in lines[:-1])


def test_a_pipe_gets_whole_plain_lines():
    """Else `prunefleet leaderboard | grep wanda` shows half of a job."""
    lines = printed(frame("pipe"), width=20, terminal=False)

    assert lines[1].startswith("model demo")
    assert lines[1].endswith("dense 0.812 ±0.020")
    assert "wanda      none         0.500 ±0.025                       61 s   bbbbbbbb" in lines
    assert not any("\x1b" in line for line in lines)


def test_the_dense_model_alone_shows_its_score():
    place = Storage("memory://dense")
    result = JobResult("d" * 16, "complete", (DENSE,))
    leaderboard.publish(place, {"model": "demo", "method": "dense"}, result)

    lines = printed(leaderboard.load(place), width=80, terminal=True)

    assert lines[2:4] == ["dense         job", "0.812 ±0.020  dddddddd"]


def test_no_results_are_said_to_be_none():
    assert printed(frame("none").iloc[:0], width=80, terminal=True) == ["No results."]


def test_a_sparsity_that_was_not_counted_is_a_question_mark():
    rows = frame("uncounted").assign(sparsity_language=None)

    assert "language 0.5→?" in printed(rows, width=100, terminal=True)[1]


def test_two_recipes_by_one_method_are_told_apart_by_what_differs():
    """What most share is not said: of three by sparse_lora, the third is the variant."""
    recipes = {
        "a": RepairSpec(num_steps=3),
        "b": RepairSpec(num_steps=3, rank={"vision": 4, "language": 8}, ressa_compat=True),
        "c": RepairSpec(num_steps=3, method="norms"),
        "d": RepairSpec(num_steps=3, learning_rate=0.5),
    }
    place = Storage("memory://recipes")
    for key, spec in recipes.items():
        job = json.dumps({"repair": spec.model_dump(mode="json")})
        facts = {"model": "demo", "method": "wanda", "repair": spec.method, "job": job}
        leaderboard.publish(place, facts, JobResult(key * 16, "complete", (DENSE,)))

    lines = printed(leaderboard.load(place), width=100, terminal=True)

    assert [line.split("  ")[0] for line in lines[3:7]] == [
        "norms",
        "sparse_lora",
        "sparse_lora rank vision:4,language:8 ressa_compat",
        "sparse_lora learning_rate 0.5",
    ]


def test_a_loss_within_its_interval_has_no_share_that_came_back():
    """Half of nothing is nothing: 0.01 lost, known to 0.02."""
    place = Storage("memory://noise")
    pruned = Score("pruned", "easy-vqa", "exact_match", 0.8025, 0.78, 0.82, 1000)
    repaired = Score("repaired", "easy-vqa", "exact_match", 0.81, 0.79, 0.83, 1000)
    facts = {"model": "demo", "method": "wanda", "repair": "norms"}
    leaderboard.publish(place, facts, JobResult("a" * 16, "complete", (DENSE, pruned, repaired)))

    lines = printed(leaderboard.load(place), width=100, terminal=True)

    assert not any("recovered" in line for line in lines)
