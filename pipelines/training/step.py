"""One optimiser step, on one screen. Evaluation, saving and logging stand around it, not in it."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mae_core.images import normalize
from mae_core.masking import Masking
from mae_core.optim import set_lr
from pipelines.data.plan import FILLER, Cut
from pipelines.data.readers import MicroBatch
from pipelines.training.clock import StepClock
from pipelines.training.upload import Upload


def precision(name: str, device: torch.device) -> torch.dtype:
    """The type that matrices are multiplied in, by a configuration's ``train.precision``."""
    bfloat16 = name == "bfloat16" or (name == "auto" and device.type == "cuda")
    return torch.bfloat16 if bfloat16 else torch.float32


def autocast(name: str, device: torch.device) -> torch.autocast:
    """The context of a forward pass in a configuration's ``train.precision``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision(name, device) == torch.bfloat16)


@dataclass
class Trainer:
    """What a training step needs and changes.

    Args:
        model: The method: takes a batch, gives a dictionary with ``loss``. Wrapped for the workers' all-reduce
            where there are several.
        optimizer: Fused AdamW.
        cut: How batches are cut.
        masking: How masks are drawn.
        seed: The run's seed.
        mean_C: Mean of each channel, on the device.
        std_C: Standard deviation of each channel, on the device.
        device: Where the step computes.
        autocast: Gives the context of the forward pass.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    cut: Cut
    masking: Masking
    seed: int
    mean_C: torch.Tensor
    std_C: torch.Tensor
    device: torch.device
    autocast: Callable[[], torch.autocast]
    wait_s: float = 0.0
    """Seconds spent waiting for data, summed up until somebody sets it back."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Samples that could not be read, with their positions in the plan, collected until somebody takes them."""
    upload: Upload = field(init=False)
    """Brings micro-batches to the device."""
    clock: StepClock = field(init=False)
    """Takes the time of the step's parts."""

    def __post_init__(self) -> None:
        """Makes what belongs to the device."""
        self.upload, self.clock = Upload(self.device, self.seed), StepClock(self.device)

    def next_batch(self, batches: Iterator[MicroBatch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next micro-batch on the device: images_BCHW, noise_BN, weight_B."""
        start = time.perf_counter()
        batch = next(batches)
        self.wait_s += time.perf_counter() - start
        if batch.skipped:
            self.skipped += _placed(batch, self.cut)
        there = self.upload(batch)
        self.clock.mark("data")
        images_BCHW = normalize(there.images_BHWC, self.mean_C, self.std_C)
        return images_BCHW, self.masking.noise(there.keys_B), there.weight_B


def _placed(batch: MicroBatch, cut: Cut) -> list[dict[str, Any]]:
    """The samples of a micro-batch that could not be read, each with its position in the plan."""
    start, _ = cut.positions(batch.index)
    rows = np.flatnonzero((batch.weight_B == 0) & (batch.sample_B != FILLER)).tolist()
    return [{**sample, "position": start + row} for row, sample in zip(rows, batch.skipped, strict=True)]


def train_step(trainer: Trainer, batches: Iterator[MicroBatch], lr: float, wish: int = 0) -> torch.Tensor:
    """One step over the global batch; skipped by all workers where the loss or a gradient is not finite.

    Every sample weighs 1 over the global batch, whoever computes it: each worker divides its sum of losses by
    ``G / W``, and the mean over the workers, which the all-reduce takes, is the sum over the batch divided by G.

    Args:
        trainer: Model, optimiser, and how the batch is cut.
        batches: This worker's micro-batches.
        lr: The step's learning rate.
        wish: A small number that is summed over all workers.

    Returns:
        float32 [4] on the device, the same on every worker: loss, gradient norm, 1 where the step was skipped, wishes.
    """
    cut, model, optimizer, clock = trainer.cut, trainer.model, trainer.optimizer, trainer.clock
    clock.begin()
    set_lr(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    loss = torch.zeros((), device=trainer.device)
    for turn in range(cut.accumulation):
        images_BCHW, noise_BN, weight_B = trainer.next_batch(batches)
        last = turn == cut.accumulation - 1
        # Gradients travel once a step, with the last micro-batch.
        wrapped = isinstance(model, DistributedDataParallel)
        with model.no_sync() if wrapped and not last else contextlib.nullcontext():
            with trainer.autocast():
                out = model(images_BCHW, noise_BN, weight_B=weight_B, denominator=cut.global_size / cut.world_size)
            clock.mark("forward")
            out["loss"].backward()
        clock.mark("communication" if wrapped and last else "backward")
        loss += out["loss"].detach() / cut.world_size
    sums_2 = torch.stack([loss, torch.full_like(loss, wish)])
    if cut.world_size > 1:
        dist.all_reduce(sums_2)
        clock.mark("communication")
    loss, wishes = sums_2
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    # Both numbers are the same on all workers, so all decide alike, and nobody asks the host.
    bad = (~(torch.isfinite(loss) & torch.isfinite(grad_norm))).float()
    optimizer.found_inf = bad  # type: ignore[attr-defined]  # fused AdamW leaves its state alone where it is 1
    optimizer.step()
    clock.mark("optimizer")
    return torch.stack([loss, grad_norm, bad, wishes])
