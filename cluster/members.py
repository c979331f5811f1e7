"""The members of a cluster on this machine: Ray's head and nodes, an MLflow server, an S3 server."""

import http.client
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pyarrow.fs as pafs

from cluster.processes import MARK, free_ports, marked, process_name, wait_until
from cluster.state import BUCKET, Node, State
from pipelines.errors import UserError

HEAD, SERVERS = "head", ("mlflow", "s3")
_START_WITHIN_S = 120.0
# The head notices a node whose processes are gone after some `period + threshold * period`, instead of 15 s and more:
# its machine refuses to connect. One that does not answer is given time: a busy one may take seconds for it.
FAST_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
}
# What members are started with, where the environment does not say otherwise.
_SETTINGS = FAST_HEALTH_CHECKS | {
    # MLflow would keep seven processes of 230 MB for jobs of its own.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # A job that is stopped has so long from SIGTERM to SIGKILL, for its last checkpoint: 3 s by default. Jobs read it
    # on the head.
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    # A run has more actors than a small node has CPUs: its raylet would warn of every dozen of them in the job's log.
    "RAY_worker_maximum_startup_concurrency": "16",
    # Where memory runs out, one process that can be done again is killed: see pipelines/ray_session.py.
    "RAY_worker_killing_policy_by_group": "true",
}


class Member:
    """A member that is starting.

    Args:
        state: The cluster.
        name: The member's name.
        command: What it runs.
        cpus: Cores that it may use; 0: all.
    """

    def __init__(self, state: State, name: str, command: list[str], cpus: int = 0):
        self.name = name
        self._log = state.folder / "logs" / f"{name}.log"
        self._log.parent.mkdir(exist_ok=True)
        environment = _SETTINGS | state.environment() | {MARK: state.mark(name)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=state.ray_dir, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        # It outlives this process, which meanwhile keeps no zombie of it.
        threading.Thread(target=self._process.wait, daemon=True).start()
        cores = sorted(os.sched_getaffinity(0))
        if 0 < cpus < len(cores):
            # Workers make as many threads as they see cores: two nodes with all of them would fight for each.
            turn = cpus * len(state.nodes)
            os.sched_setaffinity(self._process.pid, {cores[(turn + i) % len(cores)] for i in range(cpus)})

    def says(self, text: str) -> bool:
        """Whether its log has a text.

        Raises:
            UserError: It has ended.
        """
        if self._process.poll() is not None:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise UserError(f"{self.name} did not start: {lines[-1] if lines else 'no word'} (all of it: {self._log})")
        return text in self._log.read_text(errors="replace")

    def wait(self, text: str) -> None:
        """Waits until its log has a text.

        Raises:
            UserError: It has ended, or does not say so in time.
        """
        try:
            wait_until(lambda: self.says(text), _START_WITHIN_S)
        except TimeoutError:
            raise UserError(
                f"{self.name} did not start within {_START_WITHIN_S:g} s (its words: {self._log})"
            ) from None


def start_node(state: State, node: Node) -> Member:
    """Starts a node, or the head."""
    metrics, client = free_ports(2)
    if node.name == HEAD:
        where = ["--head", "--port", str(state.gcs_port), "--ray-client-server-port", str(client)]
        where += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(state.dashboard_port)]
    else:
        where = ["--address", state.head]
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-name", node.name,
        "--node-ip-address", node.address, "--num-cpus", str(node.cpus), "--num-gpus", "0",
        "--object-store-memory", str(state.store_mib << 20), "--dashboard-agent-listen-port", str(node.agent_port),
        "--metrics-export-port", str(metrics), "--min-worker-port", "0", "--max-worker-port", "0",
        # A folder of its own: where one begins to use a job's code, its agent unpacks it anew, over that of the others.
        "--disable-usage-stats", "--temp-dir", str(state.ray_dir / node.name), *where,
    ]  # fmt: skip
    return Member(state, node.name, command, node.cpus)


def wait_for_node(member: Member) -> None:
    """Waits until a node has joined.

    Raises:
        UserError: It does not.
    """
    member.wait("Ray runtime started")


def wait_for_jobs(state: State) -> None:
    """Waits until the head takes jobs: its agent comes up some seconds after it.

    Raises:
        UserError: It does not.
    """
    agent = f"http://{state.nodes[0].address}:{state.nodes[0].agent_port}/api/local_raylet_healthz"
    server = f"{state.dashboard}/api/version"
    try:
        wait_until(lambda: bool(answer(agent) and answer(server, state.token)), _START_WITHIN_S)
    except TimeoutError:
        raise UserError(f"the head takes no jobs, after {_START_WITHIN_S:g} s") from None


def start_server(state: State, name: str) -> Member:
    """Starts the MLflow server or the S3 server."""
    if name == "s3":
        # Moto's own import warns of its dependencies.
        command = ["-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(state.s3_port)]
    else:
        folder = state.folder
        command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(state.mlflow_port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
    return Member(state, name, [sys.executable, *command])


def server_answers(state: State, name: str) -> bool:
    """Whether a server does its work."""
    return answer(f"{state.s3}/moto-api/" if name == "s3" else f"{state.mlflow}/health") is not None


def wait_for_server(state: State, member: Member) -> None:
    """Waits until a server answers; the S3 server then has its bucket.

    Raises:
        UserError: It does not answer.
    """
    try:
        wait_until(lambda: member.says("") and server_answers(state, member.name), _START_WITHIN_S)
    except TimeoutError:
        raise UserError(f"{member.name} does not answer (its words: {state.folder}/logs)") from None
    if member.name == "s3":
        store = pafs.S3FileSystem(
            access_key="local", secret_key="local", region="us-east-1", endpoint_override=state.s3,
            allow_bucket_creation=True,
        )  # fmt: skip
        store.create_dir(BUCKET)


def runs(state: State, name: str) -> bool:
    """Whether a server has a process, a node its raylet."""
    found = marked(state.mark(name))
    return bool(found) if name in SERVERS else any(process_name(process) == "raylet" for process in found)


def training(state: State, name: str = "") -> list[psutil.Process]:
    """The workers of Ray Train on a node, or on all of them."""
    found = marked(state.mark(name))
    return [process for process in found if process_name(process).startswith("ray::RayTrainWork")]


def ray_nodes(state: State) -> dict[str, dict[str, Any]] | None:
    """What Ray says of the nodes, by their names; None: the head does not answer."""
    found = answer(f"{state.dashboard}/api/v0/nodes?detail=true&limit=1000", state.token)
    if found is None:
        return None
    return {one["node_name"]: one for one in json.loads(found)["data"]["result"]["result"]}


def drain(state: State, node: Node, deadline_s: int, reason: str) -> None:
    """Tells Ray that a node will be taken away.

    Args:
        state: The cluster.
        node: The node.
        deadline_s: Seconds that it still has.
        reason: Why, in words for Ray's logs.

    Raises:
        UserError: Ray does not know the node, or refuses.
    """
    known = (ray_nodes(state) or {}).get(node.name)
    if known is None or known["state"] != "ALIVE":
        raise UserError(f"{node.name} cannot be drained: Ray does not have it (see python -m cluster.local status)")
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", state.head]
    command += ["--node-id", known["node_id"], "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", reason]
    command += ["--deadline-remaining-seconds", str(deadline_s)]
    done = subprocess.run(command, env=state.environment(), capture_output=True, text=True, timeout=60)
    if done.returncode:
        told = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise UserError(f"{node.name} cannot be drained: {told}")


def answer(url: str, token: Path | None = None, timeout_s: float = 5.0) -> bytes | None:
    """What a server on this machine says, without any proxy; None where it does not answer with 200.

    Args:
        url: Its address.
        token: The file with the token to show.
        timeout_s: How long it may take, in seconds.
    """
    parts = urlsplit(url)
    headers = {"Authorization": f"Bearer {token.read_text()}"} if token else {}
    connection = http.client.HTTPConnection(parts.netloc, timeout=timeout_s)
    try:
        connection.request("GET", f"{parts.path}?{parts.query}", headers=headers)
        response = connection.getresponse()
        return response.read() if response.status == http.client.OK else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
