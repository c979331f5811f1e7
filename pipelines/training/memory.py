"""Processes that Ray kills because a node's memory is nearly full: told, with the setting that mends it.

Ray starts them again without a word: reading tasks for as long as it takes. A run that lives on so is slow, and its
user would never know why.
"""

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.core.generated import common_pb2, gcs_pb2
from ray.exceptions import RayError

from pipelines.config import Config

LOOK_EVERY_S = 5.0
_OUT_OF_MEMORY = common_pb2.WorkerExitType.Value("NODE_OUT_OF_MEMORY")  # type: ignore[attr-defined]
# In the words of Ray's raylet, which lists with each process that it kills all that it could have killed.
_CHOSEN = r"Selected to kill: .*job ID=(?P<job>\w+),.*task name=(?P<name>[^,]+),.*worker ID={id}\)"


def setting(config: Config) -> str:
    """What a user can change about it."""
    return (
        f"lower batch.micro_size ({config.batch.micro_size}), or raise data.cpus_per_task "
        f"({config.data.cpus_per_task:g}) so that fewer tasks read at once"
    )


def ran_out(text: str) -> bool:
    """Whether an error's text is Ray's about a node's memory; that of a GPU is another matter."""
    return "running low on memory" in text or "memory pressure" in text


class Killed:
    """Finds the processes of a job that were killed for memory, each once.

    Args:
        job_id: The job.
    """

    def __init__(self, job_id: str):
        self._job_id = job_id
        self._known: set[bytes] = set()

    def news(self) -> dict[str, Counter[str]]:
        """What has been killed since the last call: how many processes by the name of their task, by node."""
        found: dict[str, Counter[str]] = {}
        # Ray's public interface to this needs a dashboard, which a Ray of our own does not start.
        for line in ray_state._connect_and_get_accessor().get_worker_table():
            worker = gcs_pb2.WorkerTableData.FromString(line)  # type: ignore[attr-defined]
            address = worker.worker_address
            if worker.exit_type != _OUT_OF_MEMORY or address.worker_id in self._known:
                continue
            self._known.add(address.worker_id)
            chosen = re.search(_CHOSEN.format(id=address.worker_id.hex()), worker.exit_detail)
            if chosen and chosen["job"] == self._job_id:
                found.setdefault(address.ip_address, Counter())[chosen["name"].removesuffix(".__init__")] += 1
        return found


@contextlib.contextmanager
def watch_memory(console: Any, config: Config) -> Iterator[None]:
    """Tells of what is killed during a block, from a thread.

    Workers are told of where they are replaced (``pipelines.training.lost``).

    Args:
        console: The run's.
        config: The run's configuration.
    """
    deaths = Killed(ray.get_runtime_context().get_job_id())
    done = threading.Event()

    def look() -> None:
        while not done.wait(LOOK_EVERY_S):
            with contextlib.suppress(RayError):
                for node, killed in deaths.news().items():
                    # A worker's loss is told of where it is replaced.
                    names = [f"{name} ({times})" for name, times in killed.items() if name != "RayTrainWorker"]
                    if names:
                        console.say.remote(
                            f"node {node} ran out of memory: Ray killed {', '.join(names)}, and does that again; "
                            f"{setting(config)}"
                        )

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(LOOK_EVERY_S)
