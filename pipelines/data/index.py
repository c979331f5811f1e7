"""The index beside a shard: where each image lies in the tar, so that it is read without reading the rest.

Beside ``NAME.tar`` lies ``NAME.index.arrow``: an Arrow IPC file, uncompressed, so that it is used where it lies,
with a row for each sample in the tar's order:

| column      | type   | what                                                                          |
|-------------|--------|-------------------------------------------------------------------------------|
| key         | string | the members' name up to the first dot of its last part                        |
| extension   | string | the image member's, in lower case                                             |
| offset      | int64  | where the image's bytes begin in the tar                                      |
| size        | int64  | how many they are                                                             |
| label       | int64  | the content of the ``.cls`` member, -1 where there is none                    |
| mask_offset | int64  | where the bytes of the ``.mask.png`` member begin, -1 where there is none     |
| mask_size   | int64  | how many they are, 0 where there is none                                      |

The last two are there only where a sample of the shard has a mask.

Its schema metadata tells which tar it was made of: ``tar_bytes``, ``tar_sha256``; ``skipped``, a JSON list
of the images that packing left out; and ``mask_classes``, where packing has read the masks: their highest class, and 1.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pipelines.data.sources import image_extension, walk_tar
from pipelines.errors import UserError
from pipelines.reading import DEFAULT_POLICY, ReadPolicy, retried
from pipelines.storage import Store

NO_LABEL = -1
NO_MASK: tuple[int, int] = (-1, 0)  # offset and size
MASK_EXTENSION = "mask.png"
WRITE_HINT = "run python -m pipelines.check_shards DIR --write to make it"


class _Strings(Sequence[str]):
    """A column of strings that stays in Arrow's memory until an item is asked for."""

    def __init__(self, column: pa.Array):
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return self._column[position].to_pylist()
        return self._column[int(position)].as_py()


@dataclass(frozen=True)
class ShardIndex:
    """Where the images of a shard lie, sample by sample in the tar's order.

    Attributes:
        offset_S: int64, where the image's bytes begin in the tar.
        size_S: int64, how many they are.
        label_S: int64, -1 where there is none.
        mask_offset_S: int64, where the mask's bytes begin in the tar, -1 where there is none.
        mask_size_S: int64, how many they are, 0 where there is none.
        keys: The samples' keys.
        extensions: The images' extensions, in lower case.
    """

    offset_S: np.ndarray
    size_S: np.ndarray
    label_S: np.ndarray
    mask_offset_S: np.ndarray
    mask_size_S: np.ndarray
    keys: Sequence[str]
    extensions: Sequence[str]

    def __len__(self) -> int:
        return len(self.offset_S)


def index_name(shard_name: str) -> str:
    """The name of the index beside a shard."""
    return f"{shard_name.removesuffix('.tar')}.index.arrow"


def encode_index(
    index: ShardIndex, *, tar_bytes: int, tar_sha256: str, skipped: Sequence[dict] = (), mask_classes: int = 0
) -> bytes:
    """The index file's content: the same bytes for the same index."""
    facts = {"tar_bytes": str(tar_bytes), "tar_sha256": tar_sha256, "skipped": json.dumps(list(skipped))}
    if mask_classes:
        facts["mask_classes"] = str(mask_classes)
    columns = {
        "key": pa.array(list(index.keys), pa.string()),
        "extension": pa.array(list(index.extensions), pa.string()),
        "offset": pa.array(index.offset_S, pa.int64()),
        "size": pa.array(index.size_S, pa.int64()),
        "label": pa.array(index.label_S, pa.int64()),
    }
    if index.mask_size_S.any():
        columns["mask_offset"] = pa.array(index.mask_offset_S, pa.int64())
        columns["mask_size"] = pa.array(index.mask_size_S, pa.int64())
    batch = pa.record_batch(columns)
    batch = batch.replace_schema_metadata(facts)
    out = io.BytesIO()
    with pa.ipc.new_file(out, batch.schema) as writer:
        writer.write_batch(batch)
    return out.getvalue()


def read_index(store: Store, shard_name: str, policy: ReadPolicy = DEFAULT_POLICY) -> tuple[ShardIndex, dict[str, str]]:
    """Reads the index of a shard, and the facts about the tar that it was made of.

    Raises:
        UserError: There is none, or it is damaged, or (``ReadError``) the store does not give it.
    """
    name = index_name(shard_name)
    try:
        if store.is_local:
            path = str(store.local(name))
            source = retried(lambda: pa.memory_map(path), path, policy)
        else:
            source = pa.BufferReader(store.read(name, policy=policy))
        batch = pa.ipc.open_file(source).get_batch(0)
        keys, extensions = batch.column("key"), batch.column("extension")
        offset, size, label = (batch.column(field).to_numpy() for field in ("offset", "size", "label"))
        # A view of one number: most shards have no masks, and older indexes knew none.
        mask_offset, mask_size = (np.broadcast_to(np.int64(none), len(offset)) for none in NO_MASK)
        if "mask_offset" in batch.schema.names:
            mask_offset, mask_size = (batch.column(field).to_numpy() for field in ("mask_offset", "mask_size"))
    except FileNotFoundError:
        raise UserError(f"shard {store.shown(shard_name)} has no index {name}: {WRITE_HINT}") from None
    except (pa.ArrowInvalid, KeyError, IndexError) as error:
        raise UserError(f"{store.shown(name)} is no index of a shard ({error}): {WRITE_HINT} anew") from None
    index = ShardIndex(offset, size, label, mask_offset, mask_size, _Strings(keys), _Strings(extensions))
    facts = {key.decode(): value.decode() for key, value in (batch.schema.metadata or {}).items()}
    return index, facts


def index_tar(file: BinaryIO) -> ShardIndex:
    """Makes the index of a tar by reading its headers, also of one that others made.

    A key is a member's name up to the first dot of its last part; members of one key that follow one another
    are a sample, as webdataset has it. Its image is the first member whose whole extension is an image's;
    samples without one do not count. Its mask is the member whose extension is ``mask.png``.

    Args:
        file: The tar, seekable, at its beginning.

    Raises:
        ValueError: It is no tar, it is damaged or cut (with the byte), or it holds no image.
    """
    rows: list[list[Any]] = []
    image: list[Any] = []  # of the sample at hand: empty before its image has come
    key, label, mask, dotted = None, NO_LABEL, NO_MASK, ""
    try:
        for _, member, archive in walk_tar(file):
            if not member.isreg():
                continue
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            if (folder, stem) != key:
                _add_sample(rows, image, label, mask)
                key, label, mask, image = (folder, stem), NO_LABEL, NO_MASK, []
            known = image_extension(f"x.{extension}") if "." not in extension else None
            if extension == "cls":
                content = archive.extractfile(member)
                label = _parse_label(content.read() if content else b"", member.name)
            elif extension.lower() == MASK_EXTENSION and member.size:
                mask = member.offset_data, member.size
            elif known and stem and not image:
                name = f"{folder}/{stem}" if folder else stem
                image = [name, extension.lower(), member.offset_data, member.size]
            elif not known and image_extension(base):
                dotted = member.name
    except tarfile.ReadError as error:
        raise ValueError(f"it is no tar ({error})") from None
    except (EOFError, tarfile.TarError) as error:
        raise ValueError(f"it is truncated or damaged ({error})") from None
    _add_sample(rows, image, label, mask)
    if not rows:
        hint = f"; '{dotted}' has dots before its extension: the key ends at the first" if dotted else ""
        raise ValueError(f"it holds no image{hint}")
    return index_of(rows)


def index_of(rows: Sequence[Sequence[Any]]) -> ShardIndex:
    """The index with these rows: key, extension, and offset, size, label, mask's offset and size."""
    keys, extensions, *columns = zip(*rows, strict=True) if rows else [()] * 7
    numbers = [np.array(column, np.int64) for column in columns]
    return ShardIndex(*numbers, keys=keys, extensions=extensions)


def _add_sample(rows: list[list[Any]], image: list[Any], label: int, mask: tuple[int, int]) -> None:
    if image:
        rows.append([*image, label, *mask])


def _parse_label(text: bytes, name: str) -> int:
    try:
        label = int(text)
    except ValueError:
        label = NO_LABEL
    if not 0 <= label < 1 << 63:
        raise ValueError(f"'{name}' holds {text[:40]!r}: a label is a whole number from 0 on")
    return label
