"""What all ranks must know alike while they do steps: a step that went bad, a wish to stop, a node that will go.

Nobody is asked anything for it. Rank 0's wishes travel with the loss, in the step's own all-reduce, and come back with
the step's numbers; on a GPU these are read two steps late, when they have long been there, so that no step waits for
the host. All ranks read the numbers of the same step after the same step, and so they do the same thing.
"""

import threading
import time
from collections import deque
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError

BAD_STEPS_IN_A_ROW = 10  # after so many steps without a finite loss nothing comes back by itself
ASK_EVERY_S = 5.0  # Ray Train itself looks for nodes that will go as often
_LATE = 2  # steps, on a GPU

# Rank 0's wishes, as they travel.
_ASK, _STOP = 1, 2


class Guard:
    """Holds the ranks together.

    Args:
        rank: This worker's.
        console: Where the driver says that the run is to stop.
        device: Where the steps compute.
    """

    def __init__(self, rank: int, console: Any, device: torch.device):
        self._rank, self._device = rank, device
        self._late = _LATE if device.type == "cuda" else 0
        self._pending: deque[tuple[int, torch.Tensor, Any]] = deque()
        self._told = 0
        self._asked = time.monotonic()
        self._stop_wanted = threading.Event()
        self.row: list[int] = []
        """The present row of bad steps, whose loss or gradient was not finite, and which were skipped."""
        self.stop = False
        """Whether the run stops here."""
        self.seconds = 0.0
        """Time that all this took, summed up until somebody sets it back."""
        if rank == 0:
            threading.Thread(target=self._wait_for_stop, args=(console,), daemon=True).start()

    def _wait_for_stop(self, console: Any) -> None:
        try:
            ray.get(console.until_stopped.remote())
            self._stop_wanted.set()
        except RayError:  # the driver is gone, and this process soon will be
            return

    def wish(self) -> int:
        """What this rank sends along with its next step."""
        if self._rank:
            return 0
        wish = _STOP if self._stop_wanted.is_set() else 0
        if time.monotonic() - self._asked >= ASK_EVERY_S:
            self._asked = time.monotonic()
            wish |= _ASK
        return wish

    def heed(self, step: int, numbers_4: torch.Tensor) -> None:
        """Takes in a step's numbers.

        Args:
            step: Its number.
            numbers_4: What ``train_step`` gave.
        """
        began = time.perf_counter()
        if self._late:
            there = torch.empty(4, pin_memory=True)
            there.copy_(numbers_4, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append((step, there, event))
        else:
            self._pending.append((step, numbers_4, None))
        self._read(self._late)
        self.seconds += time.perf_counter() - began

    def catch_up(self) -> None:
        """Takes in the last steps' numbers too; for where the host waits for the device anyway."""
        self._read(0)

    def _read(self, leave: int) -> None:
        while len(self._pending) > leave:
            step, numbers_4, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            _, _, bad, wish = numbers_4.tolist()
            self.row = [*self.row, step] if bad else []
            self._told |= int(wish)
            self.stop |= bool(self._told & _STOP)

    def node_goes(self) -> str:
        """The node that will be taken away, as far as Ray Train knows; all ranks call it after the same step.

        Returns:
            Its id and how long it has, in words; empty where there is none, or where it is not time to ask.
        """
        if not self._told & _ASK:
            return ""
        self._told &= ~_ASK
        began = time.perf_counter()
        info = ray.train.get_preemption_info()
        self.seconds += time.perf_counter() - began
        if info is None:
            return ""
        left = f", in {max(0, info.deadline_ms / 1000 - time.time()):.0f} s" if info.deadline_ms else ""
        return f"node {', '.join(node[:8] for node in info.preempted_node_ids)} will be taken away{left}"
