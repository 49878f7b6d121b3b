"""One thread a process: the suite runs several, and torch's default would have them fight.

And the places that a storage can be, for the tests that all of them must pass.
"""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.storage import Storage

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, which DeepSpeed does


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    from tests.s3 import S3Server, make_bucket

    with pytest.MonkeyPatch.context() as patch, S3Server().running() as server:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        make_bucket()
        yield server


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty storage: on this disk, in memory, on an S3 server."""
    if request.param == "local":
        return Storage(str(tmp_path / "storage"))
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}")
    request.getfixturevalue("s3_server")
    return Storage(f"s3://studies/{uuid.uuid4().hex}")


@pytest.fixture
def disk(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))
