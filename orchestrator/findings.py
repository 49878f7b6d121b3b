"""What is well and what is not, judged from facts about machines and clusters alone.

Every finding that is not ok says what to do. `doctor` gathers the facts.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]

MAX_SOCKET_PATH = 107
SESSION_PATH = 62
"""Letters that Ray appends to `<temporary folder>/ray` for the longest of its sockets."""

MIN_SHM_GIB = 1.0
MIN_DISK_GIB = 10.0
MAX_DISK_USED = 0.95
"""Beyond this Ray creates no object that does not fit into memory."""

MIN_OPEN_FILES = 4096
MAX_CLOCK_SKEW_S = 60.0
NODE_LIMIT_S = 180.0
"""How long a node may take to start a process, import our packages and look around."""


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
