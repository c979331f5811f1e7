"""Processes of a cluster, found by a mark in their environment, and what they need: free ports, patience."""

import contextlib
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil

# Every process of a cluster inherits it: CLUSTER/MEMBER/.
MARK = "MAE_LOCAL_CLUSTER"
# Below the ports that the system hands out by itself, and above those that Ray gives its workers.
_PORTS = (20_000, 32_000)
_EXEC_TRIES = 5


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at any address of this machine."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("", random.randint(*_PORTS)))
                found.append(one.getsockname()[1])
        return found


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


def marked(mark: str, ray_dir: Path | None = None) -> list[psutil.Process]:
    """The processes whose mark begins so, and all that descend from them.

    Args:
        mark: ``CLUSTER/`` or ``CLUSTER/MEMBER/``.
        ray_dir: Also those of Ray's workers that work below this folder: they write their title over their
            environment, and where the raylet was killed they descend from nobody.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.pid not in found and _is_marked(process, mark, ray_dir):
                for one in (process, *process.children(recursive=True)):
                    found[one.pid] = one
    return [process for process in found.values() if _runs(process)]


def _is_marked(process: psutil.Process, mark: str, ray_dir: Path | None) -> bool:
    environment = process.environ()
    for _ in range(_EXEC_TRIES):
        # Between its birth and its first instruction a program has a file and no environment yet.
        if environment or not process.exe():
            break
        time.sleep(0.01)
        environment = process.environ()
    if MARK in environment or "PATH" in environment:
        return environment.get(MARK, "").startswith(mark)
    return ray_dir is not None and Path(process.cwd()).is_relative_to(ray_dir)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def process_name(process: psutil.Process) -> str:
    """The name of its program; empty where it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def kill(mark: str, ray_dir: Path | None = None, within_s: float = 30.0) -> None:
    """SIGKILL for all marked processes, until none is left.

    Args:
        mark: As in ``marked``.
        ray_dir: As in ``marked``.
        within_s: How long it may take, in seconds.

    Raises:
        TimeoutError: The system does not end them.
    """

    def gone() -> bool:
        left = marked(mark, ray_dir)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return not left

    wait_until(gone, within_s, lambda: f"still there: {marked(mark, ray_dir)}")
