"""Writers and a compactor that are killed all the time: does the leaderboard lose or double a row?

    python -m tests.chaos.writers [WRITERS] [RESULTS EACH] [SECONDS BETWEEN KILLS]

Every process is ended by kill -9 at random moments and started again, until each writer has seen
its last result published. One result in eight is also published by a neighbour, with another
score. After every kill: whatever a writer was told is published must be there. At the end: each
job once, with the score of the one writer that was told it had won. Prints what it did.
"""

import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import pandas as pd

from jobs.result import JobResult, Score
from jobs.storage import Storage
from orchestrator import leaderboard

SHARED_EVERY = 8


def job_key(number: int) -> str:
    return f"{number * 2654435761 % 2**64:016x}"


def work_of(writer: int, num_writers: int, each: int) -> list[int]:
    """The numbers of the jobs that a writer publishes: its own and some of its neighbour's."""
    own = range(writer * each, writer * each + each)
    after = (writer + 1) % num_writers * each
    return sorted([*own, *range(after, after + each, SHARED_EVERY)], key=lambda n: n % each)


def write(url: str, writer: int, numbers: list[int], notes: Path) -> None:
    """Publish all that is not there yet, and note after each which job, and whether we won."""
    storage = Storage(url)
    there = leaderboard.published_keys(storage, "complete")
    with notes.open("a", buffering=1) as told:
        for number in numbers:
            if job_key(number) in there:
                continue
            score = Score("pruned", "easy-vqa", "exact_match", writer / 100, None, None, 100)
            result = JobResult(job_key(number), "complete", (score,))
            won = leaderboard.publish(storage, {"sweep": "chaos", "seed": number}, result)
            told.write(f"{number} {int(won)}\n")


def compact(url: str) -> None:
    while True:
        leaderboard.compact(Storage(url))
        time.sleep(0.05)


def told(notes: Path) -> list[tuple[int, bool]]:
    """What was noted, without a last line that a kill cut short."""
    whole = [line.split() for line in notes.read_text().splitlines(keepends=True) if "\n" in line]
    return [(int(number), won == "1") for number, won in whole]


class Fleet:
    """The processes, forked from here: nothing is imported again."""

    def __init__(self, folder: Path, num_writers: int, each: int) -> None:
        self.url = str(folder / "storage")
        self.notes = [folder / f"notes-{writer}" for writer in range(num_writers)]
        for file in self.notes:
            file.touch()
        self.starts: dict[int, Callable[[], None]] = {
            writer: lambda writer=writer: write(  # type: ignore[misc]
                self.url, writer, work_of(writer, num_writers, each), self.notes[writer]
            )
            for writer in range(num_writers)
        }
        self.compactor = num_writers
        self.starts[self.compactor] = lambda: compact(self.url)
        self.running = {which: self._start(which) for which in self.starts}

    def _start(self, which: int):  # type: ignore[no-untyped-def]
        process = get_context("fork").Process(target=self.starts[which])
        process.start()
        return process

    def busy(self) -> list[int]:
        return [
            writer
            for writer, process in self.running.items()
            if writer != self.compactor and process.exitcode != 0
        ]

    def kill(self, which: int) -> bool:
        """And start again. False: it was over already."""
        process = self.running[which]
        os.kill(process.pid, signal.SIGKILL) if process.exitcode is None else None
        process.join()
        if process.exitcode == 0:
            return False
        assert process.exitcode == -signal.SIGKILL, f"{which} ended with {process.exitcode}"
        self.running[which] = self._start(which)
        return True

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.join()


def run(num_writers: int, each: int, kill_every_s: float) -> None:
    random.seed(0)
    started, kills = time.time(), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(Path(folder), num_writers, each)
        try:
            while busy := fleet.busy():
                time.sleep(random.uniform(0, 2 * kill_every_s))
                is_writer = random.random() < 0.8
                victim = random.choice(busy) if is_writer else fleet.compactor
                kills["writers" if is_writer else "compactor"] += fleet.kill(victim)
                check_nothing_lost(fleet)
        finally:
            fleet.end()
        check_rows(fleet, num_writers * each)
        left = [file for file in Path(fleet.url).rglob("_tmp*")]
    print(
        f"{num_writers} writers, {num_writers * each} results, {kills['writers']} kills of a "
        f"writer, {kills['compactor']} of the compactor, {len(left)} files left in the making, "
        f"{time.time() - started:.0f} s: nothing lost, nothing doubled"
    )


def check_nothing_lost(fleet: Fleet) -> None:
    # What was told first: a result that comes in between is no loss.
    published = {job_key(number) for file in fleet.notes for number, _ in told(file)}
    lost = published - leaderboard.published_keys(Storage(fleet.url), "complete").keys()
    assert not lost, f"told that they are published, and not there: {sorted(lost)}"


def check_rows(fleet: Fleet, num_jobs: int) -> None:
    storage = Storage(fleet.url)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a file that cannot be read
        before = leaderboard.load(storage)
        leaderboard.compact(storage)
        frame = leaderboard.load(storage)
    pd.testing.assert_frame_equal(before, frame)
    plain = pd.read_parquet(f"{fleet.url}/{leaderboard.ROWS}")
    assert sorted(plain["seed"]) == sorted(frame["seed"]) == list(range(num_jobs))
    scores = dict(zip(frame["seed"], frame["score"], strict=True))
    winners = [
        (number, writer)
        for writer, file in enumerate(fleet.notes)
        for number, won in told(file)
        if won
    ]
    assert len(winners) == len({number for number, _ in winners}), "two won the same job"
    for number, writer in winners:
        assert scores[number] == writer / 100, f"job {number}: another score than its winner's"


if __name__ == "__main__":
    given = sys.argv[1:]
    run(
        int(given[0]) if given else 8,
        int(given[1]) if len(given) > 1 else 500,
        float(given[2]) if len(given) > 2 else 0.25,
    )
