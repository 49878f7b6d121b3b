"""A small sweep, what it gives undisturbed, and the question whether a storage holds just that."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from jobs.storage import DONE, Storage
from orchestrator import leaderboard
from tests.chaos.child import Trouble, run
from tests.families import make_tiny

SWEEP = """
name: chaos
model: {model}
calibration: {{dataset: easy-vqa, num_samples: 4}}
grid: {{method: [magnitude, sparsegpt], pattern: "2:4"}}
repair: {repair}
exclude: {exclude}
evaluate: {{dataset: easy-vqa, num_items: 4, max_new_tokens: 2}}
"""
REPAIR = "{method: sparse_lora, rank: 2, num_steps: 6, batch_size: 2, checkpoint_every: 2}"
RESULT = ["job_key", "weights", "benchmark", "metric", "status", "error", "score", "score_low"]
RESULT += ["score_high", "num_items", "sparsity_total", "sparsity_vision", "sparsity_language"]
RESULT += ["damping_max", "layer_error_mean"]
"""What must be equal to the last bit, whatever happened on the way."""


@dataclass
class World:
    """A sweep in a folder of its own, and the storage of an undisturbed run of it."""

    folder: Path
    seconds: float = 0.0
    """What the undisturbed run took, so that a fault can be timed to fall within one."""

    @classmethod
    def make(cls, folder: Path, *, repairs: bool = False) -> "World":
        """Write a sweep of three jobs, four with a repair, and run it once, undisturbed."""
        folder.mkdir(parents=True, exist_ok=True)
        model = make_tiny("llava-clip", folder / "tiny")
        repair = f"[none, {REPAIR}]" if repairs else "none"
        exclude = "[{method: magnitude, repair: sparse_lora}]" if repairs else "[]"
        (folder / "sweep.yaml").write_text(
            SWEEP.format(model=model, repair=repair, exclude=exclude)
        )
        world = cls(folder)
        start = time.monotonic()
        assert world.run("undisturbed") == 0, world.log.read_text()
        world.seconds = time.monotonic() - start
        return world

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def command(self, storage: str, *more: str) -> list[object]:
        """What to give to `child.run` or `child.start`."""
        sweep, place = self.folder / "sweep.yaml", self.folder / storage
        return ["run", sweep, "--storage", place, "--executor", "inline", *more]

    def run(self, storage: str, trouble: Trouble = Trouble()) -> int:  # noqa: B008
        return run(*self.command(storage), trouble=trouble, log=self.log)

    def differences(self, storage: str) -> list[str]:
        """What the storage's results have that the undisturbed ones have not, or lack."""
        found = _rows(self.folder / storage)
        wanted = _rows(self.folder / "undisturbed")
        problems = []
        files = [path.name for path in (self.folder / storage / leaderboard.ROWS).rglob("*.parq*")]
        if len(files) != len(set(wanted["job_key"])):
            problems.append(f"{len(files)} row files: {sorted(files)}")
        if not found.equals(wanted):
            problems.append(f"rows differ:\n{found.to_string()}\nwanted:\n{wanted.to_string()}")
        weights, wanted_weights = (
            _weights(self.folder / name) for name in (storage, "undisturbed")
        )
        problems += [
            f"{name} has other weights"
            for name in weights.keys() & wanted_weights.keys()
            if weights[name] != wanted_weights[name]
        ]
        return problems

    def finished_stages(self, storage: str) -> dict[str, int]:
        """Every published stage that is sound to the last byte, with its marker's inode."""
        place = Storage(str(self.folder / storage))
        stages = {}
        for marker in (self.folder / storage / "stages").glob(f"*/*/{DONE}"):
            path = marker.parent.relative_to(self.folder / storage).as_posix()
            try:
                place.fetch_folder(path, self.folder / "fetched", verify=True)
            except Exception:
                continue
            stages[path] = marker.stat().st_ino
        return stages

    def damage(self, storage: str, dice: random.Random) -> str:
        """Truncate, overwrite or flip a bit of one file anywhere in the storage."""
        files = [file for file in (self.folder / storage).rglob("*") if file.is_file()]
        if not files:
            return "nothing to damage"
        file = dice.choice(sorted(files))
        data = bytearray(file.read_bytes())
        how = dice.choice(["truncated", "emptied", "garbage", "bit flipped"])
        if how == "truncated":
            data = data[: dice.randrange(len(data) + 1)]
        elif how == "emptied":
            data = bytearray()
        elif how == "garbage":
            data = bytearray(dice.randbytes(len(data)))
        elif data:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        file.unlink()  # stages are hard links: only this name is damaged
        file.write_bytes(data)
        return f"{how} {file.relative_to(self.folder / storage)}"


def _rows(storage: Path) -> pd.DataFrame:
    rows = leaderboard.load(str(storage))
    return rows[RESULT].sort_values(RESULT[:4], ignore_index=True)


def _weights(storage: Path) -> dict[str, str]:
    """SHA-256 of every stage's tensors, as its marker has it."""
    place = Storage(str(storage))
    found = {}
    for file in (storage / "stages").glob(f"*/*/{DONE}"):
        path = file.parent.relative_to(storage).as_posix()
        marker = place.read_marker(path) or {"files": {}}  # damaged by us, and not needed since
        for name, facts in marker["files"].items():
            if name.endswith(".safetensors"):
                found[f"{path}/{name}"] = facts["sha256"]
    return found
