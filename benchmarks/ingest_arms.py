"""The ways of getting crops from shards that ``benchmarks.ingest`` compares: those without Ray.

Each is a function that takes the images and how many of them will be wanted, about, and gives batches: crops, and
the sample ids that they are of. All but Ray's default decoder use the same decoder and the same crops.
"""

import itertools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from webdataset.compat import WebDataset, WebLoader

from benchmarks.ingest_data import SEED, Images, sample_ids
from mae_core.images import crop_resize, decode
from pipelines.data.plan import RANGE
from pipelines.data.shards import load_index
from pipelines.storage import Store

Batch = tuple[np.ndarray, np.ndarray]  # uint8 [B, H, W, C] and int64 sample ids [B]
Arm = Callable[[Images, int], Iterator[Batch]]

WORKERS = 2
_NUM_CHECKED = 3  # batches


def decode_crop(images: Images, data: Sequence[bytes], sample_B: np.ndarray, epoch_B: np.ndarray) -> np.ndarray:
    """Decodes and crops a block as ``pipelines.data.readers`` does."""
    decoded = [decode(each, images.view.channels) for each in data]
    sizes = np.array([image.shape[:2] for image in decoded])
    crops = images.view.crops(sizes[:, 0], sizes[:, 1], epoch_B, sample_B, 0)
    images_BHWC = np.empty((len(data), *images.view.image_size, images.view.channels), np.uint8)
    for row, (image, box) in enumerate(zip(decoded, crops.boxes(), strict=True)):
        crop_resize(image, *box, out=images_BHWC[row])
    return images_BHWC


def read_ranges(images: Images, worker: int = 0, workers: int = 1) -> Iterator[Batch]:
    """What the limit does in each of its processes, for ever: reads neighbours at once, decodes, crops."""
    manifest, store = images.manifest, Store(images.manifest.location)
    starts = np.concatenate(([0], np.cumsum(manifest.shard_lengths)))
    blocks = [
        (shard, first, min(first + max(RANGE, images.batch), length))
        for shard, length in enumerate(manifest.shard_lengths)
        for first in range(0, length, max(RANGE, images.batch))
    ]
    for epoch in itertools.count():
        for shard, first, last in blocks[worker::workers]:
            index = load_index(manifest, shard)
            offset, size = index.offset_S[first:last], index.size_S[first:last]
            start = int(offset[0])
            data = store.read(manifest.shard_names[shard], start, int(offset[-1] + size[-1]) - start)
            places = zip((offset - start).tolist(), size.tolist(), strict=True)
            encoded = [data[at : at + length] for at, length in places]
            for row in range(0, last - first, images.batch):
                sample_B = starts[shard] + np.arange(first + row, min(first + row + images.batch, last))
                epoch_B = np.full_like(sample_B, epoch)
                yield decode_crop(images, encoded[row : row + images.batch], sample_B, epoch_B), sample_B


def raw(images: Images, wanted: int) -> Iterator[Batch]:  # noqa: ARG001
    """The limit: plain processes that read, decode and crop; only the sizes of their batches come here."""
    reader, writer = os.pipe()

    def work(worker: int) -> None:
        for _, sample_B in read_ranges(images, worker, WORKERS):
            os.write(writer, struct.pack("i", len(sample_B)))

    processes = [get_context("fork").Process(target=work, args=(worker,), daemon=True) for worker in range(WORKERS)]
    for process in processes:
        process.start()
    nothing = np.empty((0,), np.uint8)
    try:
        while True:
            (count,) = struct.unpack("i", os.read(reader, 4))
            yield nothing, np.empty(count, np.int64)
    finally:
        for process in processes:
            process.terminate()
            process.join()
        os.close(reader)
        os.close(writer)


def webloader(images: Images, wanted: int) -> Iterator[Batch]:  # noqa: ARG001
    """Two worker processes of webdataset, for ever; it is not asked to shuffle."""
    ids = sample_ids(images.manifest)

    def work(samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        sample_B = np.array([ids[sample["__key__"]] for sample in samples])
        pixels = decode_crop(
            images, [sample[images.extension] for sample in samples], sample_B, np.zeros_like(sample_B)
        )
        # Tensors go to the other process through shared memory.
        return torch.from_numpy(pixels), torch.from_numpy(sample_B)

    dataset: Any = WebDataset(images.urls, shardshuffle=False, empty_check=False)
    # WebDataset takes an argument "repeat" too, and does nothing with it.
    dataset = dataset.batched(images.batch, collation_fn=work).repeat()
    loader = WebLoader(dataset, batch_size=None, num_workers=WORKERS, multiprocessing_context="fork")
    for images_BHWC, sample_B in loader:
        yield images_BHWC.numpy(), sample_B.numpy()


class _Files(Dataset):
    """Blocks of images from files of their own."""

    def __init__(self, images: Images):
        self._images = images

    def __getitem__(self, sample_B: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        data = [Path(self._images.files, f"{sample:07d}").read_bytes() for sample in sample_B.tolist()]
        pixels = decode_crop(self._images, data, sample_B, np.zeros_like(sample_B))
        return torch.from_numpy(pixels), torch.from_numpy(sample_B)


def dataloader(images: Images, wanted: int) -> Iterator[Batch]:  # noqa: ARG001
    """The DataLoader of torch on files, for ever; a worker makes a whole batch at once, which is its fastest way."""

    def order() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(SEED)
        while True:
            shuffled = rng.permutation(images.manifest.num_samples)
            yield from np.split(shuffled, range(images.batch, len(shuffled), images.batch))

    loader: Any = DataLoader(
        _Files(images),
        sampler=order(),  # type: ignore[arg-type]
        batch_size=None,
        num_workers=WORKERS,
        multiprocessing_context="fork",
    )
    for images_BHWC, sample_B in loader:
        yield images_BHWC.numpy(), sample_B.numpy()


def check_pixels(arm: Arm, images: Images, wanted: int = 0) -> float:
    """Holds an arm's first crops against a slow reference: each image read, decoded and cropped by itself.

    Args:
        arm: The arm; ``raw`` keeps its pixels to itself, ``read_ranges`` is what its processes do.
        images: What it reads.
        wanted: Images to ask for, which are then all taken; 0: the arm goes on for ever.

    Returns:
        The mean difference in levels of 0 to 255; 0.0: every pixel is equal.
    """
    total = num = 0
    batches = arm(images, wanted)
    for images_BHWC, sample_B in itertools.islice(batches, _NUM_CHECKED):
        for image_HWC, sample in zip(images_BHWC, sample_B.tolist(), strict=True):
            expected = _reference(images, sample)
            total += int(np.abs(image_HWC.astype(np.int16) - expected).sum())
            num += expected.size
    for _ in batches if wanted else ():
        pass
    return total / num


def _reference(images: Images, sample: int) -> np.ndarray:
    starts = np.concatenate(([0], np.cumsum(images.manifest.shard_lengths)))
    shard = int(np.searchsorted(starts, sample, side="right")) - 1
    index, place = load_index(images.manifest, shard), sample - int(starts[shard])
    with Path(images.urls[shard]).open("rb") as file:
        data = os.pread(file.fileno(), int(index.size_S[place]), int(index.offset_S[place]))
    image_HWC = decode(data, images.view.channels)
    height, width = (np.array([size]) for size in image_HWC.shape[:2])
    crops = images.view.crops(height, width, np.zeros(1, np.int64), np.array([sample]), 0)
    expected_HWC = np.empty((*images.view.image_size, images.view.channels), np.uint8)
    crop_resize(image_HWC, *next(crops.boxes()), out=expected_HWC)
    return expected_HWC


PLAIN: dict[str, Arm] = {"raw": raw, "webloader": webloader, "dataloader": dataloader}
