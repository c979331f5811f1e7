"""A few steps and a few images, to learn how fast this machine is. Knows no Ray."""

import contextlib
import itertools
import resource
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from mae_core.device_rate import bfloat16_gain
from mae_core.optim import make_optimizer
from pipelines.config import Config
from pipelines.data.plan import Cut
from pipelines.data.readers import MicroBatch, Stream, parse_block, read_blocks
from pipelines.errors import UserError
from pipelines.training.build import build_model, compiler_told, make_trainer, maybe_compiled
from pipelines.training.step import train_step
from pipelines.training.unreadable import check_readable

_READ_TASKS = 64  # of the run's first ones: more than anybody waits for


@dataclass(frozen=True)
class StepRate:
    """What a worker's training step was measured to be.

    Attributes:
        images_per_s: Images a second.
        memory_bytes: By how much the peak of the process's memory grew: what PyTorch allocates on a GPU, or all of it.
        threads: CPU threads.
        cpu_share: CPU time of a step over what its threads could have had: on a CPU, less where others had the cores.
        bfloat16_gain: As ``mae_core.device_rate.bfloat16_gain``, with these threads.
    """

    images_per_s: float
    memory_bytes: int
    threads: int
    cpu_share: float
    bfloat16_gain: float


@contextlib.contextmanager
def cpu_threads(num: int) -> Iterator[None]:
    """PyTorch with this number of CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_batch(config: Config, rows: int) -> MicroBatch:
    """A micro-batch of random pixels, as large as a run's."""
    shape = (rows, *config.data.image_size, config.data.channels)
    images_BHWC = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    sample_B, zeros_B = np.arange(rows), np.zeros(rows, np.int64)
    return MicroBatch(0, 0, images_BHWC, sample_B, zeros_B, zeros_B, np.ones(rows, np.float32), [])


def measure_step(config: Config, cut: Cut, device: torch.device, *, threads: int, seconds: float) -> StepRate:
    """Does training steps as one worker of a run does them, on random pixels and at a learning rate of 0.

    Nothing is sent between workers. Where a whole step takes long, one of fewer micro-batches is taken: of two at
    least if the run accumulates any, as its peak memory then is the run's.

    Args:
        config: The run's configuration.
        cut: How the run's batches are cut.
        device: Where the step computes.
        threads: CPU threads.
        seconds: How long to measure, after one step that is not counted; one step at least is.

    Raises:
        UserError: The model and a micro-batch do not fit into the GPU's memory.
    """
    before = _peak_bytes(device)
    try:
        with cpu_threads(threads), compiler_told(config):
            turns, times = _timed_steps(config, cut, device, seconds)
            gain = bfloat16_gain(device)
    except torch.OutOfMemoryError:
        raise UserError(
            f"the model and a micro-batch of {cut.rows} do not fit into the memory of "
            f"{torch.cuda.get_device_name(device)}: lower batch.micro_size"
        ) from None
    real = cut.global_size / (cut.micros * cut.rows)  # the rest fills up
    median = statistics.median(wall for wall, _ in times)
    share = sum(cpu for _, cpu in times) / sum(wall for wall, _ in times) / threads
    return StepRate(real * turns * cut.rows / median, _peak_bytes(device) - before, threads, share, gain)


def _timed_steps(
    config: Config, cut: Cut, device: torch.device, seconds: float
) -> tuple[int, list[tuple[float, float]]]:
    """Micro-batches a step, and for each step its seconds and its CPU-seconds."""
    model = build_model(config).to(device)
    for buffer in model.target.buffers():
        buffer.zero_()  # NaN until they are fitted
    optimizer = make_optimizer(model, config.optim.weight_decay, config.optim.betas)
    module = maybe_compiled(config, model, device)
    trainer = make_trainer(config, module, model.masking, optimizer, cut, device)
    batches = itertools.repeat(random_batch(config, cut.rows))

    def timed(turns: int) -> tuple[float, float]:
        trainer.cut = Cut(turns * cut.rows, cut.rows, 1)
        start, start_cpu = time.perf_counter(), time.process_time()
        train_step(trainer, batches, 0.0).tolist()  # waits for the device
        return time.perf_counter() - start, time.process_time() - start_cpu

    turns = min(cut.accumulation, 2)
    timed(turns)
    times = [timed(turns)]
    fit = int(turns * seconds / (3 * times[0][0]))
    if fit > turns and cut.accumulation > turns:
        turns, times = min(fit, cut.accumulation), []
    while sum(wall for wall, _ in times) < seconds:
        times.append(timed(turns))
    return turns, times


def measure_decoding(stream: Stream, steps: int, *, seconds: float, max_unreadable: float = 1.0) -> float:
    """Images that one core reads, decodes and crops in a second, as the run's first reading tasks do it.

    Counted is this process's CPU time. Waiting for a store is none: other tasks use the core meanwhile.

    Args:
        stream: The run's images.
        steps: Steps of the run.
        seconds: How long to measure, after one block that is not counted; one block at least is.
        max_unreadable: Share of the images that may be unreadable.

    Raises:
        UserError: Images cannot be read, or more of them than the run would go on with.
    """
    layout = stream.layout
    first = next(layout.segments((0, steps), _READ_TASKS))

    def blocks() -> Iterator[pa.Table]:
        for task in layout.tasks(first):
            yield from read_blocks(stream, [layout.micro_batches(first, 0, block) for block in task])

    images, unreadable = 0, Counter[str]()
    with cpu_threads(1):
        for _ in itertools.islice(blocks(), 1):
            pass
        start, stop = time.process_time(), time.monotonic() + seconds
        for table in blocks():
            for batch in parse_block(table, stream):
                images += int((batch.weight_B > 0).sum())
                unreadable.update(sample["reason"] for sample in batch.skipped)
            if time.monotonic() > stop:
                break
        spent = time.process_time() - start
    manifest = stream.manifest
    check_readable(unreadable, images + unreadable.total(), manifest.num_samples, max_unreadable, manifest.location)
    return images / spent
