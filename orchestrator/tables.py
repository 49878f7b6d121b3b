"""The leaderboard as a person reads it: a table per benchmark and metric, then what failed.

Lines are plain text, so that a pipe gets what a terminal shows. Where a table is wider than the
terminal, each job takes two lines instead.
"""

import json
import sys
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, get_args

import pandas as pd
from rich.console import Console

from jobs.result import Weights
from orchestrator.terminal import setting, visible

JOB_COLUMNS = ("model", "method", "pattern", "vision", "language", "repair", "seed")
"""What tells jobs apart. A column in which all agree is said once, above the table."""
OPTIONAL_COLUMNS = ("allocation", "refine", "propagate", "samples", "tokens")
"""The same among those it applies to: the dense model has no calibration."""

Row = dict[Hashable, Any]
SORT_BY = ["model", "sparsity", "pattern", "method", "allocation", "refine", "repair", "seed"]


def print_leaderboard(frame: pd.DataFrame, console: Console) -> None:
    """Print rows as `orchestrator.leaderboard.load` gives them."""
    if frame.empty:
        console.print("No results.")
    frame = frame.sort_values(SORT_BY, na_position="first", kind="stable")
    for (benchmark, metric), rows in frame.groupby(["benchmark", "metric"]):
        by_job: dict[str, list[Row]] = {}
        for row in rows.to_dict("records"):
            by_job.setdefault(row["job_key"], []).append(row)
        jobs = [_cells(its) for its in by_job.values()]
        firsts = [rows[0] for rows in by_job.values()]
        for part in ("method", "allocation", "repair"):
            named = _named_apart(firsts, part)
            jobs = [cells | {part: label} for cells, label in zip(jobs, named, strict=True)]
        _print_table(f"{benchmark}, {metric}", jobs, console)
    _print_without_result("stopped", "stopped early", "yellow", frame, console)
    _print_without_result("failed", "failed", "bold red", frame, console)


def _print_without_result(
    status: str, title: str, style: str, frame: pd.DataFrame, console: Console
) -> None:
    jobs = frame[frame["status"] == status]
    if len(jobs):
        _print_line(f"{len(jobs)} {title}", console, style=style)
    for job in jobs.to_dict("records"):
        cells = [_text(job[name]) for name in ("model", "method", "sparsity", "pattern")]
        what = " ".join(cell for cell in cells if cell)
        _print_line(f"{job['job_key'][:8]}  {what}  {job['error_kind']}: {job['error']}", console)


def _print_table(title: str, jobs: list[dict[str, str]], console: Console) -> None:
    line_width = console.width if console.is_terminal else sys.maxsize
    foldable = [name for name in jobs[0] if name in JOB_COLUMNS + OPTIONAL_COLUMNS]
    if any(job["pruned"] or job["repaired"] for job in jobs):
        foldable.append("dense")
    values = {name: {job[name] for job in jobs} for name in foldable}
    for name in OPTIONAL_COLUMNS:
        values[name].discard("")
    shared = [name for name in foldable if len(values[name]) <= 1]
    said = {name: max(values[name], default="") for name in shared}
    _print_line(title, console, style="bold")
    words = [f"{name} {value}" for name, value in said.items() if value]
    for line in _wrapped(words, line_width):
        _print_line(line, console, style="dim")
    names = [name for name in jobs[0] if name not in shared and any(job[name] for job in jobs)]
    widths = {name: max(len(name), *(len(job[name]) for job in jobs)) for name in names}
    if sum(widths.values()) + 2 * (len(widths) - 1) > line_width:
        for job in jobs:
            for line in _stacked({name: job[name] for name in names}, line_width):
                _print_line(line, console)
    else:
        header = {name: name for name in names}
        for job in [header, *jobs]:
            line = "  ".join(job[name].ljust(widths[name]) for name in names).rstrip()
            _print_line(line, console, style="underline" if job is header else "")
    _print_line("", console)


def _cells(rows: list[Row]) -> dict[str, str]:
    """One job on one benchmark, as text. Empty where there is nothing to say."""
    job = rows[0]
    scores = {row["weights"]: _score(row) for row in rows}
    return {
        "model": _text(job["model"]),
        "method": _text(job["method"]),
        "pattern": _text(job["pattern"]),
        "allocation": _text(job["allocation"]),
        "refine": _text(job["refine"]),
        "propagate": _text(job["propagate"]),
        "samples": _text(job["samples"]),
        "tokens": _text(job["tokens"]),
        "vision": _sparsity(job["sparsity_vision_asked"], job["sparsity_vision"]),
        "language": _sparsity(job["sparsity_language_asked"], job["sparsity_language"]),
        "repair": _text(job["repair"]),
        "seed": _text(job["seed"]),
        **{weights: scores.get(weights, "") for weights in get_args(Weights)},
        "recovered": _recovered({row["weights"]: row for row in rows}),
        "time": _duration(job["seconds_total"]),
        "job": job["job_key"][:8],
    }


def _named_apart(jobs: Sequence[Row], part: str) -> list[str]:
    """Each job's method, allocation or repair, and the options in which those of its name differ.

    A value that most of them have goes unsaid: the others are the variants.
    """
    options = [_options(job, part) for job in jobs]
    labels = []
    for job, its in zip(jobs, options, strict=True):
        name = _text(job[part])
        alike = [each for other, each in zip(jobs, options, strict=True) if other[part] == name]
        for option, value in its.items():
            counts = Counter(json.dumps(each.get(option)) for each in alike)
            if len(counts) > 1 and 2 * counts[json.dumps(value)] <= len(alike):
                name += f" {setting(option, value)}"
        labels.append(name)
    return labels


def _options(job: Row, part: str) -> dict[str, Any]:
    """Out of the row's settings; empty for the dense model, or a row of another version."""
    try:
        settings = json.loads(job["job"])
        options: dict[str, Any] = dict(
            settings[part] if part == "repair" else settings["prune"][part]
        )
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: value for name, value in options.items() if name not in ("name", "method")}


def _text(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _score(row: Row) -> str:
    """The score and half its 95% interval, in four digits: 0.812 ±0.025, 16.20 ±0.31."""
    score = row["score"]
    decimals = 3 if abs(score) < 10 else 2 if abs(score) < 100 else 1
    if pd.isna(row["score_low"]) or pd.isna(row["score_high"]):
        return f"{score:.{decimals}f}"
    half = (row["score_high"] - row["score_low"]) / 2
    return f"{score:.{decimals}f} ±{half:.{decimals}f}"


def _recovered(rows: dict[str, Row]) -> str:
    """What repair gave back of what pruning took; nothing where that is within the interval."""
    if len(rows) < len(get_args(Weights)):
        return ""
    lost = rows["dense"]["score"] - rows["pruned"]["score"]
    half = (rows["pruned"]["score_high"] - rows["pruned"]["score_low"]) / 2
    if lost == 0 or abs(lost) < half:
        return ""
    return f"{(rows['repaired']['score'] - rows['pruned']['score']) / lost:.0%}"


def _sparsity(asked: float, counted: float) -> str:
    """What was asked, and what the saved file holds. Nothing of a tower that was left alone."""
    if pd.isna(asked):
        return f"{counted:.3f}" if counted > 0 else ""
    return f"{asked:g}→{'?' if pd.isna(counted) else f'{counted:.3f}'}"


def _duration(seconds: float) -> str:
    if pd.isna(seconds):
        return ""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _stacked(cells: dict[str, str], width: int) -> Iterator[str]:
    """A job that is too wide for a line: what it is, then, indented, what came out."""
    speaks_for_itself = ("model", "method", "pattern", "repair")
    words = {
        name: cell if name in speaks_for_itself else f"{name} {cell}"
        for name, cell in cells.items()
        if cell
    }
    yield from _wrapped([words[name] for name in words if name in JOB_COLUMNS], width)
    outcome = [words[name] for name in words if name not in JOB_COLUMNS]
    yield from (f"  {line}" for line in _wrapped(outcome, width - 2))


def _wrapped(words: list[str], width: int) -> Iterator[str]:
    """Words in lines no wider than `width`, never broken inside of one."""
    line = ""
    for word in words:
        if line and len(line) + 2 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line}  {word}" if line else word
    if line:
        yield line


def _print_line(line: str, console: Console, *, style: str = "") -> None:
    console.print(visible(line), style=style, markup=False, highlight=False, soft_wrap=True)
