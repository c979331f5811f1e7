"""The actor at which a crew's executions are handed out."""

import asyncio
import contextlib
from typing import Any

import ray

Key = tuple[int, int, int]  # feed, segment, group


class _Segment:
    """What the desk knows of one execution."""

    def __init__(self) -> None:
        self.shares: list[Any] = []
        self.coordinator: Any = None
        self.num_readers = 0
        self.posted, self.started, self.left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.readers_left = 0


@ray.remote(num_cpus=0)
class Desk:
    """Hands executions from those who start them to those who read them; lives as long as rank 0.

    No worker's main thread waits for another here, so executions can change while the workers compute.
    """

    def __init__(self, world_size: int):
        self._world_size = world_size
        self._present: dict[int, Any] = {}
        self._all_present = asyncio.Event()
        self._segments: dict[Key, _Segment] = {}

    async def meet(self, rank: int, value: Any) -> list[Any]:
        """Waits for all workers; what each brings along, by rank."""
        self._present[rank] = value
        if len(self._present) == self._world_size:
            self._all_present.set()
        await self._all_present.wait()
        return [self._present[rank] for rank in range(self._world_size)]

    async def post(self, key: Key, shares: list[Any], coordinator: Any, num_readers: int) -> None:
        """Hands out an execution.

        Args:
            key: Which one.
            shares: A reference to its shares, in a list, so that they are not unpacked here: that takes much memory.
            coordinator: Its actor; None where the reference is to an exception.
            num_readers: Workers that will read it.
        """
        segment = self._segment(key)
        segment.shares, segment.coordinator, segment.num_readers = shares, coordinator, num_readers
        segment.posted.set()

    async def take(self, key: Key) -> list[Any]:
        """Waits for the reference to an execution's shares."""
        segment = self._segment(key)
        await segment.posted.wait()
        return segment.shares

    async def start(self, key: Key) -> None:
        """The execution's last task has begun."""
        self._segment(key).started.set()

    async def until_started(self, key: Key) -> None:
        """Waits until the execution needs no more CPUs."""
        await self._segment(key).started.wait()

    async def leave(self, key: Key) -> None:
        """A worker has read its share to the end; the last one ends the execution."""
        segment = self._segment(key)
        segment.readers_left += 1
        if segment.readers_left == segment.num_readers:
            segment.started.set()
            segment.left.set()
            await self._end(segment)

    async def until_left(self, key: Key) -> None:
        """Waits until all workers have read their shares to the end."""
        await self._segment(key).left.wait()

    async def give_up(self, feed: int, group: int) -> None:
        """Ends what a feed has left open."""
        for key, segment in list(self._segments.items()):
            if (key[0], key[2]) == (feed, group):
                segment.started.set()
                segment.left.set()
                await self._end(segment)

    def _segment(self, key: Key) -> _Segment:
        return self._segments.setdefault(key, _Segment())

    @staticmethod
    async def _end(segment: _Segment) -> None:
        # Without these references Ray ends it, which takes 700 MB along.
        coordinator, segment.coordinator, segment.shares = segment.coordinator, None, []
        if coordinator is not None:
            with contextlib.suppress(Exception):
                # Ended before it has given back what it had reserved, it would narrow those that come after it.
                await coordinator.shutdown_executor.remote()
