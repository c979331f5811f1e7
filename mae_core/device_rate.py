"""How fast a device multiplies matrices: what a step's FLOPs are held against."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mae_core.layers import linear

_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns; large enough for the device's full rate


@functools.cache
def matrix_rate(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The best rate of square matrix products that some tenths of a second show, in FLOP/s.

    Measured once in a process for what it is asked for. The best, not the mean: what else the machine does only slows
    it. On a GPU the products are as long as a layer's and run one after the other without the host.

    Args:
        device: Where they are multiplied.
        dtype: Of the matrices; float32 on a GPU is what ``torch.backends`` makes of it.
        seconds: How long, after one product that is not counted; one at least is.
        clock: Seconds.
    """
    size = _SIZE[device.type]
    generator = torch.Generator().manual_seed(0)  # zeros would be multiplied faster than what a model has
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    best, end = 0.0, None
    with torch.inference_mode():
        while end is None or clock() < end:
            turns = 8 if device.type == "cuda" else 1
            wait_for(device)
            start = clock()
            for _ in range(turns):
                linear(left, right)
            wait_for(device)
            if end is None:  # the first one finds its kernel
                end = clock() + seconds
            else:
                best = max(best, 2 * size**3 * turns / (clock() - start))
    return best


def bfloat16_gain(device: torch.device) -> float:
    """Returns how many times as fast as float32 matrices a device multiplies bfloat16 ones.

    Measured where a CPU has instructions for it; 0 on other CPUs, where a single product may take seconds.
    """
    if device.type == "cpu" and not _BFLOAT16_FLAGS & _cpu_flags():
        return 0.0
    return matrix_rate(device, torch.bfloat16) / matrix_rate(device, torch.float32)


_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def _cpu_flags() -> set[str]:
    """What Linux says that the first processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":")[1].split()) for line in lines if line.startswith("flags")), set())


def wait_for(device: torch.device) -> None:
    """Returns when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
