"""How fast batches arrive, what CPU time that takes, and whether somebody else had the cores meanwhile."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil


@dataclass(frozen=True)
class Turn:
    """What one arm did in one turn.

    Attributes:
        images_per_s: Images a second, from the first batch on.
        cpu_s_per_1000: CPU-seconds of all the arm's processes for a thousand images.
        first_batch_s: From calling the pipeline to its first batch.
        images: Images that arrived while it was measured.
        seconds: How long it was measured.
        foreign: Share of the cores' time that other processes, or other machines on the same host, had.
    """

    images_per_s: float
    cpu_s_per_1000: float
    first_batch_s: float
    images: int
    seconds: float
    foreign: float


def cpu_times(pid: int, without: Sequence[int] = ()) -> dict[int, float]:
    """CPU-seconds so far of a process and each of its descendants.

    Args:
        pid: The process.
        without: Processes that, with their own descendants, do not count.
    """
    seconds: dict[int, float] = {}
    waiting = [psutil.Process(pid)]
    while waiting:
        process = waiting.pop()
        try:
            times = process.cpu_times()
            waiting += [child for child in process.children() if child.pid not in without]
        except psutil.NoSuchProcess:
            continue
        seconds[process.pid] = times.user + times.system
    return seconds


def spent(before: dict[int, float], after: dict[int, float]) -> float:
    """CPU-seconds between two looks. Of what ended between them nothing is known: it counts as nothing."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def busy_seconds(cores: Sequence[int]) -> float:
    """Time that cores have worked since the machine started, for whomever; the hypervisor's share counts too."""
    times: Any = psutil.cpu_times(percpu=True)
    # A guest's time is in "user" already.
    return sum(
        sum(value for name, value in times[core]._asdict().items() if not name.startswith(("idle", "iowait", "guest")))
        for core in cores
    )


def slope(times_N: np.ndarray, counts_N: np.ndarray) -> float:
    """Images a second: the least-squares slope of the staircase of what has arrived.

    Some arms deliver in bursts (all that a task has made, at once). Where a burst happens to fall at the ends of the
    window would decide a quotient of images over time; it moves the slope of all arrivals much less.

    Args:
        times_N: When each batch arrived, in seconds.
        counts_N: Images in each batch.
    """
    grid = np.linspace(times_N[0], times_N[-1], 4096)
    # The first batch opens the clock: it was made before.
    arrived = np.cumsum(counts_N) - counts_N[0]
    return float(np.polyfit(grid - grid[0], arrived[np.searchsorted(times_N, grid, side="right") - 1], 1)[0])


def measure(
    start: Callable[[], Iterator[int]],
    seconds: float,
    *,
    cores: Sequence[int],
    root: int,
    without: Sequence[int] = (),
    drain: bool = False,
) -> Turn:
    """Consumes batches for some seconds after the first has come; nothing is done with them.

    Args:
        start: Calls the pipeline; gives the number of images of each batch.
        seconds: How long, from the first batch on.
        cores: The cores that all this runs on.
        root: The benchmark's first process: what it and its descendants use is not foreign.
        without: Children of this process that do not belong to the arm.
        drain: What is left after that time is consumed to its end, unmeasured.
    """
    called = time.perf_counter()
    batches = start()
    counts = [next(batches)]
    times = [time.perf_counter()]
    own, everyone, busy = cpu_times(os.getpid(), without), cpu_times(root), busy_seconds(cores)
    for count in batches:
        counts.append(count)
        times.append(time.perf_counter())
        if times[-1] - times[0] > seconds:
            break
    own_s, everyone_s = spent(own, cpu_times(os.getpid(), without)), spent(everyone, cpu_times(root))
    busy = busy_seconds(cores) - busy
    wall = time.perf_counter() - times[0]
    if drain:
        for _ in batches:
            pass
    images_per_s = slope(np.array(times), np.array(counts))
    return Turn(
        images_per_s=images_per_s,
        cpu_s_per_1000=1000 * own_s / max(images_per_s * wall, 1.0),
        first_batch_s=times[0] - called,
        images=sum(counts[1:]),
        seconds=wall,
        foreign=max(0.0, busy - everyone_s) / (wall * len(cores)),
    )


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}
