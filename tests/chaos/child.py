"""A command in a process of its own that a test may kill, without 10 s of imports each.

A fork server imports everything once; each command is a fork of it. What goes wrong inside is
asked for by name, see `Trouble`.
"""

import contextlib
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama
import transformers.models.llava.modeling_llava

import jobs.storage
import workers.data
import workers.repair
import workers.run
from jobs.spec import DatasetSpec
from orchestrator import cli, leaderboard, settle

PRELOADED = (deepspeed, torch, transformers, workers.repair, workers.run, leaderboard)
workers.data._easy_vqa = cache(workers.data._easy_vqa)  # forks share what they only read
for split in ("train", "test"):
    workers.data.load_dataset(DatasetSpec(format="easy-vqa"), split)


@dataclass(frozen=True)
class Trouble:
    """What is to go wrong inside of a command."""

    crash_at: str = ""
    """A crash point, see `jobs.crash`."""
    failing_writes: float = 0.0
    """Share of writes to the storage that raise ENOSPC, before or after they took effect."""
    clock_jumps: bool = False
    """Wall clock that leaps by hours, back and forth. The monotonic one is left alone: it is."""
    seed: int = 0


def start(*arguments: object, trouble: Trouble = Trouble(), log: Path) -> Any:
    """Start `prunefleet ARGUMENTS`; gives a `multiprocessing.Process`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.chaos.child"])
    process = context.Process(target=_command, args=([*map(str, arguments)], trouble, str(log)))
    process.start()
    return process


def run(*arguments: object, trouble: Trouble = Trouble(), log: Path) -> int:
    """Run `prunefleet ARGUMENTS` to its end. Returns the exit code, negative for a signal."""
    process = start(*arguments, trouble=trouble, log=log)
    process.join()
    return int(process.exitcode)


def _command(arguments: list[str], trouble: Trouble, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    cli.console.file, cli.errors.file = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    settle.jittered = lambda pause_s: pause_s / 50  # as many retries, in less time
    os.environ["PRUNEFLEET_CRASH_AT"] = trouble.crash_at
    dice = random.Random(trouble.seed)
    if trouble.clock_jumps:
        _let_the_clock_jump(dice)
    if trouble.failing_writes:
        _let_writes_fail(dice, trouble.failing_writes)
    sys.argv = ["prunefleet", *arguments]
    with contextlib.suppress(KeyboardInterrupt):
        cli.main()


def _let_the_clock_jump(dice: random.Random) -> None:
    real = time.time
    time.time = lambda: real() + dice.choice([0, 0, -86_400, -3600, 3600, 86_400])


def _let_writes_fail(dice: random.Random, share: float) -> None:
    """Of every way that a file gets into the storage, some calls fail: half of them too late."""

    def failing(act: Callable[..., Any]) -> Callable[..., Any]:
        def maybe(*args: Any, **kwargs: Any) -> Any:
            if dice.random() >= share:
                return act(*args, **kwargs)
            os.write(1, b"injected\n")
            if dice.random() < 0.5:
                act(*args, **kwargs)
            raise OSError(28, "No space left on device (injected)")

        return maybe

    for name in ("_write_durably", "_rename_exclusively", "_sync"):
        setattr(jobs.storage, name, failing(getattr(jobs.storage, name)))
