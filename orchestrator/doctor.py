"""What is wrong with this machine, or with a cluster, before anything costly runs on it.

Facts are gathered here, on this machine or by a task of zero CPUs pinned to each node of a
cluster; `findings` judges them.
"""

import contextlib
import glob
import json
import os
import platform
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jobs.errors import PrunefleetError, SpecError, StarvedError, StorageError
from jobs.storage import Storage
from orchestrator.findings import (
    NODE_LIMIT_S,
    Facts,
    Finding,
    PlacementGroup,
    judge_access,
    judge_answers,
    judge_clocks,
    judge_disk,
    judge_machine,
    judge_placement_groups,
    judge_sharing,
    judge_socket_path,
    judge_versions,
)
from orchestrator.submit import RayJobs, is_loopback

JOB_LIMIT_S = 300.0
"""How long the doctor's own job on a cluster may take."""

GIB = 2**30
UNSEEN = "what it writes there is not seen by others"


def gather_facts(node: str, *, gpus_ray: float | None, asked_at: float) -> Facts:
    """Look at the machine that this runs on."""
    from orchestrator.settle import provenance

    temp_dir = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    disk = shutil.disk_usage(temp_dir if Path(temp_dir).is_dir() else "/")
    known = provenance()
    versions = {
        name.removeprefix("version_"): value
        for name, value in known.items()
        if name.startswith("version_") or name in ("git_commit", "image_digest")
    }
    gpu_devices = len(glob.glob("/dev/nvidia[0-9]*"))
    return Facts(
        node=node,
        versions={"python": platform.python_version(), **versions},
        temp_dir=temp_dir,
        shm_gib=shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        disk_free_gib=disk.free / GIB,
        disk_used=disk.used / disk.total,
        gpu_devices=gpu_devices,
        gpus_torch=_gpus_of_torch() if gpu_devices or gpus_ray else None,
        gpus_ray=gpus_ray,
        clock=time.time() - asked_at,
    )


def _gpus_of_torch() -> int:
    """In a process of its own, which sees what Ray hides from a task that asked for no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"}
    ran = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"],
        env={name: value for name, value in os.environ.items() if name not in hidden},
        capture_output=True,
        text=True,
        timeout=NODE_LIMIT_S,
    )
    return int(ran.stdout.strip() or 0) if ran.returncode == 0 else 0


def look_at_node(node: dict[str, Any], storage_url: str, folder: str, asked_at: float) -> Facts:
    """What runs on each node of a cluster: its facts, and whether it shares the storage.

    Args:
        node: an entry of `ray.nodes()`.
    """
    name = f"{socket.gethostname()} ({node['NodeID'][:6]})"
    gpus = float(node["Resources"].get("GPU", 0))
    facts = gather_facts(name, gpus_ray=gpus, asked_at=asked_at)
    return replace(facts, storage_error=meet(node, storage_url, folder, asked_at))


def meet(node: dict[str, Any], storage_url: str, folder: str, asked_at: float) -> str | None:
    """Read what was written in the storage by another machine, and leave a file there.

    Args:
        folder: in the storage; has a file `asked`, and gets a file named by the node's id.

    Returns:
        What is wrong with the storage as this machine sees it.
    """
    try:
        storage = Storage(storage_url)
        if storage.read_bytes(f"{folder}/asked") != folder.encode():
            return "it has something else under that name"
        storage.put(f"{folder}/{node['NodeID']}", b"here")
    except FileNotFoundError:
        return "it does not see what another machine wrote there"
    except PrunefleetError as failure:
        return failure.message
    return None


def look_at_cluster(storage: Storage) -> list[Finding]:
    """Everything about the cluster that this process is connected to with `ray.init`."""
    with _shared_folder(storage) as folder:
        facts, silent = _ask_nodes(look_at_node, storage, folder)
        apart = {one.node: one.storage_error for one in facts.values() if one.storage_error}
        apart |= {
            one.node: UNSEEN
            for node, one in facts.items()
            if not one.storage_error and not storage.exists(f"{folder}/{node}")
        }
    every = list(facts.values())
    return [
        *judge_answers(len(every), silent),
        *judge_versions(every),
        *judge_sharing(len(every), apart, storage.url),
        *(finding for one in every for finding in judge_machine(one)),
        *judge_clocks(every),
        *_look_at_placement_groups(),
    ]


def require_shared_storage(storage: Storage) -> None:
    """Make sure that every node of the connected cluster works in the same storage.

    A node with a folder of its own there would lose its results without a word.

    Raises:
        SpecError: one that does not.
    """
    with _shared_folder(storage) as folder:
        answers, _ = _ask_nodes(meet, storage, folder)
        apart = {
            node[:6]: error or UNSEEN
            for node, error in answers.items()
            if error or not storage.exists(f"{folder}/{node}")
        }
    problems = [one for one in judge_sharing(len(answers), apart, storage.url) if one.remedy]
    if problems:
        raise SpecError("\n".join(f"{one.what}. {one.remedy}" for one in problems))


@contextlib.contextmanager
def _shared_folder(storage: Storage) -> Iterator[str]:
    """A folder with the file `asked`; gone afterwards."""
    folder = f"_tmp-doctor-{uuid.uuid4().hex}"
    storage.put(f"{folder}/asked", folder.encode())
    try:
        yield folder
    finally:
        storage.remove_folder(folder)


def _ask_nodes(
    look: Callable[..., Any], storage: Storage, folder: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Call `look` on every node that is alive.

    Returns:
        What it returned, by the node's id; and why other nodes did not answer, by their name.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            told = {name: node[name] for name in ("NodeID", "Resources")}
            pinned = task.options(scheduling_strategy=here)
            asked[pinned.remote(told, storage.url, folder, time.time())] = node
    answered, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_LIMIT_S)
    answers, silent = {}, {_name(asked[one]): f"no answer in {NODE_LIMIT_S:g} s" for one in late}
    for one in answered:
        try:
            answers[asked[one]["NodeID"]] = ray.get(one)
        except Exception as error:  # whatever a node without our packages raises
            silent[_name(asked[one])] = _last_line(error)
    return answers, silent


def _name(node: dict[str, Any]) -> str:
    return f"{node.get('NodeManagerHostname') or node['NodeID'][:6]} ({node['NodeID'][:6]})"


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def _look_at_placement_groups() -> list[Finding]:
    from ray.util.state import list_jobs, list_placement_groups

    try:
        over = {
            job.job_id for job in list_jobs(limit=10_000) if job.status in ("SUCCEEDED", "FAILED")
        }
        groups = [
            PlacementGroup(
                group.placement_group_id, group.state, group.creator_job_id.lower() in over
            )
            for group in list_placement_groups(limit=10_000)
        ]
    except Exception as error:  # the state API raises whatever its transport met
        return [
            Finding(
                "placement groups",
                "problem",
                f"the dashboard does not say what is reserved: {_last_line(error)}",
                "Install ray[default] and start the cluster with its dashboard: without it the "
                "resources of dead runs stay reserved",
            )
        ]
    return judge_placement_groups(groups)


def look_here(storage: Storage) -> list[Finding]:
    """This machine alone, as a cluster of one."""
    facts = gather_facts(socket.gethostname(), gpus_ray=None, asked_at=time.time())
    return [
        *judge_versions([facts]),
        judge_socket_path(facts.temp_dir),
        *judge_machine(facts),
        *look_at_storage(storage),
    ]


def look_at_storage(storage: Storage) -> list[Finding]:
    """Whether this machine can write there, and a file is created by one writer only."""
    where = f"{socket.gethostname()}: {storage.url}"
    try:
        is_exclusive = storage.probe_put_if_absent()
    except StorageError as error:
        remedy = "Name a place that this machine can write to (--storage)"
        return [Finding("storage", "problem", error.message, remedy)]
    if not is_exclusive:
        what = f"{where}: two writers can create one file, so results could be there twice"
        remedy = "Use a local or network disk, S3 or GCS"
        return [Finding("storage", "problem", what, remedy)]
    findings = [Finding("storage", "ok", f"{where}: writable, a file has one creator")]
    if storage.is_local:
        disk = shutil.disk_usage(storage.root)
        findings.append(judge_disk(where, disk.free / GIB, disk.used / disk.total))
    return findings


def look_at_access(address: str, *, is_loopback: bool) -> Finding:
    """Whether somebody without a token may run code on the cluster, through its dashboard."""
    try:
        with urllib.request.urlopen(f"{address}/api/jobs/", timeout=10) as answer:
            status = int(answer.status)
    except urllib.error.HTTPError as error:
        status = error.code
    except (OSError, ValueError) as error:
        return Finding(
            "token", "warning", f"{address} could not be asked without a token: {error}",
            "Look whether a proxy stands in between",
        )  # fmt: skip
    return judge_access(address, status, is_loopback=is_loopback)


def examine(address: str, storage: Storage) -> list[Finding]:
    """Look at the cluster at a Ray address (`auto`, `host:6379`), from one of its machines.

    Raises:
        SpecError: no cluster there.
    """
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SpecError(f"--address: {address}: no Ray cluster: {_last_line(error)}") from error
    try:
        return [*look_at_storage(storage), *look_at_cluster(storage)]
    finally:
        ray.shutdown()


def examine_remotely(
    cluster: RayJobs, storage: Storage, *, working_dir: Path | None
) -> list[Finding]:
    """Look at a cluster from outside: a small Ray job there calls `examine` and reports here.

    The report comes through the storage, which is to be shared anyway.
    """
    submission = f"doctor-{uuid.uuid4().hex[:8]}"
    report = f"doctor/{submission}.json"
    command = ["python", "-m", "orchestrator.cli", "doctor", "--address", "auto"]
    command += ["--storage", storage.url, "--report", report]
    cluster.submit(submission, shlex.join(command), metadata={}, working_dir=working_dir)
    findings = [look_at_access(cluster.address, is_loopback=is_loopback(cluster.address))]
    try:
        state = cluster.wait(submission, JOB_LIMIT_S)
        findings += [Finding(**finding) for finding in storage.read_json(report)]
        storage.delete(report)
    except StarvedError as error:
        cluster.stop(submission)
        findings.append(Finding("nodes", "problem", error.message, "Is the cluster too busy?"))
    except FileNotFoundError:
        findings.append(
            Finding(
                "shared storage",
                "problem",
                f"the doctor on the cluster left no report in {storage.url}, and ended as "
                f"{state.status}: {state.message}",
                "Use a storage that the cluster sees under the same name (s3://, gs://, a network "
                "disk), and install prunefleet on its head",
            )
        )
    return findings


def write_report(findings: Sequence[Finding], storage: Storage, path: str) -> None:
    """Where `examine_remotely` reads it."""
    storage.put(path, json.dumps([asdict(finding) for finding in findings]).encode())
