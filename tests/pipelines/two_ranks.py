"""Two ranks of a training step without Ray, one of which has a fault; in a file of its own, since both import it."""

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mae_core.masking import Masking
from mae_core.optim import make_optimizer
from pipelines.data.plan import Cut
from pipelines.data.readers import MicroBatch
from pipelines.training.step import Trainer, train_step
from pipelines.training.transfer_step import Step

FAULTS = {2: "loss", 4: "gradient"}  # by step, on rank 1


class _Sum(nn.Module):
    """Something with a loss."""

    fault = ""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))
        self.bias = nn.Parameter(torch.ones(4))
        self.weight.register_hook(lambda g: g * float("nan") if self.fault == "gradient" else g)

    def forward(self, _images_BCHW, _noise_BN, *, weight_B, denominator):
        loss = ((self.weight + self.bias) * weight_B.sum()).sum() / denominator
        return {"loss": loss * float("nan") if self.fault == "loss" else loss}


def rank(number: int, port: int, results: Any) -> None:
    """Does six steps, and puts what each came to.

    That is whether it was bad, the wishes, the weight and its moments, and loss, gradient norm and gradients. Of the
    four samples of a batch, one of rank 1 weighs nothing.
    """
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    torch.set_num_threads(1)
    model = _Sum()
    optimizer = make_optimizer(model, 0.05, (0.9, 0.95))
    one, device = torch.ones(1), torch.device("cpu")
    masking = Masking("random", (4, 4), 0.75)
    wrapped = nn.parallel.DistributedDataParallel(model)
    trainer = Trainer(wrapped, optimizer, Cut(4, 2, 2), masking, 0, one, one, device, contextlib.nullcontext)  # type: ignore[arg-type]
    rows = np.zeros(2, np.int64)
    weight_B = np.array([1, 1 - number], np.float32)
    batch = MicroBatch(0, 0, np.zeros((2, 4, 4, 1), np.uint8), np.arange(2), rows, rows, weight_B, [])
    told = []
    for step in range(6):
        model.fault = FAULTS.get(step, "") if number == 1 else ""
        wish = 3 if (step, number) == (1, 0) else 0
        loss, norm, bad, wishes = train_step(trainer, iter([batch]), 1e-2, wish).tolist()
        moments = [value.numpy().copy() for value in optimizer.state[model.weight].values()]
        gradients = [parameter.grad.numpy().copy() for parameter in (model.weight, model.bias)]  # type: ignore[union-attr]
        told.append((bad, wishes, [model.weight.detach().numpy().copy(), *moments], (loss, norm, *gradients)))
    results.put((number, told))
    results.close()
    results.join_thread()
    dist.destroy_process_group()


class _Weighed:
    """A task whose loss is the sum of its samples' numbers, each times the weight."""

    def __init__(self, bad_step: int = -1):
        self._turns, self._bad_step = 0, bad_step

    def loss(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        """The sum, over those that count."""
        step, self._turns = self._turns // 2, self._turns + 1  # two micro-batches a step
        number_B = torch.from_numpy((batch.sample_B * batch.weight_B).astype(np.float32))
        return (model(number_B[:, None]) * (float("nan") if step == self._bad_step else 1.0)).sum()


def transfer_steps(number: int, world_size: int, bad_step: int = -1) -> list[list[float]]:
    """Does three steps of a transfer over samples 0 to 6; returns the weight, and what each step gave."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    wrapped = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    worker: Any = SimpleNamespace(device=torch.device("cpu"), rank=number, left_out=lambda _: None)
    cut = Cut(7, 4 // world_size, world_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step_of = Step(wrapped, optimizer, cut, worker, _Weighed(bad_step), 0)  # type: ignore[arg-type]
    told = []
    for step in range(3):
        batches = []
        for turn in range(cut.accumulation):
            first = (cut.index(step, turn, number) % cut.micros) * cut.rows
            rows = np.arange(first, first + cut.rows)
            weight_B = (rows < 7).astype(np.float32)
            batches.append(MicroBatch(0, 0, np.zeros(0, np.uint8), rows, rows * 0, rows * 0, weight_B, []))
        numbers = step_of(step, iter(batches), 0.1, 3 if (step, number) == (1, 0) else 0).tolist()
        told.append([*numbers, model.weight.item()])
    return told


def transfer_rank(number: int, port: int, results: Any) -> None:
    """Puts what ``transfer_steps`` gives on one of two ranks; the second step of rank 1 is not finite."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=number, world_size=2)
    torch.set_num_threads(1)
    results.put((number, transfer_steps(number, 2, 1 if number else -1)))
    results.close()
    results.join_thread()
    dist.destroy_process_group()


def neighbour(number: int, port: int, machines: list[str], results: Any) -> None:
    """Puts how many workers share this one's machine."""
    from pipelines.training import loop

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=number, world_size=len(machines))
    loop.this_machine = lambda: machines[number]
    results.put((number, loop.workers_on_this_machine(len(machines))))
    results.close()
    results.join_thread()
    dist.destroy_process_group()
