"""Run a sweep on a disk that is full, then give it room. Needs a mount namespace of its own:

unshare -rm python -m tests.chaos.full_disk FOLDER
"""

import subprocess
import sys
from pathlib import Path

from tests.chaos.world import World


def main() -> None:
    world = World(Path(sys.argv[1]))
    disk = world.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(disk)]
    subprocess.run(mount, check=True)
    before = world.log.read_text()
    when_full = world.run("disk")
    said = world.log.read_text().removeprefix(before)
    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    with_room = world.run("disk")
    print(when_full, "No space left on device" in said, with_room, world.differences("disk"))


if __name__ == "__main__":
    main()
