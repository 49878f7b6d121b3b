"""What is tried again: the decisions as a table, and what raises which kind."""

import errno

import pytest
import torch
from safetensors import SafetensorError

from jobs import errors
from jobs.errors import PrunefleetError, known
from orchestrator.retry import BUDGETS, MAX_PAUSE_S, jittered, next_attempt

DECISIONS = [
    # what the attempts so far ended in      number, rung, pause of the next; None: no more
    (["spec"], None),
    (["data"], None),
    (["model"], None),
    (["numeric"], None),
    (["unknown"], None),
    (["memory"], (2, 1, 1)),
    (["memory"] * 5, (6, 5, 16)),
    (["memory"] * 6, None),
    (["lost", "lost"], (3, 0, 2)),
    (["lost"] * 6, None),
    (["stalled"], (2, 0, 0)),
    (["stalled", "stalled"], None),
    (["storage"] * 6, (7, 0, 32)),
    (["preempted"] * 20, (21, 0, MAX_PAUSE_S)),
    (["starved"] * 3, None),
    # budgets are apart: being preempted uses up nobody's patience but its own
    (["preempted"] * 10 + ["lost"], (12, 0, 1)),
    (["lost"] * 5 + ["preempted"] * 3, (9, 0, 20)),
    (["stalled", "lost", "stalled"], None),
    # a rung once climbed is kept, whatever happens next
    (["memory", "preempted", "memory", "storage"], (5, 2, 1)),
    (["memory", "numeric"], None),
]


@pytest.mark.parametrize(("failures", "expected"), DECISIONS, ids=str)
def test_what_is_tried_again(failures: list[str], expected: tuple[int, int, float] | None) -> None:
    again = next_attempt(failures)

    found = again and (again.number, again.memory_rung, again.pause_s)
    assert found == expected


def test_every_kind_of_error_has_a_finite_budget() -> None:
    """A kind that the table does not know would be a crash in the middle of a failure."""
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    kinds = {c.kind for c in classes if issubclass(c, PrunefleetError)}

    assert kinds == set(BUDGETS)
    assert sum(budget.retries for budget in BUDGETS.values()) < 100


def test_jobs_that_fail_together_do_not_return_together() -> None:
    pauses = {jittered(8.0) for _ in range(20)}

    assert len(pauses) > 1
    assert all(4 <= pause <= 8 for pause in pauses)


RAISED = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "memory"),
    (MemoryError(), "memory"),
    (OSError(errno.ENOSPC, "No space left on device"), "storage"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "storage"),
    (OSError(errno.ENOENT, "No such file or directory"), None),
    (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), None),
]


@pytest.mark.parametrize(("raised", "kind"), RAISED, ids=lambda value: str(value)[:30])
def test_a_lack_of_memory_or_disk_is_recognised(raised: Exception, kind: str | None) -> None:
    """Libraries share no class for it. What is not recognised stays a mistake, never retried."""
    explained = known(raised)

    assert (explained and explained.kind) == kind


def test_the_cpu_allocator_that_gives_up_is_recognised() -> None:
    """Really asked for, so that a new wording of torch's does not pass unnoticed."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**62, dtype=torch.uint8)

    explained = known(raised.value)
    assert explained is not None
    assert explained.kind == "memory"
