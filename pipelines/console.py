"""Lines from the workers in the driver's terminal, wherever they run."""

import asyncio
import threading
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(num_cpus=0)
class Console:
    """Carries lines from the workers to the driver's terminal, wherever they run."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._failure: tuple[str, int] | None = None
        self._stop = asyncio.Event()
        self._stopped_at: int | None = None
        self._finished = False
        self._scored: list[tuple[int, dict[str, float]]] = []
        self._goes_on_until = 0
        self._places: dict[int, str] = {}

    def say(self, line: str) -> None:
        """Adds a line."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return lines

    def fail(self, reason: str, code: int) -> None:
        """Notes why trying again is of no use; the first reason stands.

        Args:
            reason: The error in one line.
            code: What the command then exits with (``pipelines.errors``).
        """
        self._failure = self._failure or (reason, code)

    def failure(self) -> tuple[str, int] | None:
        """What was noted."""
        return self._failure

    def place(self, rank: int, node_id: str) -> None:
        """Notes on which Ray node a worker runs."""
        self._places[rank] = node_id

    def places(self) -> dict[int, str]:
        """Returns the ids of the workers' nodes, by rank."""
        return self._places

    async def stop(self) -> None:
        """Asks the run to stop at its next step."""
        self._stop.set()

    async def until_stopped(self) -> None:
        """Returns when the run is asked to stop."""
        await self._stop.wait()

    def is_stopped(self) -> bool:
        """Whether the run is asked to stop."""
        return self._stop.is_set()

    def stops_at(self, step: int) -> None:
        """Notes that all workers stop after a step."""
        self._stopped_at = step

    def stopped_at(self) -> int | None:
        """The steps done where all workers stop; None: they do not, or not yet."""
        return self._stopped_at

    def finish(self) -> None:
        """Notes that the run has come to its end."""
        self._finished = True

    def has_finished(self) -> bool:
        """Whether it has."""
        return self._finished

    def score(self, step: int, scores: dict[str, float]) -> None:
        """Shows a probe's scores to whoever judges the run.

        Args:
            step: Optimiser steps done.
            scores: By their names in the record.
        """
        self._scored.append((step, scores))

    def scored(self) -> list[tuple[int, dict[str, float]]]:
        """The scores since the last call."""
        scored, self._scored = self._scored, []
        return scored

    def judge(self, step: int) -> None:
        """Lets the run go on beyond its probe at a step; a negative one ends it there."""
        self._goes_on_until = step

    def verdict(self, step: int) -> bool | None:
        """Whether the run goes on beyond its probe at a step; None: nobody has said."""
        if self._goes_on_until < 0:
            return False
        return True if self._goes_on_until >= step else None


def make_console() -> Any:
    """A console beside this process: anywhere else it would be one more node whose loss ends the run."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Console.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


class Printer:
    """Prints a console's lines from a thread while the driver waits for the run."""

    def __init__(self, console: Any):
        self._console = console
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._done.wait(0.5):
            self._print()

    def _print(self) -> None:
        try:
            lines = ray.get(self._console.take.remote(), timeout=30)
        except RayError:
            return
        try:
            for line in lines:
                print(line, flush=True)
        except BrokenPipeError:
            # Nobody reads any more (`| head`): the run goes on all the same.
            self._done.set()

    def stop(self) -> None:
        """Prints what is left."""
        self._done.set()
        self._thread.join()
        self._print()
