"""A Ray head with its dashboard, as on a cluster, and jobs that are submitted to it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.processes import free_ports, wait_until

ROOT = Path(__file__).parents[1]
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@contextlib.contextmanager
def head() -> Iterator[dict[str, str]]:
    """A head with 3 CPUs and token authentication on; yields the environment that reaches it."""
    port, gcs, agent = free_ports(3)
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_JOB")}
        assert environment["RAY_AUTH_MODE"] == "token"
        environment |= {"RAY_worker_maximum_startup_concurrency": "16", "RAY_metrics_report_interval_ms": "1000"}
        command = [
            *_RAY, "start", "--head", "--block", "--num-cpus", "3",
            "--port", str(gcs), "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1",
            "--dashboard-port", str(port), "--dashboard-agent-listen-port", str(agent), "--temp-dir", folder,
        ]  # fmt: skip
        log = Path(folder) / "head.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            wait_until(lambda: "Ray runtime started" in log.read_text(), 60, log.read_text)
            # The last one is for scripts of tests: "auto" may find another test's Ray.
            yield environment | {
                "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}",
                "HEAD_OF_TEST": f"127.0.0.1:{gcs}",
            }
        finally:
            # Asked to end, it takes longer than the 20 s that one would give it.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            wait_until(lambda: not left_behind(folder), 60, lambda: f"still there: {left_behind(folder)}")


def left_behind(folder: str) -> list[list[str]]:
    """Processes of a Ray that lives in a folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(folder in part for part in process.info["cmdline"] or ()):
            found.append(process.info["cmdline"][:3])
    return found


def submit(
    environment: dict[str, str], command: list[str], *, options: tuple[str, ...] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Submits a Python script of this repository with its arguments, and waits for its end unless told not to.

    Args:
        environment: That of the head.
        command: The script's path in the repository, then its arguments.
        options: More flags of ``ray job submit``.
        variables: What the job finds in its environment.
    """
    submitted = ["submit", "--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": variables}), *options]
    done = None
    for _ in range(30):
        done = job(environment, *submitted, "--", sys.executable, *command)
        # The head's agent that takes jobs comes up some seconds after the head.
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(2)
    assert done is not None
    return done


def job(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Asks ``ray job``."""
    return subprocess.run(
        [*_RAY, "job", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
