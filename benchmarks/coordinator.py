"""Measures how many blocks a second one Ray Data execution deals: ``python -m benchmarks.coordinator``.

Micro-batches of one tiny image, a block each: next to nothing is decoded, so that what is left is the cost of a
block in the reading tasks, the coordinator and the readers.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import psutil
import ray
import tyro
from pydantic import BaseModel, ConfigDict, Field

from pipelines.cli import parse
from pipelines.data import layout
from pipelines.data.desk import Desk
from pipelines.data.feed import Crew, Feed
from pipelines.data.layout import Layout
from pipelines.data.plan import Cut, Plan
from pipelines.data.readers import Stream, View
from pipelines.data.shards import load_manifest
from pipelines.errors import run_command
from pipelines.ray_session import connect


class Coordinator(BaseModel):
    """Measures the blocks a second that one split coordinator deals to some readers."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    data: str
    """Shards of tiny images."""
    workers: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of readers, each a process of its own."""
    seconds: float = Field(default=10.0, gt=0)
    """How long each is measured, from the first block on."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


@ray.remote(num_cpus=0)
def read(crew: Crew, stream: Stream, seconds: float) -> tuple[int, float, float]:
    """Blocks that one worker received, when its first one came, and when it stopped."""
    feed = Feed(stream, (0, 1_000_000), crew=crew, num_tasks=16)
    next(feed)
    start, count = time.time(), 0
    while time.time() - start < seconds:
        next(feed)
        count += 1
    return count, start, time.time()


def measure(args: Coordinator, workers: int) -> dict[str, float]:
    """Blocks a second over all workers, and CPU seconds a second of the coordinator."""
    manifest = load_manifest(args.data)
    stream = Stream(manifest, Plan(manifest.num_samples, 0), Cut(workers, 1, workers), View((8, 8), 3))
    assert stream.layout == Layout(stream.cut, 1, layout.GRAIN * layout.MOST_TASK_GRAINS)
    desk: Any = Desk.remote(workers)  # type: ignore[attr-defined]
    readers = [read.remote(Crew(rank, workers, desk, 0.5), stream, args.seconds) for rank in range(workers)]
    time.sleep(args.seconds / 2)
    busy: dict[psutil.Process, float] = {}
    for process in psutil.process_iter(["name"]):
        if process.info["name"].startswith("ray::SplitCoord"):
            times = process.cpu_times()
            busy[process] = times.user + times.system
    since = time.perf_counter()
    counts = ray.get(readers)
    share = 0.0
    for process, before in busy.items():
        times = process.cpu_times()
        share = max(share, (times.user + times.system - before) / (time.perf_counter() - since))
    ray.kill(desk)
    return {
        "blocks_per_s": sum(count / (stop - start) for count, start, stop in counts),
        "coordinator_cpu": share,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Coordinator, prog="python -m benchmarks.coordinator", argv=argv)
    layout.BLOCK_BYTES = 1
    results = {}
    with connect():
        for workers in args.workers:
            results[workers] = measure(args, workers)
            print(
                f"{workers:>3} readers  {results[workers]['blocks_per_s']:8.1f} blocks/s  "
                f"coordinator {100 * results[workers]['coordinator_cpu']:.0f} % of a core",
                flush=True,
            )
    if args.output:
        Path(args.output).write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
