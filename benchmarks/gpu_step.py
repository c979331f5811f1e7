"""The parts of ``benchmarks.gpu`` that measure matrix products and training steps."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.official_style import OfficialStyle
from mae_core.checkpointing import checkpoint_activations
from mae_core.device_rate import matrix_rate, wait_for
from mae_core.flops import step_flops
from mae_core.model import MaskedAutoencoder
from mae_core.optim import make_optimizer, parameter_groups, set_lr

LR = 1e-5
BATCH = {
    "vit_small_patch16_224": 512,
    "vit_base_patch16_224": 256,
    "vit_large_patch16_224": 128,
    "vit_huge_patch14_224": 64,
}
TINY: dict[str, Any] = {
    "arch": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "width": 24, "depth": 1, "num_heads": 2,
    "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
_SECONDS = 2.0  # that an arm is measured


@dataclass(frozen=True)
class Work:
    """What a part is to do.

    Args:
        part: Its name.
        rows: What earlier parts have found.
        device: Where to compute.
        dry_run: Tiny shapes, and as little time as it can be.
        end: When its time is over, on the monotonic clock.
        tell: Takes what has been found.
    """

    part: str
    rows: list[dict[str, Any]]
    device: torch.device
    dry_run: bool
    end: float
    tell: Callable[[dict[str, Any]], None]

    @property
    def left_s(self) -> float:
        """Seconds that are left to it."""
        return self.end - time.monotonic()

    def number(self, what: str, value: float, unit: str) -> None:
        """Tells a number."""
        self.tell({"what": what, "value": value, "unit": unit})

    def model(self, arch: str) -> MaskedAutoencoder:
        """A model of a size, on the device; with normalised pixels as the target, as recipes have it."""
        options: dict[str, Any] = TINY if self.dry_run else {"arch": arch}
        with self.device:
            return MaskedAutoencoder(**options, target="normalized")


def rates(work: Work) -> None:
    """How fast the device multiplies matrices."""
    if work.device.type == "cuda":
        work.tell({"device": torch.cuda.get_device_name()})
    seconds = 0.01 if work.dry_run else 0.5
    work.tell({"name": "bfloat16", "flops_per_s": matrix_rate(work.device, torch.bfloat16, seconds)})
    work.tell({"name": "float32", "flops_per_s": matrix_rate(work.device, torch.float32, seconds)})


@dataclass(frozen=True)
class Arm:
    """One way to do the step.

    Args:
        name: What it is called.
        mode: Of ``torch.compile``; None: not compiled.
        checkpointed: With activation checkpointing.
        fused: AdamW as one kernel, else a few for all parameters together.
        official: As the official code goes about it.
    """

    name: str
    mode: str | None = None
    checkpointed: bool = False
    fused: bool = True
    official: bool = False


# One lever at a time, next to "eager".
ARMS = (
    Arm("eager"),
    Arm("official style", official=True),
    Arm("compiled", mode="default"),
    Arm("compiled, CUDA graphs", mode="reduce-overhead"),
    Arm("eager, AdamW foreach", fused=False),
    Arm("eager, activations checkpointed", checkpointed=True),
)


def steps(work: Work) -> None:
    """Training steps of one size in bfloat16 on images that are on the device, each arm with the same batch."""
    full_rate = next((row["flops_per_s"] for row in work.rows if row.get("name") == "bfloat16"), None)
    losses: dict[str, float] = {}
    batch, compiling_s = 4 if work.dry_run else BATCH[work.part], 0.0
    for arm in ARMS:
        if arm.mode and work.dry_run and work.part != "vit_base_patch16_224":
            continue
        if arm.mode and work.left_s < 1.2 * compiling_s:
            work.tell({"arm": arm.name, "error": "no time left to compile"})
            continue
        began = time.monotonic()
        row: dict[str, Any] = {"error": "not one image fits"}
        rows = batch
        while rows and "loss" not in row:
            try:
                row = _measure(work, arm, rows)
            except torch.OutOfMemoryError:
                rows //= 2
            _clean_up(work)
        if arm is ARMS[0]:
            batch = rows  # what fits the first one is what the others try
        if arm.mode:
            compiling_s = time.monotonic() - began
        if "flops_per_s" in row and full_rate:
            row["mfu"] = row["flops_per_s"] / full_rate
        if "loss" in row:
            losses.setdefault(arm.name, row["loss"])
            row["loss_equal"] = abs(row["loss"] / losses[ARMS[0].name] - 1) < 0.02
        work.tell({"arm": arm.name} | row)


def _clean_up(work: Work) -> None:
    """Gives back what an arm had: graphs keep memory of their own."""
    torch.compiler.reset()
    gc.collect()
    if work.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _measure(work: Work, arm: Arm, batch: int) -> dict[str, Any]:
    model, device = work.model(work.part), work.device
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(batch, 3, *model.image_size, generator=generator).to(device)
    noise_BN = torch.rand(batch, model.num_patches, generator=generator).to(device)
    if arm.checkpointed:
        checkpoint_activations(model)
    module: nn.Module = OfficialStyle(model).to(device) if arm.official else model
    if arm.official:
        optimizer = torch.optim.AdamW(parameter_groups(module, 0.05), lr=LR, betas=(0.9, 0.95))
    elif arm.fused:
        optimizer = make_optimizer(model)
    else:
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=LR, betas=(0.9, 0.95), foreach=True)
    forward: Any = module
    if arm.mode:
        # On a CPU this takes minutes: a dry run compiles nothing.
        forward = torch.compile(module, backend="eager") if work.dry_run else torch.compile(module, mode=arm.mode)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        if optimizer.defaults["fused"]:
            set_lr(optimizer, LR)
        with torch.autocast(device.type, torch.bfloat16):
            out = forward(images_BCHW, noise_BN)
        loss = out if arm.official else out["loss"]
        if arm.official:
            loss.item()  # as there, to see that it is finite
        loss.backward()
        optimizer.step()
        return loss.detach()

    began = time.perf_counter()
    loss = step().item()
    first_s = time.perf_counter() - began
    for _ in range(0 if work.dry_run else 3):
        step()
    seconds = _timed(step, device, 0.01 if work.dry_run else _SECONDS)
    # Those of the method; what the official style, or checkpointing, computes more is none of them.
    flops = batch * step_flops(model).training
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        "batch": batch,
        "ms": 1000 * statistics.median(seconds),
        "ms_range": [1000 * min(seconds), 1000 * max(seconds)],
        "images_per_s": batch / statistics.median(seconds),
        "flops_per_step": flops,
        "flops_per_s": flops / statistics.median(seconds),
        "peak_mib": peak / 2**20,
        "first_step_s": first_s,
        "loss": loss,
    }


def _timed(step: Callable[[], Any], device: torch.device, seconds: float) -> list[float]:
    """Seconds of a step, as means over some steps each: the device is waited for in between only."""
    wait_for(device)
    start = time.perf_counter()
    step()
    wait_for(device)
    turns = max(1, int(seconds / 8 / (time.perf_counter() - start)))
    found = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(turns):
            step()
        wait_for(device)
        found.append((time.perf_counter() - start) / turns)
    return found
