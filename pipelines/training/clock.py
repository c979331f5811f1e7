"""Where the time of training steps goes: data, forward, backward, communication, optimiser."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

PARTS = ("data", "forward", "backward", "communication", "optimizer")


class StepClock:
    """Adds up what each part of a step takes; the loop asks once in a while.

    On a CPU every step is timed. On a GPU events are put among the kernels of one step between two readings, the
    second: in the first the host has to get ahead again. Nobody waits for them: whoever reads has waited for the device
    already, since it has the losses. So the data's part is how long the device had to wait, not the host.

    Args:
        device: Where the steps compute.
        clock: Seconds, on a CPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        self._device, self._on_gpu, self._clock = device, device.type == "cuda", clock
        self._restart()

    def _restart(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._last = 0.0
        self._steps = 0
        self._events: list[tuple[str, Any]] = []

    def begin(self) -> None:
        """A step begins: what follows belongs to the first part that is marked."""
        if self._on_gpu and self._steps == 1:
            self._events = []  # those of the first step, in case there is no second one
        self._steps += 1
        self._stamp("")

    def mark(self, part: str) -> None:
        """What was done since the last mark belongs to this part."""
        self._stamp(part)

    def _stamp(self, part: str) -> None:
        if not self._on_gpu:
            now = self._clock()
            if part:
                self._seconds[part] += now - self._last
            self._last = now
        elif self._steps <= 2:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append((part, event))

    def take(self) -> dict[str, float]:
        """Mean seconds of a step that each part took since the last time; on a GPU after a wait for the device."""
        steps, seconds = self._steps, self._seconds
        if self._on_gpu:
            steps = 1
            for (_, before), (part, event) in zip(self._events, self._events[1:], strict=False):
                seconds[part] += before.elapsed_time(event) / 1000
        self._restart()
        return {part: value / max(1, steps) for part, value in seconds.items()}

    def watch(self, model: DistributedDataParallel) -> None:
        """Tells a wrapped model's backward pass from what its all-reduce adds: the wait behind the last gradient.

        Most gradients travel while others are still computed, and cost nothing. So the clock counts from when the last
        bucket of gradients is full to the end of the backward pass, waiting for slower workers included.
        """
        model.register_comm_hook(self, _all_reduce)


def _all_reduce(
    clock: StepClock,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]  # documented, and in no list of exports
) -> torch.futures.Future[torch.Tensor]:
    """The mean of gradients over the workers, bit for bit as DDP takes it without a hook."""
    if bucket.is_last():
        clock.mark("backward")
    # DDP multiplies too, and not divides.
    gradients = bucket.buffer().mul_(1.0 / dist.get_world_size())
    work = dist.all_reduce(gradients, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
