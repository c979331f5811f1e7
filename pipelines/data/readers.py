"""From byte ranges of shards to ready micro-batches: what one reading task does. Knows no Ray."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mae_core.images import Crops, ImageError, center_crops, crop_resize, decode, random_resized_crops
from pipelines.data.plan import FILLER, GRAIN, RANGE, Cut, Plan
from pipelines.data.shards import Manifest, load_index
from pipelines.storage import Store


@dataclass(frozen=True)
class View:
    """How an image becomes pixels.

    Args:
        image_size: Height and width in pixels.
        channels: 1 or 3.
        seed: The run's seed, which crops and flips are a function of.
        crop_scale: Smallest and largest share of the area that a random crop covers; None: the central crop.
        flip: Mirror half of the random crops.
        crop_share: Side of the central crop over the image's shorter side.
    """

    image_size: tuple[int, int]
    channels: int
    seed: int = 0
    crop_scale: tuple[float, float] | None = None
    flip: bool = False
    crop_share: float = 0.875

    def crops(self, height_B: np.ndarray, width_B: np.ndarray, epoch_B: np.ndarray, sample_B: np.ndarray) -> Crops:
        """The crop of each image of a block."""
        if self.crop_scale is None:
            return center_crops(height_B, width_B, out_size=self.image_size, share=self.crop_share)
        return random_resized_crops(
            height_B,
            width_B,
            seed=self.seed,
            epoch_B=epoch_B,
            sample_B=sample_B,
            repeat_B=np.zeros_like(sample_B),
            scale=self.crop_scale,
            flip=self.flip,
        )


@dataclass(frozen=True)
class Stream:
    """All that a reading task needs to know.

    Args:
        manifest: The shards.
        plan: The order of their samples.
        cut: How batches are cut.
        view: What becomes of an image.
    """

    manifest: Manifest
    plan: Plan
    cut: Cut
    view: View


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as a worker receives it; rows with weight 0 are filler or could not be read.

    Args:
        index: Its number, counted through all steps.
        images_BHWC: uint8, read-only.
        sample_B: int64 sample ids, ``FILLER`` for filler.
        epoch_B: int64.
        label_B: int64, -1 where there is none.
        weight_B: float32, 1 or 0.
        skipped: Samples that could not be read: dictionaries of shard, key, reason.
    """

    index: int
    images_BHWC: np.ndarray
    sample_B: np.ndarray
    epoch_B: np.ndarray
    label_B: np.ndarray
    weight_B: np.ndarray
    skipped: list[dict[str, str]]


def locate(manifest: Manifest, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard numbers and places within the shards of sample ids."""
    starts = np.concatenate(([0], np.cumsum(manifest.shard_lengths)))
    shard = np.searchsorted(starts, sample, side="right") - 1
    return shard, sample - starts[shard]


@dataclass(frozen=True)
class _Member:
    data: bytes | memoryview
    label: int
    shard: str
    key: str


def _read_samples(manifest: Manifest, sample: np.ndarray) -> dict[int, _Member]:
    """Reads samples, neighbours in one piece."""
    sample = np.unique(sample)
    shard, place = locate(manifest, sample)
    # A new read begins in another shard, and after a gap longer than a range.
    breaks = np.flatnonzero((np.diff(shard) != 0) | (np.diff(place) > RANGE)) + 1
    store = Store(manifest.location)
    members: dict[int, _Member] = {}
    for part in np.split(np.arange(len(sample)), breaks):
        if not len(part):
            continue
        number = int(shard[part[0]])
        name = manifest.shard_names[number]
        index = load_index(manifest, number)
        places = place[part]
        offset, size = index.offset_S[places], index.size_S[places]
        start = int(offset.min())
        data = memoryview(store.read(name, start, int((offset + size).max()) - start))
        for i, at, first, length in zip(part, places, offset - start, size, strict=True):
            members[int(sample[i])] = _Member(
                data[first : first + length], int(index.label_S[at]), name, index.keys[int(at)]
            )
    return members


def _micro_batch(
    stream: Stream, index: int, sample_B: np.ndarray, epoch_B: np.ndarray, members: dict[int, _Member]
) -> pa.Table:
    view, rows = stream.view, stream.cut.rows
    height, width = view.image_size
    images_BHWC = np.zeros((rows, height, width, view.channels), np.uint8)
    weight_B = np.zeros(rows, np.float32)
    label_B = np.full(rows, -1, np.int64)
    skipped: list[dict[str, str]] = []
    decoded: list[np.ndarray] = []
    good: list[int] = []
    for row, sample in enumerate(sample_B.tolist()):
        if sample == FILLER:
            continue
        member = members[sample]
        label_B[row] = member.label
        try:
            decoded.append(decode(bytes(member.data), view.channels))
            good.append(row)
        except ImageError as error:
            skipped.append({"shard": member.shard, "key": member.key, "reason": error.reason})
    if good:
        sizes = np.array([image.shape[:2] for image in decoded])
        crops = view.crops(sizes[:, 0], sizes[:, 1], epoch_B[good], sample_B[good])
        for row, image, box in zip(good, decoded, crops.boxes(), strict=True):
            crop_resize(image, *box, out=images_BHWC[row])
        weight_B[good] = 1.0
    return pa.table(
        {
            "index": pa.array([index], pa.int64()),
            "images": pa.array([images_BHWC.data.cast("B")], pa.binary()),
            "sample": pa.array([sample_B.tobytes()], pa.binary()),
            "epoch": pa.array([epoch_B.tobytes()], pa.binary()),
            "label": pa.array([label_B.tobytes()], pa.binary()),
            "weight": pa.array([weight_B.tobytes()], pa.binary()),
            "skipped": pa.array([json.dumps(skipped)], pa.string()),
        }
    )


def read_micro_batches(stream: Stream, indices: range) -> Iterator[pa.Table]:
    """What one reading task yields: a table of one row for each micro-batch.

    A grain's worth of encoded samples is held at a time.
    """
    batches = [stream.cut.micro_batch(stream.plan, i)[1:] for i in indices]
    group = max(1, -(-GRAIN // stream.cut.rows))
    members: dict[int, _Member] = {}
    for first in range(0, len(batches), group):
        wanted = np.concatenate([sample for sample, _ in batches[first : first + group]])
        members = _read_samples(stream.manifest, wanted[wanted != FILLER])
        for index, (sample_B, epoch_B) in zip(
            indices[first : first + group], batches[first : first + group], strict=True
        ):
            yield _micro_batch(stream, index, sample_B, epoch_B, members)


def parse_micro_batch(table: pa.Table, stream: Stream) -> MicroBatch:
    """A task's table as a micro-batch, without copying."""
    view, rows = stream.view, stream.cut.rows

    def array(name: str, dtype: Any) -> np.ndarray:
        return np.frombuffer(table.column(name)[0].as_buffer(), dtype)

    return MicroBatch(
        index=table.column("index")[0].as_py(),
        images_BHWC=array("images", np.uint8).reshape(rows, *view.image_size, view.channels),
        sample_B=array("sample", np.int64),
        epoch_B=array("epoch", np.int64),
        label_B=array("label", np.int64),
        weight_B=array("weight", np.float32),
        skipped=json.loads(table.column("skipped")[0].as_py()),
    )


def read_images(stream: Stream, index: int) -> MicroBatch:
    """Reads one micro-batch here and now, without Ray."""
    return parse_micro_batch(next(read_micro_batches(stream, range(index, index + 1))), stream)
