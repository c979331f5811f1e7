"""Measures a training step (forward, backward, optimiser): ``python -m benchmarks.step [--json OUT]``.

The arms take turns, so that what else the machine does meets them alike; a ratio is taken within each turn.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from pydantic import BaseModel, ConfigDict, Field

from mae_core.model import MaskedAutoencoder
from mae_core.optim import make_optimizer, set_lr
from pipelines.cli import parse
from pipelines.errors import UserError, run_command


class Step(BaseModel):
    """Measures training steps in float32 and in bfloat16 autocast, in turns."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    arch: str = "vit_small_patch16_224"
    """A plain ViT of timm."""
    image_size: int = Field(default=224, gt=0)
    """Pixels a side."""
    batch: int = Field(default=16, gt=0)
    """Images a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    threads: int = Field(default=0, ge=0)
    """CPU threads; 0: PyTorch's own choice."""
    turns: int = Field(default=5, ge=1)
    """How often each arm has its turn."""
    steps: int = Field(default=3, ge=1)
    """Steps a turn."""
    output: Annotated[str, tyro.conf.arg(name="json")] = ""
    """File for the numbers; empty: none."""


def make_arm(args: Step, device: torch.device, bfloat16: bool) -> tuple[Callable[[], float], Callable[[], None]]:
    """A function that does one step and gives its loss, and one that waits for the device."""
    try:
        with device:
            model = MaskedAutoencoder(args.arch, image_size=args.image_size)
    except ValueError as error:
        raise UserError(str(error)) from None
    optimizer = make_optimizer(model)
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(args.batch, 3, args.image_size, args.image_size, generator=generator).to(device)
    noise_BN = torch.rand(args.batch, model.num_patches, generator=generator).to(device)

    def step() -> float:
        set_lr(optimizer, 1e-5)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss = model(images_BCHW, noise_BN)["loss"]
        loss.backward()
        optimizer.step()
        return loss.item()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step, wait


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(Step, prog="python -m benchmarks.step", argv=argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if gpu and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no GPU here")
    device = torch.device("cuda" if gpu else "cpu")
    arms = {name: make_arm(args, device, name == "bfloat16") for name in ("float32", "bfloat16")}
    losses = {name: step() for name, (step, _) in arms.items()}
    # Faster arithmetic on the same method: the losses must be the same up to bfloat16's rounding.
    if abs(losses["bfloat16"] / losses["float32"] - 1) > 0.02:
        raise RuntimeError(f"the arms do not compute the same loss: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.turns):
        for name, (step, wait) in arms.items():
            wait()
            start = time.perf_counter()
            for _ in range(args.steps):
                step()
            wait()
            seconds[name].append((time.perf_counter() - start) / args.steps)
    ratios = [one / other for one, other in zip(seconds["float32"], seconds["bfloat16"], strict=True)]
    print(f"{args.arch}, {args.image_size} px, batch {args.batch}, {device}, {torch.get_num_threads()} threads")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"  {name:9} {1000 * median:9.1f} ms a step {args.batch / median:9.1f} images/s  loss {losses[name]:.4f}")
    median, low, high = statistics.median(ratios), min(ratios), max(ratios)
    print(f"  bfloat16 over float32: {median:.2f} ({low:.2f} to {high:.2f}, {args.turns} turns)")
    if args.output:
        result = {"losses": losses, "seconds": seconds, "bfloat16_over_float32": median, "torch": torch.__version__}
        Path(args.output).write_text(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    run_command(main)
