"""Findings from facts, and the doctor on this machine and against a Jobs API."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from jobs.storage import Storage
from orchestrator.doctor import look_at_access, look_at_node, look_at_storage
from orchestrator.findings import (
    Facts,
    Finding,
    PlacementGroup,
    judge_access,
    judge_answers,
    judge_clocks,
    judge_machine,
    judge_placement_groups,
    judge_sharing,
    judge_socket_path,
    judge_versions,
)
from tests.jobs_server import JobsServer
from tests.test_cli import prunefleet

WELL = Facts(
    node="a",
    versions={"python": "3.11.7", "torch": "2.13.0", "git_commit": None, "image_digest": None},
    temp_dir="/tmp",
    shm_gib=8.0,
    open_files=65536,
    disk_free_gib=100.0,
    disk_used=0.5,
    gpu_devices=0,
    gpus_torch=None,
    gpus_ray=0.0,
    clock=0.2,
)


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.check: finding.level for finding in findings}


def test_a_machine_that_is_well_has_no_finding_but_ok() -> None:
    findings = [*judge_machine(WELL), *judge_versions([WELL]), *judge_clocks([WELL])]

    assert {finding.level for finding in findings} == {"ok"}
    assert all(not finding.remedy for finding in findings)


@pytest.mark.parametrize(
    ("change", "check", "level", "told"),
    [
        ({"shm_gib": 0.0625}, "shared memory", "warning", "0.06 GiB"),
        ({"shm_gib": None}, "shared memory", "warning", "no /dev/shm"),
        ({"open_files": 1024}, "open files", "warning", "1024 files"),
        ({"open_files": 256}, "open files", "problem", "256 files"),
        ({"disk_free_gib": 5.0}, "disk", "warning", "5.0 GiB free"),
        ({"disk_used": 0.96}, "disk", "problem", "96% used"),
        ({"disk_free_gib": 0.5}, "disk", "problem", "0.5 GiB free"),
        ({"gpus_ray": 8.0, "gpus_torch": 0}, "GPUs", "problem", "torch sees 0 of 8"),
        ({"gpus_ray": 8.0, "gpus_torch": 8}, "GPUs", "ok", "a: 8"),
        ({"gpus_ray": 4.0, "gpus_torch": 8}, "GPUs", "warning", "torch sees 8, Ray uses 4"),
        ({"gpus_ray": None, "gpu_devices": 1, "gpus_torch": 0}, "GPUs", "problem", "0 of 1"),
    ],
)
def test_what_a_machine_lacks_is_told_with_its_remedy(
    change: dict[str, Any], check: str, level: str, told: str
) -> None:
    found = next(one for one in judge_machine(replace(WELL, **change)) if one.check == check)

    assert found.level == level
    assert told in found.what
    assert bool(found.remedy) == (level != "ok")


def test_no_gpu_is_not_worth_a_word() -> None:
    assert "GPUs" not in levels(judge_machine(WELL))


def test_a_temporary_folder_too_deep_for_sockets_is_a_problem() -> None:
    """41 letters fit (Ray adds /ray and 62 more); 42 do not."""
    assert judge_socket_path("/" + "x" * 40).level == "ok"
    assert judge_socket_path("/" + "x" * 41).level == "problem"


def test_versions_that_differ_are_named_with_their_nodes() -> None:
    other = replace(WELL, node="b", versions={**WELL.versions, "torch": "2.12.0"})
    bare = replace(WELL, node="c", versions={**WELL.versions, "torch": None})

    (found,) = judge_versions([WELL, other, bare])
    (missing,) = judge_versions([bare])

    assert found.level == "problem"
    assert found.what == "torch differs: 2.13.0 on a; 2.12.0 on b; none on c"
    assert missing.what == "torch is not installed"


def test_a_node_with_a_disk_of_its_own_is_found() -> None:
    (found,) = judge_sharing(3, {"b": "it does not see what another machine wrote"}, "/runs")

    assert found.level == "problem"
    assert found.what == "node b: /runs: it does not see what another machine wrote"
    assert levels(judge_sharing(3, {}, "/runs")) == {"shared storage": "ok"}


def test_a_silent_node_is_a_problem() -> None:
    assert levels(judge_answers(3, {})) == {"nodes": "ok"}
    (found,) = judge_answers(3, {"b": "No module named 'orchestrator'"})
    assert (found.level, found.what) == ("problem", "b: No module named 'orchestrator'")


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([], ["ok"]),
        ([PlacementGroup("1", "CREATED", False), PlacementGroup("2", "REMOVED", True)], ["ok"]),
        ([PlacementGroup("1", "CREATED", True)], ["problem"]),
        ([PlacementGroup("1", "PENDING", False)], ["warning"]),
        (
            [PlacementGroup("1", "RESCHEDULING", True), PlacementGroup("2", "PENDING", False)],
            ["problem", "warning"],
        ),
    ],
)
def test_placement_groups_without_a_job_are_orphans(
    groups: list[PlacementGroup], expected: list[str]
) -> None:
    assert [finding.level for finding in judge_placement_groups(groups)] == expected


def test_a_clock_that_is_off_is_told() -> None:
    """A node takes a while to start a process: late is not behind."""
    for clock, is_off in [(30.0, False), (-59.0, False), (-61.0, True), (3600.0, True)]:
        assert bool(judge_clocks([replace(WELL, clock=clock)])) == is_off, clock


@pytest.mark.parametrize(
    ("status", "is_loopback", "level"),
    [(401, False, "ok"), (403, True, "ok"), (200, True, "warning"), (200, False, "problem")],
)
def test_a_cluster_open_to_all_is_found(status: int, is_loopback: bool, level: str) -> None:
    assert judge_access("http://x", status, is_loopback=is_loopback).level == level


def test_a_dashboard_is_asked_without_a_token() -> None:
    with JobsServer(token="secret") as closed, JobsServer() as opened:
        found = [look_at_access(one.address, is_loopback=True) for one in (closed, opened)]

    assert [one.level for one in found] == ["ok", "warning"]


def test_a_node_looks_for_what_was_written_and_answers(tmp_path: Path) -> None:
    node = {"NodeID": "abcdef0123", "Resources": {"CPU": 1.0}}
    storage = Storage(str(tmp_path / "shared"))
    storage.put("_tmp-x/asked", b"_tmp-x")

    shares = look_at_node(node, storage.url, "_tmp-x", 0.0)
    apart = look_at_node(node, str(tmp_path / "own"), "_tmp-x", 0.0)

    assert (shares.storage_error, shares.gpus_torch) == (None, None)
    assert storage.exists("_tmp-x/abcdef0123")
    assert apart.storage_error == "it does not see what another machine wrote there"
    assert not (tmp_path / "own").exists()


def test_a_storage_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    well = look_at_storage(Storage(str(tmp_path / "new")))
    (found,) = look_at_storage(Storage(str(tmp_path / "file" / "below")))

    assert [one.check for one in well] == ["storage", "disk"]
    assert well[0].level == "ok"
    assert found.level == "problem"
    assert "cannot write" in found.what


def test_the_doctor_tells_this_machines_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of sockets is a problem of the environment that we can make here."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)

    told = prunefleet("doctor", "--storage", tmp_path / "runs")
    as_json = prunefleet("doctor", "--storage", tmp_path / "runs", "--json")

    assert (told.code, as_json.code) == (3, 3)
    assert "problem  socket path    /tmp/xxx" in told.out
    assert "export RAY_TMPDIR=/tmp" in told.out
    findings = {finding["check"]: finding for finding in json.loads(as_json.out)}
    assert findings["socket path"]["level"] == "problem"
    assert findings["versions"]["level"] == "ok"
    assert findings["storage"]["level"] == "ok"


def test_a_cluster_is_looked_at_by_a_job_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reports through the storage. One that leaves no report does not share it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    storage = Storage(str(tmp_path / "runs"))
    found = [Finding("nodes", "ok", "3 alive, all answer")]

    def report(submitted: dict[str, Any]) -> str:
        words = submitted["entrypoint"].split()
        assert words[3:6] == ["doctor", "--address", "auto"]
        storage.put(words[-1], json.dumps([asdict(one) for one in found]).encode())
        return "SUCCEEDED"

    asked = ("--storage", storage.url, "--json")
    with JobsServer(run=report) as server:
        well = prunefleet("doctor", "--address", server.address, *asked)
    with JobsServer(run=lambda _: "FAILED") as server:
        apart = prunefleet("doctor", "--address", server.address, *asked)

    told = {one["check"]: one["level"] for one in json.loads(well.out)}
    assert (told["nodes"], told["token"]) == ("ok", "warning")
    assert storage.list("doctor") == []
    assert apart.code == 3
    assert "left no report" in json.loads(apart.out)[-1]["what"]
