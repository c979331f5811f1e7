"""Writing the shards of a plan: the tar, its index, and the order in which they take their names."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from mae_core.images import ImageError, decode
from mae_core.mask_images import IGNORE, check_mask_size, decode_mask, num_mask_classes
from pipelines.data.index import MASK_EXTENSION, NO_MASK, encode_index, index_name, index_of
from pipelines.data.packing import HEADER_BYTES, PackingOptions, ShardPlan, member_bytes
from pipelines.data.sources import Source, image_extension, image_kind, read_images
from pipelines.errors import UserError
from pipelines.storage import Store


@dataclass(frozen=True)
class _Encoded:
    """What a shard holds for an image.

    Attributes:
        data: Its bytes.
        extension: Of its member.
        reason: Why it is left out, if it is.
        mask: The bytes of its mask; empty where it has none.
        mask_classes: The mask's highest class, and 1.
    """

    data: bytes
    extension: str
    reason: str = ""
    mask: bytes = b""
    mask_classes: int = 0


def write_shards(
    shards: Sequence[ShardPlan], source: Source, options: PackingOptions, store: Store
) -> Iterator[tuple[int, int]]:
    """Writes shards, each with its index; a shard has its name only when both are whole.

    Yields:
        Images and bytes read since the last time, after each image.

    Raises:
        UserError: The source cannot be read.
        OSError: The output cannot be written.
    """
    if not source.streamed:
        for shard in shards:
            with _open_shard(shard, store) as file:
                for position, data in read_images(source, shard.paths, shard.sizes_S, shard.wheres_S):
                    file.add(position, _encode(shard, position, data, options))
                    yield 1, len(data)
        return
    # One pass over the archive, and then each shard in its own order.
    held: dict[tuple[int, int], _Encoded] = {}
    owners = [(n, position) for n, shard in enumerate(shards) for position in range(len(shard.keys))]
    paths = [path for shard in shards for path in shard.paths]
    sizes_S = np.concatenate([shard.sizes_S for shard in shards])
    wheres_S = np.concatenate([shard.wheres_S for shard in shards])
    for position, data in read_images(source, paths, sizes_S, wheres_S):
        owner, place = owners[position]
        held[owner, place] = _encode(shards[owner], place, data, options)
        yield 1, len(data)
    for n, shard in enumerate(shards):
        with _open_shard(shard, store) as file:
            for position in range(len(shard.keys)):
                file.add(position, held.pop((n, position)))


def _encode(shard: ShardPlan, position: int, data: bytes, options: PackingOptions) -> _Encoded:
    """What a shard holds for the image at a position of the plan.

    Raises:
        UserError: Its mask is none, or is of another size.
    """
    extension = image_extension(shard.paths[position]) or image_kind(data)
    assert extension is not None, shard.paths[position]
    if not options.resize and not shard.masks:
        return _Encoded(data, extension)
    try:
        pixels_HWC = decode(data)
    except ImageError as error:
        return _Encoded(data, extension, str(error))
    height, width = pixels_HWC.shape[:2]
    mask, mask_HW = _read_mask(shard.masks[position], height, width, options.mask_255) if shard.masks else (b"", None)
    shorter = min(height, width)
    if 0 < options.resize < shorter:
        size = (round(width * options.resize / shorter), round(height * options.resize / shorter))
        out = io.BytesIO()
        image = Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC)
        image.save(out, "JPEG", quality=options.quality)
        data, extension = out.getvalue(), "jpg"
        if mask_HW is not None:
            mask = _png(Image.fromarray(mask_HW).resize(size, Image.Resampling.NEAREST))
    return _Encoded(data, extension, "", mask, 0 if mask_HW is None else num_mask_classes(mask_HW))


def _read_mask(path: str, height: int, width: int, mask_255: int) -> tuple[bytes, np.ndarray]:
    data = Path(path).read_bytes()
    try:
        mask_HW = decode_mask(data)
        check_mask_size(mask_HW, height, width)
    except ValueError as error:
        raise UserError(f"mask '{path}': {error}") from None
    if mask_255 != IGNORE:
        mask_HW = np.where(mask_HW == IGNORE, np.uint8(mask_255), mask_HW)
        data = _png(Image.fromarray(mask_HW))
    return data, mask_HW


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class _HashingFile:
    """A file that knows the digest of what was written to it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def abandon(self) -> None:
        """Forgets the file: a tar stream that is dropped writes its last block, wherever it can."""
        self._file = io.BytesIO()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


class _ShardFile:
    """A shard that is being written, and the index that grows with it."""

    def __init__(self, shard: ShardPlan, file: BinaryIO):
        # Not at the top: it imports PyTorch, for which a mistyped flag should not wait.
        from webdataset.writer import TarWriter

        self._shard = shard
        self._file = _HashingFile(file)
        # Fixed times and owners, or the same images would give other bytes tomorrow.
        self._tar = TarWriter(cast(BinaryIO, self._file), user="", group="", mode=0o444, mtime=0, encoder=False)
        self._rows: list[tuple[str, str, int, int, int, int, int]] = []
        self._mask_classes = 0
        self._skipped: list[dict[str, str]] = []

    def add(self, position: int, image: _Encoded) -> None:
        """Writes the sample at a position of the plan, or notes why it is left out."""
        key, label = self._shard.keys[position], int(self._shard.labels_S[position])
        if image.reason:
            self._skipped.append({"key": key, "source": self._shard.paths[position], "reason": image.reason})
            return
        sample: dict[str, Any] = {image.extension: image.data}
        if label >= 0:
            sample["cls"] = str(label).encode()
        if image.mask:
            sample[MASK_EXTENSION] = image.mask
        offset = self._tar.tarstream.offset
        where: dict[str, tuple[int, int]] = {MASK_EXTENSION: NO_MASK}
        for name in sorted(sample):  # the order in which TarWriter writes them
            where[name] = offset + HEADER_BYTES, len(sample[name])
            offset += member_bytes(len(sample[name]))
        self._rows.append((key, image.extension, *where[image.extension], label, *where[MASK_EXTENSION]))
        self._mask_classes = max(self._mask_classes, image.mask_classes)
        self._tar.write({"__key__": key, **sample})
        self._tar.tarstream.members.clear()  # type: ignore[attr-defined]  # else it keeps a kilobyte a member
        assert self._tar.tarstream.offset == offset, (key, offset)

    def abandon(self) -> None:
        """Lets go of the file, which is about to be deleted."""
        self._file.abandon()

    def finish(self) -> bytes:
        """Ends the tar; returns the content of its index file."""
        self._tar.close()
        return encode_index(
            index_of(self._rows),
            tar_bytes=self._file.num_bytes,
            tar_sha256=self._file.sha256.hexdigest(),
            skipped=self._skipped,
            mask_classes=self._mask_classes,
        )


@contextmanager
def _open_shard(shard: ShardPlan, store: Store) -> Iterator[_ShardFile]:
    with store.open_output(shard.name) as file:
        writer = _ShardFile(shard, file)
        try:
            yield writer
            content = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        # The index takes its name first: a shard that has its own name has both.
        store.write(index_name(shard.name), content)
