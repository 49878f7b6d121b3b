"""A picture of the leaderboard: a score against a column, a line for each value of another.

Reads the leaderboard and nothing else, so whatever is on it can be drawn. Columns may be
expressions as pandas evaluates them: "sparsity_vision_asked + sparsity_language_asked".
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from jobs.errors import SpecError

SETTINGS = (
    "model",
    "method",
    "pattern",
    "sparsity",
    "towers",
    "allocation",
    "propagate",
    "repair",
    "seed",
)
"""Columns in which jobs differ that would stand on one spot."""


@dataclass(frozen=True)
class Figure:
    """What to draw."""

    points: pd.DataFrame
    """x, line (text, "" where there is one line only), score, score_low, score_high; by line, x."""
    dense: float | None
    """The dense model's score, if all points agree on it."""
    x_label: str
    line_label: str
    y_label: str


def figure_of(
    frame: pd.DataFrame, *, x: str, line: str | None, weights: str, benchmark: str | None
) -> Figure:
    """Pick the points out of rows as `leaderboard.load` gives them.

    Rows without a value of x or line are left out: jobs that the question is not about.

    Raises:
        SpecError: a column that is not there, several benchmarks, no points, or two on one spot.
    """
    scored = frame[frame["status"] == "complete"]
    if benchmark is not None:
        scored = scored[scored["benchmark"] == benchmark]
    y_label = _only(scored, "benchmark", "--benchmark") + ", " + _only(scored, "metric", "a query")
    rows = scored[scored["weights"] == weights]
    points = pd.DataFrame(
        {
            "x": _values(rows, x),
            "line": _values(rows, line) if line else "",
            **{name: rows[name] for name in ("score", "score_low", "score_high")},
        }
    )
    points = points.dropna(subset=["x", "line"]).sort_values(["line", "x"], kind="stable")
    points["line"] = points["line"].map(_text)
    if points.empty:
        raise SpecError(f"no {weights} score has a value of {x}" + (f" and {line}" if line else ""))
    _refuse_doubles(points, rows.loc[points.index])
    dense = scored[scored["weights"] == "dense"]["score"].unique()
    return Figure(
        points=points.reset_index(drop=True),
        dense=float(dense[0]) if len(dense) == 1 else None,
        x_label=x,
        line_label=line or "",
        y_label=y_label,
    )


def draw(figure: Figure, to: Path) -> None:
    """Write the figure, as PNG or SVG by the name's ending.

    Raises:
        SpecError: another ending, or matplotlib is not installed.
    """
    canvas = empty_canvas(to, width=6.4)
    axes = canvas.add_subplot()
    lines = list(dict.fromkeys(figure.points["line"]))
    for name in lines:
        points = figure.points[figure.points["line"] == name]
        axes.errorbar(
            points["x"], points["score"], yerr=_bars(points), marker="o", capsize=3, label=name
        )
    if figure.dense is not None:
        axes.axhline(figure.dense, color="grey", linestyle="--", linewidth=1, label="dense")
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    axes.grid(alpha=0.3)
    title = "\n".join(textwrap.wrap(figure.line_label, 24))
    canvas.legend(loc="outside right upper", title=title or None)
    canvas.savefig(to)


def empty_canvas(to: Path, *, width: float) -> Any:
    """An empty matplotlib figure, `width` inches wide and 4 high, that can be saved as `to`.

    Raises:
        SpecError: `to` ends in neither .png nor .svg, or matplotlib is not installed.
    """
    if to.suffix not in (".png", ".svg"):
        raise SpecError(f"{to}: a figure ends in .png or .svg")
    try:
        from matplotlib.figure import Figure as Canvas  # without pyplot: no screen is needed
    except ImportError as error:
        how = "pip install -c constraints.txt -e '.[plot]'"
        raise SpecError(f"plots need matplotlib: {how}") from error
    return Canvas(figsize=(width, 4), dpi=150, layout="constrained")


def _values(rows: pd.DataFrame, expression: str) -> "pd.Series[Any]":
    try:
        values = rows.eval(expression)
    except Exception as error:  # pandas raises whatever its parser met
        raise SpecError(f"{expression!r}: {error}. Columns: {', '.join(rows.columns)}") from error
    if not isinstance(values, pd.Series):
        raise SpecError(f"{expression!r} is no column, nor made of columns")
    return values


def _text(value: Any) -> str:
    """1.2000000000000002 is 1.2."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _only(rows: pd.DataFrame, column: str, remedy: str) -> str:
    values = rows[column].dropna().unique()
    if len(values) != 1:
        raise SpecError(
            f"a figure shows one {column}, and the rows have {len(values)} "
            f"({', '.join(map(str, values))}): choose one with {remedy}"
        )
    return str(values[0])


def _refuse_doubles(points: pd.DataFrame, rows: pd.DataFrame) -> None:
    spots = points["line"] + " at " + points["x"].map(_text)
    doubled = spots[spots.duplicated()]
    if doubled.empty:
        return
    spot = doubled.iloc[0]
    jobs = rows.loc[spots.index[spots == spot]]
    differing = [name for name in SETTINGS if jobs[name].nunique(dropna=False) > 1]
    raise SpecError(
        f"{len(jobs)} jobs would stand on one spot ({spot.strip()}), which differ in "
        f"{', '.join(differing) or 'their options'}: narrow the query, or draw a line for each"
    )


def _bars(points: pd.DataFrame) -> Sequence[Any]:
    """How far the interval reaches below and above; nothing where it was not measured."""
    below = (points["score"] - points["score_low"]).clip(lower=0).fillna(0)
    above = (points["score_high"] - points["score"]).clip(lower=0).fillna(0)
    return [below, above]
