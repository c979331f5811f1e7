"""A Ray cluster of several nodes on this machine, whose nodes can be lost: what recovery is measured and tested on.

Every node is a raylet of its own (``ray start``) with an address of its own on the loopback device, so that to Ray
they are different machines.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

# A node that is gone is noticed after some `period + threshold * period` instead of 15 s and more. Only the head reads
# these: a cluster sets them where it starts its head.
FAST_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


@dataclass(frozen=True)
class Node:
    """One node.

    Args:
        address: Its IP address.
        process: ``ray start --block``, the parent of its raylet.
    """

    address: str
    process: subprocess.Popen[bytes]

    def processes(self) -> list[psutil.Process]:
        """All processes of the node: raylet, agents, workers."""
        try:
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def workers(self, name: str) -> list[psutil.Process]:
        """The node's Ray workers whose title holds a name, as ``RayTrainWorker``."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if any(name in part for part in process.cmdline()):
                    found.append(process)
        return found


class Cluster:
    """A head, and nodes that come and go.

    Args:
        folder: Short path of an empty folder; everything that Ray writes lies there.
        head_cpus: CPUs that the head offers.
        environment: More environment variables for the head and the nodes.
    """

    def __init__(self, folder: Path, head_cpus: int, environment: dict[str, str]):
        self._folder = folder
        self._started = 0
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_JOB")}
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", **environment}
        self.environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        self.nodes: list[Node] = []
        # Not 127.0.0.1: Ray puts the machine's address on the network in its place.
        (port,) = free_ports(1)
        self.address = f"127.0.1.1:{port}"
        self.head = self._start(head_cpus, ["--head", "--port", str(port), "--include-dashboard", "false"])

    def add(self, num_cpus: int) -> Node:
        """Starts a node and waits until it has joined."""
        node = self._start(num_cpus, ["--address", self.address])
        self.nodes.append(node)
        return node

    def kill(self, node: Node) -> None:
        """Takes a node away without a word: SIGKILL for its raylet and all its workers."""
        for process in node.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.name() == "raylet":
                    process.suspend()  # it starts no more workers while the list is made
        for process in node.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.process.wait()
        if node in self.nodes:
            self.nodes.remove(node)

    def _start(self, num_cpus: int, arguments: list[str]) -> Node:
        self._started += 1
        address = f"127.0.1.{self._started}"
        agent, metrics = free_ports(2)
        log = self._folder / f"node-{self._started}.log"
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", str(num_cpus),
            "--node-ip-address", address, "--dashboard-agent-listen-port", str(agent),
            "--metrics-export-port", str(metrics), "--object-store-memory", str(100 << 20),
            "--disable-usage-stats", "--temp-dir", str(self._folder), *arguments,
        ]  # fmt: skip
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=self.environment, stdout=file, stderr=file, start_new_session=True)
        if num_cpus:
            # Workers make as many threads as they see cores: two nodes with all of them would fight for each.
            cores = sorted(os.sched_getaffinity(0))
            chosen = {cores[(self._started + i) % len(cores)] for i in range(num_cpus)}
            os.sched_setaffinity(process.pid, chosen)
        node = Node(address, process)
        try:
            wait_until(lambda: "Ray runtime started" in log.read_text(), 60, log.read_text)
        except BaseException:
            self.kill(node)
            raise
        return node

    def stop(self) -> None:
        """Ends everything, and sees that it has ended."""
        for node in [*self.nodes, self.head]:
            self.kill(node)
        for process in self._left():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        wait_until(lambda: not self._left(), 60, lambda: f"still there: {self._left()}")

    def _left(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() != psutil.STATUS_ZOMBIE and any(
                    str(self._folder) in part for part in process.cmdline()
                ):
                    found.append(process)
        return found


@contextlib.contextmanager
def cluster(head_cpus: int = 1, **environment: str) -> Iterator[Cluster]:
    """A cluster for the length of a block; nothing of it is left behind.

    Args:
        head_cpus: CPUs that the head offers.
        environment: More environment variables for all nodes.
    """
    # Socket paths have a length limit.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        made = Cluster(Path(folder), head_cpus, environment)
        try:
            yield made
        finally:
            made.stop()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_until(condition: Callable[[], bool], seconds: float, told: Callable[[], str] = lambda: "in vain") -> None:
    """Waits for a condition.

    Raises:
        TimeoutError: It did not come.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s: {told()}")
        time.sleep(0.05)
