"""A real S3 server on this machine (moto), behind a counter of requests that tests can act on."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import boto3
from moto.moto_api._internal import moto_api_backend
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "models"
KEY_ID, SECRET = "AKIAUNITTEST", "canarySecretThatMustNotLeak"


@dataclass
class S3Server:
    """`requests` are "METHOD /path?query" of everything that arrived.

    `sent` is all of each: the request line, headers but Authorization, and the body.
    """

    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    sent: list[bytes] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)
    body_bytes: int = 0
    before: Callable[[int, str], int | None] = lambda number, request: None
    after: Callable[[int, str], None] = lambda number, request: None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @cached_property
    def client(self) -> Any:
        """Another client than the one under test, to look at what is there."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=KEY_ID,
            aws_secret_access_key=SECRET,
        )

    def contents(self, prefix: str = "", bucket: str = BUCKET) -> dict[str, bytes]:
        """Every object below `prefix`, its name without it."""
        client = self.client
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return {
            item["Key"].removeprefix(prefix): client.get_object(Bucket=bucket, Key=item["Key"])[
                "Body"
            ].read()
            for page in pages
            for item in page.get("Contents", [])
        }

    def count(self, pattern: str) -> int:
        """How many requests of the log match."""
        return sum(re.match(pattern, request) is not None for request in self.requests)

    def forget(self) -> None:
        """Begin a new log, without what `before` and `after` did."""
        self.requests, self.sent, self.authorizations, self.body_bytes = [], [], [], 0
        self.before = lambda number, request: None
        self.after = lambda number, request: None

    def handle(
        self, app: Any, environ: dict[str, Any], start_response: Callable[..., Any]
    ) -> Iterable[bytes]:
        """One request: `before` may answer it with a status, both may end the client."""
        query = f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else ""
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}{query}"
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        environ["wsgi.input"] = io.BytesIO(body)
        with self._lock:
            self.requests.append(request)
            number = len(self.requests)
            self.body_bytes += len(body)
            self.authorizations.append(environ.get("HTTP_AUTHORIZATION", ""))
            self.sent.append(_searchable(request, environ, body))
        status = self.before(number, request)
        if status is not None:
            start_response(f"{status} Fault", [("Content-Length", "0")])
            return [b""]
        answer = [b"".join(app(environ, start_response))]
        self.after(number, request)
        return answer


def _searchable(request: str, environ: Mapping[str, Any], body: bytes) -> bytes:
    names = [name for name in environ if name.startswith("HTTP_")]
    headers = [f"{name}: {environ[name]}" for name in names if name != "HTTP_AUTHORIZATION"]
    return "\n".join([request, *headers]).encode() + b"\n\n" + body


class _Silent(WSGIRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing: the log of requests is :attr:`S3Server.requests`."""


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with one empty bucket."""
    moto_api_backend.reset()
    server = S3Server()
    app = DomainDispatcherApplication(create_backend_app)
    http = make_server(
        "127.0.0.1",
        0,
        lambda environ, start: server.handle(app, environ, start),
        threaded=True,
        request_handler=_Silent,
    )
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    server.endpoint = f"http://127.0.0.1:{http.server_port}"
    try:
        server.client.create_bucket(Bucket=BUCKET)
        server.forget()
        yield server
    finally:
        http.shutdown()
        thread.join()


def credentials(server: S3Server) -> dict[str, str]:
    """The variables with which s3fs and botocore reach it."""
    return {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
