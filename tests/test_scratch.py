"""What a killed attempt leaves in the node's temporary folder, and who may clear it away."""

import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from workers.scratch import PREFIX, scratch_folder


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def an_old_folder(node: Path, name: str) -> Path:
    folder = node / name
    folder.mkdir()
    os.utime(folder, (0, 0))
    return folder


def test_a_scratch_folder_goes_with_its_attempt(node: Path):
    with scratch_folder("k") as folder:
        (folder / "model").write_text("gigabytes")

    assert list(node.iterdir()) == []


def test_the_next_attempt_clears_what_a_kill_left(node: Path):
    left = an_old_folder(node, f"{PREFIX}k-1")

    with scratch_folder("k"):
        assert not left.exists()


def test_a_living_attempt_keeps_its_folder_however_old(node: Path):
    with scratch_folder("a") as mine:
        os.utime(mine, (0, 0))
        with scratch_folder("b"):
            assert mine.exists()


def test_folders_of_others_are_left_alone(node: Path):
    """A `reproduce` works for hours in a folder of its own, without a lock."""
    others = [an_old_folder(node, "prunefleet-x"), an_old_folder(node, "somebody")]

    with scratch_folder("k"):
        assert all(folder.exists() for folder in others)


def test_a_folder_that_somebody_has_locked_is_not_waited_for(node: Path):
    theirs = an_old_folder(node, f"{PREFIX}theirs")
    lock = os.open(theirs, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)

    with scratch_folder("k"):
        assert theirs.exists()
    os.close(lock)
