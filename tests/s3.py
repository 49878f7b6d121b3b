"""An S3 server on loopback, for tests: moto's, one request at a time.

One at a time, because moto looks whether an object is there and then writes it, in two steps: of
two conditional writes at once both could win, which S3 itself rules out.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "studies"


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: Any) -> None:
        pass


class S3Server:
    """The server, and what it has seen."""

    def __init__(self) -> None:
        self.num_conditional_writes = 0
        self.ignores_conditions = False
        """Behave like the look-alikes that overwrite whatever the request says."""
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def environment(self) -> dict[str, str]:
        """What a client's process needs to find it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "PUT" and "HTTP_IF_NONE_MATCH" in environ:
            self.num_conditional_writes += 1
            if self.ignores_conditions:
                del environ["HTTP_IF_NONE_MATCH"]
        return self._moto(environ, start_response)  # type: ignore[no-any-return]

    @contextmanager
    def running(self) -> Iterator["S3Server"]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            thread.join()


def make_bucket() -> None:
    """Needs `environment()` to be set."""
    boto3.client("s3").create_bucket(Bucket=BUCKET)
