"""Which job may start when: the queue as a table, without Ray."""

from pathlib import Path

import pytest

from jobs.errors import SpecError
from jobs.spec import JobSpec, Resources
from jobs.storage import Storage
from orchestrator.admission import MAX_OVERTAKEN, Node, Queue, check_feasible
from orchestrator.fleet import Fleet
from tests.test_settle import DENSE

GIB = 2**30
SMALL = Node("small", {"CPU": 4, "memory": 8 * GIB})
LARGE = Node("large", {"CPU": 8, "GPU": 2, "memory": 64 * GIB})


def job(seed: int = 0, workers: int = 1, cpus: int = 1, gpus: float = 0, gib: int = 0) -> JobSpec:
    """A job of a shape; the seed tells jobs of one shape apart."""
    resources = Resources(
        num_workers=workers,
        cpus_per_worker=cpus,
        gpus_per_worker=gpus,
        memory_gib_per_worker=gib or None,
    )
    model = DENSE.model.model_copy(update={"fingerprint": f"{seed}-{workers}-{cpus}-{gpus}"})
    return DENSE.model_copy(update={"model": model, "resources": resources})


def started(queue: Queue, *nodes: Node) -> list[JobSpec]:
    """Everything that may start before anything ends."""
    found = []
    while (one := queue.next(nodes)) is not None:
        found.append(one)
    return found


FITS = [
    # workers, CPUs, GPUs, GiB of memory  and whether the two nodes hold it
    ((1, 8, 0, 0), True),
    ((1, 9, 0, 0), False),  # 12 CPUs in all, and no node with 9
    ((2, 5, 0, 0), False),  # 10 of 12 CPUs, and only one worker fits a node
    ((3, 4, 0, 0), True),  # workers of one job may lie on different nodes
    ((2, 1, 1, 0), True),
    ((4, 1, 0.5, 0), True),  # halves of two GPUs
    ((5, 1, 0.5, 0), False),
    ((3, 1, 1, 0), False),
    ((1, 1, 0, 65), False),
    ((9, 1, 0, 8), True),  # one on the small node, eight on the large: memory decides
    ((10, 1, 0, 8), False),
]


@pytest.mark.parametrize(("shape", "fits"), FITS, ids=str)
def test_what_no_cluster_of_these_nodes_can_hold_is_refused(
    shape: tuple[int, int, float, int], fits: bool
) -> None:
    """By what each worker finds on a node, not by totals that nobody can use."""
    workers, cpus, gpus, gib = shape
    asked = job(0, workers, cpus, gpus, gib)

    if fits:
        check_feasible([asked], [SMALL, LARGE])
    else:
        with pytest.raises(SpecError, match="workers of"):
            check_feasible([asked], [SMALL, LARGE])


def test_a_refusal_names_the_job_and_the_largest_node() -> None:
    asked = job(workers=2, cpus=5)

    with pytest.raises(SpecError) as refusal:
        check_feasible([job(), asked], [SMALL, LARGE])

    assert refusal.value.message == (
        f"resources: job {asked.key} needs 2 workers of 5 CPUs each. The nodes together hold 1; "
        "the largest of 2 has 8 CPUs, 2 GPUs, 64.0 GiB of memory"
    )


def test_as_many_run_as_fit_and_the_next_starts_when_one_ends() -> None:
    """No constant anywhere: four one-CPU jobs on four CPUs."""
    jobs = [job(seed) for seed in range(6)]
    queue = Queue(jobs)

    assert started(queue, SMALL) == jobs[:4]
    queue.ended(jobs[2], failed=False)
    assert started(queue, SMALL) == [jobs[4]]
    assert queue.waiting == [jobs[5]]


def test_small_jobs_fill_the_gap_that_a_large_one_cannot_use() -> None:
    """Grouped by shape, three CPUs would stand idle until the large job had run alone."""
    first, large, *small = job(0), job(1, workers=4), job(2), job(3)
    queue = Queue([first, large, *small])

    assert started(queue, SMALL) == [first, *small]


def test_a_large_job_is_not_overtaken_for_ever() -> None:
    """Small ones that keep coming would starve it: after a while its room is kept free."""
    large, small = job(0, workers=4), [job(seed) for seed in range(1, 40)]
    queue = Queue([job(99), large, *small])
    running = started(queue, SMALL)
    order = list(running)

    while running:
        queue.ended(running.pop(0), failed=False)
        new = started(queue, SMALL)
        running += new
        order += new

    assert order.index(large) == MAX_OVERTAKEN + 1
    assert len(order) == 41


def test_two_jobs_that_each_hold_half_cannot_come_about() -> None:
    """Workers are taken all at once: on 4 CPUs, two jobs of 3 workers run one after the other."""
    one, two = job(0, workers=3), job(1, workers=3)
    queue = Queue([one, two])

    assert started(queue, SMALL) == [one]
    queue.ended(one, failed=False)
    assert started(queue, SMALL) == [two]


def test_nothing_starts_on_what_somebody_else_holds() -> None:
    """It would wait inside Ray Train and be taken for starved."""
    queue = Queue([job(cpus=2)])
    busy = Node("small", {"CPU": 1, "memory": 8 * GIB})

    assert queue.next([SMALL], [busy]) is None
    assert queue.next([SMALL], [SMALL]) is not None


def test_a_node_that_is_gone_is_counted_with_no_more() -> None:
    jobs = [job(seed, cpus=4) for seed in range(4)]
    queue = Queue(jobs)

    assert started(queue, SMALL, LARGE) == jobs[:3]
    queue.ended(jobs[0], failed=False)
    assert started(queue, LARGE) == []
    queue.ended(jobs[1], failed=False)
    assert started(queue, LARGE) == [jobs[3]]


def test_a_sweep_takes_no_more_than_its_share_yet_always_one_job() -> None:
    """Half of 4 CPUs is two jobs of one; a job of three runs all the same, alone."""
    small, large = [job(seed) for seed in range(3)], job(9, cpus=3)

    half = Queue(small, max_share=0.5)
    tight = Queue([large, small[0]], max_share=0.5)

    assert started(half, SMALL) == small[:2]
    assert started(tight, SMALL) == [large]


def test_after_enough_failures_nothing_more_starts() -> None:
    jobs = [job(seed) for seed in range(6)]
    queue = Queue(jobs, stop_after=2)
    running = started(queue, SMALL)

    queue.ended(running[0], failed=True)
    assert started(queue, SMALL) == [jobs[4]]
    queue.ended(running[1], failed=True)

    assert started(queue, SMALL) == []
    assert queue.is_over
    assert queue.waiting == [jobs[5]]


class Clock:
    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_a_run_gives_way_to_a_higher_priority_that_has_jobs_waiting(tmp_path: Path) -> None:
    """Not to its own kind, not to one that has all its jobs running, not to one on another
    cluster, and not to one that died: of that, the beat stays what it was."""
    storage, clock = Storage(str(tmp_path)), Clock()
    low, same = (Fleet(storage, "a", 0, now=clock) for _ in range(2))
    high, elsewhere = (Fleet(storage, name, 5, now=clock) for name in ("a", "b"))

    def asked(one: Fleet, waiting: int = 3) -> bool:
        clock.time += 6
        return one.gives_way(waiting)

    elsewhere.gives_way(9)
    assert not asked(same)
    assert not asked(low)
    assert not asked(high)
    assert asked(low)
    high.leave()
    assert not asked(low)
    assert not asked(high, waiting=0)
    assert not asked(low)
    assert not asked(high)
    assert [asked(low) for _ in range(6)] == [True, True, True, True, True, False]
