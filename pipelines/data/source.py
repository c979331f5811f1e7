"""The plan on Ray Data: reading tasks that deliver ready micro-batches, in order.

One task reads the ranges of some grains, decodes, crops, and yields blocks of micro-batches. With
``preserve_order`` the blocks arrive in the plan's order, dealt round robin to the workers of a group.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, DataIterator, ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.data.readers import Stream, read_blocks


class _PlanSource(Datasource):
    """Ray Data's view of a stretch of the plan: a task for each share, its blocks already whole.

    Args:
        stream: What to read.
        reference: The same in the object store.
        steps: First step, and the one after the last.
        group: The workers that it is for.
        started: Called by the last task when it begins.
    """

    def __init__(
        self,
        stream: Stream,
        reference: "ray.ObjectRef[Stream]",
        steps: tuple[int, int],
        group: int,
        started: Callable[[], Any],
    ):
        super().__init__()
        height, width = stream.view.image_size
        cut, layout = stream.cut, stream.layout
        self._reference, self._steps, self._group, self._started = reference, steps, group, started
        views = layout.turns_per_block * min(cut.repeats, steps[1] - steps[0])
        self._block_bytes = views * cut.rows * height * width * stream.view.channels
        self._tasks = layout.tasks(steps)

    def get_name(self) -> str:
        return "Plan"

    def estimate_inmemory_data_size(self) -> int:
        return sum(map(len, self._tasks)) * self._block_bytes

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """The tasks as they were cut, whatever parallelism is asked for: Ray Data also asks to learn the sizes."""
        return [self._task(task, last=number == len(self._tasks) - 1) for number, task in enumerate(self._tasks)]

    def _task(self, blocks: range, last: bool) -> ReadTask:
        read = _Read(self._reference, self._steps, self._group, blocks, self._started if last else None)
        size = self._block_bytes * len(blocks)
        return ReadTask(read, BlockMetadata(num_rows=len(blocks), size_bytes=size, input_files=None, exec_stats=None))

    @property
    def num_tasks(self) -> int:
        return len(self._tasks)


@dataclass(frozen=True)
class _Read:
    """What one task does. Small, and pickled by name: an execution has thousands of them."""

    reference: "ray.ObjectRef[Stream]"
    steps: tuple[int, int]
    group: int
    blocks: range
    started: Callable[[], Any] | None

    def __call__(self) -> Iterable[pa.Table]:
        if self.started is not None:
            self.started()
        stream = _stream(self.reference)
        return read_blocks(
            stream, [stream.layout.micro_batches(self.steps, self.group, block) for block in self.blocks]
        )


@functools.lru_cache(maxsize=4)
def _stream(reference: "ray.ObjectRef[Stream]") -> Stream:
    """The stream in this process: a manifest of many shards takes a while to unpack."""
    return ray.get(reference)


def open_segment(
    stream: Stream,
    reference: "ray.ObjectRef[Stream]",
    steps: tuple[int, int],
    *,
    group: int,
    num_cpus: float,
    limit: float,
    node: str,
    started: Callable[[], Any],
) -> list[DataIterator]:
    """Starts one Ray Data execution over a stretch of steps, split among the workers of a group.

    Args:
        stream: What to read.
        reference: The same in the object store.
        steps: First step, and the one after the last.
        group: The group's number.
        num_cpus: CPUs that one reading task claims.
        limit: CPUs that all of its tasks may claim together; 0: those that are free.
        node: Id of the node that should read; empty: any.
        started: Called in the last task when it begins: from then on the execution needs no more CPUs.

    Returns:
        One iterator for each worker of the group, in order. A single worker runs the execution itself: it starts
        seconds earlier than an actor for it would, which imports as much as the worker has.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    # Blocks below this size are merged with their neighbours, larger ones cut into rows: each of ours is one row.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if limit:
        context.execution_options.resource_limits = ExecutionResources(cpu=limit)
    source = _PlanSource(stream, reference, steps, group, started)
    where = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)} if node else {}
    dataset = ray.data.read_datasource(
        source, override_num_blocks=source.num_tasks, num_cpus=num_cpus, ray_remote_args=where
    )
    size = stream.cut.group_size
    if size == 1:
        # It runs in this process, whose terminal may be the user's.
        logging.getLogger("ray.data").setLevel(logging.WARNING)
    return dataset.streaming_split(size, equal=False) if size > 1 else [dataset.iterator()]


def receive(iterator: DataIterator) -> Iterator[pa.Table]:
    """A worker's blocks of one segment, in order."""
    # None means a block as it is; Ray's annotations do not know it.
    yield from iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)  # type: ignore[arg-type]
