"""The plan on Ray Data: reading tasks that deliver ready micro-batches, in order.

One task reads the ranges of some grains, decodes, crops, and yields blocks of micro-batches. With
``preserve_order`` the blocks arrive in the plan's order, dealt round robin to the workers of a group.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, DataIterator
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
        self._reference, self._started = reference, started
        self._micro_bytes = stream.cut.rows * height * width * stream.view.channels
        layout = stream.layout
        self._tasks = [[layout.micro_batches(steps, group, block) for block in task] for task in layout.tasks(steps)]

    def get_name(self) -> str:
        return "Plan"

    def estimate_inmemory_data_size(self) -> int:
        return sum(self._num_micros(task) for task in self._tasks) * self._micro_bytes

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """The tasks as they were cut, whatever parallelism is asked for: Ray Data also asks to learn the sizes."""
        return [self._task(task, last=number == len(self._tasks) - 1) for number, task in enumerate(self._tasks)]

    def _task(self, blocks: list[list[list[int]]], last: bool) -> ReadTask:
        reference, started = self._reference, self._started if last else None

        def read() -> Iterable[pa.Table]:
            if started is not None:
                started()
            return read_blocks(_stream(reference), blocks)

        num = self._num_micros(blocks)
        metadata = BlockMetadata(
            num_rows=len(blocks), size_bytes=self._micro_bytes * num, input_files=None, exec_stats=None
        )
        return ReadTask(read, metadata)

    @staticmethod
    def _num_micros(blocks: list[list[list[int]]]) -> int:
        return sum(len(same) for views in blocks for same in views)

    @property
    def num_tasks(self) -> int:
        return len(self._tasks)


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
        node: Id of the node that should read; empty: any.
        started: Called in the last task when it begins: from then on the execution needs no more CPUs.

    Returns:
        One iterator for each worker of the group, in order.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    # Blocks below this size are merged with their neighbours, larger ones cut into rows: each of ours is one row.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    source = _PlanSource(stream, reference, steps, group, started)
    where = {"scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True)} if node else {}
    dataset = ray.data.read_datasource(
        source, override_num_blocks=source.num_tasks, num_cpus=num_cpus, ray_remote_args=where
    )
    return dataset.streaming_split(stream.cut.group_size, equal=False)


def receive(iterator: DataIterator) -> Iterator[pa.Table]:
    """A worker's blocks of one segment, in order."""
    # None means a block as it is; Ray's annotations do not know it.
    yield from iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)  # type: ignore[arg-type]
