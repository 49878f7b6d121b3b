"""Pictures of the leaderboard: which points are on it, and what is refused."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from jobs.errors import SpecError
from orchestrator.leaderboard import SCHEMA
from orchestrator.plot import Figure, draw, figure_of

SPLITS = [(0.3, 0.9, 0.1), (0.6, 0.6, 0.8), (0.9, 0.3, 0.4), (0.8, 0.8, 0.2), (0.7, 0.9, 0.05)]


def row(key: str, score: float, **changes: Any) -> dict[str, Any]:
    scored = {
        "job_key": key,
        "status": "complete",
        "weights": "pruned",
        "benchmark": "easy-vqa",
        "metric": "exact_match",
        "score": score,
        "score_low": score - 0.05,
        "score_high": score + 0.04,
        "method": "wanda",
    }
    return dict.fromkeys(SCHEMA.names) | scored | changes


def board(*more: dict[str, Any]) -> pd.DataFrame:
    """Sums of 1.2 and 1.6, the dense model, and a job that prunes one tower only."""
    rows = [
        row(f"{i}", score, sparsity_vision_asked=vision, sparsity_language_asked=language)
        for i, (vision, language, score) in enumerate(SPLITS)
    ]
    rows.append(row("dense", 0.9, weights="dense"))
    rows.append(row("one", 0.7, sparsity_vision_asked=0.5))
    return pd.DataFrame([*rows, *more])


def figure(frame: pd.DataFrame, **changes: Any) -> Figure:
    options = {
        "x": "sparsity_vision_asked",
        "line": "sparsity_vision_asked + sparsity_language_asked",
        "weights": "pruned",
        "benchmark": None,
    }
    return figure_of(frame, **(options | changes))


def test_a_line_is_drawn_for_each_value_of_an_expression() -> None:
    """0.3 + 0.9 is not 0.9 + 0.3 to a computer; one tower alone has no sum, and is left out."""
    points = figure(board()).points

    assert list(points["line"]) == ["1.2"] * 3 + ["1.6"] * 2
    assert list(points["x"]) == [0.3, 0.6, 0.9, 0.7, 0.8]
    assert list(points["score"]) == [0.1, 0.8, 0.4, 0.05, 0.2]


def test_without_a_line_there_is_one() -> None:
    frame = board()[lambda rows: rows["sparsity_language_asked"] < 0.7]

    points = figure(frame, line=None).points

    assert list(points["x"]) == [0.6, 0.9]
    assert set(points["line"]) == {""}


def test_the_dense_score_is_drawn_where_all_agree_on_it() -> None:
    """Two models have two."""
    assert figure(board()).dense == 0.9
    assert figure(board(row("other", 0.8, weights="dense"))).dense is None


@pytest.mark.parametrize(
    ("changes", "more", "told"),
    [
        ({"x": "sparsty"}, {}, "sparsty.*Columns: .*sparsity_vision"),
        ({"x": "1 + 1"}, {}, "is no column"),
        ({"weights": "repaired"}, {}, "no repaired score has a value"),
        ({}, {"benchmark": "text"}, r"2 \(easy-vqa, text\): choose one with --benchmark"),
        (
            {},
            {"method": "magnitude", "sparsity_vision_asked": 0.6, "sparsity_language_asked": 0.6},
            r"2 jobs would stand on one spot \(1.2 at 0.6\), which differ in method",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    changes: dict[str, Any], more: dict[str, Any], told: str
) -> None:
    """A mean of what stands on one spot would hide that two things were compared."""
    frame = board(row("more", 0.5, **more)) if more else board()

    with pytest.raises(SpecError, match=told):
        figure(frame, **changes)


def test_of_several_benchmarks_one_is_drawn() -> None:
    frame = board(row("more", 0.5, benchmark="text"))

    assert figure(frame, benchmark="easy-vqa").y_label == "easy-vqa, exact_match"


@pytest.mark.parametrize(("name", "begins"), [("f.png", b"\x89PNG"), ("f.svg", b"<?xml")])
def test_a_figure_is_a_file_of_its_kind(name: str, begins: bytes, tmp_path: Path) -> None:
    """Also where an interval was not measured."""
    pytest.importorskip("matplotlib")
    frame = board()
    frame.loc[0, ["score_low", "score_high"]] = None

    draw(figure(frame), tmp_path / name)

    assert (tmp_path / name).read_bytes().startswith(begins)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"f\.pdf: a figure ends in \.png or \.svg"):
        draw(figure(board()), tmp_path / "f.pdf")
