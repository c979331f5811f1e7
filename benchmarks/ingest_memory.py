"""What memory the pipeline takes: the peak over all of its processes, with few and with many shards."""

import os
import threading
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ingest_data import Images

_EVERY_S = 0.25


def footprint(pid: int) -> int:
    """Bytes that a process and its descendants hold, what they share counted once.

    Shared memory (Ray's object store) counts by the blocks of its files, mapped by anybody or not.
    """
    total, files = 0, {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            fields = dict(
                line.split(":") for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().split("\n")[1:-1]
            )
            total += sum(1024 * int(fields[name].split()[0]) for name in ("Pss_Anon", "Pss_File"))
            for link in Path(f"/proc/{process.pid}/fd").iterdir():
                if str(link.readlink()).startswith("/dev/shm/"):
                    status = link.stat()
                    files[status.st_dev, status.st_ino] = 512 * status.st_blocks
        except (OSError, psutil.NoSuchProcess):
            continue  # it has ended meanwhile
    return total + sum(files.values())


class _Peak:
    """The highest footprint of this process's tree while a block runs."""

    def __enter__(self) -> "_Peak":
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_S):
            self.peak = max(self.peak, footprint(os.getpid()))


def memory_of(images: Images, num_batches: int, cores: Sequence[int]) -> dict[str, Any]:
    """Reads batches on a Ray of its own, in a process of its own.

    Returns:
        ``peak_mib``, ``spilled_bytes``, ``shards``, ``batches`` and ``seconds``.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_consume, args=(theirs, images, num_batches, list(cores)))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        raise RuntimeError("the process that reads for the measurement of memory died") from None
    finally:
        process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _consume(connection: Connection, images: Images, num_batches: int, cores: list[int]) -> None:
    from benchmarks.ingest_on_ray import local_ray, ours

    try:
        with local_ray(cores):
            start = time.perf_counter()
            with _Peak() as watch:
                batches = sum(1 for _ in ours(images, num_batches * images.batch))
            answer = {
                "peak_mib": watch.peak / 2**20,
                "spilled_bytes": _spilled_bytes(),
                "shards": len(images.manifest.shard_names),
                "batches": batches,
                "seconds": time.perf_counter() - start,
            }
    except Exception as error:
        connection.send(error)
    else:
        connection.send(answer)


def _spilled_bytes() -> int:
    """What this Ray's object store has ever written to disk."""
    import ray
    from ray._private.internal_api import node_stats

    (node,) = ray.nodes()
    return int(node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats.spilled_bytes_total)
