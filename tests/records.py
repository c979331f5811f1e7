"""A real MLflow server, a proxy before it that fails as networks do, and records on their way there."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.spool import Spool
from pipelines.tracking import DatasetInput, RunDescription, quiet_environment

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true in time"
        time.sleep(0.1)


class Server:
    """An MLflow server process with its workers, on loopback."""

    def __init__(self, folder: Path):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        folder = self._folder
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        with (folder / "server.log").open("ab") as log:
            # Without processes for jobs of its own, which take long to start.
            environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            self._process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        eventually(self.answers, 180)

    def answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        with contextlib.suppress(OSError), contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def stop(self) -> None:
        if self._process is not None:
            # The whole group: killed alone, the parent leaves its uvicorn workers behind.
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


class Proxy:
    """Passes HTTP requests on to a server on this machine, or fails as told.

    ``mode`` says how, for the requests that ``matches`` picks: ``pass``; ``hang``, no answer; a number, that status and
    nothing passed on; ``drop``, passed on and the connection cut instead of an answer; ``late``, passed on at
    ``release``, when the client has gone.
    """

    def __init__(self, upstream: int):
        self.upstream, self.mode = upstream, "pass"
        self.matches: Callable[[str, bytes], bool] = lambda _path, _body: True
        self.after_drop: Callable[[], None] = lambda: None
        self.failed = 0
        self.dropped = 0
        self._released = threading.Event()
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._server: ThreadingHTTPServer | None = None
        self.listen()

    def listen(self) -> None:
        """Takes connections, again after ``refuse``."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy._handle(self, body)

            do_GET = do_POST = do_PUT = do_PATCH = _handle

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Listening(ThreadingHTTPServer):
            daemon_threads = True
            # One that hangs is not waited for.
            block_on_close = False

        self._server = Listening(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def refuse(self) -> None:
        """Takes no connections, as a server that is down."""
        if self._server is not None:
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()
            self._server = None

    def release(self) -> None:
        """Passes on what is late, and cuts what hangs."""
        self._released.set()

    def close(self) -> None:
        """Ends it, and the requests that hang."""
        self.release()
        self.refuse()

    def _handle(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        if self._server is None:
            # On a connection from before it refused.
            request.close_connection = True
            return
        mode = self.mode if self.matches(request.path, body) else "pass"
        if mode != "pass":
            self.failed += 1
            request.close_connection = True
        if mode.isdigit():
            request.send_error(int(mode))
            return
        if mode in ("hang", "late"):
            self._released.clear()
            self._released.wait()
            if mode == "hang":
                return
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=30)) as connection:
            headers = dict(request.headers) | {"Host": f"127.0.0.1:{self.upstream}"}
            try:
                connection.request(request.command, request.path, body, headers)
                response = connection.getresponse()
                answer = response.read()
            except (OSError, http.client.HTTPException):
                request.close_connection = True
                return
        if mode in ("drop", "late"):
            self.dropped += 1
            self.after_drop()
            return
        request.send_response(response.status)
        request.send_header("Content-Type", response.headers.get("Content-Type", "application/json"))
        request.send_header("Content-Length", str(len(answer)))
        request.end_headers()
        request.wfile.write(answer)


@contextlib.contextmanager
def proxied(upstream: int) -> Iterator[Proxy]:
    """A proxy for the length of a block."""
    proxy = Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def description(name: str, **params: object) -> RunDescription:
    data = DatasetInput(name="photos", digest="ab" * 32, source="s3://bucket/photos", num_samples=7)
    tags = {"mlflow.source.git.commit": "0123abc", "mlflow.user": "somebody", "mlflow.source.name": "a/job.py"}
    return RunDescription.model_validate(
        {"experiment": "tests", "name": name, "params": params, "tags": tags, "datasets": (data,)}
    )


def write_steps(spool: Spool, steps: range) -> None:
    for step in steps:
        spool.metrics(step, {"train/loss": 1 / (step + 1), "perf/images_per_s": 100.0 + step})


def write_picture(folder: Path, spool: Spool, step: int) -> None:
    file = f"pictures/step-{step:08d}.png"
    (folder / "pictures").mkdir(exist_ok=True)
    pixels = np.random.default_rng(step).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / file)
    spool.image(step, "reconstruction", file)


def client(uri: str):
    os.environ.update(quiet_environment())
    from pipelines.mlflow_client import connect

    return connect(uri, may_create=False)


def steps_of(uri: str, run_id: str, key: str = "train/loss") -> list[int]:
    return sorted(metric.step for metric in client(uri).get_metric_history(run_id, key))


def pictures_of(uri: str, run_id: str) -> list[int]:
    """The step of each picture that the MLflow UI would show."""
    names = [Path(file.path).name for file in client(uri).list_artifacts(run_id, "images")]
    return sorted(int(name.split("+")[2]) for name in names if "+compressed" in name)


def sync(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "pipelines.sync", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
