"""What becomes of workers, told in the driver's terminal: why one was lost, and which setting mends it."""

import re
import threading
import time
from collections.abc import Collection
from typing import Any

import ray
import ray.train
from ray.exceptions import OutOfMemoryError

from pipelines.config import Config
from pipelines.training.job import GoBackError
from pipelines.training.memory import ran_out, setting

_NODE_SEEN_S = 120.0  # for so long after a worker's loss Ray is asked whether its node is lost too


class LostWorkers(ray.train.UserCallback):
    """Tells of workers that are lost. Ray Train calls it where it watches them.

    Args:
        console: The run's.
        config: The run's configuration.
    """

    def __init__(self, console: Any, config: Config):
        self._console, self._config = console, config
        self._told: dict[int, str] = {}

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Tells of each worker's error, once for as long as it stays the same."""
        lost = [rank for rank, error in worker_exceptions.items() if reason(error, self._config)]
        if lost:
            # Ray takes some seconds to notice it; nobody waits for that.
            threading.Thread(target=tell_lost_nodes, args=(self._console, lost), daemon=True).start()
        for rank, error in worker_exceptions.items():
            why = reason(error, self._config)
            if why and self._told.get(rank) != why:
                self._console.say.remote(f"worker {rank} is lost: {why}")
            self._told[rank] = why


def tell_lost_nodes(console: Any, ranks: Collection[int], patience_s: float = _NODE_SEEN_S) -> None:
    """Names the nodes whose loss took workers with them, as soon as Ray says that they are lost.

    Args:
        console: The run's.
        ranks: Of the workers that were lost.
        patience_s: How long Ray is asked.
    """
    places: dict[int, str] = ray.get(console.places.remote())  # pyright: ignore[reportAssignmentType]
    waiting = {places[rank] for rank in ranks if rank in places}
    end = time.monotonic() + patience_s
    while waiting and time.monotonic() < end:
        for node in ray.nodes():
            if node["NodeID"] in waiting and not node["Alive"]:
                waiting.remove(node["NodeID"])
                there = ", ".join(str(rank) for rank in sorted(ranks) if places.get(rank) == node["NodeID"])
                console.say.remote(f"node {node['NodeManagerAddress']} is lost, and with it worker {there}")
        time.sleep(1.0)


def reason(error: BaseException, config: Config) -> str:
    """Why a worker was lost, in a line; empty where it has said so itself."""
    if isinstance(error, GoBackError):
        return ""
    cause = getattr(error, "health_check_failure", error)
    text = str(cause).strip()
    if isinstance(cause, OutOfMemoryError) or ran_out(text):
        return f"its node ran out of memory: {setting(config)}"
    if lost := re.search(r"\bits node has died\b|\bnode was terminated\b", text):
        # In the words of Ray, which says first that the actor died, and far below that, and where, its node did.
        address = re.search(r"^\s*ip: (\S+)", text, re.MULTILINE)
        detail = re.search(r"node was terminated(?: \w+)?: *([^\n]+)", text[lost.start() :])
        where = f"its node{f' {address[1]}' if address else ''} is lost"
        return f"{where}: {detail[1].strip()}" if detail else where
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":
        return "it no longer answers"
    return f"{type(cause).__name__}: {text.splitlines()[0] if text else 'no word'}"
