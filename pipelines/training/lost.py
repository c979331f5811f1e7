"""What becomes of workers, told in the driver's terminal: why one was lost, and which setting mends it."""

import re
from typing import Any

import ray.train
from ray.exceptions import OutOfMemoryError

from pipelines.config import Config
from pipelines.training.job import GoBackError
from pipelines.training.memory import ran_out, setting


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
        for rank, error in worker_exceptions.items():
            why = reason(error, self._config)
            if why and self._told.get(rank) != why:
                self._console.say.remote(f"worker {rank} is lost: {why}")
            self._told[rank] = why


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
