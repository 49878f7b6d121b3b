"""A cluster's dashboard as far as the Jobs API goes: real HTTP, and a record of what was sent."""

import asyncio
import importlib.metadata
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from aiohttp import web


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: str


@dataclass
class JobsServer:
    """Serves on a free port of loopback while the `with` block runs."""

    token: str | None = None
    run: Callable[[dict[str, Any]], str] | None = None
    """What a submitted job does: gets its submission, returns how it ended. None: it runs on."""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    packages: dict[str, bytes] = field(default_factory=dict)
    drop_tail_after: int | None = None
    """Cut the first connection that follows a log after so many letters."""

    def __enter__(self) -> "JobsServer":
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(10)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def submitted(self) -> list[dict[str, Any]]:
        """The bodies of all requests to submit a job."""
        return [
            json.loads(one.body)
            for one in self.requests
            if (one.method, one.path) == ("POST", "/api/jobs/")
        ]

    def add(self, submission: str, status: str, *, message: str = "") -> None:
        """A job that is there already."""
        over = status in ("SUCCEEDED", "FAILED", "STOPPED")
        self.jobs[submission] = {
            "type": "SUBMISSION",
            "submission_id": submission,
            "job_id": None,
            "status": status,
            "entrypoint": "python",
            "message": message,
            "end_time": int(time.time() * 1000) if over else None,
        }

    def _serve(self, started: threading.Event) -> None:
        asyncio.run(self._main(started))

    async def _main(self, started: threading.Event) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()

        @web.middleware
        async def recorded(request: web.Request, handler: Any) -> Any:
            return await self._recorded(request, handler)

        app = web.Application(middlewares=[recorded])
        app.router.add_get("/api/version", self._version)
        app.router.add_get("/api/jobs/", self._list)
        app.router.add_post("/api/jobs/", self._submit)
        app.router.add_get("/api/jobs/{id}", self._info)
        app.router.add_get("/api/jobs/{id}/logs", self._logs)
        app.router.add_get("/api/jobs/{id}/logs/tail", self._tail)
        app.router.add_post("/api/jobs/{id}/stop", self._stop)
        app.router.add_get("/api/packages/gcs/{name}", self._has_package)
        app.router.add_put("/api/packages/gcs/{name}", self._put_package)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._port = runner.addresses[0][1]
        started.set()
        await self._over.wait()
        await runner.cleanup()

    async def _recorded(self, request: web.Request, handler: Any) -> Any:
        body = (await request.read()).decode("latin-1")
        self.requests.append(Request(request.method, request.path, dict(request.headers), body))
        given = request.headers.get("Authorization")
        if self.token is not None and given != f"Bearer {self.token}":
            return web.Response(status=403 if given else 401, text="Unauthorized")
        return await handler(request)

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": importlib.metadata.version("ray")})

    async def _list(self, request: web.Request) -> web.Response:
        return web.json_response(list(self.jobs.values()))

    async def _submit(self, request: web.Request) -> web.Response:
        body = await request.json()
        submission = body["submission_id"]
        if submission in self.jobs:
            return web.Response(status=400, text=f"Job {submission} already exists.")
        self.add(submission, "RUNNING")
        if self.run is not None:
            status = await asyncio.to_thread(self.run, body)
            self.add(submission, status, message=f"it ended as {status}")
        return web.json_response({"job_id": submission, "submission_id": submission})

    async def _info(self, request: web.Request) -> web.Response:
        job = self.jobs.get(request.match_info["id"])
        return web.json_response(job) if job else web.Response(status=404, text="no such job")

    async def _logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": self.logs.get(request.match_info["id"], "")})

    async def _tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        text = self.logs.get(request.match_info["id"], "")
        cut, self.drop_tail_after = self.drop_tail_after, None
        for line in text[:cut].splitlines(keepends=True):
            await socket.send_str(line)
        if cut is None:  # the log is at its end, and so is the job
            self.jobs[request.match_info["id"]]["status"] = "SUCCEEDED"
        await socket.close()
        return socket

    async def _stop(self, request: web.Request) -> web.Response:
        self.add(request.match_info["id"], "STOPPED")
        return web.json_response({"stopped": True})

    async def _has_package(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if request.match_info["name"] in self.packages else 404)

    async def _put_package(self, request: web.Request) -> web.Response:
        self.packages[request.match_info["name"]] = await request.read()
        return web.Response()
