"""Writing the shards of a plan: the tar, its index, and the order in which they take their names."""

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from mae_core.images import decode
from pipelines.data.index import ShardIndex, encode_index, index_name
from pipelines.data.packing import HEADER_BYTES, PackingOptions, ShardPlan, member_bytes
from pipelines.data.sources import Source, image_extension, read_images
from pipelines.storage import Store


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
                    file.add(position, *_encode(shard.paths[position], data, options))
                    yield 1, len(data)
        return
    # One pass over the archive, and then each shard in its own order.
    held: dict[tuple[int, int], tuple[bytes, str, str]] = {}
    owners = [(n, position) for n, shard in enumerate(shards) for position in range(len(shard.keys))]
    paths = [path for shard in shards for path in shard.paths]
    sizes_S = np.concatenate([shard.sizes_S for shard in shards])
    wheres_S = np.concatenate([shard.wheres_S for shard in shards])
    for position, data in read_images(source, paths, sizes_S, wheres_S):
        held[owners[position]] = _encode(paths[position], data, options)
        yield 1, len(data)
    for n, shard in enumerate(shards):
        with _open_shard(shard, store) as file:
            for position in range(len(shard.keys)):
                file.add(position, *held.pop((n, position)))


def _encode(path: str, data: bytes, options: PackingOptions) -> tuple[bytes, str, str]:
    """What a shard holds for an image: its bytes, their extension, and why it is left out, if it is."""
    extension = image_extension(path)
    assert extension is not None, path
    if not options.resize:
        return data, extension, ""
    try:
        pixels_HWC = decode(data)
    except ValueError as error:
        return b"", extension, str(error)
    height, width = pixels_HWC.shape[:2]
    shorter = min(height, width)
    if shorter <= options.resize:
        return data, extension, ""
    size = (round(width * options.resize / shorter), round(height * options.resize / shorter))
    out = io.BytesIO()
    image = Image.fromarray(pixels_HWC).resize(size, Image.Resampling.BICUBIC)
    image.save(out, "JPEG", quality=options.quality)
    return out.getvalue(), "jpg", ""


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
        self._shard = shard
        self._file = _HashingFile(file)
        # Fixed times and owners, or the same images would give other bytes tomorrow.
        self._tar = TarWriter(cast(BinaryIO, self._file), user="", group="", mode=0o444, mtime=0, encoder=False)
        self._rows: list[tuple[str, str, int, int, int]] = []
        self._skipped: list[dict[str, str]] = []

    def add(self, position: int, data: bytes, extension: str, reason: str) -> None:
        """Writes the sample at a position of the plan, or notes why it is left out."""
        key, label = self._shard.keys[position], int(self._shard.labels_S[position])
        if reason:
            self._skipped.append({"key": key, "source": self._shard.paths[position], "reason": reason})
            return
        sample: dict[str, Any] = {extension: data}
        if label >= 0:
            sample["cls"] = str(label).encode()
        offset = self._tar.tarstream.offset
        for name in sorted(sample):  # the order in which TarWriter writes them
            if name == extension:
                self._rows.append((key, extension, offset + HEADER_BYTES, len(data), label))
            offset += member_bytes(len(sample[name]))
        self._tar.write({"__key__": key, **sample})
        self._tar.tarstream.members.clear()  # type: ignore[attr-defined]  # else it keeps a kilobyte a member
        assert self._tar.tarstream.offset == offset, (key, offset)

    def abandon(self) -> None:
        """Lets go of the file, which is about to be deleted."""
        self._file.abandon()

    def finish(self) -> bytes:
        """Ends the tar; returns the content of its index file."""
        self._tar.close()
        keys, extensions, offsets, sizes, labels = zip(*self._rows, strict=True) if self._rows else [()] * 5
        columns = (np.array(column, np.int64) for column in (offsets, sizes, labels))
        index = ShardIndex(*columns, keys=keys, extensions=extensions)
        digest = self._file.sha256.hexdigest()
        return encode_index(index, tar_bytes=self._file.num_bytes, tar_sha256=digest, skipped=self._skipped)


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
