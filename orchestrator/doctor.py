"""What is wrong with this machine, or with a cluster, before anything costly runs on it.

Facts are gathered (on this machine, or by a task of zero CPUs pinned to each node), then judged by
functions of facts alone. Every finding that is not ok says what to do.
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
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jobs.errors import PrunefleetError, SpecError, StarvedError, StorageError
from jobs.storage import Storage
from orchestrator.submit import RayJobs, is_loopback

Level = Literal["ok", "warning", "problem"]

NODE_LIMIT_S = 180.0
"""How long a node may take to start a process, import our packages and look around."""

JOB_LIMIT_S = 300.0
"""How long the doctor's own job on a cluster may take."""

GIB = 2**30
MAX_SOCKET_PATH = 107
SESSION_PATH = 62
"""Letters that Ray appends to `<temporary folder>/ray` for the longest of its sockets."""

MIN_SHM_GIB = 1.0
MIN_DISK_GIB = 10.0
MAX_DISK_USED = 0.95
"""Beyond this Ray creates no object that does not fit into memory."""

MIN_OPEN_FILES = 4096
MAX_CLOCK_SKEW_S = 60.0
UNSEEN = "what it writes there is not seen by others"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    level: Level
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Facts:
    """What one machine says of itself."""

    node: str
    """Its host name, with the first digits of its Ray id on a cluster."""
    versions: dict[str, str | None]
    """Of Python, of packages, of our commit. None: not installed, not known."""
    temp_dir: str
    shm_gib: float | None
    """None: no /dev/shm."""
    open_files: int
    disk_free_gib: float
    disk_used: float
    """Fraction, of the disk of `temp_dir`."""
    gpu_devices: int
    """/dev/nvidia<N>."""
    gpus_torch: int | None
    """None: not asked, as there is no sign of a GPU."""
    gpus_ray: float | None
    """None: no Ray runs there."""
    clock: float
    """Unix time there, minus ours."""
    storage_error: str | None = None


@dataclass(frozen=True)
class PlacementGroup:
    """Resources that a Ray job has reserved, or waits for."""

    id: str
    state: str
    job_is_over: bool
    """The Ray job that made it has ended, so that nobody will give them back."""


# ---- looking ----


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
    try:
        is_exclusive = storage.probe_put_if_absent()
    except StorageError as error:
        return [
            Finding(
                "storage",
                "problem",
                error.message,
                "Name a place that this machine can write to (--storage)",
            )
        ]
    if not is_exclusive:
        return [
            Finding(
                "storage",
                "problem",
                f"{storage.url}: two writers can create one file, so results could be there twice",
                "Use a local or network disk, S3 or GCS",
            )
        ]
    findings = [Finding("storage", "ok", f"{storage.url}: writable, a file has one creator")]
    if storage.is_local:
        disk = shutil.disk_usage(storage.root)
        findings.append(judge_disk(storage.url, disk.free / GIB, disk.used / disk.total))
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


# ---- judging ----


def judge_access(address: str, status: int, *, is_loopback: bool) -> Finding:
    """Args: status: what the dashboard answers to a request without a token."""
    if status in (401, 403):
        return Finding("token", "ok", f"{address} lets nobody in without a token")
    return Finding(
        "token",
        "warning" if is_loopback else "problem",
        f"{address} asks for no token: whoever reaches it can run any code on the cluster",
        "Start every node with RAY_AUTH_MODE=token and one token (`ray get-auth-token --generate`)",
    )


def judge_answers(num_nodes: int, silent: dict[str, str]) -> list[Finding]:
    findings = [
        Finding(
            "nodes",
            "problem",
            f"{node}: {why}",
            "Is prunefleet installed there, the same as here? Look at the node's logs in the "
            "dashboard",
        )
        for node, why in silent.items()
    ]
    if not silent:
        findings.append(Finding("nodes", "ok", f"{num_nodes} alive, all answer"))
    return findings


def judge_versions(machines: Sequence[Facts]) -> list[Finding]:
    """One version of everything on all machines, and nothing missing that a job needs."""
    findings = []
    for name in machines[0].versions if machines else ():
        by_version: dict[str | None, list[str]] = defaultdict(list)
        for machine in machines:
            by_version[machine.versions.get(name)].append(machine.node)
        if len(by_version) > 1:
            parts = "; ".join(f"{v or 'none'} on {', '.join(n)}" for v, n in by_version.items())
            findings.append(
                Finding(
                    "versions",
                    "problem",
                    f"{name} differs: {parts}",
                    "Use one image for every node, or install with the same constraints.txt",
                )
            )
        elif None in by_version and name not in ("git_commit", "image_digest"):
            findings.append(
                Finding(
                    "versions",
                    "problem",
                    f"{name} is not installed",
                    "pip install -c constraints.txt -e . in a clone of prunefleet",
                )
            )
    if machines and not findings:
        shown = [f"{n} {v}" for n, v in machines[0].versions.items() if v and n != "image_digest"]
        findings.append(Finding("versions", "ok", ", ".join(shown)))
    return findings


def judge_socket_path(temp_dir: str) -> Finding:
    """Ray's sockets lie below the temporary folder, and a socket's path is short."""
    length = len(os.path.join(temp_dir, "ray")) + SESSION_PATH
    if length <= MAX_SOCKET_PATH:
        return Finding("socket path", "ok", f"{temp_dir}: {length} of {MAX_SOCKET_PATH} letters")
    return Finding(
        "socket path",
        "problem",
        f"{temp_dir} is too long: Ray's sockets would have {length} letters, and a socket's path "
        f"has at most {MAX_SOCKET_PATH}",
        "export RAY_TMPDIR=/tmp",
    )


def judge_machine(facts: Facts) -> list[Finding]:
    """Shared memory, open files, disk and GPUs of one machine."""
    return [
        _judge_shm(facts),
        _judge_open_files(facts),
        judge_disk(f"{facts.node}: {facts.temp_dir}", facts.disk_free_gib, facts.disk_used),
        *_judge_gpus(facts),
    ]


def _judge_shm(facts: Facts) -> Finding:
    if facts.shm_gib is None:
        return Finding(
            "shared memory", "warning", f"{facts.node}: no /dev/shm; Ray uses the slower disk",
            "Mount one (in a container: --shm-size=2g)",
        )  # fmt: skip
    if facts.shm_gib < MIN_SHM_GIB:
        return Finding(
            "shared memory",
            "warning",
            f"{facts.node}: /dev/shm has {facts.shm_gib:.2f} GiB; Ray and NCCL want more",
            "In a container: --shm-size=2g; in Kubernetes: an emptyDir of medium Memory there",
        )
    return Finding("shared memory", "ok", f"{facts.node}: {facts.shm_gib:.1f} GiB")


def _judge_open_files(facts: Facts) -> Finding:
    if facts.open_files < MIN_OPEN_FILES:
        return Finding(
            "open files",
            "problem" if facts.open_files < 1024 else "warning",
            f"{facts.node}: a process may open {facts.open_files} files, and Ray opens many",
            "ulimit -n 65536 before Ray starts",
        )
    return Finding("open files", "ok", f"{facts.node}: {facts.open_files}")


def judge_disk(where: str, free_gib: float, used: float) -> Finding:
    shown = f"{where}: {free_gib:.1f} GiB free, {used:.0%} used"
    if used > MAX_DISK_USED or free_gib < 1:
        return Finding(
            "disk", "problem", f"{shown}; beyond {MAX_DISK_USED:.0%} Ray stops",
            "Delete what is not needed (old /tmp/ray sessions), or set RAY_TMPDIR to another disk",
        )  # fmt: skip
    if free_gib < MIN_DISK_GIB:
        return Finding(
            "disk", "warning", f"{shown}; models and checkpoints need room",
            "Delete what is not needed, or use a larger disk",
        )  # fmt: skip
    return Finding("disk", "ok", shown)


def _judge_gpus(facts: Facts) -> list[Finding]:
    if facts.gpus_torch is None:
        return []
    expected = facts.gpus_ray if facts.gpus_ray is not None else facts.gpu_devices
    if facts.gpus_torch < expected:
        return [
            Finding(
                "GPUs",
                "problem",
                f"{facts.node}: torch sees {facts.gpus_torch} of {expected:g}",
                "Is it a CUDA build of torch, and the driver as new as its CUDA? nvidia-smi and "
                "python -c 'import torch; print(torch.version.cuda)' tell",
            )
        ]
    if facts.gpus_ray is not None and facts.gpus_torch > facts.gpus_ray:
        return [
            Finding(
                "GPUs",
                "warning",
                f"{facts.node}: torch sees {facts.gpus_torch}, Ray uses {facts.gpus_ray:g}",
                f"Start the node with --num-gpus={facts.gpus_torch}, if they are meant to be used",
            )
        ]
    return [Finding("GPUs", "ok", f"{facts.node}: {facts.gpus_torch}")]


def judge_clocks(machines: Sequence[Facts]) -> list[Finding]:
    """A clock that is behind only seems late to answer; beyond a minute it is the clock."""
    return [
        Finding(
            "clock",
            "warning",
            f"{machine.node}: its clock is {machine.clock:+.0f} s off",
            "Synchronise it (chrony, systemd-timesyncd): ages of jobs are told by clocks",
        )
        for machine in machines
        if not -MAX_CLOCK_SKEW_S <= machine.clock <= NODE_LIMIT_S
    ]


def judge_sharing(num_nodes: int, apart: Mapping[str, str], url: str) -> list[Finding]:
    """Args: apart: what is wrong with the storage, by node."""
    if not apart:
        return [Finding("shared storage", "ok", f"{url}: the same on {num_nodes} nodes")]
    remedy = "Mount the same disk under the same path on every node, or use s3:// or gs://"
    return [
        Finding("shared storage", "problem", f"node {node}: {url}: {why}", remedy)
        for node, why in apart.items()
    ]


def judge_placement_groups(groups: Sequence[PlacementGroup]) -> list[Finding]:
    held = [group for group in groups if group.state != "REMOVED"]
    orphans = [group.id for group in held if group.job_is_over]
    waiting = [group.id for group in held if group.state == "PENDING" and not group.job_is_over]
    findings = []
    if orphans:
        findings.append(
            Finding(
                "placement groups",
                "problem",
                f"{len(orphans)} hold resources for Ray jobs that have ended: {', '.join(orphans)}",
                "ray.util.remove_placement_group on the cluster, or restart it",
            )
        )
    if waiting:
        findings.append(
            Finding(
                "placement groups",
                "warning",
                f"{len(waiting)} wait for resources",
                "The cluster is busy, or too small for what was asked: see its dashboard",
            )
        )
    return findings or [Finding("placement groups", "ok", f"{len(held)} held, none orphaned")]


# ---- on a cluster ----


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
