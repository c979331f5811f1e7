"""The micro-batch of a run that leaves it open (``batch.micro_size`` 0); found once and remembered in its folder.

On a GPU the largest that fits; on a CPU, where memory is seldom what limits it, the fastest.
"""

import gc
import itertools
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from mae_core.optim import make_optimizer
from pipelines.config import Config, flat
from pipelines.data.plan import Cut
from pipelines.errors import UserError
from pipelines.storage import Store
from pipelines.training.build import build_model, make_trainer
from pipelines.training.dry_run import random_batch
from pipelines.training.step import train_step
from pipelines.training.unreadable import over_ranks
from pipelines.training.upload import Upload

ConfigT = TypeVar("ConfigT", bound=Config)

FILE = "micro_size.json"
_GPU_SHARE = 0.92  # of a GPU's memory: the rest is for what the search does not see, and for holes
_CPU_SHARE = 0.5  # of the free memory, which reading tasks and the object store take from too
_FIRST = 8
_LONG_S = 2.0  # a CPU's step of this length gains nothing by more images
_DECIDING = ("model.", "data.image_size", "data.channels", "train.precision", "train.compile", "train.checkpoint")


def resolve(config: Config, store: Store, device: torch.device, local_workers: int) -> tuple[Config, str]:
    """The configuration with the micro-batch that the run takes; all workers call it and get the same.

    Where this run has found one on such devices before, it is that one. Else each worker looks for itself, and the
    smallest counts.

    Args:
        config: The run's configuration.
        store: The run's folder.
        device: This worker's.
        local_workers: Workers on this machine, which share its memory.

    Returns:
        The configuration, and what to tell about it: empty where it was not left open.

    Raises:
        UserError: Not a single image fits.
    """
    if config.batch.micro_size:
        return config, ""
    many = dist.is_initialized() and dist.get_world_size() > 1
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if many else (0, 1)
    names: list[Any] = [_name(device)]
    found: list[Any] = [json.loads(store.read(FILE)) if rank == 0 and store.exists(FILE) else None]
    if many:
        names = [None] * world_size
        dist.all_gather_object(names, _name(device))
        dist.broadcast_object_list(found, src=0)
    deciding = {key: value for key, value in flat(config).items() if key.startswith(_DECIDING)}
    deciding = json.loads(json.dumps(deciding | {"share": config.scale.gpu_share}))
    (known,) = found
    if known and known["of"] == deciding and set(names) <= set(known["devices"]):
        rows, how = known["rows"], "as found before"
    else:
        limit = -(-config.batch.global_size // world_size)
        rows = find(config, device, limit=limit, memory_share=1 / local_workers)
        rows = int(over_ranks(float(rows), device, dist.ReduceOp.MIN))
        how = "the largest that fits" if device.type == "cuda" else "the fastest of those tried"
        if rank == 0:
            store.write(FILE, json.dumps({"rows": rows, "devices": sorted(set(names)), "of": deciding}, indent=2))
    resolved = with_micro_size(config, rows)
    cut = Cut(config.batch.global_size, rows, world_size)
    return resolved, f"micro-batches of {cut.rows} images ({how}: {rows}), {cut.accumulation} a step and worker"


def with_micro_size(config: ConfigT, rows: int) -> ConfigT:
    """The configuration with another micro-batch."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_size": rows})})


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory >> 20
        return f"{torch.cuda.get_device_name(device)}, {memory} MiB"
    return f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def find(config: Config, device: torch.device, *, limit: int, memory_share: float = 1.0) -> int:
    """Looks for the micro-batch on this device, by training steps on random pixels.

    They accumulate two micro-batches, as their peak is then that of any number. The model is not compiled for it: that
    takes minutes, and less memory.

    Args:
        config: The run's configuration.
        device: Where the steps compute.
        limit: The most that can be of use.
        memory_share: Of this machine's memory, on a CPU.

    Raises:
        UserError: Not a single image fits.
    """
    if device.type == "cpu":
        return _search(config, device, limit, memory_share)
    torch.cuda.set_per_process_memory_fraction(_GPU_SHARE * config.scale.gpu_share, device)
    try:
        rows = _search(config, device, limit, memory_share)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        gc.collect()
        torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    if not rows:
        name = torch.cuda.get_device_name(device)
        raise UserError(f"batch.micro_size: not a single image fits beside the model into the memory of {name}")
    return rows


def _search(config: Config, device: torch.device, limit: int, memory_share: float) -> int:
    peak_before = _peak_bytes()
    model = build_model(config).to(device)
    for buffer in model.target.buffers():
        buffer.zero_()  # NaN until they are fitted
    optimizer = make_optimizer(model, config.optim.weight_decay, config.optim.betas)
    trainer = make_trainer(config, model, model.masking, optimizer, Cut(1, 1, 1), device)

    def step(rows: int) -> float:
        trainer.cut, trainer.upload = Cut(2 * rows, rows, 1), Upload(device, config.run.seed)
        batches = itertools.repeat(random_batch(config, rows))
        start = time.perf_counter()
        train_step(trainer, batches, 0.0).tolist()  # waits for the device
        return time.perf_counter() - start

    if device.type == "cpu":
        room = int(_CPU_SHARE * memory_share * psutil.virtual_memory().available)
        return fastest(step, lambda: _peak_bytes() - peak_before, room, limit)

    def fits(rows: int) -> bool:
        try:
            step(rows)
        except torch.OutOfMemoryError:
            pass
        else:
            return True
        # Not in the handler, where the error still holds all that did fit.
        optimizer.zero_grad(set_to_none=True)
        trainer.upload = Upload(device, config.run.seed)
        gc.collect()
        torch.cuda.empty_cache()
        return False

    return largest(fits, limit)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number of images that fits, to a sixteenth of it: doubled until it does not, then halved between.

    Args:
        fits: Tries one.
        limit: The most that is tried.

    Returns:
        0 where not even one does.
    """
    low, high, rows = 0, limit + 1, min(_FIRST, limit)
    while rows < high and fits(rows):
        low, rows = rows, min(2 * rows, limit)
        if low == limit:
            return limit
    high = rows
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fastest(step: Callable[[int], float], grown: Callable[[], int], room: int, limit: int) -> int:
    """The power of two of images with the most images a second, while steps are short and memory is left.

    Args:
        step: Does a step of two such micro-batches; gives its seconds.
        grown: Bytes by which the process has grown.
        room: Bytes by which it may.
        limit: The most that is tried.
    """
    rates: dict[int, float] = {}
    rows = min(_FIRST, limit)
    while True:
        if not rates:
            step(rows)  # the first step is slower
        seconds = min(step(rows) for _ in range(2))
        rates[rows] = rows / seconds
        # Activations take what they took, and as much again.
        if seconds > _LONG_S or rows == limit or 2 * grown() > room:
            return max(rates, key=lambda size: rates[size])
        rows = min(2 * rows, limit)
