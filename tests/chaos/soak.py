"""Faults by the hundred, and the question after each round whether anything was lost or doubled.

    python -m tests.chaos.soak --faults 200          inline runs, a few seconds each
    python -m tests.chaos.soak --ray                 a real cluster: minutes, and real kills

A round takes an empty storage and runs a sweep on it again and again, each time with a fault.
Then it runs it once more in peace, and compares: one result per job, equal to the last bit to an
undisturbed run's, no finished stage computed twice on the way, no process left.
"""

import argparse
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.child import Trouble, run, start
from tests.chaos.world import World

FAULTS_PER_ROUND = 8
CRASH_POINTS = [
    "after temporary write",
    "before publish",
    "after publish",
    "after building evaluate",
    "after publishing evaluate",
    "after building prune",
    "after publishing prune",
    "prune-vision-0",
    "prune-vision-1",
    "prune-language-0",
    "after checkpoint",
    "after building repair",
    "after publishing teacher",
    "between failure and result",
]


class Round:
    """One storage, its faults, and what was found wrong."""

    def __init__(self, world: World, name: str, dice: random.Random) -> None:
        self.world = world
        self.name = name
        self.dice = dice
        self.injected: Counter[str] = Counter()
        self.problems: list[str] = []
        self._finished: dict[str, int] = {}

    def play(self, num_faults: int) -> None:
        """Inject so many faults, each followed by a look at what was finished, then check."""
        kinds = [
            self.kill_any_moment,
            self.kill_at_crash_point,
            self.failing_storage,
            self.damaged_files,
            self.commands_at_once,
            self.clock_jumps,
            self.kill_while_compacting,
        ]
        weights = [5, 5, 2, 3, 1, 1, 1]
        while self.injected.total() < num_faults:
            kind = self.dice.choices(kinds, weights)[0]
            was_injected = kind()
            self.look_for_recomputed_stages(kind.__name__)
            self.injected[kind.__name__.replace("_", " ")] += was_injected
        self.finish()

    def finish(self) -> None:
        """Run in peace, and compare."""
        code = self.world.run(self.name)
        if code != 0:
            self.problems.append(f"the run in peace ended with {code}")
        self.look_for_recomputed_stages("the run in peace")
        self.problems += self.world.differences(self.name)
        if multiprocessing.active_children():
            self.problems.append(f"still there: {multiprocessing.active_children()}")

    def kill_any_moment(self) -> bool:
        process = start(*self.world.command(self.name), log=self.world.log)
        process.join(self.dice.uniform(0.05, 0.9) * self.world.seconds)
        process.kill()
        process.join()
        return process.exitcode == -9

    def kill_at_crash_point(self) -> bool:
        point = self.dice.choice(CRASH_POINTS)
        trouble = Trouble(crash_at=f"{point}#{self.dice.randint(1, 3)}")
        return self.world.run(self.name, trouble) == 86

    def failing_storage(self) -> bool:
        trouble = Trouble(failing_writes=self.dice.uniform(0.02, 0.1), seed=self.dice.randrange(99))
        before = self.world.log.read_text().count("injected")
        self.world.run(self.name, trouble)
        return self.world.log.read_text().count("injected") > before

    def damaged_files(self) -> bool:
        """Anywhere in the storage, and the rows of a job deleted, so that its stages are needed."""
        did = [self.world.damage(self.name, self.dice) for _ in range(self.dice.randint(1, 3))]
        for row in (self.world.folder / self.name / "leaderboard/rows").rglob("*.parquet"):
            if self.dice.random() < 0.5:
                row.unlink()
        sound = self.world.finished_stages(self.name)
        self._finished = {path: self._finished[path] for path in self._finished if path in sound}
        return any("nothing" not in one for one in did)

    def commands_at_once(self) -> bool:
        """Three of them, and one is killed."""
        command = self.world.command(self.name)
        running = [start(*command, log=self.world.log) for _ in range(3)]
        running[0].join(self.dice.uniform(0.05, 0.9) * self.world.seconds)
        running[0].kill()
        for process in running:
            process.join()
        return True

    def clock_jumps(self) -> bool:
        trouble = Trouble(clock_jumps=True, seed=self.dice.randrange(99))
        self.world.run(self.name, trouble)
        return True

    def kill_while_compacting(self) -> bool:
        point = self.dice.choice(["before manifest", "after temporary write", "after publish"])
        compact = ["leaderboard", "--compact", "--storage", self.world.folder / self.name]
        return run(*compact, trouble=Trouble(crash_at=point), log=self.world.log) == 86

    def look_for_recomputed_stages(self, when: str) -> None:
        now = self.world.finished_stages(self.name)
        for path, inode in self._finished.items():
            if now.get(path) != inode:
                self.problems.append(f"{path} was finished, and was computed again in {when}")
        self._finished = now


def soak(folder: Path, num_faults: int, seed: int) -> tuple[Counter[str], Counter[str]]:
    """Injected and survived faults by kind. Prints what was found wrong, with the round's seed."""
    worlds = [World.make(folder / "pruned"), World.make(folder / "repaired", repairs=True)]
    injected: Counter[str] = Counter()
    survived: Counter[str] = Counter()
    number = 0
    while injected.total() < num_faults:
        number += 1
        world = worlds[number % 3 == 0]
        one = Round(world, f"round-{number}", random.Random(f"{seed}/{number}"))
        one.play(min(FAULTS_PER_ROUND, num_faults - injected.total()))
        injected += one.injected
        survived += Counter() if one.problems else one.injected
        for problem in one.problems:
            print(f"round {number} (seed {seed}): {problem}", flush=True)
        if not one.problems:
            shutil.rmtree(world.folder / one.name)
        print(f"{injected.total()} faults, {survived.total()} survived", flush=True)
    return injected, survived


def tell(injected: Counter[str], survived: Counter[str], seconds: float) -> None:
    """A table for BENCHMARKS.md."""
    print("\n| fault | injected | survived |\n|---|---|---|")
    for kind, count in sorted(injected.items()):
        print(f"| {kind} | {count} | {survived[kind]} |")
    print(f"| all, in {seconds / 60:.0f} min | {injected.total()} | {survived.total()} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ray", action="store_true", help="ten kills on a real cluster instead")
    chosen = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        if chosen.ray:
            from tests.chaos.cluster import soak_ray

            injected, survived = soak_ray(Path(folder))
        else:
            injected, survived = soak(Path(folder), chosen.faults, chosen.seed)
    tell(injected, survived, time.monotonic() - started)
    sys.exit(injected != survived)


if __name__ == "__main__":
    main()
