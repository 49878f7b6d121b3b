"""Submitting to a cluster: decisions as tables, and the command against a Jobs API on loopback."""

import io
import json
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import SpecError
from jobs.result import JobResult, Score
from jobs.storage import Storage
from orchestrator import leaderboard
from orchestrator.executors import InlineExecutor
from orchestrator.progress import STALE_S
from orchestrator.resolved import jobs_of, known_sweeps, read_resolved, sweep_id, write_resolved
from orchestrator.settle import fail, job_columns
from orchestrator.status import ago, exit_code, state_of
from orchestrator.submit import (
    RayJobs,
    Submission,
    check_address,
    clear_text_warning,
    find_token,
    next_step,
    parse_resources,
)
from tests.families import make_tiny
from tests.jobs_server import JobsServer
from tests.test_cli import SWEEP, Ran, prunefleet
from workers.context import progress_path

TOKEN = "5ec7e7-0123456789abcdef"


# ---- decisions ----


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ({}, ("submit", 1)),
        ({1: "PENDING"}, ("join", 1)),
        ({1: "RUNNING"}, ("join", 1)),
        ({1: "FAILED"}, ("submit", 2)),
        ({1: "STOPPED", 2: "RUNNING"}, ("join", 2)),
        ({1: "SUCCEEDED", 2: "SUCCEEDED"}, ("submit", 3)),  # with jobs that failed
        ({3: "RUNNING", 9: "FAILED"}, ("join", 3)),
    ],
)
def test_a_submit_joins_what_runs_or_starts_the_next_generation(
    statuses: dict[int, str], expected: tuple[str, int]
) -> None:
    known = {n: Submission(f"s-{n}", n, status) for n, status in statuses.items()}

    assert next_step(known) == expected


@pytest.mark.parametrize(
    ("settled", "code"),
    [
        ({"a": "complete", "b": "complete", "other": "failed"}, 0),
        ({"a": "complete", "b": "failed"}, 3),
        ({"a": "complete"}, 3),
    ],
)
def test_the_exit_code_follows_from_the_leaderboard(settled: dict[str, str], code: int) -> None:
    assert exit_code({"a", "b"}, settled) == code


@pytest.mark.parametrize(
    ("row", "beat", "ended", "expected"),
    [
        ("complete", None, None, "complete"),
        ("complete", 990.0, None, "complete"),
        (None, None, None, "waiting"),
        (None, 990.0, None, "running"),
        (None, 1090.0, None, "running"),  # a machine whose clock is ahead
        (None, 1000.0 - STALE_S - 1, None, "silent"),
        (None, 990.0, 995.0, "silent"),  # its run ended after its last sign of life
        (None, 990.0, 980.0, "running"),
        ("failed", None, None, "failed"),
        ("failed", 990.0, None, "running"),  # tried again
        ("failed", 1000.0 - STALE_S - 1, None, "failed"),
    ],
)
def test_a_job_is_running_only_while_it_gives_signs_of_life(
    row: leaderboard.Status | None, beat: float | None, ended: float | None, expected: str
) -> None:
    assert state_of(row, beat, now=1000.0, ended=ended) == expected


def test_ages_are_told_in_the_unit_a_person_would_use() -> None:
    told = [ago(s) for s in (0.4, 12, 119, 120, 7199, 7200, 86400, 200_000)]

    assert told == ["0 s", "12 s", "119 s", "2 min", "120 min", "2 h", "24 h", "2 days"]


def test_the_token_is_found_where_ray_finds_it(tmp_path: Path) -> None:
    """Variable before named file before the file at home; none if the person says so."""
    named, home = tmp_path / "named", tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("of-home\n")
    named.write_text("of-file\n")

    for environment, where, expected in [
        ({"RAY_AUTH_TOKEN": "of-env", "RAY_AUTH_TOKEN_PATH": str(named)}, home, "of-env"),
        ({"RAY_AUTH_TOKEN_PATH": str(named)}, home, "of-file"),
        ({"RAY_AUTH_TOKEN": " "}, home, "of-home"),
        ({}, home, "of-home"),
        ({}, tmp_path, None),
        ({"RAY_AUTH_MODE": "TOKEN"}, home, "of-home"),
        ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "of-env"}, home, None),
    ]:
        assert find_token(environment, where) == expected, environment


def test_a_token_that_cannot_be_one_is_refused_without_showing_it(tmp_path: Path) -> None:
    """Two lines in a header would be a header of somebody else's making."""
    with pytest.raises(SpecError) as caught:
        find_token({"RAY_AUTH_TOKEN": f"{TOKEN}\r\nX-Evil: 1"}, tmp_path)
    assert "RAY_AUTH_TOKEN" in caught.value.message
    assert TOKEN not in caught.value.message

    with pytest.raises(SpecError, match="no-such-file: the cluster's token cannot be read"):
        find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "no-such-file")}, tmp_path)


@pytest.mark.parametrize(
    ("address", "token", "warned"),
    [
        ("http://127.0.0.1:8265", TOKEN, False),
        ("http://localhost:8265", TOKEN, False),
        ("http://[::1]:8265", TOKEN, False),
        ("http://127.0.0.2.evil.example:8265", TOKEN, True),
        ("http://10.0.0.7:8265", TOKEN, True),
        ("http://10.0.0.7:8265", None, False),
        ("https://ray.example", TOKEN, False),
    ],
)
def test_a_token_in_clear_text_is_warned_about(
    address: str, token: str | None, warned: bool
) -> None:
    warning = clear_text_warning(address, token)

    assert (warning is not None) == warned
    assert TOKEN not in str(warning)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:8265", "give the URL of the cluster's dashboard"),
        ("ray://head:10001", "give the URL of the cluster's dashboard"),
        ("http://", "give the URL of the cluster's dashboard"),
        ("https://me:hunter2@head", "the URL has a password in it"),
    ],
)
def test_an_address_that_is_no_dashboards_is_refused(address: str, expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_address(address)

    assert expected in caught.value.message
    assert "hunter2" not in caught.value.message


def test_driver_resources_are_a_name_and_an_amount() -> None:
    assert parse_resources(["safe_node=0.01", "a=b=2"]) == {"safe_node": 0.01, "a=b": 2.0}
    for wrong in ("safe_node", "=1", "a=", "a=-1", "a=0", "a=inf", "a=nan"):
        with pytest.raises(SpecError, match=r"such as safe_node=0\.01"):
            parse_resources([wrong])


# ---- the command against a Jobs API ----


class Study:
    """A sweep of three jobs on a tiny model, and a storage for it."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.sweep = folder / "tiny.yaml"
        self.sweep.write_text(SWEEP.format(model=model, dataset="easy-vqa"))
        self.storage = Storage(str(folder / "runs"))
        self.jobs = jobs_of(str(self.sweep))
        self.id = sweep_id(self.jobs, self.storage)

    def run(self, command: str, server: JobsServer, *more: object) -> Ran:
        address = ("--address", server.address)
        return prunefleet(command, self.sweep, *address, "--storage", self.storage.url, *more)

    def complete(self, submitted: dict[str, Any]) -> str:
        """What a cluster does: read what was resolved, and put a result for each job there."""
        path = submitted["entrypoint"].split()[4].removeprefix(f"{self.storage.url}/")
        for job in read_resolved(self.storage, path):
            score = Score("dense", "easy-vqa", "exact_match", 0.5, None, None, 8)
            result = JobResult(job.key, "complete", (score,))
            leaderboard.publish(self.storage, job_columns(job), result)
        return "SUCCEEDED"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llava-clip", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def study(tmp_path: Path, model: Path) -> Study:
    return Study(tmp_path, model)


@pytest.fixture(autouse=True)
def own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token and no address of the machine that tests run on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray lets it win over an argument


def test_a_submitted_sweep_runs_once_and_only_what_is_left(study: Study) -> None:
    """The second submit finds everything done; it does not even ask the cluster."""
    with JobsServer(run=study.complete) as server:
        server.logs[f"{study.id}-1"] = "[1/3] tiny dense: …\n[2/3] …\n"
        first = study.run("submit", server)
        asked = len(server.requests)
        second = study.run("submit", server)
        server_was_left_alone = len(server.requests) == asked

    assert first.code == 0, first.err
    assert f"3 jobs, 0 complete, the rest submitted as {study.id}-1" in first.out
    assert "[1/3] tiny dense: …\n[2/3] …\n" in first.out
    assert second.code == 0
    assert "3 jobs, all complete: nothing to submit" in second.out
    assert server_was_left_alone
    (submitted,) = server.submitted
    assert submitted["submission_id"] == f"{study.id}-1"
    assert submitted["entrypoint_num_cpus"] == 0
    assert submitted["metadata"]["storage"] == study.storage.url
    assert "entrypoint_resources" not in submitted


def test_a_second_submit_joins_the_one_that_runs(study: Study) -> None:
    with JobsServer() as server:
        first = study.run("submit", server, "--no-wait")
        second = study.run("submit", server, "--no-wait")

    assert (first.code, second.code) == (0, 0)
    assert f"the rest submitted as {study.id}-1" in first.out
    assert f"the rest running already as {study.id}-1" in second.out
    assert len(server.submitted) == 1


def test_who_loses_the_race_to_submit_joins(study: Study) -> None:
    """Ray knew of no submission a moment ago, and refuses the id now."""
    write_resolved(study.jobs, study.storage)
    with JobsServer() as server:
        cluster = RayJobs(server.address, None)
        server.add("s-1", "RUNNING")

        assert cluster.submit("s-1", "python", metadata={}) is False


def test_what_ended_early_goes_on_in_the_next_generation(study: Study) -> None:
    with JobsServer(run=study.complete) as server:
        server.add(f"{study.id}-1", "STOPPED")
        server.add(f"{study.id}-2", "FAILED")
        server.add("somebody-elses-9", "RUNNING")
        ran = study.run("submit", server)

    assert ran.code == 0
    assert server.submitted[0]["submission_id"] == f"{study.id}-3"


def test_a_sweep_that_ends_without_all_results_says_so(study: Study) -> None:
    """One job failed on the leaderboard, two have nothing: the log's word does not count."""

    def fail_one(submitted: dict[str, Any]) -> str:
        fail(study.jobs[0], study.storage, "data", "no such image")
        return "SUCCEEDED"

    with JobsServer(run=fail_one) as server:
        server.logs[f"{study.id}-1"] = "3 jobs run, 0 failed\n"
        ran = study.run("submit", server)

    assert ran.code == 3
    assert "2 of 3 jobs have no result: the Ray job ended as SUCCEEDED" in ran.err


def test_a_mistake_ends_with_2_before_anything_is_sent(study: Study) -> None:
    good = study.sweep.read_text()
    with JobsServer() as server:
        for text, more, expected in [
            (good.replace("wanda", "wnda"), (), "Did you mean 'wanda'?"),
            (good, ("--driver-resource", "safe"), "--driver-resource: got 'safe'"),
            (good, ("--storage", "memory://x"), "seen by one process"),
            (good, ("--storage", "ftp://me:hunter2@host/x"), "the URL has a password in it"),
        ]:
            study.sweep.write_text(text)
            ran = study.run("submit", server, *more)
            assert (ran.code, ran.out) == (2, ""), ran
            assert expected in ran.err
            assert "hunter2" not in ran.err
        assert server.requests == []


def test_a_driver_can_be_kept_on_safe_nodes(study: Study) -> None:
    with JobsServer() as server:
        study.run("submit", server, "--no-wait", "--driver-resource", "safe_node=0.01")

    assert server.submitted[0]["entrypoint_resources"] == {"safe_node": 0.01}


def test_a_cluster_that_wants_a_token_gets_it_in_a_header_and_nowhere_else(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a body or a path, nor in the storage, nor on the terminal."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    with JobsServer(token=TOKEN, run=study.complete) as server:
        submitted = study.run("submit", server)
        said = [submitted, *(study.run(c, server) for c in ("status", "logs"))]

    assert [ran.code for ran in said] == [0, 0, 0]
    assert {one.headers["Authorization"] for one in server.requests} == {f"Bearer {TOKEN}"}
    seen = [one.path + one.body for one in server.requests] + [ran.out + ran.err for ran in said]
    seen += [study.storage.read_bytes(path).decode("latin-1") for path in study.storage.list()]
    assert len(seen) > 10
    for text in seen:
        assert TOKEN not in text
        assert "hf_secret" not in text


@pytest.mark.parametrize(
    ("token", "expected"),
    [(None, "wants a token, and none was found"), ("another", "refuses the token")],
)
def test_a_refusal_is_explained(
    token: str | None, expected: str, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)

    with JobsServer(token=TOKEN) as server:
        ran = study.run("submit", server)

    assert ran.code == 2
    assert expected in ran.err
    assert "ray get-auth-token" in ran.err
    assert known_sweeps(study.storage) == []


def test_an_address_where_no_cluster_is_ends_with_2(study: Study) -> None:
    with JobsServer() as server:
        gone = server.address

    ran = prunefleet("submit", study.sweep, "--address", gone, "--storage", study.storage.url)

    assert ran.code == 2
    assert f"{gone}: no Ray dashboard answers there" in ran.err


def test_a_checkout_is_sent_without_its_secrets(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    (checkout / ".ssh").mkdir(parents=True)
    (checkout / "code.py").write_text("print('here')")
    for name in (".env", ".env.local", "server.pem", ".ssh/id_rsa", "auth_token"):
        (checkout / name).write_text("hunter2")

    with JobsServer() as server:
        RayJobs(server.address, None).submit("x-1", "python", metadata={}, working_dir=checkout)

    (package,) = server.packages.values()
    with zipfile.ZipFile(io.BytesIO(package)) as opened:
        assert opened.namelist() == ["code.py"]
    assert server.submitted[0]["runtime_env"]["working_dir"].startswith("gcs://")
    assert "env_vars" not in server.submitted[0]["runtime_env"]


def test_a_lost_connection_is_mended_without_saying_anything_twice() -> None:
    told: list[str] = []
    with JobsServer(drop_tail_after=6) as server:
        server.add("s-1", "RUNNING")
        server.logs["s-1"] = "one\ntwo\nthree\n"

        ended = RayJobs(server.address, None).follow("s-1", told.append)

    assert ended.status == "SUCCEEDED"
    assert "".join(told) == "one\ntwo\nthree\n"


def test_cancel_stops_the_newest_and_keeps_what_is_done(study: Study) -> None:
    """And what was cut off is not shown as running for the next ten minutes."""
    with JobsServer() as server:
        study.run("submit", server, "--no-wait")
        beat = {"stage": "prune", "done": 3, "total": 8, "time": time.time() - 5}
        study.storage.put(progress_path(study.jobs[1].key), json.dumps(beat).encode())
        running = study.run("status", server)
        cancelled = study.run("cancel", server)
        after = study.run("status", server)
        again = study.run("cancel", server)

    assert "3 jobs: 1 running, 2 waiting" in running.out
    assert f"Ray job {study.id}-1: RUNNING" in running.out
    assert re.search(r"running +prune +3/8 +\d+ s ago", running.out)
    assert cancelled.code == 0
    assert f"{study.id}-1: STOPPED. Of 3 jobs: 1 silent, 2 waiting" in cancelled.out
    assert "3 jobs: 1 silent, 2 waiting" in after.out
    assert "Run or submit the sweep again" in after.out
    assert f"{study.id}-1 has ended already, as STOPPED" in again.out


def test_status_and_logs_go_by_name_without_the_file(study: Study) -> None:
    """From another terminal, in another folder; the plan is read from the storage."""
    with JobsServer(run=study.complete) as server:
        server.logs[f"{study.id}-1"] = "hello\n"
        study.run("submit", server)
        place = ("--storage", study.storage.url)
        brief = prunefleet("status", *place)
        full = prunefleet("status", "tiny", *place, "--json")
        log = prunefleet("logs", study.id[:10], "--address", server.address, *place)

    assert brief.out == f"{study.id}: 3 jobs: 3 complete\n"
    (shown,) = json.loads(full.out)
    assert [job["state"] for job in shown["jobs"]] == ["complete"] * 3
    assert log.out == "hello\n"


def test_a_name_that_several_sweeps_have_is_asked_back(study: Study, model: Path) -> None:
    """Edited between two runs: two ids with one name. The beginning of an id tells them apart."""
    write_resolved(study.jobs, study.storage)
    edited = write_resolved(study.jobs[:2], study.storage)

    unclear = prunefleet("status", "tiny", "--storage", study.storage.url)
    clear = prunefleet("status", edited[:-4], "--storage", study.storage.url)

    assert unclear.code == 2
    assert study.id in unclear.err
    assert edited in unclear.err
    assert clear.out.startswith(f"{edited}: 2 jobs: 2 waiting")


def test_results_that_went_elsewhere_end_a_run_with_3(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that has a folder of its own under the storage's name: complete, and nothing there."""

    def settle_elsewhere(_: Any, jobs: Any, storage: Storage, on_settled: Any) -> None:
        score = Score("dense", "easy-vqa", "exact_match", 0.5, None, None, 8)
        for job in jobs:
            on_settled(job, JobResult(job.key, "complete", (score,)))

    monkeypatch.setattr(InlineExecutor, "run", settle_elsewhere)

    ran = prunefleet("run", study.sweep, "--storage", study.storage.url, "--executor", "inline")

    assert ran.code == 3
    assert "lost: 3 jobs ended, and their results are not in" in ran.err
    assert known_sweeps(study.storage) == [study.id]


def test_run_sends_to_submit_who_gives_it_a_dashboard(study: Study) -> None:
    ran = prunefleet("run", study.sweep, "--address", "http://head:8265")

    assert ran.code == 2
    assert "`prunefleet submit` is for those" in ran.err


def test_what_a_cluster_does_not_know_is_said(study: Study) -> None:
    with JobsServer() as server:
        for command in ("logs", "cancel"):
            ran = study.run(command, server)
            assert ran.code == 2
            assert f"knows no submission of {study.id}" in ran.err


# ---- resolved sweeps ----


def test_a_resolved_sweep_comes_back_as_it_was(study: Study) -> None:
    write_resolved(study.jobs, study.storage)

    again = jobs_of(f"{study.storage.url}/sweeps/{study.id}.resolved.json")

    assert again == study.jobs


def test_a_sweeps_id_depends_on_what_can_change_results(study: Study, tmp_path: Path) -> None:
    """Not on resources, so that a second submit with more memory joins or goes on."""
    wider = study.jobs[0].resources.model_copy(update={"cpus_per_worker": 2})
    roomier = [job.model_copy(update={"resources": wider}) for job in study.jobs]

    assert sweep_id(roomier, study.storage) == study.id
    assert sweep_id(study.jobs[:2], study.storage) != study.id
    assert sweep_id(study.jobs, Storage(str(tmp_path / "elsewhere"))) != study.id


def test_a_resolved_sweep_that_does_not_fit_this_machine_is_refused(
    study: Study, tmp_path: Path
) -> None:
    """Damaged, of another version, for a model that is another here, or not there at all."""
    path = f"sweeps/{study.id}.resolved.json"
    url = f"{study.storage.url}/{path}"
    write_resolved(study.jobs, study.storage)
    sound = study.storage.read_json(path)
    key = study.jobs[0].key
    other_key = {"jobs": {"0" * 16: sound["jobs"][key]}, "prunefleet": "0.0.9"}
    changed = study.jobs[0].model.model_copy(update={"fingerprint": "f" * 16})
    other = study.jobs[0].model_copy(update={"model": changed})

    for content, expected in [
        ({"jobs": {key: {**sound["jobs"][key], "new": 1}}}, "is no resolved sweep of prunefleet"),
        ([], "is no resolved sweep of prunefleet"),
        ({"jobs": {}}, "has no jobs"),
        (other_key, "It was planned by prunefleet 0.0.9"),
        (
            {"jobs": {other.key: other.model_dump(mode="json")}},
            "is not what the sweep was planned with",
        ),
    ]:
        study.storage.put(path, json.dumps(content).encode())
        with pytest.raises(SpecError) as caught:
            jobs_of(url)
        assert expected in caught.value.message
    study.storage.delete(path)
    with pytest.raises(SpecError, match="Does this machine see the storage"):
        jobs_of(url)
