"""Print what pyproject.toml asks for, a requirement a line: `requirements.py FILE [EXTRA,...]`.

So that an image installs the dependencies before it copies the code, and keeps that layer when
only the code changes.
"""

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Raises KeyError for an extra that pyproject.toml does not have."""
    project = tomllib.loads(pyproject.read_text())["project"]
    optional = project["optional-dependencies"]
    return project["dependencies"] + [one for extra in extras for one in optional[extra]]


if __name__ == "__main__":
    wanted = sys.argv[2] if len(sys.argv) > 2 else ""
    print(*requirements(Path(sys.argv[1]), [e for e in wanted.split(",") if e]), sep="\n")
