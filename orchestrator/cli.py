"""The command line: `prunefleet plan | run | leaderboard | export`.

Exit codes: 0 all jobs complete; 2 a mistake in what was asked, nothing was started; 3 some jobs
failed, each with its reason on the leaderboard.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from jobs.errors import PrunefleetError, SpecError, StorageError
from jobs.spec import JobSpec
from jobs.storage import Storage
from jobs.sweep import SweepError, read_sweep
from orchestrator import leaderboard as board
from orchestrator.estimate import estimate
from orchestrator.executors import Executor, InlineExecutor, RayExecutor
from orchestrator.plan import make_plan, shared_stages
from orchestrator.progress import Progress, describe
from orchestrator.tables import print_leaderboard
from workers.keys import STAGES, StageKeys, stage_path

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
errors = Console(stderr=True)

SweepArgument = Annotated[
    str, typer.Argument(help="A sweep file, or the name of one that ships: quickstart.")
]
StorageOption = Annotated[
    str,
    typer.Option(
        help="Where stages and the leaderboard live: a folder, or s3://, gs://.",
        envvar="PRUNEFLEET_STORAGE",
    ),
]


class ExecutorName(StrEnum):
    ray = "ray"
    inline = "inline"


def main() -> None:
    """What the console command `prunefleet` calls."""
    try:
        app()
    except PrunefleetError as error:
        errors.print(f"[red]error:[/red] {escape(error.message)}", highlight=False, soft_wrap=True)
        sys.exit(2)


@app.command()
def plan(
    sweep: SweepArgument,
    storage: StorageOption = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show a sweep's jobs: what they share, what is there already, what the rest will cost."""
    jobs, place = _planned(sweep), Storage(storage)
    settled = board.published_keys(place)
    done = _finished_stages(jobs, place)
    rows = [_plan_row(job, settled.get(job.key, "to do"), done) for job in jobs]
    shared = shared_stages(jobs)
    if as_json:
        stages = [
            {"stage": name, "key": key, "jobs": count, "done": (name, key) in done}
            for (name, key), count in shared.items()
        ]
        print(json.dumps({"jobs": rows, "stages": stages}, indent=1))
        return
    lines: list[tuple[str, ...]] = [("job", "what", "status", "memory", "time")]
    for row in rows:
        cost = (f"{row['memory_gib']:.1f} GiB", f"{row['seconds']:.0f} s")
        if row["status"] == "complete":
            cost = ("", "")
        lines.append((row["job_key"], row["what"], row["status"], *cost))
    _print_columns(lines)
    _print_line("")
    _print_columns(_sharing(shared, done))
    _print_line(_costs(rows))


@app.command()
def run(
    sweep: SweepArgument,
    storage: StorageOption = "runs",
    executor: Annotated[ExecutorName, typer.Option(help="inline: no Ray.")] = ExecutorName.ray,
    address: Annotated[
        str | None,
        typer.Option(
            help="Of a running Ray cluster; default: start one here.", envvar="RAY_ADDRESS"
        ),
    ] = None,
) -> None:
    """Run what a sweep's leaderboard lacks. Run it again: nothing is computed twice."""
    jobs, place = _planned(sweep), Storage(storage)
    settled = board.published_keys(place)
    missing = [job for job in jobs if settled.get(job.key) != "complete"]
    _print_line(
        f"{len(jobs)} jobs, {len(jobs) - len(missing)} complete, {len(missing)} to run. "
        f"Storage: {place.url}"
    )
    if missing and not place.probe_put_if_absent():
        raise StorageError(
            f"{place.url}: this storage lets two writers create one file, so results could be "
            "there twice. Use a local or network disk, S3 or GCS"
        )
    started = time.time()
    progress = Progress(missing, place, console)
    backend: Executor = InlineExecutor() if executor == "inline" else RayExecutor(address)
    with progress.shown():
        backend.run(missing, place, progress.settled)
    _print_rows(place, {job.key for job in jobs})
    failed = [result for result in progress.results.values() if result.status == "failed"]
    _print_line(
        f"{len(missing) - len(failed)} jobs run, {len(failed)} failed, "
        f"{time.time() - started:.0f} s. Leaderboard: {place.url}/{board.ROWS}"
    )
    for result in failed:
        reason = f"{result.job_key}: {escape(str(result.error))}"
        errors.print(f"[red]failed:[/red] {reason}", highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(3)


@app.command()
def leaderboard(
    query: Annotated[
        str | None, typer.Argument(help="A pandas query, such as \"method == 'wanda'\".")
    ] = None,
    storage: StorageOption = "runs",
    compact: Annotated[
        bool, typer.Option("--compact", help="First make thousands of results fast to read.")
    ] = False,
) -> None:
    """Print the leaderboard, or the part of it that a pandas query picks."""
    if compact:
        board.compact(Storage(storage))
    print_leaderboard(board.load(Storage(storage), query), console)


@app.command()
def export(
    job: Annotated[str, typer.Argument(help="A job key, or its first digits.")],
    to: Annotated[Path, typer.Option(help="A folder that does not exist yet.")],
    storage: StorageOption = "runs",
) -> None:
    """Copy a job's model out of the storage, for `from_pretrained`."""
    place = Storage(storage)
    rows = board.load(place)
    matching = rows[rows["job_key"].str.startswith(job) & rows["export"].notna()]
    keys = matching["job_key"].unique()
    if len(keys) != 1:
        raise SpecError(f"{len(keys)} jobs with a model have a key that starts with {job!r}")
    if to.exists():
        raise SpecError(f"{to} exists already; name a folder that does not")
    stage, key = matching["export"].iloc[0].split("/")[-2:]  # the storage may have moved since
    to.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".prunefleet-", dir=to.parent) as scratch:
        fetched = place.fetch_folder(stage_path(stage, key), Path(scratch) / "fetched")
        shutil.copytree(fetched, Path(scratch) / "model")
        os.replace(Path(scratch) / "model", to)
    _print_line(f"{keys[0]} is in {to}")


def _planned(sweep: str) -> list[JobSpec]:
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


def _finished_stages(jobs: list[JobSpec], storage: Storage) -> set[tuple[str, str]]:
    return {
        (name, key)
        for name, key in shared_stages(jobs)
        if storage.is_published(stage_path(name, key))
    }


def _plan_row(job: JobSpec, status: str, done: set[tuple[str, str]]) -> dict[str, Any]:
    needs = estimate(job, done)
    return {
        "job_key": job.key,
        "what": describe(job),
        "status": status,
        "memory_gib": needs.memory_gib,
        "seconds": 0.0 if status == "complete" else needs.seconds,
        "num_workers": job.num_workers,
        "stages": [{"stage": name, "key": key} for name, key in StageKeys.of(job).all()],
    }


def _sharing(
    shared: dict[tuple[str, str], int], done: set[tuple[str, str]]
) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("stage", "needed", "to compute", "there already")]
    for stage in STAGES:
        counts = {key: count for key, count in shared.items() if key[0] == stage}
        if counts:
            there = sum(key in done for key in counts)
            needed = f"{sum(counts.values())} times"
            lines.append((stage, needed, f"{len(counts) - there}", f"{there}"))
    return lines


def _costs(rows: list[dict[str, Any]]) -> str:
    missing = [row for row in rows if row["status"] != "complete"]
    if not missing:
        return f"{len(rows)} jobs, all complete."
    seconds = sum(row["seconds"] * row["num_workers"] for row in missing)
    peak = max(row["memory_gib"] for row in missing)
    return (
        f"{len(rows)} jobs, {len(missing)} to run: about {seconds / 60:.0f} worker-minutes, up to "
        f"{peak:.1f} GiB a worker (rough, from the model's shapes)."
    )


def _print_columns(lines: Sequence[tuple[str, ...]]) -> None:
    """A header and its rows, aligned and never cut: a pipe has no width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        _print_line("  ".join(cells).rstrip(), style="bold" if line is lines[0] else "")


def _print_line(line: str, *, style: str = "") -> None:
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _print_rows(storage: Storage, keys: set[str]) -> None:
    rows = board.load(storage)
    print_leaderboard(rows[rows["job_key"].isin(keys)], console)


if __name__ == "__main__":
    main()
