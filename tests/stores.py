"""Stores for tests, on loopback only: a real S3 server, an HTTP server with ranges, and a proxy that breaks them.

All listen on free ports, and nothing is left behind::

    with moto_server() as s3, FaultyProxy(s3, rules) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
"""

import contextlib
import http.client
import http.server
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import pyarrow.fs as pafs

from pipelines.data.index import read_index
from pipelines.data.shards import load_manifest
from pipelines.storage import Store

_CHUNK = 64 << 10


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """An S3 server (moto) in a process of its own; yields its address. It keeps its objects in memory."""
    port = free_port()
    process = subprocess.Popen(
        # Moto's own import warns of its dependencies; that is no business of these tests.
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not _answers(port):
            assert process.poll() is None, f"moto ended with {process.returncode}"
            assert time.monotonic() < deadline, "moto does not answer"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def s3_environment(address: str) -> dict[str, str]:
    """The environment variables with which pyarrow finds an S3 server of a test, and looks for no other."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def put(address: str, path: str, data: bytes = b"") -> None:
    """Puts an object (``bucket/key``) or, where there is no key, a bucket on an S3 server of a test."""
    server = pafs.S3FileSystem(
        access_key="test", secret_key="test", region="us-east-1", endpoint_override=address, allow_bucket_creation=True
    )
    if "/" not in path:
        server.create_dir(path)
        return
    with server.open_output_stream(path) as file:
        file.write(data)


@contextlib.contextmanager
def range_server(folder: Path, *, ranges: bool = True, most: int = sys.maxsize) -> Iterator[str]:
    """Serves the files of a folder over HTTP, whole or by ranges (of ``most`` bytes); yields its address."""

    class Handler(_FileHandler):
        root = folder
        serves_ranges = ranges
        most_bytes = most

    with _serving(Handler, free_port()) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}"


@dataclass(frozen=True)
class Fault:
    """What the proxy does to a request. Of a body, ``cut_after_bytes`` arrive before anything happens to it.

    Args:
        status: Answer with this status at once; the store behind is not asked.
        cut_after_bytes: Bytes of the body that get through (all: None).
        stall_s: Wait for so long after them, then go on (or cut, or reset).
        reset: Reset the connection instead of closing it or going on.
        bytes_per_s: Let the body through at this speed only.
    """

    status: int | None = None
    cut_after_bytes: int | None = None
    stall_s: float = 0.0
    reset: bool = False
    bytes_per_s: float | None = None


@dataclass(frozen=True)
class Request:
    """A request as the proxy saw it; ``count`` is how many of the same method and path came before."""

    method: str
    path: str
    range: str | None
    count: int
    time: float

    @property
    def first_byte(self) -> int:
        """Where the range that was asked for begins."""
        return int(self.range.removeprefix("bytes=").partition("-")[0]) if self.range else 0


Rules = Callable[[str, str, str | None, int], Fault | None]


@dataclass
class FaultyProxy:
    """An HTTP proxy in a thread of this process, before one server, that breaks what its rules say.

    Args:
        upstream: The server's address.
        rules: From (method, path, Range header, how many of the same method and path came before) to a fault, or
            None where the request goes through whole. May be replaced at any time.

    Attributes:
        requests: All that came, in order.
        in_flight: How many are being answered now.
    """

    upstream: str
    rules: Rules = lambda *_: None
    requests: list[Request] = field(default_factory=list)
    in_flight: int = 0

    def __enter__(self) -> Self:
        self.port = free_port()
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self._door = contextlib.ExitStack()
        self.open_door()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.close_door()

    @property
    def address(self) -> str:
        """Where the proxy listens."""
        return f"http://127.0.0.1:{self.port}"

    def close_door(self) -> None:
        """The store is away: connections are refused, and those that are open break."""
        self._door.close()

    def open_door(self) -> None:
        """The store is back, at the same address."""

        class Handler(_ProxyHandler):
            proxy = self

        self._door.enter_context(_serving(Handler, self.port))

    def gets(self, name: str) -> list[Request]:
        """The GET requests of a file, in order."""
        with self.lock:
            return [each for each in self.requests if each.method == "GET" and each.path.endswith(name)]

    def _see(self, method: str, path: str, range_: str | None) -> Fault | None:
        with self.lock:
            count = sum((each.method, each.path) == (method, path) for each in self.requests)
            self.requests.append(Request(method, path, range_, count, time.monotonic()))
        return self.rules(method, path, range_, count)


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what these tests are about."""


@contextlib.contextmanager
def _serving(handler: type[http.server.BaseHTTPRequestHandler], port: int) -> Iterator[_Server]:
    server = _Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        for connection in list(server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read what came in ``FaultyProxy.requests``."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _FileHandler(_Handler):
    root: Path
    serves_ranges: bool
    most_bytes: int

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.root / unquote(urlsplit(self.path).path).lstrip("/")
        if not path.is_file():
            return self.answer(404)
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        if (wanted := self.headers.get("Range")) and self.serves_ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, status = int(first), 206
            stop = min(size, int(last) + 1 if last else size, start + self.most_bytes)
            if start >= size:
                return self.answer(416, Content_Range=f"bytes */{size}")
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command == "GET":
            with path.open("rb") as file:
                sent = start
                while sent < stop:
                    sent += os.sendfile(self.connection.fileno(), file.fileno(), sent, stop - sent)
        return None


class _ProxyHandler(_Handler):
    proxy: FaultyProxy

    def pass_on(self) -> None:
        with self.proxy.lock:
            self.proxy.in_flight += 1
        try:
            self._pass_on()
        finally:
            with self.proxy.lock:
                self.proxy.in_flight -= 1

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

    def _pass_on(self) -> None:
        body = self._body()
        fault = self.proxy._see(self.command, self.path, self.headers.get("Range")) or Fault()
        if fault.status is not None:
            return self.answer(fault.status, b"" if self.command == "HEAD" else b"injected")
        upstream = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
        with contextlib.closing(upstream):
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
            upstream.request(self.command, self.path, body, headers)
            self._give_back(upstream.getresponse(), fault)
        return None

    def _body(self) -> bytes | None:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length) if length else None
        parts = []
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _give_back(self, response: http.client.HTTPResponse, fault: Fault) -> None:
        has_body = self.command != "HEAD" and response.status not in (204, 304)
        body = response.read() if has_body and response.getheader("Content-Length") is None else None
        self.send_response(response.status, response.reason)
        for name, value in response.getheaders():
            if name.lower() not in _HOP_BY_HOP | {"date", "server"}:
                self.send_header(name, value)
        if body is not None:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        passed, allowed = 0, fault.cut_after_bytes
        while has_body:
            size = _CHUNK if allowed is None else min(_CHUNK, allowed - passed)
            chunk = (body[passed : passed + size] if body is not None else response.read(size)) if size else b""
            if not chunk:
                break
            self.wfile.write(chunk)
            passed += len(chunk)
            if fault.bytes_per_s and self.proxy.stopped.wait(len(chunk) / fault.bytes_per_s):
                break
        if fault.stall_s:
            self.proxy.stopped.wait(fault.stall_s)
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if fault.reset or (allowed is not None and not (fault.stall_s and self._rest(response))):
            self.close_connection = True

    def _rest(self, response: http.client.HTTPResponse) -> bool:
        """After a stall the rest comes all the same, to whom it may still interest."""
        with contextlib.suppress(OSError):
            while chunk := response.read(_CHUNK):
                self.wfile.write(chunk)
        return True


_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect"}


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def spoil(shards: str, to: Path, keep: int = 0) -> str:
    """A copy of shards all of whose images but the first ones are zeros, in files of the same size."""
    shutil.copytree(shards, to)
    manifest = load_manifest(str(to))
    number = 0
    for name in manifest.shard_names:
        index, _ = read_index(Store(str(to)), name)
        with (to / name).open("r+b") as file:
            for offset, size in zip(index.offset_S.tolist(), index.size_S.tolist(), strict=True):
                if number >= keep:
                    file.seek(offset)
                    file.write(bytes(size))
                number += 1
    return str(to)
