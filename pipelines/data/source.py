"""The plan on Ray Data: reading tasks that deliver ready micro-batches, in order.

One task reads the ranges of some grains, decodes, crops, and yields one row a micro-batch, so that Ray Data moves
few large blocks. With ``preserve_order`` the blocks arrive in the plan's order, dealt round robin to the workers;
each says which step and samples it holds.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import DataContext, DataIterator
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipelines.data.readers import MicroBatch, Stream, parse_micro_batch, read_micro_batches


class _PlanSource(Datasource):
    """Ray Data's view of a stretch of the plan: a task for each share, its blocks already whole."""

    def __init__(self, stream: Stream, tasks: list[range]):
        super().__init__()
        self._stream = ray.put(stream)
        self._tasks = tasks
        height, width = stream.view.image_size
        self._block_bytes = stream.cut.rows * height * width * stream.view.channels

    def get_name(self) -> str:
        return "Plan"

    def estimate_inmemory_data_size(self) -> int:
        return self._block_bytes * sum(len(task) for task in self._tasks)

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: DataContext | None = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """The tasks as they were cut, whatever parallelism is asked for: Ray Data also asks to learn the sizes."""
        return [self._task(task) for task in self._tasks]

    def _task(self, indices: range) -> ReadTask:
        reference = self._stream

        def read() -> Iterable[pa.Table]:
            return read_micro_batches(ray.get(reference), indices)

        metadata = BlockMetadata(
            num_rows=len(indices), size_bytes=self._block_bytes * len(indices), input_files=None, exec_stats=None
        )
        return ReadTask(read, metadata)


def open_segment(stream: Stream, steps: tuple[int, int], *, num_cpus: float) -> list[DataIterator]:
    """Starts one Ray Data execution over a stretch of steps, split among the workers.

    Args:
        stream: What to read.
        steps: First step, and the one after the last.
        num_cpus: CPUs that one reading task claims.

    Returns:
        One iterator for each worker: worker ``r`` receives micro-batches ``r, r + W, ...`` of the stretch.
    """
    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    # Blocks below this size are merged with their neighbours; each of ours must stay one micro-batch.
    context.target_max_block_size = 1
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    tasks = list(stream.cut.tasks(*steps))
    dataset = ray.data.read_datasource(_PlanSource(stream, tasks), override_num_blocks=len(tasks), num_cpus=num_cpus)
    return dataset.streaming_split(stream.cut.world_size, equal=False)


def receive(iterator: DataIterator, stream: Stream) -> Iterator[MicroBatch]:
    """A worker's micro-batches of one segment, in order."""
    # None means a block as it is; Ray's annotations do not know it.
    batches: Any = iterator.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)  # type: ignore[arg-type]
    for table in batches:
        assert table.num_rows == 1, f"a block holds {table.num_rows} micro-batches: Ray Data merged blocks"
        yield parse_micro_batch(table, stream)


class Segments:
    """A stream's Ray Data executions, opened by all workers together: rank 0 starts each and deals the shares.

    Args:
        stream: What to read.
        rank: This worker's rank.
        num_cpus: CPUs that one reading task claims.
        broadcast: Gives rank 0's value to all workers; called by all of them.
    """

    def __init__(self, stream: Stream, *, rank: int, num_cpus: float, broadcast: Callable[[Any], Any]):
        self.stream = stream
        self.rank = rank
        self._num_cpus = num_cpus
        self._broadcast = broadcast
        self._opened: list[DataIterator] = []
        self._ahead: _Later | None = None

    def prepare(self, steps: tuple[int, int]) -> None:
        """Begins to start an execution in the background, on rank 0; ``open`` of the same steps will find it."""
        if self.rank == 0:
            self._ahead = _Later(lambda: open_segment(self.stream, steps, num_cpus=self._num_cpus))

    def open(self, steps: tuple[int, int]) -> DataIterator:
        """This worker's share of the steps; all workers call it at the same point of their work.

        The broadcast belongs to the workers' main threads: it has no names, and two at once would change places.
        """
        shares = None
        if self.rank == 0:
            ahead, self._ahead = self._ahead, None
            shares = ahead.result() if ahead else open_segment(self.stream, steps, num_cpus=self._num_cpus)
        shares = self._broadcast(shares)
        if self.rank == 0:
            self._opened.append(shares[0])
            # All workers are here, so all are done with what came before the last segment.
            self._end(self._opened[:-2])
            del self._opened[:-2]
        return shares[self.rank]

    def close(self) -> None:
        """Ends what is still open; for when all workers have read to the end."""
        self._end(self._opened)
        self._opened = []

    @staticmethod
    def _end(shares: list[DataIterator]) -> None:
        # Ray keeps an execution's coordinator, an actor of some 700 MB resident, for as long as the job lives.
        for share in shares:
            ray.kill(share._coord_actor)  # type: ignore[attr-defined]


def stream_batches(
    segments: Segments, steps: tuple[int, int], *, num_tasks: int, break_every: int = 0
) -> Iterator[MicroBatch]:
    """A worker's micro-batches of a whole run, over as many Ray Data executions as it takes.

    The next execution is started from a thread while the last quarter of the present one is consumed, so that
    little waits where they change. Every micro-batch is held against the plan: its number and its samples.

    Args:
        segments: The stream and its executions.
        steps: First step, and the one after the last.
        num_tasks: Reading tasks in one execution.
        break_every: After each multiple of so many steps nothing is being read; 0: no such pause.

    Raises:
        RuntimeError: What arrived is not what the plan says.
    """
    stream, cut = segments.stream, segments.stream.cut
    stretches = list(cut.segments(*steps, num_tasks, break_every))
    for number, (start, stop) in enumerate(stretches):
        batches = receive(segments.open((start, stop)), stream)
        ahead = stop - max(1, (stop - start) // 4)
        for step in range(start, stop):
            if step == ahead and number + 1 < len(stretches):
                segments.prepare(stretches[number + 1])
            for turn in range(cut.accumulation):
                expected = step * cut.micros + turn * cut.world_size + segments.rank
                yield _checked(stream, expected, next(batches, None))
        if next(batches, None) is not None:
            raise RuntimeError(f"the data of steps {start} to {stop - 1} holds more than the plan says")


def _checked(stream: Stream, expected: int, batch: MicroBatch | None) -> MicroBatch:
    if batch is None or batch.index != expected:
        found = "nothing" if batch is None else f"number {batch.index}"
        raise RuntimeError(f"the plan's next micro-batch is number {expected}, but {found} arrived")
    _, sample_B, _ = stream.cut.micro_batch(stream.plan, expected)
    if not np.array_equal(sample_B, batch.sample_B):
        raise RuntimeError(f"micro-batch {expected} does not hold the samples that the plan says")
    return batch


class _Later:
    """The result of a call that runs in a thread of its own."""

    def __init__(self, call: Callable[[], list[DataIterator]]):
        self._value: list[DataIterator] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], list[DataIterator]]) -> None:
        try:
            self._value = call()
        except BaseException as error:  # handed to the thread that asks
            self._error = error

    def result(self) -> list[DataIterator]:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._value is not None
        return self._value
