"""One optimiser step of a transfer, whatever it learns."""

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.randomness import Purpose, hash_u64
from pipelines.data.plan import Cut
from pipelines.data.readers import MicroBatch

if TYPE_CHECKING:
    from pipelines.training.transfer_worker import Worker


class Task(Protocol):
    """What is learned: ``Classification`` is one."""

    def model(self, seed: int, *, random: bool = False) -> nn.Module:
        """What a seed begins with, on the worker's device: with the pretrained encoder, or with a random one."""
        ...

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Its optimiser, every rate 0; a group's rate is the schedule's times its ``lr_scale``, 1 where it has none."""
        ...

    def loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The losses of a micro-batch's samples, each times its weight, summed; may draw from global generators."""
        ...

    def confusion(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The confusion matrix [C, C] of a micro-batch, int64 on the CPU: rows true, columns predicted."""
        ...

    def score(self, confusion_CC: torch.Tensor) -> float:
        """What the protocol is scored by, in percent."""
        ...

    def sheet(self, model: nn.Module, batch: MicroBatch) -> Image.Image | None:
        """A picture of what the model makes of some images; None where there is nothing to see."""
        ...

    def flops(self, model: Any) -> int:
        """Of one training step a sample."""
        ...


class Step:
    """One optimiser step over the global batch; every sample weighs 1 over it, whoever computes it.

    It is skipped by all workers where the loss or a gradient is not finite.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, cut: Cut, worker: "Worker", task: Task, seed: int
    ):
        self._model, self._optimizer, self._cut = model, optimizer, cut
        self._worker, self._task, self._seed = worker, task, seed

    def __call__(self, step: int, batches: Iterator[MicroBatch], lr: float, wish: int = 0) -> torch.Tensor:
        """Takes the step's micro-batches.

        Args:
            step: Its number.
            batches: This worker's.
            lr: The schedule's learning rate.
            wish: A small number that is summed over all workers.

        Returns:
            float32 [4] on the device, as ``train_step`` gives it: loss, gradient norm, 1 where the step was skipped,
            wishes.
        """
        cut, worker = self._cut, self._worker
        for group in self._optimizer.param_groups:
            scaled = lr * group.get("lr_scale", 1.0)
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(scaled)
            else:
                group["lr"] = scaled
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=worker.device)
        # The statistics of a BatchNorm: few numbers, of the head alone.
        before = [buffer.clone() for buffer in self._model.buffers()]
        for turn in range(cut.accumulation):
            batch = next(batches)
            worker.left_out(batch.skipped)
            self._draw_anew(step, turn)
            model, last = self._model, turn == cut.accumulation - 1
            apart = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else None
            with apart or contextlib.nullcontext():
                loss = self._task.loss(self._model, batch) / (cut.global_size / cut.world_size)
                loss.backward()
            total += loss.detach() / cut.world_size
        sums_2 = torch.stack([total, torch.full_like(total, wish)])
        if cut.world_size > 1:
            dist.all_reduce(sums_2)
        total, wishes = sums_2
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])
        # The same on all workers, so all decide alike.
        bad = (~(torch.isfinite(total) & torch.isfinite(grad_norm))).float()
        if self._optimizer.defaults.get("fused"):
            self._optimizer.found_inf = bad  # type: ignore[attr-defined]  # leaves its state alone where it is 1
            self._optimizer.step()
        elif not bad:
            # LARS, which knows nothing of it: the host waits, once in a step of many micro-batches.
            self._optimizer.step()
        for buffer, value in zip(self._model.buffers(), before, strict=True):
            buffer.copy_(torch.where(bad > 0, value, buffer))
        return torch.stack([total, grad_norm, bad, wishes])

    def _draw_anew(self, step: int, turn: int) -> None:
        """Mixup, erasing and drop path draw from the global generators: seeded here by (seed, step, turn, rank)."""
        key = int(hash_u64(Purpose.MIX, self._seed, step, turn, self._worker.rank))
        random.seed(key)
        np.random.seed(key & 0xFFFFFFFF)
        torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)
