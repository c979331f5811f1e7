"""A worker's micro-batches over as many Ray Data executions as it takes, each begun before the last has ended.

The workers of a run form a *crew*. Each execution covers a *segment* of the plan. The next one starts when the last
reading task of the present one has begun: earlier its tasks could take the CPUs that the present one still needs,
and wait with them for somebody to take their output.
"""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.data.desk import Desk, Key
from pipelines.data.readers import MicroBatch, Stream, parse_block
from pipelines.data.source import open_segment, receive
from pipelines.errors import UserError

_BLOCKS_AHEAD = 2  # parsed and waiting in this worker, beside those that Ray Data holds for it

# A change of executions costs a second or so where decoding limits; a task takes a CPU about as long. So with this
# many tasks for each CPU an execution takes some minutes, on any cluster, and its change is under 1 % of it.
_TASKS_PER_CPU = 512
_MOST_TASKS = 8192  # what one coordinator has to hold; no execution is that short on clusters that reach it


@dataclass
class Crew:
    """This worker's place among those who share streams.

    Args:
        rank: Its rank.
        world_size: Workers.
        desk: Where executions are handed out.
        num_cpus: CPUs that one reading task claims.
        nodes: Node id of each group's workers, where groups are fed apart; else empty.
        segment_tasks: Reading tasks in one execution, about, where a feed is not told otherwise.
        limit: CPUs that the tasks of one execution may claim together; 0: those that are free.
    """

    rank: int
    world_size: int
    desk: Any
    num_cpus: float
    nodes: tuple[str, ...] = ()
    segment_tasks: int = _TASKS_PER_CPU
    limit: float = 0.0
    feeds: int = field(default=0, init=False)
    """Feeds made so far: the same on all workers, since all make the same ones in the same order."""

    @property
    def groups(self) -> int:
        """Groups of workers that are fed apart."""
        return len(self.nodes) or 1


def join_crew(
    rank: int,
    world_size: int,
    *,
    num_cpus: float,
    limit: float = 0.0,
    broadcast: Callable[[Any], Any] = lambda value: value,
    per_node: bool = False,
) -> Crew:
    """Brings the workers of a run together; all call it.

    Args:
        rank: This worker's rank; ranks of one node are neighbours.
        world_size: Workers.
        num_cpus: CPUs that one reading task claims.
        limit: CPUs that all reading tasks may claim together; 0: those that are free.
        broadcast: Gives rank 0's value to all workers.
        per_node: Feed the workers of each node by an execution of its own, where all nodes have equally many.
    """
    here = ray.get_runtime_context().get_node_id()
    made = None
    if rank == 0:
        # On rank 0's own node: anywhere else it would be one more node whose loss ends the attempt.
        place = NodeAffinitySchedulingStrategy(here, soft=False)
        desk = Desk.options(scheduling_strategy=place).remote(world_size)  # type: ignore[attr-defined]
        # CPUs come and go, and all must cut alike.
        made = desk, int(ray.cluster_resources().get("CPU", 1))
    desk, cpus = broadcast(made)
    nodes: tuple[str, ...] = ()
    if per_node and world_size > 1:
        by_rank = ray.get(desk.meet.remote(rank, here))
        distinct = tuple(dict.fromkeys(by_rank))
        size = world_size // len(distinct)
        if len(distinct) > 1 and by_rank == [node for node in distinct for _ in range(size)]:
            nodes = distinct
    tasks = min(_TASKS_PER_CPU * max(cpus // max(len(nodes), 1), 1), _MOST_TASKS)
    return Crew(rank, world_size, desk, num_cpus, nodes, tasks, limit / max(len(nodes), 1))


class Feed:
    """One worker's micro-batches of a stretch of steps, in order; each is held against the plan.

    Reading begins when all workers have made the feed. A feed that has been read to its end has ended; one that is
    given up must be closed.

    Args:
        stream: What to read.
        steps: First step, and the one after the last.
        crew: The workers.
        num_tasks: Reading tasks in one execution, about; 0: as many as take some minutes.

    Raises:
        UserError: A shard could not be read.
        RuntimeError: What arrived is not what the plan says.
    """

    def __init__(self, stream: Stream, steps: tuple[int, int], *, crew: Crew, num_tasks: int = 0):
        assert stream.cut.groups == crew.groups, "the stream was cut for other groups of workers"
        self.stream, self.crew, self.steps = stream, crew, steps
        self.group, self.member = divmod(crew.rank, stream.cut.group_size)
        self.segments = list(stream.layout.segments(steps, num_tasks or crew.segment_tasks))
        self.change_wait_s = 0.0
        """Seconds waited for the first block of each segment but the first."""
        self._number = crew.feeds
        crew.feeds += 1
        self._closed = threading.Event()
        self._queues: list[queue.Queue[Any]] = [queue.Queue(_BLOCKS_AHEAD) for _ in self.segments]
        self._receiving = 0
        self._batches = self._run()
        if self.segments:
            if self.member == 0:
                threading.Thread(target=self._deal, daemon=True).start()
            self._receive_next()

    def __iter__(self) -> Iterator[MicroBatch]:
        return self

    def __next__(self) -> MicroBatch:
        return next(self._batches)

    def close(self) -> None:
        """Ends the feed before its end; nothing happens where it has ended."""
        self._closed.set()
        if self.member == 0:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(self.crew.desk.give_up.remote(self._number, self.group))

    def _key(self, segment: int) -> Key:
        return self._number, segment, self.group

    def _run(self) -> Iterator[MicroBatch]:
        cut, rank = self.stream.cut, self.crew.rank
        for segment, (first, stop) in enumerate(self.segments):
            self._receive_next()
            blocks = self._blocks(segment)
            # Views of the same samples arrive together and are due in different steps.
            held: dict[int, MicroBatch] = {}
            for step in range(first, stop):
                for turn in range(cut.accumulation):
                    due = cut.index(step, turn, rank)
                    while due not in held:
                        block = next(blocks, None)
                        if block is None:
                            raise RuntimeError(f"the plan's next micro-batch is number {due}, but nothing more arrived")
                        for batch in block:
                            self._check(batch, first, stop, held)
                            held[batch.index] = batch
                    yield held.pop(due)
            if held or next(blocks, None) is not None:
                raise RuntimeError(f"the data of steps {first} to {stop - 1} holds more than the plan says")

    def _check(self, batch: MicroBatch, first: int, stop: int, held: dict[int, MicroBatch]) -> None:
        cut = self.stream.cut
        expected = cut.rank(batch.index) == self.crew.rank and first <= batch.index // cut.micros < stop
        if not expected or batch.index in held:
            raise RuntimeError(f"micro-batch {batch.index} arrived, which is not due on worker {self.crew.rank}")
        _, sample_B, _ = cut.micro_batch(self.stream.plan, batch.index)
        if not np.array_equal(sample_B, batch.sample_B):
            raise RuntimeError(f"micro-batch {batch.index} does not hold the samples that the plan says")

    def _blocks(self, segment: int) -> Iterator[list[MicroBatch]]:
        """A segment's blocks as the receiving thread hands them over."""
        first = True
        while True:
            began = time.perf_counter()
            block = self._queues[segment].get()
            if first and segment:
                self.change_wait_s += time.perf_counter() - began
            first = False
            if isinstance(block, BaseException):
                raise _told(block)
            if block is None:
                return
            yield block

    # ---- threads

    def _receive_next(self) -> None:
        if self._receiving < len(self.segments):
            threading.Thread(target=self._receive, args=(self._receiving,), daemon=True).start()
            self._receiving += 1

    def _receive(self, segment: int) -> None:
        """Takes this worker's share of a segment, and its blocks as there is room for them.

        An execution begins to read when all of its workers have asked for the first block.
        """
        desk, key = self.crew.desk, self._key(segment)
        try:
            (reference,) = ray.get(desk.take.remote(key))
            shares = ray.get(reference)
            if isinstance(shares, BaseException):
                raise shares
            if segment:
                ray.get(desk.until_started.remote(self._key(segment - 1)))
            for table in receive(shares[self.member]):
                if not self._put(segment, parse_block(table, self.stream)):
                    return
            desk.leave.remote(key)
            self._put(segment, None)
        except BaseException as error:  # handed to the one who reads
            self._put(segment, error)

    def _put(self, segment: int, block: Any) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queues[segment].put(block, timeout=0.5)
                return True
        return False

    def _deal(self) -> None:
        """Makes the group's executions, each while the one before it is being read, and hands them out."""
        desk, crew, segment = self.crew.desk, self.crew, 0
        try:
            reference = ray.put(self.stream)
            for segment, steps in enumerate(self.segments):
                if segment > 1:
                    ray.get(desk.until_left.remote(self._key(segment - 2)))
                if self._closed.is_set():
                    return
                key = self._key(segment)
                shares = open_segment(
                    self.stream,
                    reference,
                    steps,
                    group=self.group,
                    num_cpus=crew.num_cpus,
                    limit=crew.limit,
                    node=crew.nodes[self.group] if crew.nodes else "",
                    started=_Started(desk, key),
                )
                coordinator = shares[0]._coord_actor if len(shares) > 1 else None  # type: ignore[attr-defined]
                ray.get(desk.post.remote(key, [ray.put(shares)], coordinator, len(shares)))
        except BaseException as error:  # handed to those who wait
            with contextlib.suppress(ray.exceptions.RayActorError):  # unless the crew has gone
                ray.get(desk.post.remote(self._key(segment), [ray.put(error)], None, 0))


@dataclass(frozen=True)
class _Started:
    """Tells the desk that a segment's last task has begun."""

    desk: Any
    key: Key

    def __call__(self) -> None:
        self.desk.start.remote(self.key)


def _told(error: BaseException) -> BaseException:
    """What went wrong, out of the layers that Ray wraps around it."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, UserError) and not isinstance(inner, ray.exceptions.RayTaskError):
            # Ray Data adds advice of its own.
            return UserError(str(inner).splitlines()[0])
        inner = getattr(inner, "cause", None) or inner.__cause__
    return error
