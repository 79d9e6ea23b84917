"""Two S3 servers on loopback: moto's, in a process of its own, and one that serves a folder and misbehaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pyarrow import fs

SECRET = "the-secret-that-no-message-may-show"
BUCKET = "hands"
_SERVER = """
import logging
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""


@contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of a fresh server with an empty bucket; this process's credentials and endpoint are set to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with _pointed_at(endpoint):
            filesystem(endpoint).create_dir(BUCKET)
            yield endpoint
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def filesystem(endpoint: str) -> fs.S3FileSystem:
    """The server's objects as files."""
    host = endpoint.removeprefix("http://")
    return fs.S3FileSystem(
        endpoint_override=host, scheme="http", region="us-east-1", allow_bucket_creation=True, background_writes=False
    )


Misbehave = Callable[[str, str, int], str | None]
"""(method, path, how often both came before) -> None, or what to do: 500, 503, 403, truncate, stall."""


class FolderServer(ThreadingHTTPServer):
    """The files under a folder as the objects of a bucket, read only: counts requests and misbehaves when told to."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, misbehave: Misbehave, stall_s: float) -> None:
        super().__init__(("127.0.0.1", 0), _Objects)
        self.folder, self.misbehave, self.stall_s = folder, misbehave, stall_s
        self.seen: dict[tuple[str, str], int] = {}
        self.at_once = self.most_at_once = 0
        self.guard = threading.Lock()

    def gets(self, ending: str = "") -> int:
        """How many GET requests came for paths with this ending."""
        return sum(n for (method, path), n in self.seen.items() if method == "GET" and path.endswith(ending))

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up in the middle are what some tests are about."""


class _Objects(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FolderServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        server, key = self.server, (self.command, self.path)
        with server.guard:
            count = server.seen.get(key, 0)
            server.seen[key] = count + 1
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            self._answer(server.misbehave(self.command, self.path, count))
        finally:
            with server.guard:
                server.at_once -= 1

    def _answer(self, wrong: str | None) -> None:
        path = self.server.folder / self.path.removeprefix(f"/{BUCKET}/")
        if wrong == "stall":
            time.sleep(self.server.stall_s)
            self.close_connection = True
            return
        if wrong in ("500", "503", "403") or not path.is_file():
            self._send(int(wrong) if wrong else 404, b"", 0)
            return
        data = path.read_bytes()
        first, last = 0, len(data) - 1
        if asked := self.headers.get("Range"):
            first, last = (int(part) for part in asked.removeprefix("bytes=").split("-"))
        body = data[first : last + 1]
        sent = body[: len(body) // 2] if wrong == "truncate" else body
        self.close_connection = wrong == "truncate"
        self._send(206 if asked else 200, b"" if self.command == "HEAD" else sent, len(body))

    def _send(self, status: int, body: bytes, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("Last-Modified", "Sat, 01 Nov 2025 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_HEAD = _serve  # noqa: N815 - names that http.server looks for


@contextmanager
def folder_server(
    folder: Path, misbehave: Misbehave = lambda method, path, count: None, stall_s: float = 2.0
) -> Iterator[FolderServer]:
    """s3://hands/... is what lies under `folder`; this process's credentials and endpoint are set to it."""
    server = FolderServer(folder, misbehave, stall_s)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    with _pointed_at(f"http://127.0.0.1:{server.server_address[1]}"):
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(5)
            server.server_close()


@contextmanager
def _pointed_at(endpoint: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= {"AWS_ACCESS_KEY_ID": "tester", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": endpoint}
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
