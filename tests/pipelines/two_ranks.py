"""Two ranks of a training step without Ray, one of which has a fault; in a file of its own, since both import it."""

import contextlib
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


def neighbour(number: int, port: int, machines: list[str], results: Any) -> None:
    """Puts how many workers share this one's machine."""
    from pipelines.training import loop

    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=number, world_size=len(machines))
    loop.this_machine = lambda: machines[number]
    results.put((number, loop.workers_on_this_machine(len(machines))))
    results.close()
    results.join_thread()
    dist.destroy_process_group()
