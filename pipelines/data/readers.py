"""From byte ranges of shards to ready micro-batches: what one reading task does. Knows no Ray."""

import functools
import itertools
import json
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mae_core.augment import AUGMENTS, auto_augment
from mae_core.images import Crops, ImageError, center_crops, crop_resize, decode
from mae_core.mask_images import IGNORE, check_mask_size, crop_mask, decode_mask
from pipelines.data.layout import Layout, make_layout
from pipelines.data.plan import FILLER, GRAIN, Cut, Plan
from pipelines.data.shards import Manifest, load_index
from pipelines.errors import UserError
from pipelines.reading import DEFAULT_POLICY, ReadPolicy, read_range
from pipelines.storage import Store

GRAINS_AHEAD = 2  # being read while another is decoded
LOCAL_THREADS = 2
_LONGEST_GAP = 8  # samples that are read for nothing between two that are wanted
_SPARE: list[np.ndarray] = []  # pixels' memory that an earlier task of this process has left
REMOTE_THREADS = 8  # a grain's ranges at once: a store's answers take their time


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
        auto_augment: RandAugment after a random crop, in timm's words; empty: none.
        masks: Also read the samples' segmentation masks, under the crops of their images.
        augment: How the crops are drawn and what else is done, by its name in ``AUGMENTS``; not with the central crop.
    """

    image_size: tuple[int, int]
    channels: int
    seed: int = 0
    crop_scale: tuple[float, float] | None = None
    flip: bool = False
    crop_share: float = 0.875
    auto_augment: str = ""
    masks: bool = False
    augment: str = "random_crop"

    def crops(
        self, height_B: np.ndarray, width_B: np.ndarray, epoch_B: np.ndarray, sample_B: np.ndarray, repeat: int
    ) -> Crops:
        """The crop of each image of a block."""
        if self.crop_scale is None:
            return center_crops(height_B, width_B, out_size=self.image_size, share=self.crop_share)
        return AUGMENTS[self.augment].crops(
            height_B,
            width_B,
            out_size=self.image_size,
            seed=self.seed,
            epoch_B=epoch_B,
            sample_B=sample_B,
            repeat_B=repeat,
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
        policy: How long a store may fail before the run does.
    """

    manifest: Manifest
    plan: Plan
    cut: Cut
    view: View
    policy: ReadPolicy = DEFAULT_POLICY

    @functools.cached_property
    def layout(self) -> Layout:
        """The blocks and tasks that carry it."""
        height, width = self.view.image_size
        return make_layout(
            self.cut,
            encoded_bytes=sum(self.manifest.shard_bytes) / self.manifest.num_samples,
            pixel_bytes=height * width * (self.view.channels + self.view.masks) * self.cut.repeats,
        )


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as a worker receives it; rows with weight 0 are filler or could not be read.

    Args:
        index: Its number, counted through all steps.
        repeat: Which view of its samples it holds.
        images_BHWC: uint8, read-only.
        sample_B: int64 sample ids, ``FILLER`` for filler.
        epoch_B: int64.
        label_B: int64, -1 where there is none.
        weight_B: float32, 1 or 0.
        skipped: Samples that could not be read: dictionaries of shard, key, reason.
        mask_BHW: uint8 classes, read-only, 255 where nothing counts: also for what has no mask or weight 0; None where
            the view asks for no masks.
    """

    index: int
    repeat: int
    images_BHWC: np.ndarray
    sample_B: np.ndarray
    epoch_B: np.ndarray
    label_B: np.ndarray
    weight_B: np.ndarray
    skipped: list[dict[str, str]]
    mask_BHW: np.ndarray | None = None


# Encoded sample, label, its place in the shard, and its encoded mask, empty where there is none or it is not asked for.
_Member = tuple[memoryview, int, int, memoryview]
_NOTHING = memoryview(b"")


def locate(manifest: Manifest, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shard numbers and places within the shards of sample ids."""
    shard = np.searchsorted(manifest.starts, sample, side="right") - 1
    return shard, sample - manifest.starts[shard]


def _read_piece(stream: Stream, shard: int, sample: np.ndarray, place: np.ndarray) -> dict[int, _Member]:
    """Reads neighbouring samples of one shard in one piece."""
    manifest = stream.manifest
    index = load_index(manifest, shard, stream.policy)
    offset, size = index.offset_S[place], index.size_S[place]
    start, stop = int(offset.min()), int((offset + size).max())
    mask_size = mask_offset = None
    if stream.view.masks:
        mask_size = index.mask_size_S[place]
        mask_offset = np.where(mask_size > 0, index.mask_offset_S[place], offset)
        start, stop = min(start, int(mask_offset.min())), max(stop, int((mask_offset + mask_size).max()))
    name = manifest.shard_names[shard]
    data = memoryview(read_range(Store(manifest.location), name, start, stop - start, stream.policy))
    columns = (sample, offset - start, size, index.label_S[place], place)
    members: dict[int, _Member] = {
        id_: (data[first : first + length], label, at, _NOTHING)
        for id_, first, length, label, at in zip(*(column.tolist() for column in columns), strict=True)
    }
    if mask_size is not None and mask_offset is not None:
        for id_, first, length in zip(sample.tolist(), (mask_offset - start).tolist(), mask_size.tolist(), strict=True):
            members[id_] = (*members[id_][:3], data[first : first + length])
    return members


def _pieces(manifest: Manifest, sample: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Cuts samples into what is read at once: shard, sample ids, and places in the shard."""
    sample = np.unique(sample)
    shard, place = locate(manifest, sample)
    # A new read begins in another shard, and after a gap that would be dearer to read than another request.
    breaks = np.flatnonzero((np.diff(shard) != 0) | (np.diff(place) > _LONGEST_GAP)) + 1
    for part in np.split(np.arange(len(sample)), breaks):
        if len(part):
            yield int(shard[part[0]]), sample[part], place[part]


class _Grains:
    """The encoded samples of a task, read grain by grain, ahead of the decoder.

    Args:
        stream: What to read.
        positions: First position, and the one after the last, of each micro-batch in the order of its use.
        pool: Threads that read.
    """

    def __init__(self, stream: Stream, positions: list[tuple[int, int]], pool: ThreadPoolExecutor):
        self._stream, self._pool = stream, pool
        self._uses = [range(start // GRAIN, -(-stop // GRAIN) if stop > start else 0) for start, stop in positions]
        wanted: dict[int, list[np.ndarray]] = {}
        for (start, stop), grains in zip(positions, self._uses, strict=True):
            position = np.arange(start, stop)
            for grain in grains:
                wanted.setdefault(grain, []).append(position[position // GRAIN == grain])
        self._wanted = {grain: np.concatenate(parts) for grain, parts in wanted.items()}
        self._last_use = {grain: use for use, grains in enumerate(self._uses) for grain in grains}
        self._waiting = list(self._wanted)
        self._reading: dict[int, list[Future[dict[int, _Member]]]] = {}
        self._members: dict[int, dict[int, _Member]] = {}

    def members(self, use: int) -> dict[int, _Member]:
        """The samples of the micro-batch that is used ``use``-th; before it is asked for, reading goes on."""
        found: dict[int, _Member] = {}
        for grain in self._uses[use]:
            while grain not in self._members:
                self._read_on()
                self._finish_one()
            found |= self._members[grain]
        for grain in [g for g in self._members if self._last_use[g] <= use]:
            del self._members[grain]
        self._read_on()
        return found

    def _read_on(self) -> None:
        while self._waiting and len(self._reading) < GRAINS_AHEAD:
            grain = self._waiting.pop(0)
            plan, position = self._stream.plan, self._wanted[grain]
            start, stop = int(position.min()), int(position.max()) + 1
            sample = plan.samples(start, stop)[0][position - start]
            self._reading[grain] = [
                self._pool.submit(_read_piece, self._stream, *piece) for piece in _pieces(self._stream.manifest, sample)
            ]

    def _finish_one(self) -> None:
        grain = next(iter(self._reading))
        members: dict[int, _Member] = {}
        for piece in self._reading.pop(grain):
            members |= piece.result()
        self._members[grain] = members


def _fixed(array: np.ndarray) -> pa.Array:
    """An array as one row of Arrow's binary of fixed size, without copying."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(array.nbytes), 1, [None, pa.py_buffer(array)])


def _block(stream: Stream, views: list[list[int]], members: Iterator[dict[int, _Member]], room: np.ndarray) -> pa.Table:
    """A block: one row with all its micro-batches, the views of the same samples one after the other.

    One row, because Ray Data cuts a block of several where it likes. Its pixels lie in ``room``.
    """
    indices = [index for same in views for index in same]
    num, rows = len(indices), stream.cut.rows
    height, width = stream.view.image_size
    # K micro-batches of the block
    shape = (num, rows, height, width, stream.view.channels)
    images_KBHWC = room[: math.prod(shape)].reshape(shape)
    sample_KB = np.empty((num, rows), np.int64)
    epoch_KB = np.empty((num, rows), np.int64)
    label_KB = np.full((num, rows), -1, np.int64)
    weight_KB = np.zeros((num, rows), np.float32)
    masks_KBHW = np.full((num, rows, height, width), IGNORE, np.uint8) if stream.view.masks else None
    skipped: list[list[dict[str, str]]] = []
    k = 0
    for same, found in zip(views, members, strict=True):
        own = slice(k, k + len(same))
        for row, index in enumerate(same, start=k):
            _, sample_KB[row], epoch_KB[row] = stream.cut.micro_batch(stream.plan, index)
        bad = _decode_views(
            stream,
            same,
            found,
            images_KBHWC[own],
            None if masks_KBHW is None else masks_KBHW[own],
            sample_KB[own],
            epoch_KB[own],
            label_KB[own],
            weight_KB[own],
        )
        # Said once, however many views there are.
        skipped += [bad if view == 0 else [] for view in range(len(same))]
        k += len(same)
    images_KBHWC[weight_KB == 0] = 0
    columns = {
        "index": _fixed(np.array(indices, np.int64)),
        "images": _fixed(images_KBHWC),
        "sample": _fixed(sample_KB),
        "epoch": _fixed(epoch_KB),
        "label": _fixed(label_KB),
        "weight": _fixed(weight_KB),
        "skipped": pa.array([json.dumps(skipped)], pa.string()),
    }
    if masks_KBHW is not None:
        columns["masks"] = _fixed(masks_KBHW)
    return pa.table(columns)


def _decode_views(
    stream: Stream,
    indices: list[int],
    members: dict[int, _Member],
    images_RBHWC: np.ndarray,
    masks_RBHW: np.ndarray | None,
    sample_RB: np.ndarray,
    epoch_RB: np.ndarray,
    label_RB: np.ndarray,
    weight_RB: np.ndarray,
) -> list[dict[str, str]]:
    """Decodes samples once and cuts all their views; returns those that could not be read.

    Raises:
        UserError: A mask is none, or is of another size than its image.
    """
    view = stream.view
    decoded: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    good: list[int] = []
    skipped: list[dict[str, str]] = []
    # A later view may be filler where an earlier one is not.
    for row, sample in enumerate(sample_RB[0].tolist()):
        if sample == FILLER:
            continue
        data, label_RB[:, row], place, mask = members[sample]
        try:
            image_HWC = decode(data, view.channels)
            if masks_RBHW is not None:
                masks.append(_decode_mask(stream, sample, place, mask, image_HWC))
            decoded.append(image_HWC)
            good.append(row)
        except ImageError as error:
            shard, key = _named(stream, sample, place)
            skipped.append({"shard": shard, "key": key, "reason": error.reason})
    if not good:
        return skipped
    sizes = np.array([image.shape[:2] for image in decoded])
    change_pixels = AUGMENTS[view.augment].pixels
    for r, index in enumerate(indices):
        crops = view.crops(sizes[:, 0], sizes[:, 1], epoch_RB[r, good], sample_RB[r, good], stream.cut.repeat(index))
        real = (sample_RB[r, good] != FILLER).tolist()
        for number, (row, image, box, is_real) in enumerate(zip(good, decoded, crops.boxes(), real, strict=True)):
            if is_real:
                crop_resize(image, *box, out=images_RBHWC[r, row])
                if masks_RBHW is not None:
                    crop_mask(masks[number], *box, out=masks_RBHW[r, row])
                if view.auto_augment or change_pixels:
                    key = view.seed, int(epoch_RB[r, row]), int(sample_RB[r, row])
                    if view.auto_augment:
                        auto_augment(images_RBHWC[r, row], view.auto_augment, key)
                    if change_pixels:
                        change_pixels(images_RBHWC[r, row], (*key, stream.cut.repeat(index)))
                weight_RB[r, row] = 1.0
    label_RB[sample_RB == FILLER] = -1
    return skipped


def _named(stream: Stream, sample: int, place: int) -> tuple[str, str]:
    """A sample's shard and key."""
    shard = int(locate(stream.manifest, np.array([sample]))[0][0])
    return stream.manifest.shard_names[shard], load_index(stream.manifest, shard, stream.policy).keys[place]


def _decode_mask(stream: Stream, sample: int, place: int, data: memoryview, image_HWC: np.ndarray) -> np.ndarray:
    """The mask of an image [H, W]; where it has none, nothing of it counts."""
    height, width, _ = image_HWC.shape
    if not data:
        return np.full((height, width), IGNORE, np.uint8)
    try:
        mask_HW = decode_mask(bytes(data))
        check_mask_size(mask_HW, height, width)
    except ImageError:
        raise
    except ValueError as error:
        shard, key = _named(stream, sample, place)
        raise UserError(f"{shard}: the mask of {key}: {error}") from None
    return mask_HW


def read_blocks(stream: Stream, blocks: list[list[list[int]]]) -> Iterator[pa.Table]:
    """What one reading task yields.

    Some grains' worth of encoded samples is held at a time, read while others are decoded. All blocks have their
    pixels in the same memory, so each must be done with before the next is asked for, as Ray does, which copies it
    into its object store. New memory for each would cost some 5 % of the time: the kernel clears it first. A task that
    has been read to its end leaves it to the next one in the same process.

    Args:
        stream: What to read.
        blocks: For each block, for each of its turns, the indices of the micro-batches that hold the same samples.
    """
    positions = [_real(stream, same[0]) for views in blocks for same in views]
    threads = LOCAL_THREADS if Store(stream.manifest.location).is_local else REMOTE_THREADS
    pool = ThreadPoolExecutor(threads)
    try:
        grains = _Grains(stream, positions, pool)
        members = map(grains.members, range(len(positions)))
        height, width = stream.view.image_size
        most = max(sum(map(len, views)) for views in blocks)
        size = most * stream.cut.rows * height * width * stream.view.channels
        room = _SPARE.pop() if _SPARE else np.empty(0, np.uint8)
        if len(room) < size:
            room = np.empty(size, np.uint8)
        for views in blocks:
            yield _block(stream, views, itertools.islice(members, len(views)), room)
        # Only now: who has asked for no more may still look at what was given last.
        _SPARE[:] = [room]
    finally:
        # What else is being read from a store that is gone would wait for its own deadline, one piece after the other.
        pool.shutdown(wait=False, cancel_futures=True)


def _real(stream: Stream, index: int) -> tuple[int, int]:
    """The positions of a micro-batch that are no filler: it comes last. Later views have no more of them."""
    start, _ = stream.cut.positions(index)
    _, sample_B, _ = stream.cut.micro_batch(stream.plan, index)
    return start, start + int((sample_B != FILLER).sum())


def parse_block(table: pa.Table, stream: Stream) -> list[MicroBatch]:
    """A block's micro-batches, without copying."""
    assert table.num_rows == 1, f"{table.num_rows} blocks arrived as one: Ray Data merged them"
    rows, view = stream.cut.rows, stream.view

    def array(name: str, dtype: Any) -> np.ndarray:
        # Of the buffer, not of the row: Arrow's scalar would be a copy.
        column = table.column(name).chunk(0)
        buffer = column.buffers()[1]
        assert buffer is not None
        return np.frombuffer(
            buffer, dtype, column.type.byte_width // np.dtype(dtype).itemsize, column.offset * column.type.byte_width
        )

    indices = array("index", np.int64).tolist()
    images_KBHWC = array("images", np.uint8).reshape(-1, rows, *view.image_size, view.channels)
    sample_KB, epoch_KB, label_KB = (array(name, np.int64).reshape(-1, rows) for name in ("sample", "epoch", "label"))
    weight_KB = array("weight", np.float32).reshape(-1, rows)
    masks_KBHW = array("masks", np.uint8).reshape(-1, rows, *view.image_size) if view.masks else None
    skipped = json.loads(table.column("skipped")[0].as_py())
    return [
        MicroBatch(
            index=index,
            repeat=stream.cut.repeat(index),
            images_BHWC=images_KBHWC[k],
            sample_B=sample_KB[k],
            epoch_B=epoch_KB[k],
            label_B=label_KB[k],
            weight_B=weight_KB[k],
            skipped=skipped[k],
            mask_BHW=None if masks_KBHW is None else masks_KBHW[k],
        )
        for k, index in enumerate(indices)
    ]


def read_images(stream: Stream, index: int) -> MicroBatch:
    """Reads one micro-batch here and now, without Ray."""
    return parse_block(next(read_blocks(stream, [[[index]]])), stream)[0]
