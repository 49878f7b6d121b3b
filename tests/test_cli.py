"""The command line from outside: what it prints, where, and with which exit code."""

import contextlib
import io
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from jobs.storage import Storage
from jobs.sweep import read_sweep
from orchestrator import leaderboard
from orchestrator.cli import app, main
from orchestrator.plan import make_plan
from orchestrator.progress import Progress
from tests.families import make_tiny
from workers.context import progress_path
from workers.models import count_sparsity, load_model

SWEEP = """\
name: tiny
model: {model}
calibration: {{dataset: {dataset}, num_samples: 4}}
grid: {{method: [magnitude, wanda], pattern: 2:4}}
evaluate: {{dataset: easy-vqa, num_items: 8, max_new_tokens: 2}}
"""


@dataclass
class Ran:
    code: int
    out: str
    err: str


def prunefleet(*arguments: object) -> Ran:
    """Call the console command in this process, as a shell would with its output piped."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["prunefleet", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    return Ran(code, out.getvalue(), err.getvalue())


@dataclass
class Place:
    sweep: Path
    storage: Path
    model: Path
    first: Ran
    """What the first run said."""

    def run(self) -> Ran:
        return prunefleet("run", self.sweep, "--storage", self.storage, "--executor", "inline")

    def stages(self) -> dict[Path, int]:
        """Every file of every stage, with the time it was written."""
        files = (self.storage / "stages").rglob("*")
        return {file: file.stat().st_mtime_ns for file in files}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava-clip", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Place:
    """A sweep that was run: the dense model, magnitude and Wanda."""
    folder = tmp_path_factory.mktemp("done")
    (folder / "tiny.yaml").write_text(SWEEP.format(model=model, dataset="easy-vqa"))
    place = Place(folder / "tiny.yaml", folder / "runs", model, Ran(0, "", ""))
    place.first = place.run()
    return place


def test_plan_shows_jobs_and_what_they_share(tmp_path: Path, model: Path) -> None:
    """One dense evaluation for three jobs. A plan starts nothing and writes nothing."""
    (tmp_path / "s.yaml").write_text(SWEEP.format(model=model, dataset="easy-vqa"))

    ran = prunefleet("plan", tmp_path / "s.yaml", "--storage", tmp_path / "runs")

    assert ran.code == 0
    lines = ran.out.splitlines()
    jobs = [line.split() for line in lines if "to do" in line]
    assert [job[1:4] for job in jobs[1:]] == [
        ["magnitude", "2:4", "vision+language"],
        ["wanda", "2:4", "vision+language"],
    ]
    assert jobs[0][1:3] == ["tiny", "dense"]
    table = [line.split() for line in lines]
    assert ["prune", "2", "times", "2", "0"] in table
    assert ["evaluate", "5", "times", "3", "0"] in table
    assert "3 jobs, 3 to run: about" in ran.out
    assert not (tmp_path / "runs").exists()


def test_a_disk_too_small_for_the_plan_is_said_before_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """quickstart leaves 15 models of 7 MB."""

    def said(free_bytes: int) -> str:
        usage = shutil.disk_usage(tmp_path)._replace(free=free_bytes)
        monkeypatch.setattr("orchestrator.cli.shutil.disk_usage", lambda _: usage)
        return prunefleet("plan", "quickstart", "--storage", tmp_path / "runs").err

    assert said(2**40) == ""
    assert "GiB free, and this will write about 0.1 GiB" in said(2**20)


def test_plan_for_programs_is_json(done: Place) -> None:
    ran = prunefleet("plan", done.sweep, "--storage", done.storage, "--json")

    plan = json.loads(ran.out)
    assert [job["status"] for job in plan["jobs"]] == ["complete"] * 3
    assert [job["seconds"] for job in plan["jobs"]] == [0] * 3
    assert all(stage["done"] for stage in plan["stages"])
    assert sum(stage["jobs"] for stage in plan["stages"]) == 7
    named = {(stage["stage"], stage["key"]) for stage in plan["stages"]}
    assert named == {(s["stage"], s["key"]) for job in plan["jobs"] for s in job["stages"]}


MISTAKES = {
    "a typing mistake": (
        "grid: {method: wnda}",
        "s.yaml:1: grid.method: unknown method 'wnda'. Did you mean 'wanda'?",
    ),
    "markup": ("name: '[/red] x'", "got '[/red] x'"),
    "not YAML": ("name: [", "not valid YAML"),
}


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_bad_sweep_ends_with_2_and_its_reason_on_stderr(
    mistake: str, command: str, tmp_path: Path
) -> None:
    """And no traceback: it is the person's file, not our code."""
    text, expected = MISTAKES[mistake]
    (tmp_path / "s.yaml").write_text(text)

    ran = prunefleet(command, tmp_path / "s.yaml", "--storage", tmp_path / "runs")

    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("error: ")
    assert expected in ran.err
    assert "Traceback" not in ran.err
    assert not (tmp_path / "runs").exists()


def test_a_sweep_that_cannot_be_planned_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP.format(model="/no/model", dataset="easy-vqa"))

    ran = prunefleet("plan", tmp_path / "s.yaml")

    assert ran.code == 2
    assert ran.err.startswith(f"error: {tmp_path}/s.yaml: model '/no/model': no such folder")


def test_an_unknown_sweep_is_answered_with_those_that_ship() -> None:
    ran = prunefleet("plan", "quikstart")

    assert ran.code == 2
    assert ran.err.startswith("error: quikstart: no such file. Sweeps that ship: ")
    assert "quickstart" in ran.err.split("ship:")[1]


def test_a_shipped_sweep_goes_by_its_name(tmp_path: Path) -> None:
    ran = prunefleet("plan", "quickstart", "--storage", tmp_path / "runs")

    assert ran.code == 0
    assert "sparsegpt 1:4 vision+language 0.75 + sparse_lora" in ran.out


@pytest.mark.parametrize("arguments", [["plan"], ["no-such-command"], ["run", "x", "--executor=y"]])
def test_a_wrong_command_line_ends_with_2(arguments: list[str]) -> None:
    assert prunefleet(*arguments).code == 2


def test_help_names_the_commands() -> None:
    said = CliRunner().invoke(app, ["--help"]).output

    assert all(command in said for command in ("plan", "run", "leaderboard", "export"))


def test_run_computes_a_sweep_and_shows_its_leaderboard(done: Place) -> None:
    """2:4 in every prunable layer is counted as 0.5 from the saved file."""
    rows = leaderboard.load(str(done.storage))

    assert done.first.code == 0, done.first.err
    assert "3 jobs, 0 complete, 3 to run." in done.first.out
    assert "3 jobs run, 0 failed" in done.first.out
    assert sorted(zip(rows["method"], rows["weights"], strict=True)) == [
        ("dense", "dense"),
        ("magnitude", "dense"),
        ("magnitude", "pruned"),
        ("wanda", "dense"),
        ("wanda", "pruned"),
    ]
    pruned = rows[rows["weights"] == "pruned"]
    assert pruned["sparsity_total"].tolist() == [0.5, 0.5]
    assert rows["num_items"].tolist() == [8] * 5
    assert "easy-vqa, exact_match" in done.first.out


def test_run_tells_each_job_on_a_line_of_its_own(done: Place) -> None:
    """Also in a pipe, which has no width to wrap at."""
    told = [line for line in done.first.out.splitlines() if line.startswith("[")]

    assert [line[:5] for line in told] == ["[1/3]", "[2/3]", "[3/3]"]
    assert all(line.endswith(" s") for line in told)
    assert "magnitude 2:4 vision+language 0.5: easy-vqa exact_match" in told[1]


def test_a_second_run_computes_nothing(done: Place) -> None:
    before = done.stages()

    ran = done.run()

    assert ran.code == 0
    assert "3 jobs, 3 complete, 0 to run." in ran.out
    assert "easy-vqa, exact_match" in ran.out
    assert done.stages() == before


def test_a_row_that_was_deleted_is_made_again_from_its_stages(done: Place) -> None:
    """Killed between the last stage and the row: nothing is computed again."""
    [row] = leaderboard.load(str(done.storage), "method == 'wanda' and weights == 'pruned'")[
        "job_key"
    ]
    (done.storage / leaderboard.row_path(row, "complete")).unlink()
    before = done.stages()

    ran = done.run()

    assert "3 jobs, 2 complete, 1 to run." in ran.out
    assert done.stages() == before
    assert leaderboard.published_keys(Storage(str(done.storage)))[row] == "complete"


def test_leaderboard_answers_a_query(done: Place) -> None:
    everything = prunefleet("leaderboard", "--storage", done.storage)
    wanda = prunefleet("leaderboard", "method == 'wanda'", "--storage", done.storage)

    assert (everything.code, wanda.code) == (0, 0)
    assert "magnitude" in everything.out
    assert "wanda" in wanda.out
    assert "magnitude" not in wanda.out


def test_leaderboard_for_other_programs(done: Place) -> None:
    """As CSV, as JSON, and only some columns. What pandas reads back is what `load` gives."""
    rows = leaderboard.load(str(done.storage))
    asked = ("--columns", "method, score", "--storage", done.storage)

    as_csv = pd.read_csv(io.StringIO(prunefleet("leaderboard", "--csv", *asked).out))
    as_json = json.loads(prunefleet("leaderboard", "--json", "--storage", done.storage).out)
    as_text = prunefleet("leaderboard", *asked).out.splitlines()
    unknown = prunefleet("leaderboard", "--columns", "methd", "--storage", done.storage)

    assert list(as_csv.columns) == ["method", "score"]
    assert as_csv["score"].tolist() == pytest.approx(rows["score"].tolist())
    assert [one["job_key"] for one in as_json] == rows["job_key"].tolist()
    assert as_text[0].split() == ["method", "score"]
    assert len(as_text) == 1 + len(rows)
    assert unknown.code == 2
    assert "methd" in unknown.err


def test_leaderboard_without_results_says_so(tmp_path: Path) -> None:
    assert prunefleet("leaderboard", "--storage", tmp_path).out == "No results.\n"


def test_a_query_that_is_none_ends_with_2_and_the_columns(done: Place) -> None:
    ran = prunefleet("leaderboard", "methd == 'wanda'", "--storage", done.storage)

    assert ran.code == 2
    assert "methd" in ran.err
    assert "Columns: job_key, status" in ran.err


def key_of(done: Place, method: str) -> str:
    rows = leaderboard.load(str(done.storage), f"method == '{method}'")
    return str(rows["job_key"].iloc[0])


def test_export_copies_a_model_that_loads(done: Place, tmp_path: Path) -> None:
    """By the first digits of the key that the leaderboard shows. What is copied is ours to keep."""
    key = key_of(done, "wanda")
    to = tmp_path / "deep" / "model"

    ran = prunefleet("export", key[:8], "--to", to, "--storage", done.storage)

    assert (ran.code, ran.out) == (0, f"{key} is in {to}\n")
    assert count_sparsity(load_model(to, device=torch.device("cpu")))["sparsity_total"] == 0.5
    assert [file.name for file in to.parent.iterdir()] == ["model"]
    copied = to / "model.safetensors"
    stored = next((done.storage / "stages" / "prune").rglob("model.safetensors"))
    assert copied.stat().st_ino != stored.stat().st_ino


def test_export_finds_a_model_in_a_storage_that_was_moved(done: Place, tmp_path: Path) -> None:
    """Fetched from the cluster to a laptop: the row still names the place it was made in."""
    moved = shutil.copytree(done.storage, tmp_path / "moved")

    ran = prunefleet("export", key_of(done, "wanda"), "--to", tmp_path / "m", "--storage", moved)

    assert ran.code == 0, ran.err
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_export_refuses_what_is_not_one_model(done: Place, tmp_path: Path) -> None:
    """No such key; a key that two share; the dense model, which nobody saved; a folder in use."""
    dense = key_of(done, "dense")
    wanda = key_of(done, "wanda")
    (tmp_path / "there").mkdir()

    for key, to, expected in [
        ("ffffffffffffffff0", "new", "0 jobs with a model have a key that starts with"),
        ("", "new", "2 jobs with a model have a key that starts with"),
        (dense, "new", "0 jobs with a model"),
        (wanda, "there", "there exists already; name a folder that does not"),
    ]:
        ran = prunefleet("export", key, "--to", tmp_path / to, "--storage", done.storage)
        assert (ran.code, ran.out) == (2, "")
        assert expected in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.fixture
def faulty(tmp_path: Path, model: Path) -> Place:
    """A sweep whose calibration data has a broken image. Brackets in names are no markup."""
    folder = tmp_path / "[" / "b]"
    folder.mkdir(parents=True)
    for number in range(4):
        Image.new("RGB", (64, 64), (255, 0, 60 * number)).save(folder / f"{number}.png")
    records = [
        {"image": f"{number}.png", "question": "what color?", "answer": "red"}
        for number in range(4)
    ]
    (folder / "data.json").write_text(json.dumps(records))
    (folder / "2.png").write_bytes(b"no image")
    data = "{format: vqa, path: data.json}"
    (folder / "s.yaml").write_text(SWEEP.format(model=model, dataset=data))
    return Place(folder / "s.yaml", tmp_path / "runs", model, Ran(0, "", ""))


def test_a_job_that_fails_is_a_row_with_its_reason_and_stops_no_other(faulty: Place) -> None:
    """Magnitude looks at no data and completes. Mended, the job runs again, and only it."""
    first = faulty.run()

    assert first.code == 3
    assert "2 jobs run, 1 failed" in first.out
    reason = f"image {faulty.sweep.parent}/2.png cannot be read"
    assert [line for line in first.err.splitlines() if reason in line]
    rows = leaderboard.load(str(faulty.storage)).set_index("method")
    assert rows.loc["magnitude", "status"].tolist() == ["complete"] * 2
    assert rows.loc["wanda", "status"] == "failed"
    assert rows.loc["wanda", "error_kind"] == "data"
    assert reason in rows.loc["wanda", "error"]
    assert "Traceback" not in first.out + first.err

    shown = prunefleet("plan", faulty.sweep, "--storage", faulty.storage)
    assert [line for line in shown.out.splitlines() if "wanda" in line and "failed" in line]

    Image.new("RGB", (64, 64)).save(faulty.sweep.parent / "2.png")
    second = faulty.run()

    assert second.code == 0
    assert "3 jobs, 2 complete, 1 to run." in second.out
    rows = leaderboard.load(str(faulty.storage), "method == 'wanda'")
    assert rows["status"].tolist() == ["complete"] * 2
    assert rows["error"].isna().all()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_tells_the_stage_of_each_job_that_runs(
    is_terminal: bool, done: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live table in a terminal, a line for each new stage in a pipe. Damaged or old is none."""
    monkeypatch.setattr("orchestrator.progress.REFRESH_S", 0.02)
    storage = Storage(str(tmp_path))
    now = time.time()
    beats = [
        {"stage": "evaluate [/b]", "done": 3, "total": 8, "time": now},
        {"stage": "long ago", "done": 3, "total": 8, "time": now - 10_000},
    ]
    jobs = make_plan(read_sweep(done.sweep))
    for job, beat in zip(jobs[1:], beats, strict=True):
        storage.put(progress_path(job.key), json.dumps(beat).encode())
    storage.put(progress_path(jobs[0].key), b'{"stage": "ha')
    out = io.StringIO()

    with Progress(jobs, storage, Console(file=out, force_terminal=is_terminal, width=120)).shown():
        time.sleep(0.2)

    told = out.getvalue()
    assert "evaluate [/b]" in told
    assert "3/8" in told
    assert "long ago" not in told
    if not is_terminal:
        assert told == "      magnitude 2:4 vision+language 0.5: evaluate [/b] 3/8\n"
    else:
        assert "0 of 3 jobs done" in told
