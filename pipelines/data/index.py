"""The index beside a shard: where each image lies in the tar, so that it is read without reading the rest.

Beside ``NAME.tar`` lies ``NAME.index.arrow``: an Arrow IPC file, uncompressed, so that it is used where it lies,
with a row for each sample in the tar's order:

| column      | type   | what                                                                          |
|-------------|--------|-------------------------------------------------------------------------------|
| key         | string | the members' name before its extension                                        |
| extension   | string | the image member's, in lower case                                             |
| offset      | int64  | where the image's bytes begin in the tar                                      |
| size        | int64  | how many they are                                                             |
| label       | int64  | the content of the ``.cls`` member, -1 where there is none                    |
| mask_offset | int64  | where the bytes of the ``.mask.png`` member begin, -1 where there is none     |
| mask_size   | int64  | how many they are, 0 where there is none                                      |

The last two are there only where a sample of the shard has a mask.

Its schema metadata tells which tar it was made of: ``tar_bytes``, ``tar_sha256``; ``skipped``, a JSON list
of the images that packing left out; ``mask_classes``, where packing has read the masks: their highest class, and 1;
and ``keys``, where it is not the longest known extension that ends a key.
"""

import io
import json
import os
import posixpath
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa

from pipelines.commands import command_line
from pipelines.data.sources import (
    IMAGE_EXTENSIONS,
    extension_of,
    image_extension,
    is_hidden,
    not_a_file,
    valid_text,
    walk_tar,
)
from pipelines.errors import UserError
from pipelines.reading import DEFAULT_POLICY, ReadPolicy, retried
from pipelines.storage import Store

NO_LABEL = -1
NO_MASK: tuple[int, int] = (-1, 0)  # offset and size
MASK_EXTENSION = "mask.png"
# Where a member's key ends: before the longest extension that is known (``22.05.jpg``: key 22.05), or as webdataset has
# it at the first dot of the name's last part (key 22, extension 05.jpg).
KeyRule = Literal["longest", "first-dot"]
# Why members are left out: how many, and the first names.
LeftOut = dict[str, tuple[int, tuple[str, ...]]]
_NAMES = 3
WRITE_HINT = f"run {command_line('pipelines.check_shards', 'DIR', '--write')} to make it"


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
    index: ShardIndex,
    *,
    tar_bytes: int,
    tar_sha256: str,
    skipped: Sequence[dict] = (),
    mask_classes: int = 0,
    keys: KeyRule = "longest",
) -> bytes:
    """The index file's content: the same bytes for the same index."""
    facts = {"tar_bytes": str(tar_bytes), "tar_sha256": tar_sha256, "skipped": json.dumps(list(skipped))}
    if mask_classes:
        facts["mask_classes"] = str(mask_classes)
    if keys != "longest":
        facts["keys"] = keys
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
            source = retried(lambda: pa.memory_map(os.fsencode(path)), path, policy)
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


@dataclass(frozen=True)
class TarContents:
    """What the members of a tar are: each is a sample, a sample's label or mask, or left out.

    Attributes:
        index: The samples.
        left_out: What is not used, and what is odd, by reason.
        problems: What could give an image another one's label or mask, a line each.
        no_labels: Why the labels cannot be used; empty where they can.
    """

    index: ShardIndex
    left_out: LeftOut
    problems: tuple[str, ...]
    no_labels: str


def index_tar(file: BinaryIO, keys: KeyRule = "longest") -> ShardIndex:
    """The index of a tar, as ``read_tar`` finds it.

    Raises:
        ValueError: It is no tar, it is damaged or cut (with the byte), it holds no image, or there is a problem.
    """
    contents = read_tar(file, keys)
    if contents.problems:
        raise ValueError(contents.problems[0])
    if not len(contents.index):
        raise ValueError(f"it holds no image ({', '.join(contents.left_out) or 'it is empty'})")
    return contents.index


def read_tar(file: BinaryIO, keys: KeyRule = "longest") -> TarContents:
    """Finds the samples of a tar by reading its headers, also of one that others made.

    A sample is an image with the label (``.cls``) and the mask (``.mask.png``) of the same key, wherever in the tar
    they stand; where no image has their key, with those that webdataset would give it: ``a.input.jpg`` with ``a.cls``,
    unless there are several. Beside an image ``a.jpg``, ``a.seg.png`` is no image of its own, and ``a.5.jpg`` is.

    Args:
        file: The tar, seekable, at its beginning.
        keys: Where a member's key ends.

    Raises:
        ValueError: It is no tar, or it is damaged or cut (with the byte).
    """
    found = _Members(keys)
    try:
        for _, member, archive in walk_tar(file):
            if reason := not_a_file(member):
                found.leave_out(reason, member.name)
            elif is_hidden(posixpath.normpath(member.name)):
                found.leave_out("hidden", member.name)
            elif not member.isdir():
                found.add(member, archive)
    except tarfile.ReadError as error:
        raise ValueError(f"it is no tar ({error})") from None
    except (EOFError, tarfile.TarError) as error:
        raise ValueError(f"it is truncated or damaged ({error})") from None
    return found.join()


@dataclass(frozen=True)
class _Image:
    """An image of a tar: its member's name, what of it is the key, the extension, and where the bytes lie."""

    name: str
    key: str
    extension: str
    offset: int
    size: int

    @property
    def stem(self) -> str:
        """The key by webdataset's rule."""
        folder, slash, base = self.name.rpartition("/")
        return folder + slash + base.partition(".")[0]

    @property
    def numbered(self) -> bool:
        """Whether what stands between the first dot and the extension is a number, as in ``22.05.jpg``."""
        return self.name[len(self.stem) : -len(self.extension) - 1].replace(".", "").isdigit()


class _Members:
    """The members of a tar, and how they belong together."""

    def __init__(self, keys: KeyRule):
        self._rule: KeyRule = keys
        self._images: list[_Image] = []
        self._labels: dict[str, list[int]] = defaultdict(list)
        self._masks: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._names: dict[str, list[str]] = defaultdict(list)
        self._counts: Counter[str] = Counter()
        self._problems: list[str] = []
        self._no_labels = ""

    def leave_out(self, reason: str, name: str) -> None:
        self._counts[reason] += 1
        if len(self._names[reason]) < _NAMES:
            self._names[reason].append(valid_text(name))

    def add(self, member: tarfile.TarInfo, archive: tarfile.TarFile) -> None:
        """Notes a file as what its extension says."""
        name = member.name
        key, extension = _split(name, self._rule)
        if extension == "cls":
            content = archive.extractfile(member)
            label = _parse_label(content.read(65) if content else b"")
            if label == NO_LABEL and not self._no_labels:
                content = archive.extractfile(member)
                held = content.read(40) if content else b""
                self._no_labels = f"'{valid_text(name)}' holds {held!r}, and a label is a whole number from 0 on"
            self._labels[key].append(label)
        elif extension == MASK_EXTENSION:
            if member.size:
                self._masks[key].append((member.offset_data, member.size))
            else:
                self.leave_out("empty masks", name)
        elif image_extension(f"x.{extension}"):
            self._images.append(_Image(name, key, extension, member.offset_data, member.size))
        else:
            self.leave_out(extension_of(name), name)

    def join(self) -> TarContents:
        """Brings the members together by their keys."""
        images = self._without_companions()
        by_key = _grouped((image.key, image) for image in images)
        self._adopt("label", self._labels, by_key)
        self._adopt("mask", self._masks, by_key)
        for key, same in by_key.items():
            self._check_repeated(key, same)
        if self._rule == "longest":
            alike = "kept as images of their own, alike up to the first dot"
            for stem, same in _grouped((image.stem, image) for image in images if not image.numbered).items():
                if len({image.key for image in same}) > 1 and stem not in by_key:
                    for image in same:
                        self.leave_out(alike, image.name)
        rows = []
        for image in images:
            labels, masks = self._labels.get(image.key), self._masks.get(image.key)
            if self._labels and not labels:
                self.leave_out("images without a label", image.name)
            # A shard's index names plain extensions.
            rows.append(
                (
                    valid_text(image.key),
                    image.extension.rpartition(".")[2],
                    image.offset,
                    image.size,
                    labels[0] if labels else NO_LABEL,
                    *(masks[0] if masks else NO_MASK),
                )
            )
        left_out = {reason: (count, tuple(self._names[reason])) for reason, count in self._counts.items()}
        return TarContents(index_of(rows), left_out, tuple(self._problems), self._no_labels)

    def _without_companions(self) -> list[_Image]:
        """The images that are samples: not what stands beside another image of its sample."""
        plain = {image.key for image in self._images if image.stem == image.key and "." not in image.extension}
        first: dict[str, str] = {}
        images = []
        for image in self._images:
            rest = image.name[len(image.stem) + 1 :]
            own = self._rule == "longest" and (image.numbered or image.key in self._labels)
            dotted = "." in rest and image.stem in plain and not own
            if dotted or ("." not in image.extension and first.get(image.key, image.extension) != image.extension):
                self.leave_out(f"beside their image (.{valid_text(rest.lower())})", image.name)
            else:
                first.setdefault(image.key, image.extension)
                images.append(image)
        return images

    def _adopt(self, what: str, theirs: dict[str, list[Any]], by_key: Mapping[str, list[_Image]]) -> None:
        """Gives labels or masks whose key no image has to the image that webdataset's rule would give them."""
        lonely = [key for key in theirs if key not in by_key]
        if not lonely:
            return
        by_stem = _grouped((image.stem, image) for same in by_key.values() for image in same)
        for key in lonely:
            member = f"{key}.{'cls' if what == 'label' else MASK_EXTENSION}"
            near = [image for image in by_stem.get(key, []) if image.key not in theirs]
            if len(near) == 1:
                theirs[near[0].key] = theirs.pop(key)
            elif near:
                names = " and ".join(f"'{valid_text(image.name)}'" for image in near[:2])
                self._problems.append(
                    f"the {what} '{valid_text(member)}' may be of {names}: give each image a {what} of its own key"
                )
            else:
                self.leave_out(f"{what}s without an image", member)

    def _check_repeated(self, key: str, same: list[_Image]) -> None:
        """Names a key whose images, labels and masks do not say which belong together."""
        labels, masks = self._labels.get(key, []), self._masks.get(key, [])
        if len(same) == 1 and len(set(labels)) <= 1 and len(masks) <= 1:
            return
        shown = f"the key '{valid_text(key)}'"
        if len({image.name for image in same}) > 1 and self._rule == "first-dot":
            self._problems.append(
                f"{shown} has {len(same)} images ('{valid_text(same[0].name)}', '{valid_text(same[1].name)}'): "
                "--keys longest gives each a key of its own"
            )
        elif len(set(labels)) > 1 or masks:
            comes = ", ".join(
                f"{len(each)} {what}{'s' if len(each) > 1 else ''}"
                for each, what in ((same, "image"), (labels, "label"), (masks, "mask"))
                if each
            )
            named = f" ({', '.join(map(str, labels[:3]))})" if len(set(labels)) > 1 else ""
            self._problems.append(f"{shown} has {comes}{named}: nobody can tell whose is whose; write it once")
        else:
            for image in same[1:]:
                self.leave_out("kept, under a key that has come before", image.name)


def _split(name: str, rule: KeyRule) -> tuple[str, str]:
    """Key and extension of a member, the extension in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if rule == "longest" and "." in extension:
        if base.lower().endswith(f".{MASK_EXTENSION}"):
            stem, extension = base[: -len(MASK_EXTENSION) - 1], MASK_EXTENSION
        elif base.rpartition(".")[2].lower() in ("cls", *IMAGE_EXTENSIONS):
            stem, _, extension = base.rpartition(".")
    return folder + slash + stem, extension.lower()


def _grouped(pairs: Iterable[tuple[str, _Image]]) -> dict[str, list[_Image]]:
    groups: dict[str, list[_Image]] = defaultdict(list)
    for key, image in pairs:
        groups[key].append(image)
    return groups


def add_left_out(parts: Iterable[LeftOut]) -> LeftOut:
    """What several tars leave out together."""
    total: LeftOut = {}
    for part in parts:
        for reason, (count, names) in part.items():
            before, first = total.get(reason, (0, ()))
            total[reason] = before + count, (first + names)[:_NAMES]
    return total


def index_of(rows: Sequence[Sequence[Any]]) -> ShardIndex:
    """The index with these rows: key, extension, and offset, size, label, mask's offset and size."""
    keys, extensions, *columns = zip(*rows, strict=True) if rows else [()] * 7
    numbers = [np.array(column, np.int64) for column in columns]
    return ShardIndex(*numbers, keys=keys, extensions=extensions)


def _parse_label(text: bytes) -> int:
    digits = text.strip() if len(text) <= 64 else b""
    label = int(digits) if digits.isdigit() else NO_LABEL
    return label if label < 1 << 63 else NO_LABEL
