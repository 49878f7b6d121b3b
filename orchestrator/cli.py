"""The command line: `prunefleet plan | run | submit | status | leaderboard | export | …`.

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
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape

from jobs.errors import LostError, PrunefleetError, SpecError, StorageError
from jobs.spec import JobSpec
from jobs.storage import Storage
from orchestrator import doctor as physician
from orchestrator import garbage
from orchestrator import leaderboard as board
from orchestrator import reproduce as anew
from orchestrator.estimate import estimate, stored_gib
from orchestrator.executors import Executor, InlineExecutor, RayExecutor
from orchestrator.findings import Finding
from orchestrator.history import draw_history
from orchestrator.plan import shared_stages
from orchestrator.plot import draw, figure_of
from orchestrator.progress import STALE_S, Progress, describe, described
from orchestrator.resolved import find_sweep, jobs_of, known_sweeps, write_resolved
from orchestrator.status import JobStatus, ago, exit_code, summary, sweep_status
from orchestrator.submit import (
    RayJobs,
    Submission,
    check_address,
    clear_text_warning,
    find_token,
    is_loopback,
    parse_resources,
    shared_storage,
    start,
)
from orchestrator.tables import print_leaderboard
from orchestrator.terminal import visible
from workers.keys import STAGES, StageKeys, stage_path

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
errors = Console(stderr=True)

SweepArgument = Annotated[
    str, typer.Argument(help="A sweep file, or the name of one that ships, such as quickstart.")
]
StorageOption = Annotated[
    str,
    typer.Option(
        help="Where stages and the leaderboard live: a folder, or s3://, gs://.",
        envvar="PRUNEFLEET_STORAGE",
    ),
]


ClusterOption = Annotated[
    str,
    typer.Option(
        help="URL of the cluster's dashboard, such as http://127.0.0.1:8265.",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"],
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
        _print_error("error", error.message)
        sys.exit(3 if isinstance(error, LostError) else 2)


@app.command()
def plan(
    sweep: SweepArgument,
    storage: StorageOption = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show a sweep's jobs: what they share, what is there already, what the rest will cost."""
    jobs, place = jobs_of(sweep), Storage(storage)
    settled = board.published_keys(place)
    done = _finished_stages(jobs, place)
    words = described(jobs)
    rows = [_plan_row(job, words[job.key], settled.get(job.key, "to do"), done) for job in jobs]
    shared = shared_stages(jobs)
    missing = [job for job in jobs if settled.get(job.key) != "complete"]
    stored = stored_gib(missing, done)
    if as_json:
        stages = [
            {"stage": name, "key": key, "jobs": count, "done": (name, key) in done}
            for (name, key), count in shared.items()
        ]
        print(json.dumps({"jobs": rows, "stages": stages, "stored_gib": stored}, indent=1))
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
    _print_line(_costs(rows, stored))
    _warn_of_full_disk(place, stored)


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
    if executor == "ray" and (address or "").startswith(("http://", "https://")):
        raise SpecError(f"--address: {address} is a dashboard: `prunefleet submit` is for those")
    jobs, place = jobs_of(sweep), Storage(storage)
    _discard_damaged(jobs, place)
    missing = board.still_to_run(jobs, place)
    _print_line(
        f"{len(jobs)} jobs, {len(jobs) - len(missing)} complete, {len(missing)} to run. "
        f"Storage: {place.url}"
    )
    if missing:
        _check_storage(place)
        _warn_of_full_disk(place, stored_gib(missing, _finished_stages(missing, place)))
        write_resolved(jobs, place)  # for `status` in another terminal
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
        _print_error("failed", f"{result.job_key}: {result.error}")
    not_run = len(missing) - len(progress.results)
    if not_run:
        stop_after = jobs[0].policy.on_failure.stop_after
        _print_error(
            "not run",
            f"{not_run} jobs, since on_failure stops after {stop_after} failures. "
            "Run the sweep again for them",
        )
    if failed or not_run:
        raise typer.Exit(3)
    lost = progress.results.keys() - board.published_keys(place).keys()
    if lost:
        _print_error(
            "lost",
            f"{len(lost)} jobs ended, and their results are not in {place.url}. "
            "Does a node write to a disk of its own there? `prunefleet doctor` tells",
        )
        raise typer.Exit(3)


@app.command()
def submit(
    sweep: SweepArgument,
    address: ClusterOption,
    storage: StorageOption = "runs",
    wait: Annotated[
        bool, typer.Option(help="Follow the log until the sweep has ended; or return at once.")
    ] = True,
    working_dir: Annotated[
        Path | None,
        typer.Option(help="Send this checkout along; default: what the cluster has installed."),
    ] = None,
    driver_resource: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=AMOUNT of a custom resource, to keep the driver on nodes that have it."
        ),
    ] = None,
) -> None:
    """Run a sweep on a cluster as a Ray job. Submit it again to join it, or to do what is left."""
    resources = parse_resources(driver_resource or [])
    jobs, place = jobs_of(sweep), shared_storage(storage)
    _discard_damaged(jobs, place)
    settled = board.published_keys(place)
    keys = {job.key for job in jobs}
    if not board.still_to_run(jobs, place):
        _print_line(f"{len(jobs)} jobs, all complete: nothing to submit. Storage: {place.url}")
        return
    _check_storage(place)
    cluster = _cluster(address)
    if place.is_local and not is_loopback(address):
        _warn(f"{place.url} is a folder: every node of the cluster must see it under this name")
    name, is_new = start(cluster, jobs, place, working_dir=working_dir, driver_resources=resources)
    done = sum(settled.get(key) == "complete" for key in keys)
    verb = "submitted as" if is_new else "running already as"
    _print_line(f"{len(jobs)} jobs, {done} complete, the rest {verb} {name}")
    if not wait:
        return
    _follow(cluster, name)
    settled = board.published_keys(place)
    if missing := keys - settled.keys():
        ended = cluster.status(name)
        _print_error(
            f"{len(missing)} of {len(jobs)} jobs have no result",
            f"the Ray job ended as {ended.status}: {ended.message}\n"
            "Submit the sweep again: it does what is left",
        )
    raise typer.Exit(exit_code(keys, settled))


@app.command()
def status(
    sweep: Annotated[
        str | None, typer.Argument(help="A sweep file, or a name or id; default: all, in short.")
    ] = None,
    storage: StorageOption = "runs",
    address: Annotated[
        str | None, typer.Option(help="Ask the cluster with this dashboard too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show how far sweeps are, run here or on a cluster, from any terminal."""
    place = Storage(storage)
    names = [sweep] if sweep else known_sweeps(place)
    cluster = _cluster(address) if address else None
    shown = [_status_of(*find_sweep(name, place), place, cluster) for name in names]
    if as_json:
        print(json.dumps(shown, indent=1))
        return
    if not shown:
        _print_line(f"No sweep was run or submitted with the storage {place.url}")
    for one in shown:
        _print_status(one, in_full=sweep is not None)


@app.command()
def logs(
    sweep: SweepArgument,
    address: ClusterOption,
    storage: StorageOption = "runs",
    follow: Annotated[bool, typer.Option(help="Go on until the sweep has ended.")] = True,
) -> None:
    """Print what a submitted sweep prints on its cluster."""
    cluster = _cluster(address)
    newest = _newest_submission(cluster, find_sweep(sweep, Storage(storage))[0])
    if follow and not newest.is_over:
        _follow(cluster, newest.id)
    else:
        print(cluster.logs(newest.id), end="")


@app.command()
def cancel(sweep: SweepArgument, address: ClusterOption, storage: StorageOption = "runs") -> None:
    """Stop a submitted sweep. What has finished stays; submit it again to go on."""
    cluster, place = _cluster(address), Storage(storage)
    name, jobs = find_sweep(sweep, place)
    newest = _newest_submission(cluster, name)
    if newest.is_over:
        _print_line(f"{newest.id} has ended already, as {newest.status}")
        return
    ended = cluster.stop(newest.id)
    states = sweep_status(jobs, place, now=time.time(), ended=time.time())
    _print_line(f"{newest.id}: {ended.status}. Of {summary(states)}")


@app.command()
def doctor(
    address: Annotated[
        str | None,
        typer.Option(
            help="Look at the cluster with this dashboard (or, on one of its nodes, `auto`).",
            envvar="RAY_ADDRESS",
        ),
    ] = None,
    storage: StorageOption = "runs",
    working_dir: Annotated[
        Path | None, typer.Option(help="As for `submit`: send this checkout along.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    report: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Say what is wrong with this machine or a cluster, and what to do. Exit code 3: a problem."""
    place = shared_storage(storage)
    if address is None:
        findings = physician.look_here(place)
    elif address.startswith(("http://", "https://")):
        findings = physician.look_at_storage(place)
        findings += physician.examine_remotely(_cluster(address), place, working_dir=working_dir)
    else:
        findings = physician.examine(address, place)
    if report:
        physician.write_report(findings, place, report)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        _print_findings(findings)
    if any(finding.level == "problem" for finding in findings):
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
    columns: Annotated[
        str | None, typer.Option(help="Only these, separated by commas: method,sparsity,score.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="One line per score.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="An object per score.")] = False,
) -> None:
    """Print the leaderboard, or the part of it that a pandas query picks."""
    if compact:
        board.compact(Storage(storage))
    rows = board.load(Storage(storage), query)
    if columns is not None:
        rows = board.select(rows, [name.strip() for name in columns.split(",")])
    if as_csv:
        print(rows.to_csv(index=False), end="")
    elif as_json:
        print(rows.to_json(orient="records", date_format="iso", indent=1))
    elif columns is not None:
        cells = rows.astype(object).where(rows.notna(), "").map(str)
        _print_columns([tuple(rows.columns), *cells.itertuples(index=False, name=None)])
    else:
        print_leaderboard(rows, console)


@app.command()
def reproduce(
    job: Annotated[str, typer.Argument(help="A job key, or its first digits.")],
    storage: StorageOption = "runs",
    into: Annotated[
        str | None, typer.Option(help="An empty folder to compute in, and to keep. Default: none.")
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="How far a number may be off; beyond 1, as a fraction of it."),
    ] = 0.0,
    executor: Annotated[
        ExecutorName, typer.Option(help="inline: here, without Ray.")
    ] = ExecutorName.inline,
    address: Annotated[
        str | None, typer.Option(help="Of a running Ray cluster.", envvar="RAY_ADDRESS")
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that came with the model.")
    ] = False,
) -> None:
    """Compute a result anew, every stage of it. Exit code 1: it differs by more than allowed."""
    then = anew.find_row(Storage(storage), job)
    spec = anew.job_of(then, trust_remote_code=trust_remote_code)
    _print_line(f"{then['job_key'].iloc[0]}  {describe(spec)}")
    backend: Executor = InlineExecutor() if executor == "inline" else RayExecutor(address)
    with tempfile.TemporaryDirectory(prefix="prunefleet-") as scratch:
        now = anew.run_anew(spec, Storage(into or f"{scratch}/storage"), backend)
    if (now["status"] != "complete").any():
        _print_error("failed", str(now["error"].iloc[0]))
        raise typer.Exit(3)
    compared = anew.compare(then, now, tolerance=tolerance)
    lines = [
        (one.name, _text(one.then), _text(one.now), "" if one.agrees else "differs")
        for one in compared
    ]
    _print_columns([("", "then", "now", ""), *lines])
    if any(one.counts and not one.agrees for one in compared):
        explaining = [one.name for one in compared if not one.counts and not one.agrees]
        if explaining:
            _print_line(f"It was measured under another {', '.join(explaining)}. See --tolerance")
        raise typer.Exit(1)
    _print_line("Reproduced." if tolerance == 0 else f"Reproduced within {tolerance:g}.")


@app.command()
def gc(
    storage: StorageOption = "runs",
    delete: Annotated[bool, typer.Option("--delete", help="Do it; else only show.")] = False,
    min_age: Annotated[float, typer.Option(min=0, help="Hours; what is younger stays.")] = 24.0,
    keep: Annotated[
        list[str] | None, typer.Option(help=f"A stage to keep: {', '.join(STAGES)}.")
    ] = None,
) -> None:
    """Show what no result needs, and how large it is; with --delete, delete it. Rows stay."""
    if unknown := set(keep or ()) - set(STAGES):
        raise SpecError(f"--keep {unknown.pop()!r} is no stage. Known: {', '.join(STAGES)}")
    place = Storage(storage)
    found = garbage.survey(place, min_age_s=min_age * 3600, keep=keep or ())
    lines = [(_size(one.size), ago(one.age_s), one.path, one.reason) for one in found.garbage]
    if lines:
        _print_columns([("size", "age", "what", "why"), *lines])
    total = _size(sum(one.size for one in found.garbage))
    _print_line(f"{len(found.garbage)} things nothing needs, {total}.")
    if found.too_young:
        _print_line(f"{found.too_young} more are younger than {min_age:g} hours: see --min-age.")
    if found.alive:
        _print_line(f"Jobs are running here ({found.alive[0]}): no stage is looked at.")
    if found.unreadable:
        _print_line(
            f"The rows of {', '.join(found.unreadable[:3])} cannot be read, nor what they need: no "
            "stage is looked at. Delete the files and run their sweep again."
        )
    if delete:
        deleted = sum(garbage.delete(place, one) for one in found.garbage)
        _print_line(f"Deleted {deleted} of {len(found.garbage)}.")
    elif found.garbage:
        _print_line("Nothing was deleted: see --delete.")


@app.command()
def history(
    job: Annotated[str, typer.Argument(help="A job key, or its first digits.")],
    to: Annotated[Path, typer.Option(help="A file that ends in .png or .svg.")],
    storage: StorageOption = "runs",
) -> None:
    """Draw how a job's search for sparsities went: its objective, and what it found."""
    place = Storage(storage)
    rows = board.load(place)
    matching = rows[rows["job_key"].str.startswith(job) & (rows["allocation"] == "slimllava")]
    if matching["job_key"].nunique() != 1 or matching["stages"].isna().all():
        raise SpecError(
            f"{matching['job_key'].nunique()} finished searches have a key that starts with {job!r}"
        )
    stages = json.loads(matching["stages"].dropna().iloc[0])
    key = next(stage["key"] for stage in stages if stage["stage"] == "allocate")
    with tempfile.TemporaryDirectory(prefix="prunefleet-") as scratch:
        folder = place.fetch_folder(stage_path("allocate", key), Path(scratch))
        draw_history(json.loads((folder / "history.json").read_text()), to)
    _print_line(f"{to} is drawn")


@app.command()
def plot(
    query: Annotated[
        str | None, typer.Argument(help="Which rows, as for `leaderboard`; default: all.")
    ] = None,
    *,
    to: Annotated[Path, typer.Option(help="A file that ends in .png or .svg.")],
    x: Annotated[str, typer.Option(help="A column, or an expression of columns.")] = "sparsity",
    line: Annotated[
        str | None, typer.Option(help="A line for each of its values; a column or an expression.")
    ] = None,
    weights: Annotated[str, typer.Option(help="pruned or repaired.")] = "pruned",
    benchmark: Annotated[str | None, typer.Option(help="If there are several.")] = None,
    storage: StorageOption = "runs",
) -> None:
    """Draw scores against a column of the leaderboard, with their 95% intervals."""
    rows = board.load(Storage(storage), query)
    draw(figure_of(rows, x=x, line=line, weights=weights, benchmark=benchmark), to)
    _print_line(f"{to} is drawn")


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


def _discard_damaged(jobs: list[JobSpec], storage: Storage) -> None:
    for path in board.discard_damaged(storage, {job.key for job in jobs}):
        _print_line(f"{storage.url}/{path} was damaged and is deleted; its job runs again")


def _check_storage(storage: Storage) -> None:
    if not storage.probe_put_if_absent():
        raise StorageError(
            f"{storage.url}: this storage lets two writers create one file, so results could be "
            "there twice. Use a local or network disk, S3 or GCS"
        )


def _warn_of_full_disk(storage: Storage, needed_gib: float) -> None:
    """A full disk is met with a pause and a new attempt, but nobody wants to find out at night."""
    if not storage.is_local:
        return
    folder = next(
        path for path in (Path(storage.root), *Path(storage.root).parents) if path.exists()
    )
    free_gib = shutil.disk_usage(folder).free / 2**30
    if needed_gib > free_gib:
        _warn(
            f"{storage.url} has {free_gib:.1f} GiB free, and this will write about "
            f"{needed_gib:.1f} GiB. `prunefleet gc` shows what no result needs"
        )


def _cluster(address: str) -> RayJobs:
    """The cluster with this dashboard, with the token that Ray would use."""
    token = find_token(os.environ, Path.home())
    if warning := clear_text_warning(check_address(address), token):
        _warn(warning)
    return RayJobs(address, token)


def _follow(cluster: RayJobs, submission: str) -> None:
    try:
        cluster.follow(submission, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        _print_line(f"\n{submission} runs on. See `prunefleet status`, `logs` and `cancel`")
        raise typer.Exit(130) from None


def _newest_submission(cluster: RayJobs, sweep: str) -> Submission:
    known = cluster.submissions(sweep)
    if not known:
        raise SpecError(f"{cluster.address} knows no submission of {sweep}")
    return known[max(known)]


def _status_of(
    name: str, jobs: list[JobSpec], storage: Storage, cluster: RayJobs | None
) -> dict[str, Any]:
    known = cluster.submissions(name) if cluster else {}
    newest = known[max(known)] if known else None
    is_over = bool(known) and all(submission.is_over for submission in known.values())
    ended = newest.ended if newest and is_over else None
    states = sweep_status(jobs, storage, now=time.time(), ended=ended)
    return {
        "sweep": name,
        "summary": summary(states),
        "submission": asdict(newest) if newest else None,
        "jobs": [asdict(state) for state in states],
    }


def _print_status(shown: dict[str, Any], *, in_full: bool) -> None:
    submission = shown["submission"]
    ray_job = f". Ray job {submission['id']}: {submission['status']}" if submission else ""
    _print_line(f"{shown['sweep']}: {shown['summary']}{ray_job}")
    if not in_full:
        return
    lines: list[tuple[str, ...]] = [("job", "what", "state", "stage", "progress", "last sign")]
    states = [JobStatus(**job) for job in shown["jobs"]]
    for job in states:
        seen = ("", "", "")
        if job.stage is not None and job.age_s is not None:
            seen = (job.stage, f"{job.done}/{job.total}", f"{ago(job.age_s)} ago")
        lines.append((job.job_key, job.what, job.state, *seen))
    _print_columns(lines)
    if any(job.state == "silent" for job in states):
        _print_line(
            f"silent: no sign of life for {ago(STALE_S)}, or since the Ray job ended: killed, lost "
            "with its machine, or hanging. Run or submit the sweep again; it goes on where it was"
        )


def _print_findings(findings: list[Finding]) -> None:
    styles = {"ok": "green", "warning": "yellow", "problem": "red"}
    width = max(len(finding.check) for finding in findings)
    for finding in findings:
        head = f"{finding.level:7}  {finding.check:{width}}  "
        _print_line(head + finding.what, style=styles[finding.level])
        if finding.remedy:
            _print_line(" " * len(head) + finding.remedy)


def _print_error(kind: str, text: str, *, style: str = "red") -> None:
    line = f"[{style}]{kind}:[/{style}] {escape(visible(text))}"
    errors.print(line, highlight=False, soft_wrap=True)


def _warn(text: str) -> None:
    _print_error("warning", text, style="yellow")


def _finished_stages(jobs: list[JobSpec], storage: Storage) -> set[tuple[str, str]]:
    return {
        (name, key)
        for name, key in shared_stages(jobs)
        if storage.is_published(stage_path(name, key))
    }


def _plan_row(job: JobSpec, what: str, status: str, done: set[tuple[str, str]]) -> dict[str, Any]:
    needs = estimate(job, done)
    return {
        "job_key": job.key,
        "what": what,
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


def _costs(rows: list[dict[str, Any]], stored: float) -> str:
    missing = [row for row in rows if row["status"] != "complete"]
    if not missing:
        return f"{len(rows)} jobs, all complete."
    seconds = sum(row["seconds"] * row["num_workers"] for row in missing)
    peak = max(row["memory_gib"] for row in missing)
    return (
        f"{len(rows)} jobs, {len(missing)} to run: about {seconds / 60:.0f} worker-minutes, up to "
        f"{peak:.1f} GiB of memory a worker and {stored:.1f} GiB on disk (rough, from the shapes)."
    )


def _text(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:.10g}" if isinstance(value, float) else str(value)


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _print_columns(lines: Sequence[tuple[str, ...]]) -> None:
    """A header and its rows, aligned and never cut: a pipe has no width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        _print_line("  ".join(cells).rstrip(), style="bold" if line is lines[0] else "")


def _print_line(line: str, *, style: str = "") -> None:
    console.print(visible(line), style=style, markup=False, highlight=False, soft_wrap=True)


def _print_rows(storage: Storage, keys: set[str]) -> None:
    rows = board.load(storage)
    print_leaderboard(rows[rows["job_key"].isin(keys)], console)


if __name__ == "__main__":
    main()
