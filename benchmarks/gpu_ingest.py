"""The parts of ``benchmarks.gpu`` that measure the step as a run does it, and a checkpoint.

What they need beside PyTorch is imported where it is used: they are left out where it is missing.
"""

import functools
import hashlib
import io
import itertools
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from benchmarks.gpu_step import Work
from mae_core.device_rate import wait_for
from mae_core.optim import make_optimizer

_ARCH = "vit_base_patch16_224"


def _trainer(work: Work, rows: int) -> Any:
    """What a run's training step needs, on one worker."""
    from pipelines.data.plan import Cut
    from pipelines.training.step import Trainer, autocast

    model, device = work.model(_ARCH), work.device
    mean_C, std_C = torch.full((2, 3), 0.5, device=device)
    return Trainer(
        model,
        make_optimizer(model),
        Cut(rows, rows, 1),
        model.masking,
        seed=0,
        mean_C=mean_C,
        std_C=std_C,
        device=device,
        autocast=functools.partial(autocast, "bfloat16", device),
    )


def _rate(work: Work, trainer: Any, batches: Iterator[Any], seconds: float) -> tuple[float, dict[str, float]]:
    """Images a second of a run's steps in the steady state, and their split."""
    from pipelines.training.step import train_step

    for _ in range(1 if work.dry_run else 5):
        train_step(trainer, batches, 1e-5)
    wait_for(work.device)
    trainer.clock.take()
    steps, start = 0, time.perf_counter()
    losses = []
    # As between two log points: nobody asks the device in between.
    while time.perf_counter() - start < seconds or steps < 2:
        losses.append(train_step(trainer, batches, 1e-5))
        steps += 1
    torch.stack(losses).tolist()
    elapsed = time.perf_counter() - start
    return steps * trainer.cut.rows / elapsed, trainer.clock.take()


def loop(work: Work) -> None:
    """A run's steps on pixels in memory: uploaded, normalised, masked, with the split of a step."""
    from pipelines.data.readers import MicroBatch
    from pipelines.training.step import train_step

    rows = 4 if work.dry_run else 256
    trainer = _trainer(work, rows)
    shape = (rows, *trainer.model.image_size, 3)
    pixels, zeros_B = np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.zeros(rows, np.int64)
    batch = MicroBatch(0, 0, pixels, np.arange(rows), zeros_B, zeros_B, np.ones(rows, np.float32), [])
    batches = itertools.repeat(batch)
    images_per_s, split = _rate(work, trainer, batches, 0.01 if work.dry_run else 5.0)
    work.number(f"images/s of {_ARCH}", images_per_s, "images/s")
    step_s = rows / images_per_s
    for part, seconds in split.items():
        work.number(f"{part}, of a step", 100 * seconds / step_s, "%")
    if work.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            train_step(trainer, batches, 1e-5)
        torch.cuda.set_sync_debug_mode("default")
        work.number("steps that waited for the device (set_sync_debug_mode)", 0, "")


def write_shards(folder: Path, num_images: int, size: tuple[int, int], num_shards: int) -> Any:
    """Writes shards of JPEGs that are as hard to decode as photographs, and gives their manifest.

    Args:
        folder: An empty one.
        num_images: Images.
        size: Width and height.
        num_shards: Shards, all of the same length.
    """
    from PIL import Image

    from pipelines.data.index import encode_index, index_name, index_tar
    from pipelines.data.shards import Manifest

    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(min(64, num_images)):
        # Coarse noise for shapes and fine noise for texture.
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (size[1], size[0], 3), np.int16)
        out = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        encoded.append(out.getvalue())
    names, sizes, digests = [], [], []
    each = num_images // num_shards
    for shard in range(num_shards):
        path = folder / f"train-{shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for place in range(each):
                member = tarfile.TarInfo(f"{shard:04d}{place:06d}.jpg")
                data = encoded[(shard * each + place) % len(encoded)]
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        content = path.read_bytes()
        names.append(path.name)
        sizes.append(len(content))
        digests.append(hashlib.sha256(content).hexdigest())
        index = encode_index(index_tar(io.BytesIO(content)), tar_bytes=sizes[-1], tar_sha256=digests[-1])
        (folder / index_name(path.name)).write_bytes(index)
    lengths = (each,) * num_shards
    return Manifest(str(folder), "train", tuple(names), lengths, tuple(sizes), tuple(digests), ())


class _Reading(IterableDataset):
    """Micro-batches as the reading tasks make them; each process makes every so many-th."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        from pipelines.data.readers import parse_block, read_blocks

        info = get_worker_info()
        assert info is not None
        torch.set_num_threads(1)
        blocks = ([[index]] for index in itertools.count(info.id, info.num_workers))
        # A task of some micro-batches at a time, as in a run.
        while task := list(itertools.islice(blocks, 8)):
            for table in read_blocks(self._stream, task):
                (batch,) = parse_block(table, self._stream)
                yield [torch.from_numpy(part.copy()) for part in (batch.images_BHWC, batch.sample_B, batch.weight_B)]


def ingest(work: Work) -> None:
    """From JPEG shards to the step: what the GPU is busy of the time, and what decoding alone allows.

    Reading tasks as in a run, in processes of a DataLoader instead of Ray's: Ray's own share is not in it.
    """
    from pipelines.data.plan import Cut, Plan
    from pipelines.data.readers import MicroBatch, Stream, View

    rows, processes = (4, 1) if work.dry_run else (128, max(1, (os.cpu_count() or 2) - 1))
    trainer = _trainer(work, rows)
    image_size = trainer.model.image_size
    seconds = 0.01 if work.dry_run else 15.0
    with tempfile.TemporaryDirectory(prefix="mae-gpu-") as folder:
        size = (64, 48) if work.dry_run else (500, 375)
        manifest = write_shards(Path(folder), 64 if work.dry_run else 8192, size, 2 if work.dry_run else 8)
        stream = Stream(manifest, Plan(manifest.num_samples, 0), Cut(rows, rows, 1), View(image_size, 3, 0, (0.2, 1.0)))
        ahead = 4  # batches of a process
        loader = DataLoader(_Reading(stream), batch_size=None, num_workers=processes, prefetch_factor=ahead)
        zeros_B = np.zeros(rows, np.int64)

        def batches() -> Generator[MicroBatch]:
            for tensors in loader:
                images_BHWC, sample_B, weight_B = (tensor.numpy() for tensor in tensors)
                yield MicroBatch(0, 0, images_BHWC, sample_B, zeros_B, zeros_B, weight_B, [])

        coming = batches()
        for _ in range(2 * processes):
            next(coming)
        decoded, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            next(coming)
            decoded += rows
        decode = decoded / (time.perf_counter() - start)
        resident, _ = _rate(work, trainer, itertools.repeat(next(coming)), seconds / 3)
        for _ in range(ahead * processes):
            next(coming)  # which have been decoded while nobody took any
        found, _ = _rate(work, trainer, coming, seconds)
        coming.close()
    work.number(f"decoding alone, {processes} processes, {size[0]}x{size[1]}", decode, "images/s")
    work.number(f"steps of {_ARCH} from memory", resident, "images/s")
    work.number("from shards to the step", found, "images/s")
    work.number("the GPU is busy", 100 * found / resident, "%")
    work.number("of what the slower one alone does", 100 * found / min(decode, resident), "%")


def checkpoint(work: Work) -> None:
    """A checkpoint: how long the steps stand still, until it is written, and until it is read."""
    from pipelines.storage import Store
    from pipelines.training import checkpoint as checkpoints
    from pipelines.training.writer import Writer

    model = work.model("vit_large_patch16_224")
    optimizer = make_optimizer(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    stood, written, read = [], [], []
    with tempfile.TemporaryDirectory(prefix="mae-gpu-") as folder:
        store = Store(folder)
        writer = Writer(store, 2)
        for step in range(1, 2 if work.dry_run else 4):
            if step > 1 and work.left_s < 2 * (stood[-1] + written[-1] + read[-1]):
                break
            wait_for(work.device)
            start = time.perf_counter()
            optimizer.step()
            wait_for(work.device)
            alone, start = time.perf_counter() - start, time.perf_counter()
            writer.save(step, model, optimizer, {"step": step})
            optimizer.step()  # waits for the copy
            wait_for(work.device)
            stood.append(max(0.0, time.perf_counter() - start - alone))
            writer.wait()
            written.append(time.perf_counter() - start)
            start = time.perf_counter()
            checkpoints.restore(store, step, model, optimizer)
            wait_for(work.device)
            read.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors")) / len(
            list(Path(folder).glob("step-*"))
        )
    work.number("size, ViT-L", size / 1e6, "MB")
    for what, seconds in (("the steps stand still", stood), ("written", written), ("restored", read)):
        work.number(what, statistics.median(seconds), "s")
