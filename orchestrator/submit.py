"""A sweep as a job of a Ray cluster, through the Ray Jobs API: submit, follow, cancel.

A submission's id is the sweep's id and a generation, and Ray accepts an id once: so of two who
submit the same sweep at the same time one starts it and the other joins. What has finished is
known from the leaderboard alone, never from a log.
"""

import asyncio
import contextlib
import importlib.metadata
import ipaddress
import os
import shlex
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from jobs.errors import SpecError, StarvedError
from jobs.spec import JobSpec
from jobs.storage import Storage
from orchestrator.resolved import resolved_path, sweep_id, write_resolved

HTTP_LIMITS_S = (10.0, 120.0)
"""To connect to a dashboard, and between two bytes of its answer."""

SILENCE_S = 60.0
"""A log that says nothing for so long may have lost its connection: ask, and connect again."""

UNREACHABLE_S = 120.0
"""How long a cluster that was there may be out of reach before we stop following."""

STOP_LIMIT_S = 90.0

NOT_SHIPPED = [
    ".git", ".venv", "venv", "runs", "__pycache__", "*.pyc", ".mypy_cache", ".ruff_cache",
    ".env", ".env.*", ".netrc", ".aws", ".ssh", ".ray", ".kube", ".huggingface",
    "*.pem", "*.key", "*.token", "*auth_token*", "*credentials*",
]  # fmt: skip
"""What `--working-dir` leaves behind beside what .gitignore names: bulk, and whatever is secret."""

TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")

Step = Literal["join", "submit"]


@dataclass(frozen=True)
class Submission:
    """One generation of a sweep, as the cluster knows it."""

    id: str
    generation: int
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str = ""
    ended: float | None = None
    """Unix time, by the cluster's clock."""

    @property
    def is_over(self) -> bool:
        return self.status in TERMINAL


def next_step(submissions: Mapping[int, Submission]) -> tuple[Step, int]:
    """What to do for a sweep that lacks results, and the generation that it is about.

    Args:
        submissions: of this sweep, by generation.
    """
    running = [number for number, submission in submissions.items() if not submission.is_over]
    return ("join", max(running)) if running else ("submit", max(submissions, default=0) + 1)


def start(
    cluster: "RayJobs",
    jobs: list[JobSpec],
    storage: Storage,
    *,
    working_dir: Path | None = None,
    driver_resources: Mapping[str, float] | None = None,
) -> tuple[str, bool]:
    """Have a cluster run a sweep, unless it does so already.

    Args:
        working_dir, driver_resources: see `RayJobs.submit`.

    Returns:
        The id of the submission, and whether it is new.
    """
    sweep = sweep_id(jobs, storage)
    step, generation = next_step(cluster.submissions(sweep))
    submission = f"{sweep}-{generation}"
    if step == "join":
        return submission, False
    write_resolved(jobs, storage)
    is_new = cluster.submit(
        submission,
        entrypoint(sweep, storage),
        metadata=metadata_of(sweep, storage),
        working_dir=working_dir,
        driver_resources=driver_resources,
    )
    return submission, is_new


def entrypoint(sweep: str, storage: Storage) -> str:
    """The command that the cluster runs: the sweep as it was resolved here."""
    resolved = f"{storage.url}/{resolved_path(sweep)}"
    command = ["python", "-m", "orchestrator.cli", "run", resolved, "--storage", storage.url]
    return shlex.join(command)


def find_token(environment: Mapping[str, str], home: Path) -> str | None:
    """The cluster's token, where Ray looks for it: two variables, then ~/.ray/auth_token.

    Raises:
        SpecError: a file that is named and cannot be read, or a token that cannot be one.
    """
    if environment.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None  # off by the person's wish, or a kind that Ray itself takes care of
    source, token = "RAY_AUTH_TOKEN", environment.get("RAY_AUTH_TOKEN", "").strip()
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else home / ".ray" / "auth_token"
    if not token and (named or file.is_file()):
        source = str(file)
        try:
            token = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(f"{file}: the cluster's token cannot be read: {error}") from None
    if any(not 32 < ord(letter) < 127 for letter in token):
        raise SpecError(f"{source}: not a token: it has spaces or letters that no token has")
    return token or None


def check_url(what: str, url: str) -> None:
    """Refuse a URL with a password: it would stand in logs, in metadata, on the leaderboard."""
    parts = urlsplit(url)
    if parts.password is not None:
        raise SpecError(
            f"{what}: the URL has a password in it, which would be seen in logs and rows. Leave it "
            "out; give credentials the way your storage's client finds them by itself"
        )


def shared_storage(url: str) -> Storage:
    """The storage of a sweep that a cluster is to run.

    Raises:
        SpecError: one that a cluster could not use.
    """
    check_url("--storage", url)
    storage = Storage(url)
    if storage.url.startswith("memory:"):
        raise SpecError("storage memory:// is seen by one process; a cluster needs a shared one")
    return storage


def check_address(address: str) -> str:
    """The address of a dashboard, without a slash at its end.

    Raises:
        SpecError: not the URL of one.
    """
    check_url("--address", address)
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SpecError(
            f"--address: got {address!r}: give the URL of the cluster's dashboard, such as "
            "http://127.0.0.1:8265"
        )
    return address.rstrip("/")


def clear_text_warning(address: str, token: str | None) -> str | None:
    """What to say before a token goes unencrypted to another machine."""
    parts = urlsplit(address)
    if token is None or parts.scheme == "https" or is_loopback(address):
        return None
    port = parts.port or 8265
    return (
        f"{address} is plain http: the token can be read by whoever sees the network between here "
        f"and there. Use https, or a tunnel: ssh -L 8265:127.0.0.1:{port} {parts.hostname}, and "
        "--address http://127.0.0.1:8265"
    )


def is_loopback(address: str) -> bool:
    """Whether a URL leads to this machine."""
    host = urlsplit(address).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


class RayJobs:
    """The Jobs API of one cluster. The token travels in a header and nowhere else.

    Raises, from every method:
        SpecError: no dashboard there, or it wants a token (another one).
    """

    def __init__(self, address: str, token: str | None) -> None:
        self.address = check_address(address)
        self._has_token = token is not None
        with self._explained():
            self._client = _client(self.address, token)

    def submissions(self, sweep: str) -> dict[int, Submission]:
        """What the cluster knows of a sweep, by generation."""
        with self._explained():
            details = self._client.list_jobs()
        found = {}
        for one in details:
            prefix, _, generation = (one.submission_id or "").rpartition("-")
            if prefix == sweep and generation.isdecimal():
                found[int(generation)] = _submission(one, int(generation))
        return dict(sorted(found.items()))

    def status(self, submission: str) -> Submission:
        with self._explained():
            return _submission(self._client.get_job_info(submission), 0)

    def submit(
        self,
        submission: str,
        command: str,
        *,
        metadata: Mapping[str, str],
        working_dir: Path | None = None,
        driver_resources: Mapping[str, float] | None = None,
    ) -> bool:
        """Start a command on the cluster, once. It reserves no CPU: workers need them.

        Args:
            working_dir: a folder to run it in, sent along; default: what is installed there.
            driver_resources: custom resources that its node must have.

        Returns:
            False: the cluster has a job of this id already.
        """
        environment: dict[str, Any] = {}
        if working_dir is not None:
            if not working_dir.is_dir():
                raise SpecError(f"--working-dir: {working_dir} is no folder")
            environment = {"working_dir": str(working_dir), "excludes": NOT_SHIPPED}
        try:
            with self._explained():
                self._client.submit_job(
                    submission_id=submission,
                    entrypoint=command,
                    metadata=dict(metadata),
                    runtime_env=environment,
                    entrypoint_num_cpus=0,
                    entrypoint_resources=dict(driver_resources or {}) or None,
                )
        except RuntimeError as error:
            if "already exists" in str(error):
                return False
            raise SpecError(f"{self.address} refused the job: {error}") from error
        return True

    def stop(self, submission: str) -> Submission:
        """End a job, and wait until it has ended.

        Raises:
            StarvedError: it does not end.
        """
        with self._explained():
            self._client.stop_job(submission)
        return self.wait(submission, STOP_LIMIT_S)

    def wait(self, submission: str, limit_s: float) -> Submission:
        """Wait until a job has ended.

        Raises:
            StarvedError: it does not.
        """
        deadline = time.monotonic() + limit_s
        while not (state := self.status(submission)).is_over:
            if time.monotonic() > deadline:
                raise StarvedError(
                    f"{submission} is still {state.status} after {limit_s:g} s. Look at "
                    f"{self.address}"
                )
            time.sleep(0.5)
        return state

    def logs(self, submission: str) -> str:
        with self._explained():
            return str(self._client.get_job_logs(submission))

    def follow(self, submission: str, write: Callable[[str], None]) -> Submission:
        """Hand on what a job prints, as it comes, until it has ended. Lost connections are mended.

        Raises:
            SpecError: the cluster is gone.
        """
        return asyncio.run(self._follow(submission, write))

    async def _follow(self, submission: str, write: Callable[[str], None]) -> Submission:
        written, reached = 0, time.monotonic()
        while True:
            seen = 0
            async for chunk in self._chunks(submission):
                write(chunk[max(0, written - seen) :])  # a new connection starts at the beginning
                seen += len(chunk)
                written = max(written, seen)
            try:
                state = self.status(submission)
            except SpecError:
                if time.monotonic() - reached > UNREACHABLE_S:
                    raise
            else:
                reached = time.monotonic()
                if state.is_over:
                    return state
            await asyncio.sleep(1)

    async def _chunks(self, submission: str) -> AsyncIterator[str]:
        """What the job has printed and prints, until it ends, is silent or cannot be heard."""
        import aiohttp

        chunks = aiter(self._client.tail_job_logs(submission))
        try:
            while True:
                yield await asyncio.wait_for(anext(chunks), SILENCE_S)
        except (StopAsyncIteration, TimeoutError, RuntimeError, OSError, aiohttp.ClientError):
            return  # `_follow` asks for the status, which tells more than any of these

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Say in our words what keeps us from the cluster. The token stands in no message."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise SpecError(self._refused()) from error
        except (OSError, ValueError, KeyError) as error:
            raise SpecError(
                f"{self.address}: no Ray dashboard answers there ({type(error).__name__}: {error})"
                ". Is the cluster up, and its dashboard reachable from here? From outside of it: "
                "ssh -L 8265:127.0.0.1:8265 HEAD, or kubectl port-forward"
            ) from error

    def _refused(self) -> str:
        if self._has_token:
            return (
                f"{self.address} refuses the token: it is another cluster's. Copy this cluster's "
                "(`ray get-auth-token` on its head, or its Kubernetes secret) to ~/.ray/auth_token "
                "or RAY_AUTH_TOKEN"
            )
        return (
            f"{self.address} wants a token, and none was found in RAY_AUTH_TOKEN, "
            "RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token (nor is one looked for with "
            "RAY_AUTH_MODE=disabled). Copy the cluster's there: `ray get-auth-token` on its head "
            "prints it, or its Kubernetes secret has it"
        )


def metadata_of(sweep: str, storage: Storage) -> dict[str, str]:
    """What Ray's dashboard shows beside the submission."""
    return {
        "sweep": sweep,
        "storage": storage.url,
        "prunefleet": importlib.metadata.version("prunefleet"),
    }


def parse_resources(pairs: list[str]) -> dict[str, float]:
    """`safe_node=0.01` as a mapping.

    Raises:
        SpecError: not a name and an amount.
    """
    resources = {}
    for pair in pairs:
        name, _, amount = pair.rpartition("=")
        try:
            resources[name] = float(amount)
        except ValueError:
            name = ""
        if not name or not 0 < resources[name] < float("inf"):
            raise SpecError(
                f"--driver-resource: got {pair!r}: name one that nodes have, and how much of it, "
                "such as safe_node=0.01"
            )
    return resources


def _client(address: str, token: str | None) -> Any:
    """Ray's client, at this address whatever the environment says, and with finite patience."""
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]
        def _do_request(self, method: str, endpoint: str, **arguments: Any) -> Any:
            return super()._do_request(method, endpoint, **{"timeout": HTTP_LIMITS_S, **arguments})

    variable = "RAY_API_SERVER_ADDRESS"  # it would override the argument
    before = os.environ.pop(variable, None)
    os.environ[variable] = address
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else None
        return Client(address, headers=headers)
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def _submission(details: Any, generation: int) -> Submission:
    return Submission(
        id=details.submission_id,
        generation=generation,
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        ended=details.end_time / 1000 if details.end_time else None,
    )
