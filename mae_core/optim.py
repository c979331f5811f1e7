"""The paper's optimiser: which parameters decay, how large the learning rate is, and at which step."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters into those that decay and those that do not.

    Biases and 1-D parameters (norms) do not decay; class and mask token do, as in the paper's code. Frozen
    parameters are left out.

    Args:
        model: The model.
        weight_decay: Decay of the first group.

    Returns:
        Two groups as ``torch.optim`` takes them, their ``params`` as (name, parameter) pairs.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = {name for name, parameter in named if parameter.ndim <= 1 or name.endswith(".bias")}
    return [
        {"params": [pair for pair in named if pair[0] not in plain], "weight_decay": weight_decay},
        {"params": [pair for pair in named if pair[0] in plain], "weight_decay": 0.0},
    ]


def peak_lr(base_lr: float, effective_batch: int) -> float:
    """The linear scaling rule, ``base_lr * effective_batch / 256`` (appendix A of the paper).

    Args:
        base_lr: The recipe's learning rate for 256 samples.
        effective_batch: Samples an optimiser step, over all workers and accumulation steps.
    """
    return base_lr * effective_batch / 256


def lr_at(step: int, *, peak: float, warmup_steps: int, total_steps: int, floor: float = 0.0) -> float:
    """The learning rate of one step: linear warm-up from 0 to the peak, then half a cosine down to the floor.

    Args:
        step: Optimiser steps done before this one, from 0.
        peak: Learning rate at the end of the warm-up.
        warmup_steps: Length of the warm-up; 0 begins at the peak.
        total_steps: Where the cosine reaches the floor; later steps stay there.
        floor: The lowest learning rate after the warm-up.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return floor
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def make_optimizer(
    model: nn.Module, weight_decay: float = 0.05, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Fused AdamW over the model's parameter groups; its learning rate is 0 until ``set_lr``.

    The learning rate is a tensor on the parameters' device: a new value neither recompiles a compiled step
    nor waits for the device. To skip a step without asking the host, set ``optimizer.found_inf`` to a float32
    scalar tensor before ``step()``: exactly 1.0 leaves parameters, moments and step counts as they are, 0.0
    steps.

    Args:
        model: Its trainable parameters, all on one device.
        weight_decay: For all but biases and 1-D parameters.
        betas: AdamW's.
    """
    device = next(model.parameters()).device
    lr = torch.zeros((), dtype=torch.float32, device=device)
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, in place, without a host synchronisation.

    Args:
        optimizer: From ``make_optimizer``.
        lr: The next step's learning rate, as from ``lr_at``.
    """
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's weights; its buffers are the model's own.

    After each step ``update_parameters(model)``. Before the step t, counted from 0, takes part in it the average is
    multiplied by ``min(decay, (1 + t) / (10 + t))``; the first step's weights are taken as they are. The paper's 0.9999
    (appendix A.1, table 9, from scratch) remembers 10,000 steps: without that warm-up a shorter training would be
    scored by the weights that it began with. The state dict holds the count of steps too.

    Args:
        model: Copied, on its device, as it is.
        decay: In [0, 1).
    """

    def update(averages: Any, currents: Any, num_averaged: torch.Tensor | int) -> None:
        share = 1 - min(decay, (1 + int(num_averaged)) / (10 + int(num_averaged)))
        for average, current in zip(averages, currents, strict=True):
            average.lerp_(current, share)

    return AveragedModel(model, multi_avg_fn=update)
