"""Measures how many blocks a second one Ray Data execution deals: ``python -m benchmarks.coordinator --data SHARDS``.

Micro-batches of one tiny image, a block each: next to nothing is decoded, so that what is left is the cost of a
block in the reading tasks, the coordinator and the readers. They share this machine's cores, so how many blocks are
dealt says little of larger ones; what the coordinator spends on a block says where it would end with a core of its own.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import ray
import tyro
from pydantic import BaseModel, ConfigDict, Field

from benchmarks.ingest_on_ray import local_ray
from cluster.processes import wait_until
from pipelines.cli import parse
from pipelines.data.desk import Desk
from pipelines.data.feed import Crew, Feed
from pipelines.data.layout import Layout
from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import Stream, View
from pipelines.data.shards import load_manifest
from pipelines.errors import run_command

BLOCKS_PER_TASK = 16  # as of photos on 16 workers
NUM_TASKS = 2048  # of one execution: none ends while it is measured
STEPS = (0, 1_000_000)
CPUS_PER_TASK = 0.5


class Coordinator(BaseModel):
    """Measures the blocks a second that one split coordinator deals to some readers, and what a block costs it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str
    """Shards of tiny images."""
    workers: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2, 4, 8)
    """Numbers of readers, each a process of its own."""
    seconds: float = Field(default=10.0, gt=0)
    """How long each is measured, when its blocks flow."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


class _Stream(Stream):
    """A stream with a block for each micro-batch, however small."""

    @property
    def layout(self) -> Layout:  # type: ignore[override]
        return Layout(self.cut, 1, BLOCKS_PER_TASK)


@ray.remote(num_cpus=0)
class Reader:
    """One worker, which does nothing with its blocks.

    Args:
        crew: Its place among the workers.
        stream: What to read.
    """

    def __init__(self, crew: Crew, stream: Stream):
        self._feed = Feed(stream, STEPS, crew=crew, num_tasks=NUM_TASKS)

    def read(self, seconds: float) -> int:
        """Takes blocks for some seconds, one at least; returns how many."""
        end, count = time.perf_counter() + seconds, 0
        while not count or time.perf_counter() < end:
            next(self._feed)
            count += 1
        return count

    def close(self) -> None:
        """Ends the execution; all call it."""
        self._feed.close()


def measure(args: Coordinator, workers: int) -> dict[str, float]:
    """One number of readers, on an execution of its own, of which nothing is left afterwards.

    Returns:
        ``blocks_per_s`` over all readers; ``coordinator_cpu``, CPU-seconds a second of the coordinator;
        ``coordinator_ms``, its CPU-milliseconds a block; ``limit_blocks_per_s``, extrapolated from there: the blocks
        that would take it a whole core.
    """
    manifest = load_manifest(args.data)
    stream = _Stream(manifest, Plan(manifest.num_samples, 0), Cut(workers, 1, workers), View((8, 8), 3))
    desk: Any = Desk.remote(workers)  # type: ignore[attr-defined]
    readers: list[Any] = [Reader.remote(Crew(rank, workers, desk, CPUS_PER_TASK), stream) for rank in range(workers)]

    def all_readers(what: Callable[[Any], Any]) -> list[Any]:
        return ray.get([what(reader) for reader in readers])

    try:
        # When the blocks that were made before anybody took one are gone, as many come as are made.
        all_readers(lambda reader: reader.read.remote(args.seconds / 2))
        before, since = _cpu_seconds("SplitCoord"), time.perf_counter()
        blocks = sum(all_readers(lambda reader: reader.read.remote(args.seconds)))
        cpu_s, seconds = _cpu_seconds("SplitCoord") - before, time.perf_counter() - since
        all_readers(lambda reader: reader.close.remote())
    finally:
        for actor in (*readers, desk):
            ray.kill(actor)
        wait_until(lambda: not any(_processes(name) for name in ("SplitCoord", "ReadPlan", "Reader", "Desk")), 60)
    return {
        "blocks_per_s": blocks / seconds,
        "coordinator_cpu": cpu_s / seconds,
        "coordinator_ms": 1000 * cpu_s / blocks,
        "limit_blocks_per_s": blocks / cpu_s,
    }


def _processes(name: str) -> list[psutil.Process]:
    """The processes of this Ray whose work has a name that begins so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith(f"ray::{name}"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue  # it has ended meanwhile
    return found


def _cpu_seconds(name: str) -> float:
    """What they have used so far."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in _processes(name)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Coordinator, prog="python -m benchmarks.coordinator", argv=argv)
    results = {}
    with local_ray(sorted(os.sched_getaffinity(0))):
        for workers in args.workers:
            results[workers] = result = measure(args, workers)
            print(
                f"{workers:>3} readers  {result['blocks_per_s']:8.1f} blocks/s  coordinator "
                f"{result['coordinator_cpu']:4.0%} of a core, {result['coordinator_ms']:.2f} ms a block: with a whole "
                f"core {result['limit_blocks_per_s']:,.0f} blocks/s (extrapolated)",
                flush=True,
            )
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
